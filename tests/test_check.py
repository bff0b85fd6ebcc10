"""The conformance suite: the catalogue passes it, and every planted mistake is caught by the check that names it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import models
from attnbench import check, checks, receptive
from attnbench.checks import CHECKS, Subject, examine
from attnbench.errors import Refusal
from models.full import Dense
from models.geometry import Grid, Scan
from models.mixer import ExactMixer, Layer, Mixer

CATALOGUE = sorted(models.VARIANTS)


@pytest.fixture
def planted() -> Iterator[dict[str, tuple[type, str]]]:
    from tests import planted

    known = dict(models.VARIANTS)
    for name, (cls, _) in planted.BUGS.items():
        models.variant(
            name, family="planted", time="O(n²)" if issubclass(cls, Dense) else "O(n)", memory="O(n)",
            summary="", reference="planted",
        )(cls)  # fmt: skip
    yield planted.BUGS
    models.VARIANTS.clear()
    models.VARIANTS.update(known)


SLOW = ("compiles", "visible is declared", "low precision", "no future")
FEW = ((1, 1), (3, 5), (10, 9))
"""A shape that degenerates, one that is not square, one that crosses a border of tiles or chunks."""


PROMISED = {"equals oracle": "oracle", "decoding equals full pass": "decoding"}
"""Checks that are promises of their own."""


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.promise(PROMISED[n]) if n in PROMISED else ()) for n in names]


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("which", marked(name for name in CHECKS if name not in SLOW))
def test_catalogue_passes(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SHAPES", FEW)
    verdict = examine(Subject(name), which)
    assert verdict.status != "failed", verdict.words


@pytest.mark.soak
@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("which", marked(name for name in CHECKS if name != "no future"))
def test_catalogue_passes_whole(name: str, which: str) -> None:
    verdict = examine(Subject(name), which)
    assert verdict.status != "failed", verdict.words


@pytest.mark.promise("future")
@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("shapes", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_no_variant_sees_the_future(
    name: str, shapes: int, monkeypatch: pytest.MonkeyPatch, injected: Callable[[int], None]
) -> None:
    """`attnbench.check` draws 200 shapes; here a tenth of them, and all with -m soak."""
    monkeypatch.setattr(checks, "DRAWN_SHAPES", shapes)
    verdict = examine(Subject(name), "no future")
    assert verdict.status != "failed", verdict.words
    injected(shapes if verdict.status == "passed" else 0)


def test_at_least_twenty_mistakes_are_planted(planted: dict[str, tuple[type, str]]) -> None:
    assert len(planted) >= 20


@pytest.mark.promise("checks")
def test_every_planted_mistake_is_caught_by_its_check(
    planted: dict[str, tuple[type, str]], injected: Callable[[int], None]
) -> None:
    injected(len(planted))
    missed = {name: (which, v.words) for name, (_, which) in planted.items()
              if (v := examine(Subject(name), which)).status != "failed"}  # fmt: skip
    assert not missed


def test_a_mistake_fails_for_its_own_reason(planted: dict[str, tuple[type, str]]) -> None:
    """The names of what is wrong are in the words, so that a person finds it."""
    words = {name.removeprefix("planted-"): examine(Subject(name), which).words for name, (_, which) in planted.items()}
    assert "sees slot" in words["SkewedWindow"] or "does not see" in words["SkewedWindow"]
    assert "depends on pixel" in words["PerAxisCausal"]
    assert "dk" in words["DetachedKeys"]
    assert "FLOPs" in words["FlattersItself"]


def test_receptive_field_of_a_window(tmp_path: Path) -> None:
    values = receptive.field(Subject("local2d", {"radius": 2}), depth=1, target=(7, 7))
    assert int((values > 0).sum()) == 2 * 2**2 + 2 * 2
    assert (values > 0)[5:7, 5:10].all()
    assert (values > 0)[7, 5:7].all()


def test_where_there_is_cuda_a_library_is_checked_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        model = Subject("dense-relbias2d").build(7, 11, dim=32, backend="flex")
        names = {name for mixer in model.mixers for name in checks.backends(mixer)}
        assert names - {"compiled"} == {"sdpa", "blocked", "math"}
    assert 0 < checks._off_by(model, torch.bfloat16, 0.1) < 0.1
    with pytest.raises(AssertionError, match=r"bfloat16 flex: off by .*, allowed 1e-06"):
        checks._off_by(model, torch.bfloat16, 1e-6)


def test_nothing_named_is_refused() -> None:
    with pytest.raises(Refusal, match="--all"):
        check.main([])


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(Refusal, match="did you mean 'local2d'"):
        check.main(["local2dd"])
    with pytest.raises(Refusal, match="no option 'radios'"):
        check.main(["local2d", "--options.radios", "2"])


def walked_through(folder: Path) -> None:
    """Leaves the file that CONTRIBUTING walks through in `folder`, as a user would."""
    source = Path(__file__).parent.parent / "CONTRIBUTING.md"
    example = source.read_text().split("```python\n# my_attention.py\n")[1].split("```")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    (folder / "my_attention.py").write_text(example)


def pair() -> tuple[str, str]:
    """The check and the run of that attention that the README names, each from the command's name on."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    check_it, run_it = re.findall(r"^python -m attnbench\.(.*my_attention:MyAttention.*)$", readme, flags=re.MULTILINE)
    return check_it, run_it


