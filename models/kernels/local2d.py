"""Local 2D attention on CPU (local2d.cpp) as a torch operator: eager, under autograd, fake tensors and torch.compile.

Shapes: q, k, v, out (batch, heads, seq, head_dim), seq = height · width; stats (batch, heads, 2, seq): of each query
the greatest score, in powers of two, and 1 / Σ of the weights, from which the backward pass computes them again; bias
(heads, offsets), a number that is added to the scores of each offset, in the order of `offsets`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiler import call
from .layout import dense, like


def local2d(
    q: Tensor, k: Tensor, v: Tensor, height: int, width: int, radius: int, bias: Tensor | None = None
) -> Tensor:
    """Softmax attention over the start token and the raster-earlier pixels within `radius` (geometry.window2d, "ar").

    float32 or float64 on CPU.  The result lies in memory as (batch, seq, heads, head_dim).
    """
    return _Local2D.apply(q, k, v, bias, height, width, _reach(height, width, radius))


def offsets(height: int, width: int, radius: int) -> tuple[Tensor, Tensor]:
    """A query and a key, int64 (offsets,) each, that stand at each offset: the start token; then rows of keys from the
    farthest above to the query's own, left to right.  An offset too great for the grid has the start token's pair."""
    reach = _reach(height, width, radius)
    pairs = [(0, 0)]
    for down in range(reach, -1, -1):
        for right in range(reach, -reach - 1 if down else 0, -1):
            fits = down < height and abs(right) < width
            query = down * width + max(0, right)
            pairs.append((query, query - down * width - right + 1) if fits else (0, 0))
    query, key = torch.tensor(pairs).T.clone()
    return query, key


def working_rows(height: int, width: int, radius: int) -> int:
    """How many numbers a backward pass keeps for each thread: weights and slopes of R + 1 rows, for every offset.

    Where images are lanes it is R + 1 rows of keys, values and their gradients instead, at most 4 MiB.
    """
    reach = _reach(height, width, radius)
    return 2 * (reach + 1) * (2 * reach * (reach + 1) + 1) * (width + 2 * reach)


def _reach(height: int, width: int, radius: int) -> int:
    """A radius beyond the grid is as good as the grid's."""
    return min(radius, max(height, width))


@torch.library.custom_op("attnbench::local2d", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, height: int, width: int, radius: int
) -> tuple[Tensor, Tensor]:
    out, stats = _shapes(q, k, v, bias, height, width, radius)
    shape = (q.shape[0], q.shape[1], height, width, q.shape[3], radius)
    given = dense(q), dense(k), dense(v)
    call("local2d", "local2d_forward", shape, q.shape[3] ** -0.5, *given, out, stats, _numbers(bias, q))
    return out, stats


@_forward.register_fake
def _shapes(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, height: int, width: int, radius: int
) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[0], q.shape[1], 2, q.shape[2])


@torch.library.custom_op("attnbench::local2d_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, bias: Tensor | None,
    height: int, width: int, radius: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _gradients(grad, q, k, v, out, stats, bias, height, width, radius)
    shape = (q.shape[0], q.shape[1], height, width, q.shape[3], radius)
    given = (*(dense(x) for x in (q, k, v, grad, out)), *grads[:3], stats, _numbers(bias, q), grads[3][None, None])
    call("local2d", "local2d_backward", shape, q.shape[3] ** -0.5, *given)
    return grads


@_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, bias: Tensor | None,
    height: int, width: int, radius: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return like(q), like(k), like(v), q.new_empty((0, 0) if bias is None else bias.shape)


def _numbers(bias: Tensor | None, q: Tensor) -> Tensor:
    """The bias as `call` takes it, in the dtype of the scores; without one a tensor at no address."""
    return q.new_empty(1, 1, 0, 0) if bias is None else bias.to(q.dtype).contiguous()[None, None]


class _Local2D(torch.autograd.Function):
    """Ties the two operators together, with a little less overhead a call than a registered autograd formula."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, height: int, width: int, radius: int
    ) -> Tensor:
        out, stats = _forward(q, k, v, bias, height, width, radius)
        ctx.save_for_backward(q, k, v, out, stats, bias)
        ctx.grid = height, width, radius
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: where activations are recomputed, a second time is an error
        *grads, bias = _backward(grad, *saved, *ctx.grid)
        return (*grads, None if saved[-1] is None else bias, None, None, None)
