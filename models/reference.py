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


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, feature: Callable[[Tensor], Tensor], causal: bool, floor: float = 0.0
) -> Tensor:
    """φ(q) S / φ(q) z, step by step, with S = Σ φ(k) vᵀ and z = Σ φ(k) over the visible keys (Katharopoulos 2020).

    floor: the least that is divided by.
    """
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
        (q[:, :, t, None, :] @ memory).squeeze(-2) / (q[:, :, t] * mass).sum(-1, keepdim=True).clamp(min=floor)
        for t, (memory, mass) in enumerate(states)
    ]
    return torch.stack(rows, dim=2)


def weighted_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Σ over keys of weight·(q·k) v, query by query; weight (heads, query, key), 0 where a key is hidden."""
    rows = []
    for t in range(q.shape[2]):
        scores = (q[:, :, t, None, :] * k).sum(-1) * weight[:, t]  # (batch, heads, keys)
        rows.append((scores[..., None] * v).sum(dim=2))
    return torch.stack(rows, dim=2)


def decayed_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """q_t S_t with S_t = exp(log_decay_t) ∘ S_{t-1} + k_t v_tᵀ, step by step (Yang 2024).

    log_decay (batch, heads, seq, 1 or head_dim): of the whole state, or of each of its rows.
    """
    memory = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :])
    rows = []
    for t in range(q.shape[2]):
        memory = log_decay[:, :, t].exp()[..., None] * memory + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, :, None] * memory).sum(dim=2))
    return torch.stack(rows, dim=2)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """q_t S_t, step by step (Gated DeltaNet, Yang 2025): fade, erase by β what k_t reads, write β v_t in its place.

    log_decay, beta (batch, heads, seq).
    """
    memory = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None, :])
    rows = []
    for t in range(q.shape[2]):
        memory = log_decay[:, :, t, None, None].exp() * memory
        read = (k[:, :, t, :, None] * memory).sum(dim=2)
        memory = memory + k[:, :, t, :, None] * (beta[:, :, t, None] * (v[:, :, t] - read))[:, :, None, :]
        rows.append((q[:, :, t, :, None] * memory).sum(dim=2))
    return torch.stack(rows, dim=2)


def unit_mean_square(x: Tensor, eps: float) -> Tensor:
    """x divided by the root of its mean square over the last dimension (Zhang & Sennrich 2019), without a gain."""
    return x / ((x * x).mean(dim=-1, keepdim=True) + eps).sqrt()


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x divided by its length over the last dimension, or by eps if it is shorter."""
    return x / (x * x).sum(dim=-1, keepdim=True).sqrt().clamp(min=eps)
