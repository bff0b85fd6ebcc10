"""Two folders side by side: what is worse is found, what is noise is not, and the exit status says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnbench import cli, compare
from tests import synthetic_records as synthetic

Change = Callable[[dict[str, Any]], None]


def run(tmp_path: Path, change: Change, *flags: str, seeds: int = 3) -> int:
    before = [synthetic.one(v, s, cost=True) for v in ("dense1d", "local2d") for s in range(seeds)]
    after = copy.deepcopy(before)
    for done in after:
        change(done)
    folders = [str(synthetic.write(tmp_path / name, runs)) for name, runs in (("a", before), ("b", after))]
    return cli.command(compare.main)([*folders, *flags])


def scaled(name: str, factor: float) -> Change:
    def change(done: dict[str, Any]) -> None:
        done["metrics"][name] *= factor

    return change


def shifted(amount: float, *, variant: str | None = None) -> Change:
    def change(done: dict[str, Any]) -> None:
        if variant in (None, done["variant"]):
            done["metrics"]["nats_per_token"] += amount
            done["per_image_nats"] = [value + amount for value in done["per_image_nats"]]

    return change


def test_a_run_that_is_gone_or_damaged_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [synthetic.one("dense1d", s) for s in range(4)]
    folders = [synthetic.write(tmp_path / name, runs) for name, runs in (("a", before), ("b", before[:3]))]
    path = folders[1] / "runs" / f"{before[0]['id']}.json"
    path.write_text(path.read_text()[:500])
    assert cli.command(compare.main)([str(folder) for folder in folders]) == 1
    said = capsys.readouterr().out
    assert "2 lost runs" in said and all(
        f"{before[s]['id']} ended well before and is not there" in said for s in (0, 3)
    )


def test_a_run_at_a_rate_that_lost_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [synthetic.one("dense1d", s, lr=lr, nats=n) for s in range(3) for lr, n in ((5e-3, 1.4), (8e-3, 1.3))]
    after = copy.deepcopy(before)
    for done in after:
        if done["config"]["train"]["lr"] == 8e-3:
            shifted(1.0)(done)
    folders = [str(synthetic.write(tmp_path / name, runs)) for name, runs in (("a", before), ("b", after))]
    assert cli.command(compare.main)(folders) == 1
    assert "lr=0.008" in capsys.readouterr().out


def test_the_same_twice_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, lambda done: None) == 0
    assert "0 worse" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [shifted(0.02), shifted(0.02, variant="local2d"), scaled("train_peak_bytes", 1.1),
     scaled("train_images_per_second", 0.7), scaled("probe_accuracy_best", 0.9)],
)  # fmt: skip
def test_a_regression_ends_with_status_1(tmp_path: Path, change: Change) -> None:
    assert run(tmp_path, change) == 1


@pytest.mark.parametrize(
    "change",
    [shifted(0.005), shifted(-0.5), scaled("train_peak_bytes", 0.5), scaled("train_images_per_second", 0.9),
     scaled("sample_images_per_second", 3.0)],
)  # fmt: skip
def test_what_is_tolerated_or_better_ends_with_status_0(tmp_path: Path, change: Change) -> None:
    assert run(tmp_path, change) == 0


def test_tolerance_is_a_flag(tmp_path: Path) -> None:
    assert run(tmp_path, shifted(0.005), "--nats", "0.001") == 1


def test_one_seed_is_judged_by_its_test_images(tmp_path: Path) -> None:
    assert run(tmp_path, shifted(0.02), seeds=1) == 1


def test_noise_beyond_the_threshold_that_does_not_separate_is_no_regression(tmp_path: Path) -> None:
    def change(done: dict[str, Any]) -> None:
        done["metrics"]["nats_per_token"] += (-0.3, 0.0, 0.4)[done["seed"]]  # mean 0.033

    assert run(tmp_path, change) == 0


def test_a_run_that_no_longer_ends_well_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(done: dict[str, Any]) -> None:
        if done["variant"] == "local2d" and done["seed"] == 1:
            done.update(status="oom", reason="out of memory", metrics={})

    assert run(tmp_path, change) == 1
    assert "ended well before and in oom now: out of memory" in capsys.readouterr().out


def test_nothing_in_common_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = synthetic.write(tmp_path / "a", [synthetic.one("dense1d")])
    b = synthetic.write(tmp_path / "b", [synthetic.one("linear")])
    assert cli.command(compare.main)([str(a), str(b)]) == 2
    assert "no run in common" in capsys.readouterr().err


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command(compare.main)([str(tmp_path / "x"), str(tmp_path / "y")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
