"""What the person at the terminal sees: a bar while it runs, a table when it is done."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from attnbench.experiment import Watch


@contextmanager
def bar(console: Console, title: str, steps: int, batch: int) -> Iterator[Watch]:
    """A progress bar over training steps with loss, images/s and time left, then the name of each later stage."""
    columns = (
        TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[state]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=steps, state="loading")

        def watch(stage: str, step: int, loss: float) -> None:
            if stage != "train":
                progress.update(task, description=f"{title}: {stage}", state="")
                return
            speed = progress.tasks[0].speed or 0.0
            progress.update(task, completed=step, state=f"loss {loss:.3f} · {speed * batch:,.0f} images/s")

        yield watch


def table(record: dict[str, Any]) -> Table:
    """The figures of a record."""
    out = Table(title=f"{record['variant']} · {record['data']['name']} · seed {record['seed']}", title_justify="left")
    out.add_column("figure")
    out.add_column("value", justify="right")
    out.add_column("unit", style="dim")
    for name, value, unit in rows(record):
        out.add_row(name, value, unit)
    return out


def rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, value, unit) of every figure that the record has."""
    metrics, shape = record.get("metrics", {}), record["data"]
    yield "status", record["status"], record.get("reason", "")
    yield "sequence", f"{shape['height']} × {shape['width']} = {shape['height'] * shape['width']}", "tokens"
    yield "backend", record["backend"], record["environment"].get("gpu") or "cpu"
    plain = (
        ("parameters", "parameters", "{:,}", ""),
        ("training cost", "train_flops_per_image", "{:.3e}", "FLOPs/image"),
        ("likelihood", "nats_per_token", "{:.4f}", "nats/token"),
        ("", "bits_per_token", "{:.4f}", "bits/token"),
        ("", "bits_per_dim", "{:.4f}", "bits/dim" + ", lossless bound" * bool(metrics.get("bits_per_dim_is_bound"))),
        ("regret", "regret_nats_per_token", "{:.4f}", "nats/token over the optimum"),
        ("best probe", "probe_accuracy_best", "{:.3f}", "accuracy"),
    )
    for label, key, form, unit in plain:
        if metrics.get(key) is not None:
            yield label, form.format(metrics[key]), unit
    if metrics.get("probe_accuracy"):
        yield "probe by depth", " ".join(f"{a:.2f}" for a in metrics["probe_accuracy"]), "embedding first"
    if metrics.get("train_peak_bytes"):
        yield "training memory", f"{metrics['train_peak_bytes'] / 2**20:,.1f}", "MiB at peak"
    for label, key in (("training", "train"), ("evaluation", "eval"), ("sampling", "sample")):
        spread = metrics.get("spread", {}).get(f"{key}_images_per_second")
        if spread:
            low, high, n = spread["low"], spread["high"], spread["n"]
            yield label, f"{spread['median']:,.0f}", f"images/s (quartiles {low:,.0f} to {high:,.0f}, n = {n})"
    if metrics.get("state_bytes_per_image"):
        yield "decoding state", f"{metrics['state_bytes_per_image'] / 2**10:,.1f}", "KiB/image"
    if metrics.get("seconds"):
        yield "trained", f"{metrics['steps']:,} steps", f"{metrics['seconds']:.0f} s"


def checks(names: list[str], options: dict[str, Any], out: Path, workers: int) -> int:
    """Runs every check on every variant, a process a core, under a bar; prints what passed; 1 if any failed."""
    from attnbench.checks import CHECKS

    console = Console()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_single_thread)
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    with pool, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("checks", total=len(names) * len(CHECKS))
        waiting = {pool.submit(_check, name, options, check): name for name in names for check in CHECKS}
        pictures = [pool.submit(_picture, name, options, out) for name in names]
        for done in as_completed(waiting):
            verdict = done.result()
            results[waiting[done]][verdict.check] = verdict
            progress.update(task, advance=1, description=f"{waiting[done]}: {verdict.check}")
    failures = _print_checks(console, results, list(CHECKS))
    drawn = [picture.result() for picture in pictures]
    for name, told in zip(names, drawn, strict=True):
        if isinstance(told, str):
            console.print(f"no receptive field of {name}: {escape(told)}", soft_wrap=True)
    console.print(f"{sum(isinstance(told, Path) for told in drawn)} receptive fields in {out}", soft_wrap=True)
    return 1 if failures else 0


def _print_checks(console: Console, results: dict[str, dict[str, Any]], order: list[str]) -> int:
    signs = {"passed": "[green]✓[/]", "failed": "[bold red]✗[/]", "n/a": "[dim]·[/]"}
    out = Table(title="conformance", title_justify="left")
    out.add_column("variant", no_wrap=True)
    for number in range(1, len(order) + 1):
        out.add_column(str(number), justify="center")
    for name, verdicts in results.items():
        out.add_row(name, *(signs[verdicts[check].status] for check in order))
    if len(results) > 1:
        console.print(out)
        console.print(", ".join(f"{number} {check}" for number, check in enumerate(order, 1)))
    failed = 0
    for name, verdicts in results.items():
        for check in order:
            verdict = verdicts[check]
            failed += verdict.status == "failed"
            if verdict.status == "failed" or len(results) == 1:
                console.print(f"{signs[verdict.status]} {name}: {check}: {escape(verdict.words)}", soft_wrap=True)
    console.print(f"{sum(map(len, results.values())) - failed} held, {failed} failed")
    return failed


def _single_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _check(name: str, options: dict[str, Any], check: str) -> Any:
    from attnbench.checks import Subject, examine

    return examine(Subject(name, options), check)


def _picture(name: str, options: dict[str, Any], out: Path) -> Path | str | None:
    """Draws a receptive field; None for what has none (a supervised model), the reason where the model fails."""
    import models
    from attnbench import receptive, storage
    from attnbench.checks import Subject

    try:
        subject = Subject(name, options)
        if subject.variant.objectives[0] not in models.OBJECTIVES:
            return None
        drawn = receptive.picture(subject)
    except Exception as error:  # the checks say what is wrong with it, and must be read
        return " ".join(f"{type(error).__name__}: {error}".split())
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    return storage.write_bytes(out / f"{stem}.png", drawn)
