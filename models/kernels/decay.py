"""Sums that fade on CPU (decay.cpp) as torch operators: eager, under autograd, fake tensors and torch.compile.

Nothing but its arguments is kept for the backward pass: every gradient is a sum of the same kind.

Shapes: q, k (batch, heads, seq, width); v, out (batch, heads, seq, channels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .compiler import call
from .layout import dense, like

ONE, BY_ROW, BY_LANE = 0, 1, 2
"""What fades a slot's matrix a bᵀ: one number, one for each channel of a, or one for each of b."""


def decayed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float = 1.0) -> Tensor:
    """scale · Σ (q_t ∘ exp(log_decay_{j+1} + … + log_decay_t))·k_j v_j over the keys no later than the query.

    log_decay (batch or 1, heads, seq or 1, width or 1), ≤ 0.  float32 or float64 on CPU.  The result lies in memory as
    (batch, seq, heads, channels).
    """
    return _Decayed.apply(q, k, v, log_decay, scale)


def decayed2d(
    q: Tensor, k: Tensor, v: Tensor, fades: Tensor, height: int, width: int, *,
    scale: float = 1.0, later: bool = False, started: bool = False,
) -> Tensor:  # fmt: skip
    """scale · Σ λ_row^|Δrow| λ_col^|Δcol| (q·k) v over the raster-earlier pixels, or over the later ones.

    fades (2, heads): λ_row and λ_col; there is no gradient of them.  seq = height · width.  started, of earlier pixels
    alone: slot 0 of k and v is the start token, of weight 1, and slot p + 1 pixel p.  Else as `decayed`.

    Raises ValueError for both.
    """
    if started and later:
        raise ValueError("a start token stands before earlier pixels: started and later exclude each other")
    return _Decayed2D.apply(q, k, v, fades, height, width, scale, later, started)


def solved(x: Tensor, a: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The y with y_t = v_t - Σ exp(log_decay_{j+1} + … + log_decay_t) (x_t·a_j) y_j over the slots before t.

    x, a (batch, heads, seq, width), v, y (…, channels), log_decay (…, 1).  Else as `decayed`.
    """
    return _Solved.apply(x, a, v, log_decay)


def unit(x: Tensor, eps: float) -> Tensor:
    """x (batch, heads, seq, dim) / √(mean of x² + eps), the mean over dim; laid out in memory as `decayed`'s result."""
    return _Unit.apply(x, eps)


@torch.library.custom_op("attnbench::decay_line", mutates_args=(), device_types="cpu")
def _line(x: Tensor, a: Tensor, b: Tensor, fade: Tensor, by: int, later: bool, scale: float) -> Tensor:
    """Σ (x·a) b over the slots no later, or no earlier, faded in between: what the output is, and each gradient too."""
    return _along("decay_line", x, a, b, fade, by, later, scale)


@_line.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, fade: Tensor, by: int, later: bool, scale: float) -> Tensor:
    return like(b)


@torch.library.custom_op("attnbench::decay_solve", mutates_args=(), device_types="cpu")
def _solve(x: Tensor, a: Tensor, b: Tensor, fade: Tensor, later: bool) -> Tensor:
    """The y with y = b - Σ (x·a) y over the slots before, or after: what the output is, and the gradient of b too."""
    return _along("decay_solve", x, a, b, fade, ONE, later, 1.0)


@_solve.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, fade: Tensor, later: bool) -> Tensor:
    return like(b)


def _along(function: str, x: Tensor, a: Tensor, b: Tensor, fade: Tensor, by: int, later: bool, scale: float) -> Tensor:
    out = like(b)
    batch, heads, seq, rows = x.shape
    shape = (batch, heads, 1, seq, rows, b.shape[3], int(later), by, 0)
    call("decay", function, shape, scale, dense(x), dense(a), dense(b), out, dense(fade.expand(batch, -1, seq, -1)))
    return out


@torch.library.custom_op("attnbench::decay_grid", mutates_args=(), device_types="cpu")
def _grid(
    x: Tensor, a: Tensor, b: Tensor, fades: Tensor, height: int, width: int, scale: float, later: bool, started: bool
) -> Tensor:
    """Σ λ_row^|Δrow| λ_col^|Δcol| (x·a) b: what the output is, and each gradient too."""
    out, fades = like(b), fades.to(x.dtype).contiguous()[None, None]
    shape = (*x.shape[:2], height, width, x.shape[3], b.shape[3], int(later), ONE, int(started))
    call("decay", "decay_grid", shape, scale, dense(x), dense(a), dense(b), out, fades)
    return out


