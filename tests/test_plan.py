"""What is predicted: the meter of fake storages, lines through few layers, the search, the measured peak, commands."""

from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from attnbench import measure, plan, predict, trace, train
from attnbench.config import ModelConfig, RunConfig, StepConfig, TrainConfig
from attnbench.errors import Refusal
from attnbench.measure import Request
from attnbench.optimiser import make_optimiser

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the meter is /proc's")
SIDES = ((8, 128), (16, 32), (32, 8))
"""Sides, with a batch that makes the peak large beside what libraries need for themselves."""


def request_for(
    variant: str, side: int, batch: int = 2, depth: int = 4, dim: int = 64, objective: str | None = None
) -> Request:
    told = objective or models.VARIANTS[variant].objectives[0]
    model = ModelConfig(dim=dim, depth=depth, heads=4, objective=told)  # type: ignore[arg-type]
    settings = TrainConfig(batch=batch, precision="float32")
    return Request(RunConfig(variant=variant, model=model, train=settings, device="cpu"), side, side, 17)


# --- the meter --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dense1d", "local1d"])
def test_counts_as_torchs_own_tracker(variant: str) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    request = request_for(variant, 8, depth=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens = torch.zeros((2, 8, 8), dtype=torch.long)
        with MemTracker() as tracker:
            model = train.make_model(request.config, *request.shape)
            optimiser = make_optimiser(model, request.config)
            for step in range(2):
                train.train_step(model, optimiser, tokens, step, request.config)
                tracker.reset_mod_stats()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    found = trace.step(request)
    assert found.bytes - found.worst["overhead"] == pytest.approx(peak["Total"], rel=0.005)


def test_parameters_gradients_and_moments_are_what_they_must_be() -> None:
    request = request_for("dense1d", 4, batch=1, depth=8, dim=128)
    size = 4 * sum(p.numel() for p in trace.build(request).parameters())
    kinds = trace.step(request).peaks["backward"]
    assert size <= kinds["parameters"] < 1.01 * size
    assert 2 * size <= kinds["optimiser"] < 2.01 * size
    assert 0.8 * size < kinds["gradients"] <= size


def test_no_memory_and_no_luck_is_used() -> None:
    """A model of 27 GB; and the global generator stands where it stood."""
    request = request_for("dense1d", 16, depth=1, dim=24_000)
    before = torch.get_rng_state()
    assert trace.step(request).bytes > 4 * 12 * 24_000**2 * 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_of_too_many_operations_is_given_up() -> None:
    with pytest.raises(trace.TooLong):
        trace.step(request_for("dense1d", 4), limit=100)


def test_an_operation_counts_once_for_every_tensor_that_it_makes() -> None:
    """To split a long sequence into its chunks takes as long as it has chunks."""
    with FakeTensorMode(), trace.Meter("cpu", None) as meter:
        torch.zeros(100, 2).unbind()
    assert meter.trace.operations == 101


def test_bert_is_traced_too() -> None:
    assert trace.step(request_for("dense1d", 8, objective="bert")).bytes > 0


@ON_LINUX
@pytest.mark.serial
def test_long_tables_and_counts_take_no_memory() -> None:
    """Laid out, who sees whom among 147,456 slots took 1 GB: it is counted in slices, and no large table is made."""
    meter = measure.PeakMeter("cpu")
    for variant in ("strided", "fixed"):
        predict.Predictor(request_for(variant, 384))(384, 384)
    assert meter.bytes() < 300e6


# --- few layers, few rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", ["dense1d", "dense-relbias2d", "local2d", "axial", "gla", "based", "hybrid-local2d", "pixelcnn"]
)
def test_many_layers_from_few(variant: str) -> None:
    request = request_for(variant, 12, depth=16, dim=32)
    found = predict.Predictor(request)(12, 12)
    model = trace.build(request)
    # relbias2d has a table of all layers: only so deep has it, and each of its moments, a page for malloc's header.
    pages = 3 * trace.PAGE if variant == "dense-relbias2d" else 0
    assert found.bytes + pages == pytest.approx(trace.step(request).bytes, rel=1e-3)
    assert found.flops == model.flops()  # type: ignore[operator]
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_layers_are_counted_from_both_ends() -> None:
    names = ["tokens", "blocks.0.gain", "blocks.1.gain", "stages.0.0.w", "stages.1.0.w", "stages.1.1.w"]
    last = ["tokens", "blocks.-2.gain", "blocks.-1.gain", "stages.-2.-1.w", "stages.-1.-2.w", "stages.-1.-1.w"]
    assert trace._names(names) == list(zip(names, last, strict=True))


