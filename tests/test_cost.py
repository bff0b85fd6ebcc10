"""Cost cells: by turns, under limits, as records; what does not fit is a row; suites that need a GPU say so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from attnbench import cost, curves, duel, measure, record, train
from attnbench.config import RunConfig
from attnbench.cost import CostConfig
from attnbench.errors import Refusal
from tests.timing import LONG, ratio

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


def sleeping(seconds: float) -> duel.Phases:
    """Two phases that take that long."""

    def call() -> float:
        time.sleep(seconds)
        return seconds

    return {"forward": call, "backward": call}


def test_no_budget_is_too_small_for_three_turns() -> None:
    found = duel.by_turns({"own": sleeping(0.02)}, lambda: 1.0, budget=1e-3)
    assert [found[phase]["own"]["n"] for phase in ("forward", "backward")] == [3, 3]


def test_the_limit_of_time_ends_the_turns_and_a_single_one_has_no_quartiles() -> None:
    """Warm-up and turn of both phases are 0.2 s of the 0.3; without a limit the budget would be 100 turns."""
    found = duel.by_turns({"own": sleeping(0.05)}, lambda: 1.0, budget=5.0, limit=0.3)
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


class Children:
    """In place of measure.in_child: keeps what it is told, and answers unless `fails` has an ending and a last line."""

    def __init__(self, fails: Callable[[dict[str, Any]], tuple[str, str] | None] = lambda told: None) -> None:
        self.fails = fails
        self.told: list[dict[str, Any]] = []

    def __call__(self, kind: str, told: dict[str, Any], limit: float) -> dict[str, Any]:
        self.told.append(told | {"kind": kind.rpartition(":")[2], "limit": limit})
        if (failure := self.fails(self.told[-1])) is not None:
            raise measure.ChildFailed(kind, failure[0], [failure[1]])
        timing = {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
        phases = {"forward": {"own": dict(timing), "product": dict(timing)}}
        return {"peak_bytes": 1, "phases": phases, "flops": {}, "backend": "any"}


def attention_cell(variant: str = "linear", side: int = 8, **told: Any) -> cost.Cell:
    block = cost.CellsConfig(variants=(variant,), scope="attention", sides=(side,), **told)
    suite = cost.CostSuite(seconds=1, budget=1, limit=1, memory="1GB", cells=(block,))
    (cell,) = cost._declared(block, suite)
    return cell


def test_what_cannot_be_captured_is_timed_without_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, with the baseline still, and the peak is there."""
    ask = Children(lambda told: ("ended", "__main__.Uncaptured: no CUDA graph") if told["graphs"] else None)
    monkeypatch.setattr(measure, "in_child", ask)
    cell = attention_cell()
    cell = replace(cell, config=cell.config.model_copy(update={"device": "cuda"}))
    found = cost.measured(cell, limits(tmp_path), baseline=True)
    assert found["status"] == "ok" and found["metrics"]["peak_bytes"] == 1
    assert [bool(told["baseline"]) for told in ask.told] == [True, True]
    assert found["reason"].startswith("without graphs: ") and "Uncaptured" in found["reason"]


@pytest.mark.parametrize("ending", ["was ended by SIGKILL", "took more than 60 s"])
def test_a_baseline_that_does_not_fit_beside_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    ask = Children(lambda told: (ending, "") if told["kind"] == "time" and told["baseline"] else None)
    monkeypatch.setattr(measure, "in_child", ask)
    found = cost.measured(attention_cell(), limits(tmp_path), baseline=True)
    assert found["status"] == "ok" and found["reason"].startswith("without baseline: ") and ending in found["reason"]
    assert [told["kind"] for told in ask.told] == ["memory", "time", "time"]


def test_what_fails_alone_too_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "in_child", Children(lambda told: ("took more than 60 s", "")))
    assert cost.measured(attention_cell(), limits(tmp_path), baseline=True)["status"] == "timeout"


def test_a_child_knows_when_it_must_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Children()
    monkeypatch.setattr(measure, "in_child", ask)
    cost.measured(attention_cell(), limits(tmp_path), baseline=True)
    assert [told["limit"] for told in ask.told] == [60, 60]
    assert all(told["deadline"] == pytest.approx(time.time() + 60, abs=5) for told in ask.told)


@pytest.mark.parametrize(("memory", "reserved"), [("8GB", 4), ("4", 2)])
def test_a_child_that_measures_time_holds_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, reserved: int
) -> None:
    """Four peaks, which are one byte here, and at most half of the memory."""
    ask = Children()
    monkeypatch.setattr(measure, "in_child", ask)
    cost.measured(attention_cell(), limits(tmp_path, memory=memory), baseline=True)
    assert [told.get("reserve") for told in ask.told] == [None, reserved]


