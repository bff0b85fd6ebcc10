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
from attnbench import cost, curves, frame, measure, record, variants
from attnbench.config import RunConfig
from attnbench.cost import CostConfig
from attnbench.errors import Refusal
from tests.timing import LONG, ratio

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")


def limits(tmp_path: Path, **told: Any) -> CostConfig:
    settings: dict[str, Any] = {"out": tmp_path, "budget": 0.05, "memory": "4GB"}
    return CostConfig(**(settings | told))


class Children:
    """In place of measure.in_child: keeps what it is told, and answers with every phase but those that are known; with
    `done` of them, where `fails` has an ending and a last line."""

    def __init__(
        self, fails: Callable[[dict[str, Any]], tuple[str, str] | None] = lambda told: None, done: int = 0
    ) -> None:
        self.fails, self.done = fails, done
        self.told: list[dict[str, Any]] = []

    def __call__(self, kind: str, told: dict[str, Any], limit: float) -> dict[str, Any]:
        self.told.append(told | {"kind": kind.rpartition(":")[2], "limit": limit})
        answer: dict[str, Any] = {"peak_bytes": 1}
        if self.told[-1]["kind"] != "memory":
            answer |= {"flops": {}, "backend": "any"}
            timing, sides = {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}, ["own", "product"]
            sides += ["baseline", "ratio"] if told["baseline"] else []
            phases = [p for p in ("forward", "backward", "decoding") if p not in told["known"]]
            answer["phases"] = {phase: {side: dict(timing) for side in sides} for phase in phases}
        if (failure := self.fails(self.told[-1])) is not None:
            answer["phases"] = dict([*answer.get("phases", {}).items()][: self.done])
            raise measure.ChildFailed(kind, failure[0], [failure[1]], answer if self.done else None)
        return answer


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
    assert found["status"] == "ok" and "without baseline: " in found["reason"] and ending in found["reason"]
    left_out = [(bool(told.get("reserve")), bool(told["baseline"])) for told in ask.told[1:]]
    assert left_out == [(True, True), *([(False, True)] if "SIGKILL" in ending else []), left_out[-1]]
    assert not left_out[-1][1]


def test_a_phase_that_does_not_end_loses_none_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the baseline two phases end; without it the third alone is asked for, and there is."""
    late = Children(
        lambda told: ("took more than 60 s", "") if told["kind"] == "time" and told["baseline"] else None, 2
    )
    monkeypatch.setattr(measure, "in_child", late)
    found = cost.measured(attention_cell(), limits(tmp_path), baseline=True)
    assert found["status"] == "ok" and [told.get("known") for told in late.told[1:]] == [[], ["forward", "backward"]]
    ratios = {phase: "ratio" in timings for phase, timings in found["metrics"]["phases"].items()}
    assert ratios == {"forward": True, "backward": True, "decoding": False}

    never = Children(lambda told: ("took more than 60 s", "") if told["kind"] == "time" else None, 1)
    monkeypatch.setattr(measure, "in_child", never)
    (done,) = cost.run(limits(tmp_path), [attention_cell("dense1d")])
    assert done["status"] == "timeout" and [*done["metrics"]["phases"]] == ["forward"]
    cost._print([done])


def test_the_memory_of_what_misses_its_oracle_is_no_cost_of_the_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "attnbench.duel.OracleMissed: linear misses its oracle: its output is off by 0.1 of the whole"
    ask = Children(lambda told: ("ended with exit status 1", said) if told["kind"] == "time" else None)
    monkeypatch.setattr(measure, "in_child", ask)
    found = cost.measured(attention_cell(), limits(tmp_path), baseline=True)
    assert found["status"] == "crash" and found["reason"].endswith(said)
    assert len(ask.told) == 2, "without its baseline it would miss it again"
    assert found["metrics"] == {"peak_bytes": None}


OWN = """
from models.linear import Linear
class Mine(Linear):
    "Mine, {}."