def test_many_rows_from_few(monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(request_for("deltanet", 24, depth=2), height=64)
    whole = trace.step(request).bytes
    monkeypatch.setattr(predict, "OPERATIONS", 100)
    assert predict.peak_bytes(request) == pytest.approx(whole, rel=0.01)


def test_few_rows_that_do_otherwise_are_not_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that computes in groups from 20 rows on, and then needs no more, however high it is."""
    count = 0

    def traced(request: Request, limit: int | None) -> predict.Figures:
        nonlocal count
        if limit is not None:
            raise trace.TooLong("for the line's sake")
        count += 1
        return {("update", "activations"): Fraction(1000 * request.height if request.height < 20 else 5000)}

    monkeypatch.setattr(predict, "_traced", traced)
    request = replace(request_for("dense1d", 32, depth=2), height=100)
    assert predict._small_heights(request, 1, 256)[:2] == [12, 20]
    assert predict.peak_bytes(request) == 5000
    assert predict.peak_bytes(replace(request, height=32)) == 5000
    assert count > 4


def test_rows_that_fill_a_loop_late_are_told_from_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 rows of 73 pixels fill groups of 512 slots; so do 512 pixels in a column. The line through a few groups is
    1.2 MB below, as it is with rows that fill them soon."""
    request = replace(request_for("based", 73, depth=2), height=91)
    whole = trace.step(request).bytes
    sizes: list[int] = []

    def traced(request: Request, limit: int | None) -> predict.Figures:
        sizes.append(request.height * request.width)
        if limit is not None:
            raise trace.TooLong("for the column's sake")
        peaks = trace.step(request).peaks
        return {(place, kind): Fraction(size) for place, kinds in peaks.items() for kind, size in kinds.items()}

    monkeypatch.setattr(predict, "_traced", traced)
    monkeypatch.setattr(predict, "MANY", 1)
    assert predict.peak_bytes(request) == pytest.approx(whole, rel=0.015)
    assert max(sizes[1:]) < 5000 < sizes[0]


@pytest.mark.parametrize(("position", "options"), [("learned2d", {}), (None, {"band": 4})])
def test_what_knows_rows_is_not_told_from_a_column(position: str | None, options: dict[str, int]) -> None:
    told = replace(request_for("decay2d" if options else "based", 300), height=200)
    model = told.config.model.model_copy(update={"options": options, "backend": "blocked"})
    config = told.config.model_copy(update={"position": position, "model": model})
    assert predict._is_as_a_column(replace(request_for("based", 300), height=201))
    assert not predict._is_as_a_column(replace(told, config=config))


@pytest.mark.parametrize("variant", ["dense1d", "local2d", "strided", "axial", "linear"])
def test_flops_of_many_rows_from_few(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(request_for(variant, 24, depth=1), height=96)
    monkeypatch.setattr(predict, "LONG", 1)
    figures = predict._size(request, walked=True)
    assert figures["model", "flops"] == trace.build(request).flops()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("variant", "height", "width", "options"),
    [("local2d", 96, 24, {"radius": 40}), ("block2d", 96, 24, {"block": 24, "memory": 8}),
     ("local1d", 96, 24, {"window": 1000}), ("axial", 4, 64, {}), ("axial", 64, 4, {}),
     ("fixed", 9, 32, {"columns": 9})],
)  # fmt: skip
def test_flops_whatever_the_reach_and_the_grid(
    variant: str, height: int, width: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reach beyond the few rows that are counted, a block that does not divide them, rows unlike columns, an option
    that only the whole width allows."""
    told = request_for(variant, 24, depth=8)
    model = told.config.model.model_copy(update={"options": options})
    request = replace(told, config=told.config.model_copy(update={"model": model}), height=height, width=width)
    monkeypatch.setattr(predict, "LONG", 1)
    predictor = predict.Predictor(request)
    figures = predictor._deep([(d, predict._size(r, walked=True)) for d, r in predictor._shallow(height, width)])
    assert figures["model", "flops"] == trace.build(request).flops()  # type: ignore[operator]


# --- against the child that really trains -----------------------------------------------------------------------------


def agrees(variant: str, side: int, batch: int, **told: Any) -> None:
    """With the median of three children: of a small model's peak single ones differ by up to 3 %."""
    request = request_for(variant, side, batch)
    train = request.config.train.model_copy(update=told)
    request = replace(request, config=request.config.model_copy(update={"train": train}))
    measured = statistics.median(measure.peak_bytes(request) for _ in range(3))
    assert predict.peak_bytes(request) == pytest.approx(measured, rel=0.02)


@ON_LINUX
@pytest.mark.serial
@pytest.mark.parametrize(
    ("variant", "side", "batch"),
    [("dense1d", 8, 128), ("local2d", 16, 32), ("linear", 32, 8), ("resnet", 32, 8), ("resnet", 32, 64)],
)
def test_within_two_percent_of_the_measured_peak(variant: str, side: int, batch: int) -> None:
    agrees(variant, side, batch)


@ON_LINUX
@pytest.mark.serial
@pytest.mark.parametrize(("variant", "side", "batch"), [("dense1d", 16, 32), ("local2d", 32, 8)])
@pytest.mark.parametrize("told", [{"recompute": True}, {"optimiser": "muon", "accumulate": 2}])
def test_within_two_percent_however_it_is_trained(variant: str, side: int, batch: int, told: dict[str, Any]) -> None:
    agrees(variant, side, batch, **told)


@ON_LINUX
@pytest.mark.soak
@pytest.mark.parametrize(("side", "batch"), SIDES)
@pytest.mark.parametrize("variant", list(models.VARIANTS))
def test_every_variant_within_two_percent(variant: str, side: int, batch: int) -> None:
    agrees(variant, side, batch)


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [1, 2, 31, 32, 33, 76, 1000, 30_000])
@pytest.mark.parametrize("power", [2, 4])
def test_the_largest_side(answer: int, power: int) -> None:
    asked: list[int] = []

    def bytes_of(side: int) -> int:
        asked.append(side)
        return 1000 + 7 * side**power

    assert plan.largest_side(bytes_of, bytes_of(answer)) == answer
    assert plan.largest_side(bytes_of, bytes_of(answer + 1) - 1) == answer
    assert len(asked) < 60


def test_no_side_fits() -> None:
    assert plan.largest_side(lambda side: 10 + side, 10) == 0
    assert plan.largest_side(lambda side: 10 + side, 10, turns=[5, 40]) == 0


@pytest.mark.parametrize("turns", [[23], [6, 23], [6, 23, 200], [2, 6, 31, 32, 33]])
def test_the_largest_side_where_bytes_fall(turns: list[int]) -> None:
    """By half, at each turn; of all sides, not of those that a search happens to meet."""

    def bytes_of(side: int) -> int:
        return 1000 + side**2 * 2 ** (8 - sum(side >= turn for turn in turns))

    for limit in (bytes_of(side) + extra for turn in turns for side in range(turn - 2, turn + 9) for extra in (-1, 0)):
        most = max((side for side in range(1, 2000) if bytes_of(side) <= limit), default=0)
        assert plan.largest_side(bytes_of, limit, turns) == most


def test_bytes_fall_at_turns_alone() -> None:
    """`based` computes 512 slots, which are fewer than 23², in a group; from the second on it does so twice."""
    predictor = predict.Predictor(request_for("based", 8))
    needs = [predictor.bytes(side, side) for side in range(20, 27)]
    falls = [low > high for low, high in itertools.pairwise(needs)]
    assert falls == [False, False, True, False, False, False] and predictor.turns() == [23]
    assert predict.Predictor(request_for("local2d", 8)).turns() == []
    assert predict.Predictor(request_for("pixelcnn", 8)).turns() == []


def test_one_answer_whatever_else_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """The larger of two sides whose memory is about the same: 20, and 32 with groups."""
    answers = set()
    for more in ([], ["--side", "8"]):
        plan.main(["--variant", "based", "--memory", "25MB", *more])
        answers.add(capsys.readouterr().out.splitlines()[-1])
    (answer,) = answers
    assert int(answer.split(": ")[1].split()[0]) > 22, answer


def test_no_larger_side_is_looked_for_and_that_is_said() -> None:
    said = plan._answer("80GB", 10**9, lambda side: side, ())
    assert "32768 or more (1,073,741,824 tokens" in said and "32769" not in said
    assert "or more" not in plan._answer("80GB", plan.LARGEST - 1, lambda side: side, ())


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_preset_is_the_default_and_flags_win() -> None:
    config = plan.parse(["--side", "32", "--preset", "igpt-m", "--model.heads", "16"])
    assert (config.model.dim, config.model.depth, config.model.heads) == (1024, 36, 16)
    assert config.run().model == ModelConfig(dim=1024, depth=36, heads=16)
    assert plan.parse(["--side", "32"]).model == ModelConfig()


def test_the_last_of_two_presets_wins() -> None:
    config = plan.parse(["--side", "32", "--preset", "igpt-m", "--preset=igpt-s"])
    assert (config.preset, config.model.dim) == ("igpt-s", plan.PRESETS["igpt-s"]["dim"])


@pytest.mark.parametrize(
    ("preset", "millions"), [("igpt-s", 76.57), ("igpt-m", 455.16), ("igpt-l", 1362.25), ("igpt-xl", 6801.4)]
)
def test_the_papers_parameters(preset: str, millions: float) -> None:
    config = plan.parse(["--side", "32", "--preset", preset]).run()
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "float32"})})
    found = predict.Predictor(Request(config, 32, 32, 512))
    assert found(32, 32).parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--side", "0"],
        ["--side", "8", "--height", "8", "--width", "8"],
        ["--height", "8"],
        ["--side", "8", "--preset", "igpt-xxl"],
        ["--side", "8", "--memory", "80XB"],
        ["--memory", "0GB"],
        ["--side", "8", "--model.heads", "7"],
        ["--side", "8", "--preset", "igpt-s", "--model.heads", "7"],
        ["--sied", "8"],
        ["--side", "8", "--train.batch", "3", "--train.accumulate", "2"],
    ],
)
def test_bad_input_is_refused(argv: list[str]) -> None:
    with pytest.raises(Refusal) as refused:
        plan.parse(argv)
    assert "\n" not in str(refused.value)


