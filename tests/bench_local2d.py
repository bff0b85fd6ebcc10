"""local2d, radius 3, against dense attention and against the peers' windows: `pytest --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

from models import backends, kernels
from models.geometry import Grid, Scan, window2d
from tests.timing import PHASES, dense, inputs, mixer_at, passed, ratio, time_attention, work_of

RADIUS = 3


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("backend", "side"), [("compiled", 32), ("compiled", 64), ("compiled", 128), ("blocked", 64)])
def test_local2d(benchmark: Any, backend: str, phase: str, side: int) -> None:
    if backend == "compiled" and (reason := kernels.missing("local2d")):
        pytest.skip(reason)
    mixer = mixer_at("local2d", side, backend)
    time_attention(benchmark, "local2d", backend, mixer, mixer.flops(), side, phase)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("phase", PHASES)
def test_dense(benchmark: Any, phase: str, side: int) -> None:
    mixer = mixer_at("dense1d", side)
    time_attention(benchmark, "dense1d", passed("dense1d", "sdpa"), dense, mixer.flops(), side, phase)


def test_compiled_flex_attention_at_the_same_window(benchmark: Any) -> None:
    """Forward alone: on CPU it has no backward pass.  Compiled here, because backends.flex is not, on a CPU."""
    scan, compiled = Scan(Grid(64, 64)), torch.compile(flex_attention)
    mask = backends.flex_plan(window2d(scan, RADIUS), 64 * 64, torch.device("cpu")).block_mask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out

    with torch.no_grad():
        q, k, v = inputs(64)
        assert_close(attend(q, k, v), mixer_at("local2d", 64)(q, k, v), rtol=1e-4, atol=1e-4)
    flops = mixer_at("local2d", 64).flops()
    time_attention(benchmark, "local2d", "flex", attend, flops, 64, "forward")
    ours = work_of(mixer_at("local2d", 64), 64, "forward")
    benchmark.extra_info["times_slower_than_ours"] = ratio(work_of(attend, 64, "forward"), ours)


def test_natten_at_the_same_window(benchmark: Any) -> None:
    """Forward alone, through FlexAttention: on CPU NATTEN has no kernel of its own."""
    pytest.importorskip("natten", reason="natten is not installed (extra gpu)")
    scan = Scan(Grid(64, 64))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backends.natten(q, k, v, scan, RADIUS)

    with torch.no_grad():
        q, k, v = inputs(64)
        assert_close(attend(q, k, v), mixer_at("local2d", 64)(q, k, v), rtol=1e-4, atol=1e-4)
    time_attention(benchmark, "local2d", "natten", attend, None, 64, "forward")
    ours = work_of(mixer_at("local2d", 64), 64, "forward")
    benchmark.extra_info["times_slower_than_ours"] = ratio(work_of(attend, 64, "forward"), ours)
