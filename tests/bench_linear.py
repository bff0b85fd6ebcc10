"""Linear attention against dense attention and the causal forms of two peers: `pytest --benchmark-only`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbench.config import threads
from models import kernels
from tests.timing import PHASES, Attend, mixer_at, ratio, time_attention, times_slower, work_of

SIDE = 64
"""Of the image that peers are given."""


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("backend", "side"), [("compiled", 32), ("compiled", 64), ("compiled", 128), ("blocked", 64)])
def test_linear(benchmark: Any, backend: str, phase: str, side: int) -> None:
    if backend == "compiled" and (reason := kernels.missing("linear")):
        pytest.skip(reason)
    mixer = mixer_at("linear", side, backend)
    time_attention(benchmark, "linear", backend, mixer, mixer.flops(), side, phase)


def linear_attention_transformer() -> Attend:
    """Its own features, softmax(q) and exp(k), in buckets of 64."""
    peer: Any = import_module("linear_attention_transformer.linear_attention_transformer")
    attend: Attend = peer.causal_linear_attn
    return attend


def performer_pytorch() -> Attend:
    """What its causal form does without its CUDA kernel, given the same features as ours."""
    peer: Any = import_module("performer_pytorch.performer_pytorch")
    feature: Any = mixer_at("linear", SIDE).feature

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = peer.causal_linear_attention_noncuda(feature(q), feature(k), v)
        return out

    return attend


PEERS = {peer.__name__: peer for peer in (linear_attention_transformer, performer_pytorch)}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("package", PEERS)
def test_peer(benchmark: Any, package: str, phase: str) -> None:
    pytest.importorskip(package, reason=f"{package.replace('_', '-')} is not installed (peers)")
    time_attention(benchmark, "linear", package, PEERS[package](), None, SIDE, phase)
    benchmark.extra_info.update(times_slower(against_ours, package, phase))


def against_ours(package: str, phase: str) -> dict[str, Any]:
    torch.set_num_threads(threads())
    ours = work_of(mixer_at("linear", SIDE), SIDE, phase)
    return ratio(work_of(PEERS[package](), SIDE, phase), ours, rounds=9)