def test_the_step_is_told_as_a_runs_is(capsys: pytest.CaptureFixture[str]) -> None:
    """By the same names, with the same words; but for one image, and in the precision of a CPU."""
    shared = StepConfig.model_fields
    assert plan.PlannedStep.model_fields.keys() == shared.keys() and shared.keys() < TrainConfig.model_fields.keys()
    assert all(plan.PlannedStep.model_fields[name].description == told.description for name, told in shared.items())
    flags = ["--train.recompute", "--train.optimiser", "muon", "--train.batch", "4", "--train.accumulate", "2"]
    run = plan.parse(["--side", "8", *flags]).run().train
    assert run == TrainConfig(recompute=True, optimiser="muon", batch=4, accumulate=2, precision="float32")
    assert plan.parse(["--side", "8"]).run().train == TrainConfig(batch=1, precision="float32")
    assert plan.main(["--side", "4", *flags]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "GB, 4 images a step, in 2 parts, float32, muon, recomputed" in said


def test_recomputing_takes_less_memory() -> None:
    needs = []
    for more in ([], ["--train.recompute"]):
        config = plan.parse(["--side", "32", "--train.batch", "8", *more]).run()
        needs.append(predict.peak_bytes(Request(config, 32, 32, 17)))
    assert needs[1] < 0.5 * needs[0]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--side", "8", "--memory", "60MB", "--model.depth", "2"]) == 0
    said = capsys.readouterr().out
    assert "peak memory" in said and "largest side that fits into 60MB: " in said


OWN = """
import models, torch

class Empty(models.Mixer):
    pass

class Wrong(models.Mixer):
    def forward(self, q, k, v):
        return v @ torch.zeros(3, 3)

class Uncounted(models.Mixer):
    def forward(self, q, k, v):
        return v
"""


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("Empty", ["--side", "6"], "NotImplementedError: Empty has no flops; write one"),
        ("Empty", ["--memory", "1MB"], "NotImplementedError: Empty has no forward; write one"),
        ("Wrong", ["--memory", "1MB"], "RuntimeError: "),
        ("Uncounted", ["--memory", "1MB"], None),  # nobody asked for its FLOPs
    ],
)
def test_an_own_attention_that_fails_is_refused(name: str, asked: list[str], words: str | None, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    argv = ["--variant", f"{file}:{name}", "--model.depth", "2", *asked]
    try:
        said = f"{plan.main(argv)}"
    except Refusal as refusal:
        said = str(refusal)
    finally:
        models.VARIANTS.pop(f"{file}:{name}", None)
    if words is None:
        assert said == "0"
    else:
        assert said.startswith(f"{file}:{name}: {words}") and said.endswith("; mend it") and "\n" not in said


def test_a_bug_of_the_catalogues_own_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> int:
        raise NotImplementedError("a bug")

    monkeypatch.setattr(models.VARIANTS["local2d"].cls, "flops", broken)
    with pytest.raises(NotImplementedError):
        plan.main(["--variant", "local2d", "--side", "4"])


@pytest.mark.gpu
def test_a_model_for_cuda_is_built_without_memory() -> None:
    """Parameters and tables on the device that the run would have; torch for CPU makes not even fake ones there."""
    told = TrainConfig(precision="float32")
    request = measure.Request(RunConfig(variant="dense-rope2d", device="cuda", train=told), 6, 6, 8)
    model = trace.build(request)
    placed = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in placed} == {"cuda"}
    like = train.make_model(request.config.model_copy(update={"device": "cpu"}), *request.shape)
    assert [p.shape for p in model.parameters()] == [p.shape for p in like.parameters()]