def test_only_a_baseline_of_the_same_shape_says_whether_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fits with a batch of 2 admits none with a batch of 8, where it does not; to backends and options it is
    the same."""
    ask = Children(lambda told: ("was ended by SIGKILL", "") if told["request"]["config"]["train"]["batch"] == 8 and
                   told["request"]["config"]["variant"] == "dense1d" else None)  # fmt: skip
    monkeypatch.setattr(measure, "in_child", ask)
    todo = [attention_cell("dense1d", batch=batch) for batch in (2, 8)]
    todo += [attention_cell(batch=8), attention_cell("local2d", options={"local2d": {"radius": 2}})]
    done = cost.run(limits(tmp_path), todo)
    assert [r["status"] for r in done] == ["ok", "oom", "ok", "ok"]
    rivals = {told["request"]["config"]["variant"]: bool(told["baseline"]) for told in ask.told}
    assert rivals == {"dense1d": False, "linear": False, "local2d": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_backend_that_cannot_run_is_refused_without_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every declared cell that names one: the record has the backend's reasons, and the next cell follows."""
    ask = Children()
    monkeypatch.setattr(measure, "in_child", ask)
    named = [cell for cell in cost.cells(CostConfig(suite="gpu")) if cell.config.model.backend != "auto"]
    done = cost.run(limits(tmp_path), [*named, attention_cell("dense1d")])
    assert len(named) >= 6 and len(ask.told) == 2
    assert {r["status"] for r in done[:-1]} == {"crash"} and done[-1]["status"] == "ok"
    assert all("no CUDA device is here" in r["reason"] for r in done[:-1])
    assert record.read(tmp_path / "costs" / f"{done[0]['id']}.json")["reason"] == done[0]["reason"]


def test_a_suite_ends_in_its_seconds_and_says_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second cell is cut short, which is no timeout of its own; the third never begins; both follow next time."""
    slow = [True]

    def answer(told: dict[str, Any]) -> tuple[str, str] | None:
        if told["request"]["config"]["variant"] == "dense1d" or not slow:
            return None
        time.sleep(told["limit"])
        return f"took more than {told['limit']:g} s", ""

    monkeypatch.setattr(measure, "in_child", Children(answer))
    (tmp_path / "short.yaml").write_text(
        "{seconds: 4, budget: 1, limit: 60, memory: 1GB, cells: [{variants: [dense1d, linear, gla], scope: attention,"
        " sides: [8]}]}"
    )
    monkeypatch.setattr(cost, "FOLDER", tmp_path)
    command = ["--suite", "short", "--out", str(tmp_path)]
    began = time.monotonic()
    assert cost.main(command) == 0 and time.monotonic() - began < 20
    told = capsys.readouterr()
    assert told.out.count("not run") == 2
    assert (
        "not run, the suite's time is up: linear attention 8, gla attention 8; the same command goes on\n" in told.err
    )
    assert [r["variant"] for r in record.read_all(tmp_path, cost.ROOM)[0]] == ["dense1d"]
    slow.clear()
    cost.main(command)
    assert [r["status"] for r in record.read_all(tmp_path, cost.ROOM)[0]] == ["ok"] * 3


def test_a_label_says_whatever_differs() -> None:
    """Two radii are two curves, and so are two depths and precisions; a default that is told is none."""

    def named(variant: str, precision: str = "float32", **told: Any) -> str:
        cell = attention_cell(variant, **told)
        train = cell.config.train.model_copy(update={"precision": precision})
        return curves.label(cost._identity(replace(cell, config=cell.config.model_copy(update={"train": train}))))

    assert named("local2d") == named("local2d", options={"local2d": {"radius": 3}}) == "local2d"
    assert named("local2d", options={"local2d": {"radius": 5}}, backend="flex") == "local2d radius=5 (flex)"
    assert named("linear", preset="igpt-s", batch=8) == "linear dim 512 depth 24 heads 8 batch 8"
    assert named("linear", "bfloat16", compile=True) == "linear bfloat16 compiled"


def test_the_committed_cells_are_the_cells_of_today() -> None:
    """The reference's records have the ids that the same settings have now, and plain labels."""
    known, _ = record.read_all(Path(__file__).parent.parent / "results" / "reference", cost.ROOM)
    assert len(known) >= 126
    for done in known:
        config = RunConfig.model_validate(done["config"])
        assert cost.Cell(config, done["side"], done["scope"]).id == done["id"]
        assert curves.label(done) == done["variant"]


def test_a_ratio_alternates_after_both_were_warmed() -> None:
    log: list[str] = []
    found = ratio(lambda: log.append("s"), lambda: log.append("f"), repeats=2)
    assert "".join(log) == "fs" + "ffs" + "sff" + "ffs" and found["rounds"] == 3


def test_a_ratio_to_what_takes_long_has_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr("tests.timing.seconds", lambda work: work() or (LONG if log[-1] == "s" else 0.5))
    found = ratio(lambda: log.append("s"), lambda: log.append("f"), rounds=7)
    assert log.count("s") == 3 and found == {"median": 4.0, "low": 4.0, "high": 4.0, "rounds": 1}


def test_a_first_call_that_loads_something_costs_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr("tests.timing.seconds", lambda work: work() or (LONG if log.count("s") == 1 else 0.5))
    assert ratio(lambda: log.append("s"), lambda: log.append("f"), rounds=7)["rounds"] == 7


def test_a_classifier_has_its_step_against_the_baseline_that_predicts_pixels() -> None:
    found = [c for c in cost.cells(cost.CostConfig(variants="resnet", sides="8")) if c.config.variant == "resnet"]
    assert [(c.scope, c.config.model.objective) for c in found] == [("step", "supervised")]
    rival = cost._rival(found[0])
    assert (rival.config.variant, rival.config.model.objective) == ("dense1d", "ar")


def test_all_variants_have_cells() -> None:
    assert {c.config.variant for c in cost.cells(cost.CostConfig(sides="8"))} == set(models.VARIANTS)


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
