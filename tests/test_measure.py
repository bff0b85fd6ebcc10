"""The meters tell the truth: known allocations, known durations, children of large parents, children that die."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnbench import clock, measure
from attnbench.config import ModelConfig, RunConfig, TrainConfig

MEGABYTE = 2**20
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the meter is /proc's")


def request_for(objective: str = "ar", depth: int = 2, batch: int = 64) -> measure.Request:
    model = ModelConfig(dim=64, depth=depth, heads=2, objective=objective)  # type: ignore[arg-type]
    train = TrainConfig(batch=batch, precision="float32")
    return measure.Request(RunConfig(model=model, train=train, device="cpu"), 8, 8, 17)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def large_parent() -> Iterator[None]:
    """This process holds 500 MB while the test runs."""
    held = bytearray(os.urandom(1)) * (500 * MEGABYTE)
    yield
    del held


@ON_LINUX
@pytest.mark.usefixtures("large_parent")
def test_a_large_parent_hides_nothing() -> None:
    """`ru_maxrss` of a child starts at its parent's peak: by that meter, this child would need 0 bytes."""
    got = measure.in_child("meter", {"bytes": 80 * MEGABYTE, "each": MEGABYTE})["peak_bytes"]
    assert got == pytest.approx(80 * MEGABYTE, rel=0.03)


def _lower_bound(request: measure.Request) -> int:
    """Bytes of parameters, gradients and Adam's two moments of the model."""
    from attnbench import train

    model = train.make_model(request.config, *request.shape)
    return 4 * sum(parameter.nbytes for parameter in model.parameters())


@ON_LINUX
def test_peak_of_training_has_its_parts() -> None:
    """Four times the parameters, and of the activations at least what an MLP and the residual stream must keep."""
    request = request_for(batch=256)
    activations = measure.peak_bytes(request) - _lower_bound(request)
    # images × blocks × tokens × (MLP before and after its nonlinearity, residual twice) × bytes
    must = 256 * 2 * 64 * (2 * 4 * 64 + 2 * 64) * 4
    assert must < activations < 10 * must


# --- time -------------------------------------------------------------------------------------------------------------


def test_timing_is_a_median_with_quartiles() -> None:
    assert measure.Timing.of([4.0, 1.0, 3.0, 2.0, 100.0]) == measure.Timing(median=3.0, low=2.0, high=4.0, n=5)
    assert measure.Timing.of([7.0]) == measure.Timing(7.0, 7.0, 7.0, 1)


@pytest.mark.serial
def test_rates_of_a_known_duration() -> None:
    timing = measure.rates(lambda: time.sleep(0.02), images=10, budget=0.5)
    assert timing.low <= timing.median <= timing.high <= 500
    assert timing.median == pytest.approx(500, rel=0.2)
    assert 3 <= timing.n <= 25  # 25 fit the budget on a quiet machine; three are taken on any


def test_warm_up_is_not_timed() -> None:
    durations = iter([0.2] + [0.001] * 10_000)
    timing = measure.rates(lambda: time.sleep(next(durations)), images=1, budget=0.05)
    assert timing.low > 1 / 0.2


@pytest.mark.parametrize(("duration", "calls"), [(0.03, 4), (0.3, 2)])
def test_slow_work_is_repeated_less(duration: float, calls: int) -> None:
    """Three repeats unless they take four budgets; and a warm-up beyond the budget is the last."""
    seen: list[float] = []

    def work() -> None:
        seen.append(duration)
        time.sleep(duration)

    timing = measure.rates(work, images=1, budget=0.02)
    assert len(seen) == timing.n + 1
    assert len(seen) <= calls


def test_nothing_is_collected_while_timing() -> None:
    import gc

    states = []
    measure.rates(lambda: states.append(gc.isenabled()), images=1, budget=0.001, warmup=1)
    assert states[0] and not any(states[1:])
    assert gc.isenabled()


def test_stopwatch() -> None:
    watch = clock.Stopwatch()
    time.sleep(0.02)
    assert 0.02 <= watch.seconds < 5


RATES = ["train_images_per_second", "eval_images_per_second", "sample_images_per_second"]


def test_throughput() -> None:
    found = measure.throughput(request_for(), budget=0.6)
    assert set(found) == {*RATES, "state_bytes_per_image"}
    for key in RATES:
        assert 0 < found[key]["low"] <= found[key]["median"] <= found[key]["high"] and found[key]["n"] >= 1
    assert found["eval_images_per_second"]["median"] > found["train_images_per_second"]["median"]
    # Dense decoding keeps keys and values (64 wide, 4 bytes, 2 layers) of 64 slots, and little besides.
    pixels = found["state_bytes_per_image"] / (2 * 2 * 64 * 4)
    assert 63 <= pixels <= 66


def test_bert_does_not_decode() -> None:
    found = measure._measure_time(request_for("bert", depth=1).dump() | {"budget": 0.1})
    assert found["train_images_per_second"]["n"] >= 1
    assert found["sample_images_per_second"] is None and found["state_bytes_per_image"] is None


@dataclass
class State:
    layers: list[dict[str, Any]]
    slot: int


def test_state_bytes_counts_memory_once() -> None:
    cache, table = torch.zeros(4, 100), nn.Linear(10, 10, bias=False)
    assert measure.state_bytes(State([{"k": cache, "v": (cache[:, :5], cache.T)}], 3)) == 1600
    assert measure.state_bytes([cache.expand(50, 4, 100), torch.zeros(3, dtype=torch.int64)]) == 1624
    assert measure.state_bytes([cache, table.weight, table.weight[0]], table) == 1600
    assert measure.state_bytes(None) == 0