def test_own_attention_from_a_file_outside(tmp_path: Path) -> None:
    walked_through(tmp_path)
    name, *told = pair()[0].split()
    command = [sys.executable, "-m", f"attnbench.{name}", *told, "--out", "rf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    assert (tmp_path / "rf" / "my_attention-MyAttention.png").stat().st_size > 5000


def test_an_attention_that_fails_still_gets_its_table(tmp_path: Path) -> None:
    body = """import models
class Broken(models.VARIANTS["dense1d"].cls):
    "Its forward raises."
    def forward(self, *args, **more):
        raise RuntimeError("no [luck]\\nat all")
"""
    (tmp_path / "broken.py").write_text(body)
    command = [sys.executable, "-m", "attnbench.check", "broken:Broken", "--out", "rf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    *checked, reason, drawn = done.stdout.splitlines()
    assert "failed" in checked[-1] and any("equals oracle" in line for line in checked)
    assert reason == "no receptive field of broken:Broken: RuntimeError: no [luck] at all"
    assert drawn == "0 receptive fields in rf" and not list(tmp_path.glob("rf/*"))


OWN_SUITE = """question: Does mine do better?
blocks:
  - name: mine
    variants: ["my_attention:MyAttention"]
    seeds: 1
    settings:
      data: {name: digits}
      model: {dim: 16, depth: 1, heads: 1}
      train: {steps: 2, batch: 8, warmup: 1}
      evaluate: {images: 8}
      probe: {enabled: false}
      sample: {count: 0}
      measure: false
"""


def commanded(folder: Path, *commands: str) -> None:
    """Runs commands one after the other in one process, in `folder`: each alone would import torch first."""
    script = "import importlib, sys\nfrom attnbench import cli\n"
    for name, *told in map(str.split, commands):
        script += f"assert not cli.command(importlib.import_module('attnbench.{name}').main)({told}), '{name}'\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


def recorded(folder: Path) -> list[tuple[str, str]]:
    records = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
    return [(record["variant"], record["status"]) for record in records if "variant" in record]


def test_own_attention_through_run_sweep_and_report(tmp_path: Path) -> None:
    walked_through(tmp_path)
    (tmp_path / "mine.yaml").write_text(OWN_SUITE)
    small = "--model.dim 16 --model.depth 1 --model.heads 1 --train.steps 2 --train.batch 8 --train.warmup 1"
    commanded(
        tmp_path,
        f"run --variant my_attention:MyAttention {small} --no-measure --sample.count 2 --evaluate.images 8",
        "sweep mine.yaml",
        "report results --out page",
    )
    assert recorded(tmp_path / "results" / "runs") == [("my_attention:MyAttention", "ok")] * 2
    for name in ("front.csv", "index.html"):
        assert "my_attention:MyAttention" in (tmp_path / "page" / name).read_text()


def test_own_attention_on_own_pictures(tmp_path: Path) -> None:
    walked_through(tmp_path)
    random = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "pictures" / ("cats" if number % 2 else "dogs") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path)
    small = "--model.dim 16 --model.depth 1 --model.heads 1 --train.steps 2 --train.batch 2 --train.warmup 1"
    commanded(tmp_path, f"{pair()[1]} {small} --no-measure --sample.count 0 --probe.no-enabled --data.colours 8")
    assert recorded(tmp_path / "results" / "runs") == [("my_attention:MyAttention", "ok")]


@pytest.mark.soak
def test_own_attention_through_cost(tmp_path: Path) -> None:
    walked_through(tmp_path)
    commanded(tmp_path, "cost --variants my_attention:MyAttention --sides 3 --budget 0.1 --out costs")
    mine = [status for variant, status in recorded(tmp_path / "costs") if variant == "my_attention:MyAttention"]
    assert mine == ["ok"] * 2, "attention alone, and a step"


@pytest.mark.parametrize("method", ["forward", "oracle", "start", "step", "flops", "visible"])
def test_what_an_attention_of_ones_own_lacks_is_named(method: str) -> None:
    class Bare(ExactMixer if method == "visible" else Mixer):  # type: ignore[misc]
        pass

    given = [torch.zeros(1, 1, 4, 4)] * 3
    arguments = {"forward": given, "oracle": given, "start": (1, given[0]), "step": (*given, None)}.get(method, ())
    with pytest.raises(NotImplementedError, match=f"Bare has no {method}; write one"):
        getattr(Bare(Layer(Scan(Grid(2, 2)), 1, 4)), method)(*arguments)
