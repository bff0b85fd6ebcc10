"""One cost cell in its process: turns, limits, oracles before clocks, and attention alone as the mean over a trunk."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models.linear
from attnbench import clock, cost, duel, measure, train
from attnbench.cost import CostConfig


def test_the_two_are_timed_by_turns() -> None:
    """Each goes first every other time, the yardstick before both; the ratio is taken within a turn."""
    log: list[str] = []
    seconds = {"own": 0.003, "baseline": 0.001}

    def call(name: str) -> float:
        log.append(name)
        time.sleep(0.001)
        return seconds[name]

    sides: dict[str, duel.Phases] = {name: {"forward": lambda name=name: call(name)} for name in seconds}  # type: ignore[misc]
    found = dict(duel.by_turns(sides, lambda: 0.002, budget=0.02))["forward"]
    assert log[:6] == ["own", "baseline", "own", "baseline", "baseline", "own"]
    assert found["ratio"]["median"] == pytest.approx(3.0) and found["ratio"]["n"] == found["own"]["n"] >= 3
    assert found["product"]["median"] == 0.002


def sleeping(seconds: float) -> duel.Phases:
    """Two phases that take that long."""

    def call() -> float:
        time.sleep(seconds)
        return seconds

    return {"forward": call, "backward": call}


def test_no_budget_is_too_small_for_three_turns() -> None:
    found = dict(duel.by_turns({"own": sleeping(0.02)}, lambda: 1.0, budget=1e-3))
    assert [found[phase]["own"]["n"] for phase in ("forward", "backward")] == [3, 3]


def test_the_limit_of_time_ends_the_turns_and_a_single_one_has_no_quartiles() -> None:
    """Warm-up and turn of both phases are 0.2 s of the 0.3; without a limit the budget would be 100 turns."""
    found = dict(duel.by_turns({"own": sleeping(0.05)}, lambda: 1.0, budget=5.0, limit=0.3))
    assert found["forward"]["own"] == {"median": 0.05, "low": None, "high": None, "n": 1}
    assert found["backward"]["own"]["n"] == 1


def test_what_slows_a_whole_turn_leaves_the_ratio() -> None:
    """Both sides ten times as slow in every other turn: times spread, the ratio does not."""
    turn = iter(range(10_000))

    def slow(base: float) -> duel.Phases:
        def call() -> float:
            time.sleep(0.001)
            return base * (10 if next(turn) // 2 % 2 else 1)

        return {"forward": call}

    sides = {"own": slow(2.0), "baseline": slow(1.0)}
    found = dict(duel.by_turns(sides, lambda: 1.0, budget=0.05))["forward"]
    assert found["own"]["high"] >= 5 * found["own"]["low"]
    assert found["ratio"]["low"] == found["ratio"]["high"] == pytest.approx(2.0)


def request_of(variant: str, side: int = 4) -> measure.Request:
    told = CostConfig(variants=variant, sides=str(side))
    return next(measure.Request(c.config, side, side, 5) for c in cost.cells(told) if c.config.variant == variant)


def twisted(x: Tensor, by: float = 0.001) -> Tensor:
    """The same value with another gradient."""
    return x + by * (x - x.detach())


def one(like: Tensor, value: float) -> Tensor:
    """Zeros, but for one number: in the norm of the whole it is lost."""
    found = torch.zeros_like(like)
    found[0, 0, 70, 0] = value
    return found


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "output": ("forward", lambda right, self, q, k, v: right(self, q, k, v) * 1.001),
    "output beyond slot 100": (
        "forward",
        lambda right, self, q, k, v: right(self, q, k, v) * (1 + 0.01 * (torch.arange(q.shape[2]) > 100))[:, None],
    ),
    "output beyond one number": ("forward", lambda right, self, q, k, v: right(self, q, k, v) + one(v, 1e-9)),
    "gradient of q": ("forward", lambda right, self, q, k, v: right(self, twisted(q), k, v)),
    "gradient of v": ("forward", lambda right, self, q, k, v: right(self, q, k, twisted(v))),
    "decoding": ("step", lambda right, self, q, k, v, state: right(self, q, k, 1.001 * v, state)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_timed_before_its_oracle_has_passed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out, at any slot, what goes back, and what decoding gives."""
    request = request_of("linear")
    duel.check_oracle(request)
    method, wrong = FAULTS[fault]
    right = getattr(models.linear.Linear, method)
    monkeypatch.setattr(models.linear.Linear, method, lambda self, *given: wrong(right, self, *given))
    with pytest.raises(duel.OracleMissed, match=f"linear misses its oracle: its {fault.split(' beyond')[0]} is off by"):
        duel.subject_of(request, "attention")


def test_decoding_that_is_not_timed_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.linear.Linear, "step", models.Mixer.step)
    duel.check_oracle(request_of("linear"), decoding=False)
    with pytest.raises(NotImplementedError):
        duel.check_oracle(request_of("linear"))


def test_low_precision_is_within_its_bound_of_every_oracle() -> None:
    """As on CUDA, where a cell in bfloat16 is held against LOW: here by the same passes on a CPU."""
    for name in ("dense1d", "local2d", "strided", "gla"):
        shared, given = duel.attentions(measure.Request(request_of(name).config, *duel.ORACLE, 5), torch.bfloat16)
        for mixer in shared:
            found, want = duel._passes(mixer, given), duel._passes(mixer.oracle, given.wide())
            off = {n: duel._off(x, want[n], worst=False) for n, x in found.items()}
            assert max(off.values()) < duel.LOW / 2, (name, off)
            assert max(off.values()) > duel.EXACT


