"""Decay by the two-dimensional offset on CPU (decay2d.cpp) as a torch operator: autograd, fake tensors, torch.compile.

Shapes: q, k, v, out (batch, heads, seq, head_dim), seq = height · width; fades (2, heads): λ_row and λ_col.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .compiler import call
from .layout import dense, like


def decay2d(q: Tensor, k: Tensor, v: Tensor, fades: Tensor, height: int, width: int, later: bool = False) -> Tensor:
    """Σ λ_row^|Δrow| λ_col^|Δcol| (q·k) v over the raster-earlier pixels, or over the later ones.

    float32 or float64 on CPU; no gradient of the fades.  The result lies in memory as (batch, seq, heads, head_dim).
    """
    return _Decay2D.apply(q, k, v, fades, height, width, later)


@torch.library.custom_op("attnbench::decay2d", mutates_args=(), device_types="cpu")
def _summed(x: Tensor, a: Tensor, b: Tensor, fades: Tensor, height: int, width: int, later: bool) -> Tensor:
    """Σ λ_row^|Δrow| λ_col^|Δcol| (x·a) b: what the output is, and each gradient too."""
    out, fades = like(b), fades.to(x.dtype).contiguous()[None, None]
    shape = (*x.shape[:2], height, width, x.shape[3], b.shape[3], int(later))
    call("decay2d", "decay2d", shape, 0.0, dense(x), dense(a), dense(b), out, fades)
    return out


@_summed.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, fades: Tensor, height: int, width: int, later: bool) -> Tensor:
    return like(b)


class _Decay2D(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, fades: Tensor, height: int, width: int, later: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, fades)
        ctx.settings = height, width, later
        return _summed(q, k, v, fades, height, width, later)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, fades), (height, width, later) = ctx.saved_tensors, ctx.settings
        # A key is read by queries on the other side of it.
        sides = (fades, height, width, later), (fades, height, width, not later)
        made = _summed(grad, v, k, *sides[0]), _summed(v, grad, q, *sides[1]), _summed(k, q, grad, *sides[1])
        return (*made, None, None, None, None)


@register_flop_formula(torch.ops.attnbench.decay2d)
def _flops(x: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Two matrices a pixel, each with an outer product more and read once."""
    return 8 * x.numel() * b[3]