@_grid.register_fake
def _(
    x: Tensor, a: Tensor, b: Tensor, fades: Tensor, height: int, width: int, scale: float, later: bool, started: bool
) -> Tensor:
    return like(b)


@torch.library.custom_op("attnbench::decay_unit", mutates_args=(), device_types="cpu")
def _unit(x: Tensor, eps: float) -> Tensor:
    y = like(x)
    call("decay", "decay_unit", tuple(x.shape), eps, dense(x), y)
    return y


@_unit.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return like(x)


@torch.library.custom_op("attnbench::decay_unit_backward", mutates_args=(), device_types="cpu")
def _unit_backward(x: Tensor, grad: Tensor, eps: float) -> Tensor:
    made = like(x)
    call("decay", "decay_unit_backward", tuple(x.shape), eps, dense(x), dense(grad), made)
    return made


@_unit_backward.register_fake
def _(x: Tensor, grad: Tensor, eps: float) -> Tensor:
    return like(x)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps
        return _unit(x, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _unit_backward(*ctx.saved_tensors, grad, ctx.eps), None


class _Decayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
        fade = log_decay.exp()
        ctx.save_for_backward(q, k, v, fade)
        ctx.scale = scale
        return _line(q, k, v, fade, BY_ROW if fade.shape[3] > 1 else ONE, False, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, fade), scale = ctx.saved_tensors, ctx.scale
        rows, lanes = (BY_ROW, BY_LANE) if fade.shape[3] > 1 else (ONE, ONE)
        of_q = _line(grad, v, k, fade, lanes, False, scale)
        of_k = _line(v, grad, q, fade, lanes, True, scale)  # a key is read by queries on the other side of it
        of_v = _line(k, q, grad, fade, rows, True, scale)
        of_decay = _of_decay(q * of_q - k * of_k, fade) if ctx.needs_input_grad[3] else None
        return of_q, of_k, of_v, of_decay, None


class _Solved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        fade = log_decay.exp()
        y = _solve(x, a, v, fade, False)
        ctx.save_for_backward(x, a, y, fade)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, y, fade = ctx.saved_tensors
        of_v = _solve(a, x, grad, fade, True)  # what reads y_t is subtracted from it, later slots first
        own = (of_v * y).sum(-1, keepdim=True)  # a slot does not read itself
        of_x = own * a - _line(of_v, y, a, fade, ONE, False, 1.0)
        of_a = own * x - _line(y, of_v, x, fade, ONE, True, 1.0)
        return of_x, of_a, of_v, _of_decay(x * of_x - a * of_a, fade) if ctx.needs_input_grad[3] else None


def _of_decay(read: Tensor, fade: Tensor) -> Tensor:
    """The gradient of the logarithm, from what each slot's query read less what was read of its key, by channel.

    A slot's decay is in what queries from it on read of the keys before it: all that they read, less what is read of
    the keys from it on (Yang et al., 2024).
    """
    read = read.sum_to_size(*read.shape[:3], fade.shape[3])
    return read.flip(2).cumsum(dim=2).flip(2).sum_to_size(fade.shape)


class _Decayed2D(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, fades: Tensor, height: int, width: int, scale: float,
        later: bool, started: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, fades)
        ctx.settings = height, width, scale, later, started
        return _grid(q, k, v, fades, height, width, scale, later, started)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, fades), (height, width, scale, later, started) = ctx.saved_tensors, ctx.settings
        here, there = ((fades, height, width, scale, side, started) for side in (later, not later))
        made = _grid(grad, v, k, *here), _grid(v, grad, q, *there), _grid(k, q, grad, *there)
        return *made, None, None, None, None, None, None


@register_flop_formula([torch.ops.attnbench.decay_line, torch.ops.attnbench.decay_solve])
def _line_flops(x: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """A matrix a slot, with an outer product more and read once."""
    return 4 * x.numel() * b[3]


@register_flop_formula(torch.ops.attnbench.decay_grid)
def _grid_flops(x: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Two of them."""
    return 8 * x.numel() * b[3]
