"""The oracles: what each attention means, written for reading. Float64-clean, never optimised, never trained with.

Shapes: q, k, v (batch, heads, seq, head_dim); mask bool (query, key), True = may attend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q·k/√head_dim + bias) v over the visible keys (Vaswani 2017); bias (heads, query, key)."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor, feature: Callable[[Tensor], Tensor], causal: bool) -> Tensor:
    """φ(q) S / φ(q) z, step by step, with S = Σ φ(k) vᵀ and z = Σ φ(k) over the visible keys (Katharopoulos 2020)."""
    q, k = feature(q), feature(k)
    batch, heads, seq, width = k.shape
    memory = v.new_zeros(batch, heads, width, v.shape[-1])
    mass = v.new_zeros(batch, heads, width)
    states = []
    for t in range(seq):
        memory = memory + k[:, :, t, :, None] * v[:, :, t, None, :]
        mass = mass + k[:, :, t]
        states.append((memory, mass))
    if not causal:
        states = states[-1:] * seq
    rows = [
        (q[:, :, t, None, :] @ memory).squeeze(-2) / (q[:, :, t] * mass).sum(-1, keepdim=True)
        for t, (memory, mass) in enumerate(states)
    ]
    return torch.stack(rows, dim=2)
