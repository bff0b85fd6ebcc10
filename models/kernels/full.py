"""Dense softmax attention on CPU (full.cpp) as a torch operator: eager, under autograd, fake tensors, torch.compile.

Shapes: q, k, v, out (batch, heads, seq, head_dim); stats (batch, heads, 2, seq): of each query the greatest score, in
powers of two, and 1 / Σ of the weights, from which the backward pass computes them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiler import call
from .layout import dense, like


def full(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(QKᵀ/√d)V over all keys, or with `causal` over those no later than the query.

    float32 or float64 on CPU.  The result lies in memory as (batch, seq, heads, head_dim).
    """
    return _Full.apply(q, k, v, causal)


@torch.library.custom_op("attnbench::full", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, stats = _shapes(q, k, v, causal)
    call("full", "full_forward", (*q.shape, causal), q.shape[3] ** -0.5, dense(q), dense(k), dense(v), out, stats)
    return out, stats


@_forward.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[0], q.shape[1], 2, q.shape[2])


@torch.library.custom_op("attnbench::full_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = like(q), like(k), like(v)
    given = (dense(x) for x in (q, k, v, grad, out))
    call("full", "full_backward", (*q.shape, causal), q.shape[3] ** -0.5, *given, *grads, stats)
    return grads


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v)


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out, stats = _forward(q, k, v, causal)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, ctx.causal), None)
