"""What this machine can run, and for each backend every reason why not: `python -m attnbench.doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from attnbench import cli
from attnbench.config import Settings, threads

COMPILERS = ("cc", "gcc", "g++", "clang", "nvcc", "ninja")
PACKAGES = {  # distribution -> what brings it in
    "numpy": "always", "einops": "always", "pydantic": "always", "tyro": "always", "scikit-learn": "always",
    "scikit-image": "always", "safetensors": "always", "xformers": "x86-64 Linux", "triton": "torch's CUDA builds",
    "natten": "extra gpu", "flash-linear-attention": "extra gpu", "ray": "extra ray", "submitit": "extra slurm",
    "datasets": "extra hub", "transformers": "extra peers", "linear-attention-transformer": "extra peers",
    "performer-pytorch": "extra peers", "pytest": "extra test", "hypothesis": "extra test",
}  # fmt: skip
SMALL: dict[str, Any] = {"height": 4, "width": 4, "vocab": 4, "dim": 32, "depth": 4, "heads": 1}
"""The model on which a backend is asked: the reasons hold for the machine, not for a size."""


class DoctorConfig(Settings):
    """What this machine can run, and for each backend every reason why not."""

    variant: str | None = None
    """Ask about this variant's backends only."""


@dataclass(frozen=True)
class Row:
    """One finding: what was looked at, what was found, and whether it serves (None: neither good nor bad)."""

    name: str
    found: str
    good: bool | None = None
    note: str = ""


def machine() -> Iterator[Row]:
    """Python, system, cores, threads and memory."""
    yield Row("Python", f"{platform.python_version()} ({sys.executable})", sys.version_info >= (3, 11))
    yield Row("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Row("cores", str(os.cpu_count()), note=f"a run uses {threads()} threads; OMP_NUM_THREADS changes that")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Row("memory", f"{size / 2**30:.1f} GiB")


def torch_rows() -> Iterator[Row]:
    """torch, its build, and every CUDA device."""
    try:
        import torch
    except Exception as error:  # a broken installation is what a doctor is for
        yield Row("torch", "cannot be imported", False, f"{type(error).__name__}: {error}")
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Row("torch", torch.__version__, True, f"built {built}; {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        reason = "this build has no CUDA" if not torch.version.cuda else "no device or no driver answers"
        yield Row("CUDA", "no", None, reason)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        ability = f"compute {device.major}.{device.minor}, bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        yield Row(f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB", True, ability)


def compilers() -> Iterator[Row]:
    """The compilers that torch.compile and FlexAttention need."""
    for name in COMPILERS:
        path = shutil.which(name)
        yield Row(name, _first_line(path) if path else "not found", bool(path) or None, path or "")


def packages() -> Iterator[Row]:
    """Versions of what attnbench builds on or can use; nothing is imported."""
    for name, origin in PACKAGES.items():
        try:
            yield Row(name, importlib.metadata.version(name), True, origin)
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "not installed", False if origin == "always" else None, origin)


@dataclass(frozen=True)
class Answer:
    """How a variant runs here: the backend that "auto" picks, the others that run, and why the rest do not."""

    picked: str
    others: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


def backends(only: str | None = None) -> dict[Answer, list[str]]:
    """What the backends that each variant has answer here, with the variants of which it is true.

    Raises:
        Refusal: `only` is no variant.
    """
    # Here, not above: --help must not wait for torch.
    import models
    from attnbench import variants

    asked = [variants.find(only)] if only is not None else list(models.VARIANTS.values())
    found: dict[Answer, list[str]] = {}
    for variant in asked:
        found.setdefault(ask(models.build, variant.name, variant.objectives[0]), []).append(variant.name)
    return found


def ask(build: Callable[..., Any], variant: str, objective: str) -> Answer:
    """What the mixers of a small model say of their backends."""
    try:
        model = build(variant, **SMALL, objective=objective)
    except Exception as error:  # whatever it dies of is its reason
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Answer("none", refused=(("auto", reason),))
    mixers = list(getattr(model, "mixers", ()))
    named = dict.fromkeys(name for part in mixers or [model] for name in part.backends)
    reasons = {name: dict.fromkeys(why for mixer in mixers for why in mixer.refusals(name)) for name in named}
    picked = model.backend.split("+")
    return Answer(
        picked=" and ".join(picked),
        others=tuple(name for name, why in reasons.items() if not why and name not in picked),
        refused=tuple((name, "; ".join(why)) for name, why in reasons.items() if why),
    )


def backend_table(found: dict[Answer, list[str]]) -> Table:
    """A row for all variants with the same answer."""
    drawn = Table(title="backends", title_justify="left", header_style="bold", show_lines=True)
    for heading in ("variants", "auto picks", "also runs", "does not run here"):
        drawn.add_column(heading, overflow="fold")
    for answer, names in found.items():
        refused = "\n".join(f"[bold]{name}[/]: {_plain(reasons)}" for name, reasons in answer.refused)
        style = "red" if answer.picked == "none" else "green"
        drawn.add_row(", ".join(names), f"[{style}]{answer.picked}[/]", ", ".join(answer.others), refused)
    return drawn


def _first_line(path: str) -> str:
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer: {error}"
    lines = [line for line in (told.stdout or told.stderr).splitlines() if line.strip()]
    # nvcc tells its release in the last lines.
    return next((line for line in lines if "release" in line), lines[0] if lines else "says nothing").strip()


def table(title: str, rows: Iterator[Row]) -> Table:
    """The findings of one kind as a table."""
    drawn = Table(title=title, title_justify="left", header_style="bold", expand=False)
    for heading in ("what", "found", "note"):
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        style = {True: "green", False: "red", None: "dim"}[row.good]
        drawn.add_row(row.name, f"[{style}]{_plain(row.found)}[/]", _plain(row.note))
    return drawn


def _plain(text: str) -> str:
    """Text in which rich sees no markup."""
    return text.replace("[", r"\[")


@cli.command
def main(argv: list[str] | None = None) -> int:
    """The command; exit status 1 where something that attnbench always needs is missing."""
    config = cli.parse(DoctorConfig, argv, prog="attnbench.doctor")
    console = Console()
    sections = {"machine": machine, "torch": torch_rows, "compilers": compilers, "packages": packages}
    missing = False
    for title, look in sections.items():
        rows = list(look())
        missing |= any(row.good is False for row in rows)
        console.print(table(title, iter(rows)))
    if missing:
        console.print("[red]something that attnbench always needs is missing: pip install -c constraints.txt -e .[/]")
        return 1
    console.print(backend_table(backends(config.variant)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
