"""What the micro-benchmarks share: no variant is timed before its oracle passed in this process, and ratios alternate.

Shapes: q, k, v (batch, heads, seq, head_dim).
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from attnbench.config import threads
from models import VARIANTS, Mixer
from models.geometry import Grid, Scan
from models.mixer import Layer

BATCH, HEADS, HEAD_DIM = 2, 4, 32
LONG = 2.0
"""Seconds of a call from which on one round must do."""

PHASES = ("forward", "forward and backward")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The yardstick of every ratio: torch's fused causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@functools.cache
@torch.enable_grad()
def passed(name: str, backend: str) -> str:
    """The backend that runs the variant, after output and gradients have equalled the oracle's in float64.

    Raises ValueError if the variant refuses the backend, AssertionError if it is wrong: nothing is timed then.
    """
    mixer = VARIANTS[name].cls(Layer(Scan(Grid(9, 11)), 2, HEAD_DIM, backend=backend)).double()
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 99, HEAD_DIM, dtype=torch.float64, requires_grad=True) for _ in range(3))
    results = [
        (out, *torch.autograd.grad(out.sin().sum(), (q, k, v))) for out in (mixer(q, k, v), mixer.oracle(q, k, v))
    ]
    for got, want in zip(*results, strict=True):
        assert_close(got, want, rtol=1e-10, atol=1e-10)
    return mixer.backend


def mixer_at(name: str, side: int, backend: str = "auto") -> Mixer:
    """The variant's attention on a square image, with the backend that passed."""
    made: Mixer = VARIANTS[name].cls(Layer(Scan(Grid(side, side)), HEADS, HEAD_DIM, backend=passed(name, backend)))
    return made


def inputs(side: int, gradients: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, HEADS, side * side, HEAD_DIM, requires_grad=gradients) for _ in range(3)]


def work_of(attend: Attend, side: int, phase: str) -> Callable[[], object]:
    """One call of the attention on new inputs of its own, without or with its backward pass."""
    q, k, v = inputs(side, gradients=phase != "forward")
    upstream = torch.randn(BATCH, HEADS, side * side, HEAD_DIM)
    if phase == "forward":
        return torch.no_grad()(lambda: attend(q, k, v))
    return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), upstream)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 3, repeats: int = 3) -> dict[str, Any]:
    """How many times longer `slow` takes: median and range over rounds, of which every other begins with `slow`.

    A `slow` of LONG seconds or more has one round, which `rounds` says.
    """
    fast()
    if seconds(slow) >= LONG and seconds(slow) >= LONG:  # the first call may load what it needs
        rounds = 1
    values = []
    for turn in range(rounds):
        spent = {}
        for work in (slow, fast) if turn % 2 else (fast, slow):
            spent[work] = statistics.median(seconds(work) for _ in range(repeats if work is fast else 1))
        values.append(spent[slow] / spent[fast])
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": rounds}


def times_slower(compare: Callable[..., dict[str, Any]], *given: str) -> dict[str, Any]:
    """Facts for extra_info: what `compare` says in a new process, and in one where malloc holds a gigabyte of pages.

    In this process glibc's malloc keeps more the larger the tensors that earlier benchmarks freed, so that what takes
    many new ones, as peers do, would be the faster the later it is run.
    """
    found = {}
    for name, first in (
        ("", "pass"),
        ("_where_malloc_holds_pages", "from attnbench.duel import reserve; reserve(2**30)"),
    ):
        told = f"from {compare.__module__} import {compare.__name__} as compare; print(json.dumps(compare(*{given!r})))"
        command = [sys.executable, "-c", f"import json; {first}; {told}"]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[f"times_slower_than_ours{name}"] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that `work` holds of what torch allocates for it; a kernel's own working rows are not in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def describe(benchmark: Any, variant: str, backend: str, phase: str, tokens: int, flops: int | None, peak: int) -> None:
    """The facts that go with a timing; `flops` of all images, None where nobody counted."""
    benchmark.group = f"{phase}, {tokens} tokens"
    benchmark.extra_info.update(
        variant=variant, backend=backend, phase=phase, tokens=tokens, flops=flops, peak_bytes=peak,
        threads=torch.get_num_threads(),
    )  # fmt: skip


def time_attention(
    benchmark: Any, name: str, backend: str, attend: Attend, flops: int | None, side: int, phase: str
) -> None:
    """Times it, and its ratio to dense attention in alternation."""
    torch.set_num_threads(threads())
    work = work_of(attend, side, phase)
    total = None if flops is None else BATCH * flops * (1 if phase == "forward" else 3)
    describe(benchmark, name, backend, phase, side * side, total, peak_bytes(work))
    once = seconds(work)
    if attend is not dense and once < 1:
        benchmark.extra_info["times_faster_than_dense"] = ratio(work_of(dense, side, phase), work)
    benchmark.pedantic(work, rounds=max(1, min(10, int(2 / once))))
