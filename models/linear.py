"""Linear-time attention by feature maps: a sum over keys becomes a state of fixed size.

Shapes: q, k, v (batch, heads, seq, head_dim); φ(q), φ(k) (batch, heads, seq, width).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .mixer import Layer, Mixer
from .registry import variant


@dataclass
class Sums:
    """What decoding keeps: memory Σ φ(k) vᵀ (batch, heads, width, head_dim + 1), the mass Σ φ(k) as last column."""

    memory: Tensor


def _with_ones(v: Tensor) -> Tensor:
    """A last channel of ones: its sum is the normaliser, carried along for nothing."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def _normalised(out: Tensor) -> Tensor:
    return out[..., :-1] / out[..., -1:]


def chunked(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Σ over keys no later than the query of (q·k) v: matrix products inside a chunk, a running state between chunks.

    O(n·(chunk + width)·head_dim) time, O(n·width·head_dim / chunk) extra memory.
    """
    size = q.shape[2]
    pad = -size % chunk
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, chunk)) for x in (q, k, v))  # (b, h, chunks, chunk, d)
    within = (q @ k.mT).tril() @ v
    before = (k.mT @ v).cumsum(dim=2)
    before = F.pad(before, (0, 0, 0, 0, 1, -1))  # the state at a chunk's start: the sum over the chunks before
    return (within + q @ before).flatten(2, 3)[:, :, :size]


@variant(
    "linear",
    family="linear",
    time="O(n·d²)",
    memory="O(n·d)",
    summary="φ = elu + 1",
    reference="Katharopoulos et al., Transformers are RNNs, ICML 2020",
)
class Linear(Mixer):
    """φ(q) Σ φ(k) vᵀ / φ(q) Σ φ(k), φ(x) = elu(x) + 1."""

    backends = ("blocked",)

    def __init__(self, layer: Layer, *, chunk: int = 64) -> None:
        super().__init__(layer)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        self.chunk = chunk

    def feature(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.feature(q), self.feature(k), _with_ones(v)
        if self.layer.scan.causal:
            return _normalised(chunked(q, k, v, min(self.chunk, q.shape[2])))
        return _normalised(q @ (k.mT @ v))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.linear_attention(q, k, v, self.feature, self.layer.scan.causal)

    def start(self, batch: int, like: Tensor) -> Sums:
        width = self.feature(like.new_zeros(1, self.layer.head_dim)).shape[-1]
        return Sums(like.new_zeros(batch, self.layer.heads, width, self.layer.head_dim + 1))

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Sums) -> tuple[Tensor, Sums]:
        memory = state.memory + self.feature(k).mT @ _with_ones(v)
        return _normalised(self.feature(q) @ memory), Sums(memory)

    def flops(self) -> int:
        """Within a chunk the scores and their use, between chunks the state's making and its use."""
        n, d, heads = self.layer.size, self.layer.head_dim, self.layer.heads
        if not self.layer.scan.causal:
            return 4 * heads * n * d * (d + 1)
        chunk = min(self.chunk, n)
        padded = -(-n // chunk) * chunk
        return heads * padded * (2 * chunk * d + 2 * chunk * (d + 1) + 4 * d * (d + 1))
