"""Dense softmax attention on CPU (full.cpp) as a torch operator: eager, under autograd, fake tensors, torch.compile.

Shapes: q, k, v, out (batch, heads, seq, head_dim); stats (batch, heads, 2, seq): of each query the greatest score, in
powers of two, and 1 / Σ of the weights, from which the backward pass computes them again; bias (heads, offsets), whose
number target[s] - content[t], both int32 (seq,), is added to the score of query s and key t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compiler import call
from .layout import dense, like


def full(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None = None,
    target: Tensor | None = None, content: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(QKᵀ/√d + bias)V over all keys, or with `causal` over those no later than the query.

    target and content go with the bias (geometry.offsets).

    float32 or float64 on CPU.  The result lies in memory as (batch, seq, heads, head_dim).
    """
    return _Full.apply(q, k, v, bias, target, content, causal)


@torch.library.custom_op("attnbench::full", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, target: Tensor | None, content: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    out, stats = _shapes(q, k, v, bias, target, content, causal)
    given = dense(q), dense(k), dense(v), out, stats, *_numbers(q, bias, target, content)
    call("full", "full_forward", _shape(q, causal, bias), q.shape[3] ** -0.5, *given)
    return out, stats


@_forward.register_fake
def _shapes(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, target: Tensor | None, content: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[0], q.shape[1], 2, q.shape[2])


@torch.library.custom_op("attnbench::full_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, bias: Tensor | None,
    target: Tensor | None, content: Tensor | None, causal: bool, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients, that of the bias by image, (batch, heads, offsets), and empty unless it is `learned`."""
    grads = _gradients(grad, q, k, v, out, stats, bias, target, content, causal, learned)
    given = (*(dense(x) for x in (q, k, v, grad, out)), *grads[:3], stats, *_numbers(q, bias, target, content))
    call("full", "full_backward", _shape(q, causal, bias), q.shape[3] ** -0.5, *given, grads[3][..., None])
    return grads


@_backward.register_fake
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, bias: Tensor | None,
    target: Tensor | None, content: Tensor | None, causal: bool, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    size = bias.shape if bias is not None and learned else (0, 0)
    return like(q), like(k), like(v), q.new_empty(q.shape[0], *size)


def _shape(q: Tensor, causal: bool, bias: Tensor | None) -> tuple[int, ...]:
    return (*q.shape, causal, 0 if bias is None else bias.shape[1])


def _numbers(q: Tensor, bias: Tensor | None, target: Tensor | None, content: Tensor | None) -> list[Tensor]:
    """The bias, in the dtype of the scores, and its places as `call` takes them; without one tensors at no address."""
    if bias is None or target is None or content is None:
        return [q.new_empty(1, 1, 0, 0)] * 3
    return [x.contiguous()[None, None] for x in (bias.to(q.dtype), target, content)]


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, target: Tensor | None, content: Tensor | None,
        causal: bool,
    ) -> Tensor:  # fmt: skip
        out, stats = _forward(q, k, v, bias, target, content, causal)
        ctx.save_for_backward(q, k, v, out, stats, bias, target, content)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: where activations are recomputed, a second time is an error
        learned = ctx.needs_input_grad[3]
        *grads, bias = _backward(grad, *saved, ctx.causal, learned)
        return (*grads, bias.sum(0) if learned else None, None, None, None)