def test_each_phase_is_answered_when_it_is_done_and_known_ones_are_left_out() -> None:
    told = {"request": request_of("linear").dump(), "scope": "attention", "budget": 0.01, "baseline": None}
    first, *answers = ({**known, "phases": [*known["phases"]]} for known in duel.time_cell(told))
    assert first["phases"] == []
    assert [known["phases"] for known in answers] == [
        ["forward"], ["forward", "backward"], ["forward", "backward", "decoding"]
    ]  # fmt: skip
    assert all(known["flops"]["forward"] and known["backend"] for known in answers)
    assert answers[0]["fused"] in ("flash_attention", "math", "efficient_attention")
    *_, last = duel.time_cell(told | {"known": ["forward", "backward"]})
    assert [*last["phases"]] == ["decoding"]
    (nothing,) = duel.time_cell(told | {"known": ["forward", "backward", "decoding"]})
    assert nothing["phases"] == {}


def test_on_cuda_short_calls_are_timed_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as last half a second, ten at most; a long one alone."""
    rows: list[int] = []

    def between(work: Any, calls: int) -> float:
        rows.append(calls)
        return calls * float(work())

    monkeypatch.setattr(clock, "_between_events", between)
    lasting = 0.001, 0.1, 0.3
    assert [clock.seconds_of(partial(float, s), "cuda") for s in lasting] == pytest.approx([*lasting])
    assert rows == [1, 10, 1, 5, 1]


@pytest.mark.parametrize(
    ("variant", "options", "shares"),
    [
        ("dense1d", {}, {"Dense": 1.0}),
        ("performer", {}, {"Performer": 1.0}),
        ("axial", {}, {"row": 0.5, "col": 0.5}),
        ("hybrid-local2d", {}, {"Local2D": 5 / 6, "Dense": 1 / 6}),
        ("hybrid-linear", {"every": 1}, {"Linear": 0.5, "Dense": 0.5}),
    ],
)
def test_attention_alone_is_the_mean_over_the_layers_of_a_trunk(
    variant: str, options: dict[str, Any], shares: dict[str, float]
) -> None:
    """A layer of each kind, weighted by how many there are: FLOPs, and times that are known."""
    (cell,) = [c for c in cost.cells(CostConfig(variants=variant, sides="6")) if c.config.variant == variant][:1]
    config = cell.config.model_copy(update={"model": cell.config.model.model_copy(update={"options": options})})
    request = measure.Request(config, 6, 6, 5)
    found, _ = duel.attentions(request)
    assert {str(getattr(mixer, "axis", type(mixer).__name__)): share for mixer, share in found.items()} == shares
    trunk = train.make_model(config, 6, 6, 5)
    mean = sum(mixer.flops() for mixer in trunk.mixers) / len(trunk.mixers)  # type: ignore[operator,union-attr,arg-type]
    assert duel._flops(request, "attention")["forward"] == round(mean) * config.train.batch
    assert set(duel.subject_of(request, "attention").phases) == {"forward", "backward", "decoding"}


def test_the_time_of_a_layer_is_weighted_by_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = [c for c in cost.cells(CostConfig(variants="hybrid-local2d", sides="6")) if "hybrid" in c.id][:1]
    seconds = {"Local2D": 6.0, "Dense": 60.0}
    monkeypatch.setattr(duel, "_phases", lambda mixer, *_: {"forward": lambda: seconds[type(mixer).__name__]})
    subject = duel.subject_of(measure.Request(cell.config, 6, 6, 5), "attention")
    assert subject.phases["forward"]() == pytest.approx(15.0)


def test_the_rehearsal_has_the_size_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size loads other code, which would be counted."""
    log: list[Any] = []

    def logged(entry: Any, result: Any) -> Any:
        log.append(entry)
        return result

    right = duel.attentions
    monkeypatch.setattr(duel, "attentions", lambda told: logged((told.height, told.width), right(told)))
    monkeypatch.setattr(duel, "PeakMeter", lambda device: logged("meter", measure.PeakMeter(device)))
    (cell,) = (c for c in cost.cells(CostConfig(variants="dense1d", sides="12")) if c.scope == "attention")
    duel.peak_cell({"request": measure.Request(cell.config, 12, 12, 5).dump(), "scope": "attention"})
    assert log == [(12, 12), "meter", (12, 12)]


class NoCapture:
    """Of torch.cuda what a capture needs; its graphs cannot be made, as capture_end says of what was not permitted."""

    def __init__(self, *given: Any, **told: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if isinstance(self, NoGraph):
            raise RuntimeError("operation not permitted when stream is capturing")

    def wait_stream(self, other: object) -> None:
        pass

    def pool(self) -> None:
        pass


class NoGraph(NoCapture):
    pass


def test_a_pass_that_cannot_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "CUDAGraph", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, NoCapture)
    monkeypatch.setattr(torch.cuda, "graph", NoGraph)
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(duel.Uncaptured, match="not permitted"):
        duel._replays(lambda: 2 * x, [x])


def test_the_name_of_what_was_not_captured_leaves_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "from attnbench import duel, measure", "def fail(told): raise duel.Uncaptured('x')"
    (tmp_path / "uncaptured.py").write_text("\n".join([*lines, "measure.main({'time': fail})"]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(measure.ChildFailed) as failed:
        measure.in_child("uncaptured:time", {})
    assert duel.Uncaptured.__name__ in failed.value.tail[-1]
