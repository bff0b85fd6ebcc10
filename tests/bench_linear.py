"""Linear attention against dense attention and the causal forms of two peers: `pytest --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from models import kernels
from tests.timing import PHASES, mixer_at, ratio, time_attention, work_of


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("backend", "side"), [("compiled", 32), ("compiled", 64), ("compiled", 128), ("blocked", 64)])
def test_linear(benchmark: Any, backend: str, phase: str, side: int) -> None:
    if backend == "compiled" and (reason := kernels.missing("linear")):
        pytest.skip(reason)
    mixer = mixer_at("linear", side, backend)
    time_attention(benchmark, "linear", backend, mixer, mixer.flops(), side, phase)


@pytest.mark.parametrize("phase", PHASES)
def test_linear_attention_transformer(benchmark: Any, phase: str) -> None:
    """Its own features, softmax(q) and exp(k), in buckets of 64."""
    package = "linear_attention_transformer"
    peer = pytest.importorskip(f"{package}.{package}", reason="linear-attention-transformer is not installed (peers)")
    time_peer(benchmark, peer.causal_linear_attn, package, phase)


@pytest.mark.parametrize("phase", PHASES)
def test_performer_pytorch(benchmark: Any, phase: str) -> None:
    """What its causal form does without its CUDA kernel, given the same features as ours."""
    peer = pytest.importorskip(
        "performer_pytorch.performer_pytorch", reason="performer-pytorch is not installed (peers)"
    )
    feature = mixer_at("linear", 64).feature  # type: ignore[operator]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = peer.causal_linear_attention_noncuda(feature(q), feature(k), v)  # type: ignore[operator]
        return out

    time_peer(benchmark, attend, "performer_pytorch", phase)


def time_peer(benchmark: Any, attend: Any, package: str, phase: str) -> None:
    time_attention(benchmark, "linear", package, attend, None, 64, phase)
    ours = work_of(mixer_at("linear", 64), 64, phase)
    benchmark.extra_info["times_slower_than_ours"] = ratio(work_of(attend, 64, phase), ours, rounds=9)