class Slow(nn.Module):
    """Decodes a pixel in 20 ms."""

    def start(self, batch: int) -> int:
        return batch

    def step(self, pixel: Tensor | None, state: int) -> tuple[Tensor, int]:
        time.sleep(0.02)
        return torch.zeros(state, 17), state


def test_decoding_that_takes_too_long_is_given_up() -> None:
    watch = clock.Stopwatch()
    assert measure._sampling(Slow(), request_for(), budget=0.002) == dict.fromkeys(
        ["sample_images_per_second", "state_bytes_per_image"]
    )
    assert watch.seconds < 1


# --- children ---------------------------------------------------------------------------------------------------------


def test_a_request_survives_the_way() -> None:
    request = request_for("bert")
    assert measure.Request.parse(json.loads(json.dumps(request.dump()))) == request


@pytest.mark.parametrize("config", [RunConfig(device="cpu"), RunConfig(train=TrainConfig(precision="float32"))])
def test_what_runs_is_measured_and_not_what_might(config: RunConfig) -> None:
    with pytest.raises(ValueError, match="resolve"):
        measure.Request(config, 8, 8, 17)


def test_an_error_in_the_child_is_told() -> None:
    with pytest.raises(measure.ChildFailed, match=r"exit status 1.*KeyError: 'each'") as failed:
        measure.in_child("meter", {"bytes": 1})
    assert failed.value.kind == "meter" and not failed.value.out_of_memory
    assert any("Traceback" in line for line in failed.value.tail)


def test_too_much_memory_is_told() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, device="cpu")
    assert measure.ChildFailed("memory", "ended with exit status 1", str(error.value).splitlines()).out_of_memory


ENDINGS = [
    ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
    ("import os; os.write(2, b'\\xff last words'); os.abort()", "SIGABRT.*last words"),
    ("print('not JSON')", "gave no answer"),
    ("print('7')", "gave no answer"),
    ("pass", "gave no answer"),
    ("raise SystemExit(3)", "exit status 3"),
    ("import sys, time; print('slow', file=sys.stderr, flush=True); time.sleep(60)", "took more than 0.5 s: slow"),
]


@pytest.mark.parametrize(("script", "message"), ENDINGS)
def test_how_a_child_ended_is_told(monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    monkeypatch.setattr(measure, "_command", lambda kind: [sys.executable, "-c", script])
    timeout = 0.5 if "0.5" in message else 60
    with pytest.raises(measure.ChildFailed, match=message):
        measure.in_child("time", {"large": "x" * 1_000_000}, timeout)


def test_the_child_is_told_its_malloc_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert measure._environment("memory")["MALLOC_MMAP_THRESHOLD_"] == "65536"
    assert "MALLOC_MMAP_THRESHOLD_" not in measure._environment("time")
    assert measure._environment("time")["OMP_NUM_THREADS"] == "1"


def _said(program: str, *argv: str, **told: str) -> str:
    """What a process prints whose malloc was told this alone."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", program, *argv]
    return subprocess.run(command, env=given | told, capture_output=True, text=True, check=True).stdout


FAULTS = """
import resource, torch
from attnbench import measure
kept = measure.keep_freed()
faults = []
for _ in range(5):  # until the heap has room for each of them between what else lies there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in range(1, 9):
        torch.ones(size * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize(("told", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_malloc_keeps_what_is_freed_unless_it_was_told_otherwise(told: dict[str, str], kept: bool) -> None:
    answer, faults = _said(FAULTS, **told).split()
    assert (answer == "True", int(faults) < 4000) == (kept, kept)  # of 36,864 pages; a system may take some away


RESERVED = """
import resource, sys, torch
from attnbench import duel
duel.reserve(int(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize(("told", "size", "reserved"), [
    ({}, 2**28, True), ({}, 0, False), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, 2**28, False),
])  # fmt: skip
def test_what_is_reserved_needs_no_new_pages(told: dict[str, str], size: int, reserved: bool) -> None:
    assert (int(_said(RESERVED, str(size), **told)) < 4000) == reserved  # of 32,768; a system may take some away


GIVEN_BACK = """
import pathlib, resource, torch
from attnbench import measure
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
measure.keep_freed()
tensors = [torch.ones(2**22) for _ in range(32)]  # 512 MiB, and one that keeps the heap from shrinking
last = torch.ones(2**10)
del tensors
kept = resident()
try:
    measure.in_child("nothing", {}, 60)
except measure.ChildFailed:
    print(kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_child_may_have_what_its_parent_freed() -> None:
    assert int(_said(GIVEN_BACK)) > 400 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda() -> None:
    request = request_for()
    request = measure.Request(request.config.model_copy(update={"device": "cuda"}), *request.shape)
    assert measure.peak_bytes(request) > _lower_bound(request)
    assert measure.throughput(request, budget=0.6)["train_images_per_second"]["median"] > 0


def test_what_a_child_knew_when_it_was_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers as it goes; the last answer before the limit, or before it failed, is kept."""
    lines = (
        "import time; from attnbench import measure",
        "def slow(told):",
        "    yield {'known': 1}",
        "    yield {'known': 2}",
        "    time.sleep(60) if told['slow'] else 1 / 0",
        "measure.main({'time': slow})",
    )
    (tmp_path / "answering.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for told, limit, ending in (({"slow": True}, 8.0, "took more than 8 s"), ({"slow": False}, 60.0, "exit status 1")):
        with pytest.raises(measure.ChildFailed, match=ending) as failed:
            measure.in_child("answering:time", told, limit)
        assert failed.value.answer == {"known": 2}
