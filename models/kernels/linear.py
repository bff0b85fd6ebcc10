"""Causal linear attention on CPU (linear.cpp) as a torch operator: eager, under autograd, fake tensors, torch.compile.

Shapes: q, k (batch, heads, seq, width); v, out (batch, heads, seq, head_dim); mass (batch, heads, seq): φ(q)·Σ φ(k);
kept (batch, heads, blocks - 1, (head_dim + 1)·width): Σ v φ(k)ᵀ and Σ φ(k) before every block of slots but the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .compiler import call
from .layout import dense, like

FEATURES = {"none": 0, "elu+1": 1}
"""φ: none, where q and k are features already, or elu(x) + 1."""


def linear(q: Tensor, k: Tensor, v: Tensor, feature: str = "none", floor: float = 0.0) -> Tensor:
    """Σ φ(q)·φ(k) v / Σ φ(q)·φ(k) over the keys no later than the query (Katharopoulos et al., 2020).

    The normaliser is at least `floor`.  float32 or float64 on CPU.  The result lies in memory as
    (batch, seq, heads, head_dim).
    """
    return _Linear.apply(q, k, v, FEATURES[feature], floor)


@torch.library.custom_op("attnbench::linear", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, feature: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    made = _shapes(q, k, v, feature, floor)
    call("linear", "linear_forward", _problem(q, v, feature), floor, dense(q), dense(k), dense(v), *made)
    return made


@_forward.register_fake
def _shapes(q: Tensor, k: Tensor, v: Tensor, feature: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, seq, width), dim = q.shape, v.shape[3]
    kept = q.new_empty(batch, heads, (seq - 1) // _block(width), (dim + 1) * width)
    return like(v), q.new_empty(batch, heads, seq), kept


@torch.library.custom_op("attnbench::linear_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mass: Tensor, kept: Tensor, feature: int, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = like(q), like(k), like(v)
    given = (dense(x) for x in (q, k, v, grad, out))
    call("linear", "linear_backward", _problem(q, v, feature), floor, *given, *grads, mass, kept)
    return grads


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mass: Tensor, kept: Tensor, feature: int, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v)


def _problem(q: Tensor, v: Tensor, feature: int) -> tuple[int, ...]:
    return (*q.shape, v.shape[3], feature, _block(q.shape[3]))


def _block(width: int) -> int:
    """Slots that are handled at a time: so many that what is kept takes half the room of v at most."""
    return max(128, 2 * width)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, feature: int, floor: float) -> Tensor:
        out, mass, kept = _forward(q, k, v, feature, floor)
        ctx.save_for_backward(q, k, v, out, mass, kept)
        ctx.settings = feature, floor
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None)


def _flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """A state a slot with its mass, an outer product more and read once."""
    return 4 * q.numel() * (v[3] + 1)


register_flop_formula(torch.ops.attnbench.linear)(_flops)
register_flop_formula(torch.ops.attnbench.linear_backward)(
    lambda grad, *rest, **_: 3 * _flops(*rest)
)  # three such sums
