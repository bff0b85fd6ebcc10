"""Cost cells: by turns, under limits, as records; what does not fit is a row; suites that need a GPU say so."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbench import afterwards, cost, duel, measure, record
from attnbench.cost import CostConfig
from attnbench.errors import Refusal

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")


def limits(tmp_path: Path, **told: Any) -> CostConfig:
    settings: dict[str, Any] = {"out": tmp_path, "budget": 0.05, "memory": "4GB"}
    return CostConfig(**(settings | told))


def test_the_two_are_timed_by_turns() -> None:
    """Each goes first every other time, the yardstick before both; the ratio is taken within a turn."""
    log: list[str] = []
    seconds = {"own": 0.003, "baseline": 0.001}

    def call(name: str) -> float:
        log.append(name)
        time.sleep(0.001)
        return seconds[name]

    sides: dict[str, duel.Phases] = {name: {"forward": lambda name=name: call(name)} for name in seconds}  # type: ignore[misc]
    found = duel.by_turns(sides, lambda: 0.002, budget=0.02)["forward"]
    assert log[:6] == ["own", "baseline", "own", "baseline", "baseline", "own"]
    assert found["ratio"]["median"] == pytest.approx(3.0) and found["ratio"]["n"] == found["own"]["n"] >= 3
    assert found["product"]["median"] == 0.002


def test_what_slows_a_whole_turn_leaves_the_ratio() -> None:
    """Both sides ten times as slow in every other turn: times spread, the ratio does not."""
    turn = iter(range(10_000))

    def slow(base: float) -> duel.Phases:
        def call() -> float:
            time.sleep(0.001)
            return base * (10 if next(turn) // 2 % 2 else 1)

        return {"forward": call}

    found = duel.by_turns({"own": slow(2.0), "baseline": slow(1.0)}, lambda: 1.0, budget=0.05)["forward"]
    assert found["own"]["high"] >= 5 * found["own"]["low"]
    assert found["ratio"]["low"] == found["ratio"]["high"] == pytest.approx(2.0)


def test_nothing_is_timed_before_its_oracle_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = [c for c in cost.cells(CostConfig(variants="linear", sides="4")) if c.config.variant == "linear"][:1]
    request = measure.Request(cell.config, 4, 4, 5)
    duel.check_oracle(request)
    import models.linear

    right = models.linear.Linear.forward
    monkeypatch.setattr(models.linear.Linear, "forward", lambda *a, **k: right(*a, **k) * 1.001)
    with pytest.raises(AssertionError):
        duel.subject_of(request, "attention")


@pytest.mark.serial
def test_cells_are_records_and_are_measured_once(tmp_path: Path) -> None:
    told = limits(tmp_path, variants="linear", sides="4")
    todo = [cell for cell in cost.cells(told) if cell.scope == "attention"]
    assert [cell.config.variant for cell in todo] == ["dense1d", "linear"]
    base, own = cost.run(told, todo)
    for done in (base, own):
        assert done["kind"] == "cost" and done["status"] == "ok"
        kept = record.read(tmp_path / "costs" / f"{done['id']}.json")
        assert kept["metrics"]["phases"].keys() == {"forward", "backward", "decoding"}
        assert kept["metrics"]["phases"]["forward"]["share_of_product"] > 0
    assert "ratio" in own["metrics"]["phases"]["forward"] and "ratio" not in base["metrics"]["phases"]["forward"]
    assert not (tmp_path / "runs").exists()
    assert cost.run(told, todo)[0]["environment"]["time"] == base["environment"]["time"]


@ON_LINUX
@pytest.mark.serial
@pytest.mark.parametrize(
    ("told", "side", "scope", "status"),
    [
        ({"memory": "30MB"}, 64, "attention", "oom"),
        ({"memory": "30MB"}, 64, "step", "oom"),
        ({"limit": 0.5}, 8, "attention", "timeout"),
    ],
)
def test_a_cell_that_does_not_fit_is_a_row(
    tmp_path: Path, told: dict[str, Any], side: int, scope: str, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = limits(tmp_path, variants="dense1d", sides=str(side), **told)
    (cell,) = [replace(c) for c in cost.cells(settings) if c.scope == scope]
    (done,) = cost.run(settings, [cell])
    assert done["status"] == status and done["reason"]
    assert record.read(tmp_path / "costs" / f"{done['id']}.json")["status"] == status
    cost._print([done])
    assert status in capsys.readouterr().out


def test_exponents_and_crossovers_come_from_records() -> None:
    def made(variant: str, side: int, seconds: float, ratio: float | None) -> dict[str, Any]:
        spread = {"median": seconds, "low": seconds, "high": seconds, "n": 3}
        phases: dict[str, Any] = {"forward": {"own": spread}}
        if ratio is not None:
            phases["forward"]["ratio"] = {"median": ratio, "low": ratio, "high": ratio, "n": 3}
        place = {"variant": variant, "scope": "attention", "side": side, "tokens": side**2}
        return {**place, "status": "ok", "metrics": {"peak_bytes": None, "phases": phases}}

    sides = (16, 32, 64, 128)
    records = [made("linear", s, 1e-6 * s**2, 2500 / s**2) for s in sides]
    points = cost.series(records)["linear", "attention", "forward"]
    from attnbench.exponents import crossover, exponent

    fit = exponent([p["tokens"] for p in points], [p["cost"] for p in points])
    assert fit is not None and fit.value == pytest.approx(1.0)
    assert crossover([p["ratio"] for p in points]).side == pytest.approx(50)


def test_the_report_has_a_table_of_the_cells(tmp_path: Path) -> None:
    """A row a cost; another shape, backend or machine is another row, and what did not fit is none."""

    def kept(variant: str, side: int, seconds: float, machine: str = "A", status: str = "ok", **model: Any) -> None:
        spread = {"median": seconds, "low": seconds, "high": seconds, "n": 3}
        phases = {"forward": {"own": spread, "ratio": spread | {"median": 50 / side}}} if status == "ok" else {}
        found = {"id": f"{variant}-{side}-{machine}-{len(model)}", "kind": "cost", "variant": variant, "side": side}
        found |= {"scope": "attention", "tokens": side**2, "status": status, "environment": {"cpu": machine}}
        found |= {"config": {"model": model}, "metrics": {"peak_bytes": None, "phases": phases}}
        record.write(tmp_path, found, room=cost.ROOM)

    for side in (16, 32, 64, 128):
        kept("linear", side, 1e-6 * side**2)
    kept("linear", 256, 0.0, status="oom")
    kept("linear", 16, 1.0, backend="blocked")
    kept("linear", 16, 1.0, machine="B")
    table = afterwards.costs(tmp_path)
    assert list(table["setting"]) == ["linear", "linear (blocked)", "linear"] and list(table["machine"]) == list("AAB")
    first = table.iloc[0]
    assert first["sides"] == "16–128" and first["exponent"] == pytest.approx(1.0)
    assert first["ratio_to_baseline"] == 50 / 128 and first["cheaper_from_side"].startswith("50")
    assert table.iloc[1]["sides"] == "16" and table["exponent"].isna().tolist() == [False, True, True]


def test_the_gpu_suite_is_sound() -> None:
    """Its cells name variants that there are, in shapes that can be built; its attention cells are few."""
    import models

    todo = cost.cells(CostConfig(suite="gpu"))
    assert {cell.config.device for cell in todo} == {"cuda"}
    assert {cell.config.train.precision for cell in todo} == {"bfloat16"}
    assert {("local2d", 128), ("local2d", 256)} <= {(c.config.variant, c.side) for c in todo if c.scope == "attention"}
    assert len({cell.id for cell in todo}) == len(todo) <= 45
    for cell in todo:
        assert cell.config.variant in models.VARIANTS
        assert set(cell.config.model.options) <= set(models.options(cell.config.variant))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_is_refused_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"needs a CUDA GPU: .*; run it where"):
        cost.main(["--suite", "gpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv", [["--sides", "x"], ["--sides", "0"], ["--variants", "densest"], ["--suite", "none"], ["--memory", "8XB"]]
)
def test_bad_input_is_refused(argv: list[str]) -> None:
    with pytest.raises(Refusal):
        cost.main(argv)