"""


def test_an_own_attention_is_measured_again_where_its_code_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record says which code it was, and of two the later makes the curve."""
    monkeypatch.setattr(measure, "in_child", Children())
    done: list[dict[str, Any]] = []
    known: tuple[dict[str, Any], ...] = models.VARIANTS, variants._CODES
    for place in known:
        monkeypatch.setitem(place, "mine.py:Mine", None)  # so that it is forgotten afterwards too
    for version in ("first", "second"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "mine.py").write_text(OWN.format(version))
        monkeypatch.chdir(tmp_path / version)
        for place in known:
            del place["mine.py:Mine"]
        monkeypatch.delitem(sys.modules, "attnbench_own_mine", raising=False)
        told = limits(tmp_path, variants="mine.py:Mine", sides="8")
        (cell,) = (c for c in cost.cells(told) if c.config.variant == "mine.py:Mine" and c.scope == "attention")
        done += cost.run(told, [cell])
    assert len({one["id"] for one in done}) == len({one["code"] for one in done}) == 2
    done[1]["environment"] = done[0]["environment"] | {"time": "9999"}
    assert curves.by_place(done[::-1]) == {frame.place(done[0]): [done[1]]}


def test_an_own_attention_that_fails_under_the_plan_is_left_to_the_child(tmp_path: Path) -> None:
    (cell,) = (c for c in cost.cells(CostConfig(variants="dense1d", sides="8")) if c.scope == "step")
    assert cost.too_large(cell, limits(tmp_path)) is None
    assert "GB by plan" in str(cost.too_large(cell, limits(tmp_path, memory="1MB")))
    wrong = cell.config.model.model_copy(update={"options": {"no such": 1}})
    wrong_cell = replace(cell, config=cell.config.model_copy(update={"model": wrong}))
    assert cost.too_large(wrong_cell, limits(tmp_path, memory="1MB")) is None


def test_a_name_is_taken_once_and_may_have_spaces_around() -> None:
    found = cost.cells(CostConfig(variants="linear, linear,dense1d", sides="16, 8,16"))
    assert [(c.config.variant, c.side) for c in found if c.scope == "step"] == [
        ("dense1d", 8), ("dense1d", 16), ("linear", 8), ("linear", 16)
    ]  # fmt: skip


def test_cells_of_other_threads_are_no_points_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Half as fast on one thread: on each the exponent is 1, and of all together it would not be."""
    cells = [
        {"variant": "linear", "scope": "attention", "status": "ok", "side": side, "tokens": side**2,
         "environment": {"cpu": "A", "threads": count}, "metrics": {"peak_bytes": None, "phases": {
             "forward": {"own": {"median": side**2 / count, "low": 0, "high": 1, "n": 3}}}}}
        for side, count in ((16, 1), (32, 1), (64, 2), (128, 2))
    ]  # fmt: skip
    cost._print(cells)
    said = capsys.readouterr().out
    assert "A, threads: 1" in said and "A, threads: 2" in said and said.count("1.00") == 4


def test_what_fails_alone_too_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "in_child", Children(lambda told: ("took more than 60 s", "")))
    assert cost.measured(attention_cell(), limits(tmp_path), baseline=True)["status"] == "timeout"


def test_a_child_knows_when_it_must_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Children()
    monkeypatch.setattr(measure, "in_child", ask)
    cost.measured(attention_cell(), limits(tmp_path), baseline=True)
    assert [told["limit"] for told in ask.told] == [60, 60]
    assert all(told["deadline"] == pytest.approx(time.time() + 60, abs=5) for told in ask.told)


@pytest.mark.parametrize(("memory", "reserved"), [("8GB", 4), ("6", 2), ("3", 0)])
def test_a_child_that_measures_time_holds_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, reserved: int
) -> None:
    """Four peaks, which are one byte here, of what the memory leaves beside as many: large tensors do not use them."""
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
        told = curves.label(done).removeprefix(done["variant"])
        assert told in ("", " table=False", " batch 1"), "what the curves of the reference are called"


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


def test_a_cnn_is_the_same_at_every_side() -> None:
    """As many parameters as the trunk at each would make its own exponent that of the trunk's table."""
    found = [c for c in cost.cells(CostConfig(variants="pixelcnn", sides="8,64")) if c.config.variant == "pixelcnn"]
    assert [c.config.model.options for c in found] == [{"table": False}] * 2
    assert {curves.label(cost._identity(c)) for c in found} == {"pixelcnn table=False"}


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
    "argv",
    [
        ["--sides", "x"],
        ["--sides", "0"],
        ["--variants", "densest"],
        ["--suite", "none"],
        ["--memory", "8XB"],
        ["--memory", "0"],
        ["--limit", "1e7"],
        ["--suite", "gpu", "--sides", "8"],
    ],
)
def test_bad_input_is_refused(argv: list[str]) -> None:
    with pytest.raises(Refusal):
        cost.main(argv)
