"""Local 2D attention on CPU (local2d.cpp) as a torch operator: eager, under autograd, fake tensors and torch.compile.

Shapes: q, k, v, out (batch, heads, seq, head_dim), seq = height · width; stats (batch, heads, 2, seq): of each query
the greatest score, in powers of two, and 1 / Σ of the weights, from which the backward pass computes them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiler import call
from .layout import dense, like


def local2d(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> Tensor:
    """Softmax attention over the start token and the raster-earlier pixels within `radius` (geometry.window2d, "ar").

    float32 or float64 on CPU.  The result lies in memory as (batch, seq, heads, head_dim).
    """
    return _Local2D.apply(q, k, v, height, width, min(radius, max(height, width)))


@torch.library.custom_op("attnbench::local2d", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> tuple[Tensor, Tensor]:
    out, stats = _shapes(q, k, v, height, width, radius)
    shape = (q.shape[0], q.shape[1], height, width, q.shape[3], radius)
    call("local2d", "local2d_forward", shape, q.shape[3] ** -0.5, dense(q), dense(k), dense(v), out, stats)
    return out, stats


@_forward.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[0], q.shape[1], 2, q.shape[2])


@torch.library.custom_op("attnbench::local2d_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, height: int, width: int, radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = like(q), like(k), like(v)
    shape = (q.shape[0], q.shape[1], height, width, q.shape[3], radius)
    given = (dense(x) for x in (q, k, v, grad, out))
    call("local2d", "local2d_backward", shape, q.shape[3] ** -0.5, *given, *grads, stats)
    return grads


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, height: int, width: int, radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v)


class _Local2D(torch.autograd.Function):
    """Ties the two operators together, with a little less overhead a call than a registered autograd formula."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int) -> Tensor:
        out, stats = _forward(q, k, v, height, width, radius)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.grid = height, width, radius
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, *ctx.grid), None, None, None)
