"""Dense attention: every query sees every earlier pixel. The members differ only in their positional encoding."""

from __future__ import annotations

from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import backends, geometry, kernels
from .geometry import Offsets, Predicate
from .mixer import ExactMixer, Layer, ScoreBias
from .registry import variant

_IGPT = "Chen et al., Generative Pretraining from Pixels, ICML 2020"
_ROFORMER = "Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021"
_HEO = "Heo et al., Rotary Position Embedding for Vision Transformer, ECCV 2024"
_ALIBI = "Press et al., Train Short, Test Long: Attention with Linear Biases, ICLR 2022"
_SINUSOIDS = "Vaswani et al., Attention Is All You Need, NeurIPS 2017"
_PARMAR = f"{_SINUSOIDS}; by row and column Parmar et al., Image Transformer, ICML 2018"
_CHILD = "Child et al., Generating Long Sequences with Sparse Transformers, 2019 (row and column embeddings of images)"
_SWIN = "Liu et al., Swin Transformer, ICCV 2021 (relative position bias)"
BLOCK = 128
"""Queries whose scores "blocked" lays out at a time."""

dense = partial(variant, family="dense", time="O(n²)", memory="O(n)")


@dense("dense1d", summary="learned table, one vector a slot: iGPT itself", reference=_IGPT)
@dense("dense-none", summary="causal mask only", reference=_IGPT, position="none")
@dense("dense-sin1d", summary="sines and cosines of the place", reference=_SINUSOIDS, position="sin1d")
@dense("dense-rope1d", summary="rotary by the place", reference=_ROFORMER, position="rope1d")
@dense("dense-alibi1d", summary="linear bias on the distance along the scan", reference=_ALIBI, position="alibi1d")
@dense("dense2d", summary="learned row vector + learned column vector", reference=_CHILD, position="learned2d")
@dense("dense-sin2d", summary="half the channels encode the row, half the column", reference=_PARMAR, position="sin2d")
@dense("dense-rope2d", summary="half of each head turned by row, half by column", reference=_HEO, position="rope2d")
@dense("dense-mixed2d", summary="rotary by ω_r·row + ω_c·col, frequencies learned", reference=_HEO, position="mixed2d")
@dense("dense-relbias2d", summary="a learned bias per head and (Δrow, Δcol)", reference=_SWIN, position="relbias2d")
@dense(
    "dense-alibi2d", summary="linear bias on |Δrow| + |Δcol|", position="alibi2d",
    reference=f"{_ALIBI}; in two dimensions here",
)  # fmt: skip
class Dense(ExactMixer):
    """softmax(QKᵀ/√d)V.

    "compiled": a C++ kernel for CPU, O(n) memory; a bias must depend on the offset or the distance alone.  "sdpa": a
    fused kernel, O(n) memory, but a bias on the scores is laid out, n² values a head, and kept for the backward pass.
    "blocked": runs of 128 queries, whose scores and bias are made again in the backward pass and so are never kept for
    longer than the run; with a bias "auto" takes it before "sdpa".  "math": the n² scores laid out.
    """

    backends = ("compiled", "sdpa", "blocked", "flex", "xformers", "math")

    def __init__(self, layer: Layer) -> None:
        if layer.biased:
            self.backends = ("compiled", "blocked", "sdpa", "flex", "xformers", "math")
        super().__init__(layer)

    @property
    def unit(self) -> int:  # type: ignore[override]
        return BLOCK if self.backend == "blocked" else 1

    def refusals(self, backend: str) -> list[str]:
        if backend == "xformers":
            return backends.xformers_reasons(self.layer.scan, None, self.layer.biased)
        if backend == "compiled":
            unfit = self.layer.biased and not self.layer.relates
            reasons = ["adds a bias to the scores by (Δrow, Δcol) or distance only"] if unfit else []
            return reasons + kernels.reasons("full")
        return [] if backend == "blocked" else super().refusals(backend)

    def visible(self) -> Predicate:
        return geometry.everything(self.layer.scan)

    def last_use(self) -> Tensor:
        return torch.full((self.layer.size,), self.layer.size - 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None) -> Tensor:
        scan = self.layer.scan
        if kernels.serves(self, q, k, v):
            return kernels.full(q, k, v, scan.causal, *self._table(bias))
        if self.backend == "sdpa" and bias is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=scan.causal)
        if self.backend == "sdpa":
            return self._rows(q, k, v, 0, bias)
        if self.backend == "xformers":
            return backends.xformers(q, k, v, backends.xformers_bias(scan, None))
        return super().forward(q, k, v, bias)

    @cached_property
    def _offsets(self) -> Offsets:
        with torch.inference_mode(False):  # kept for later passes, which may be training
            return geometry.offsets(self.layer.scan, along=self.layer.relates == "distance")

    def _table(self, bias: ScoreBias | None) -> tuple[Tensor, ...]:
        """The bias as the kernel takes it."""
        if bias is None:
            return ()
        query, key, target, content = self._offsets
        return bias(query, key), target, content

    def _blocked(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None) -> Tensor:
        if q.shape[2] <= BLOCK:
            return self._rows(q, k, v, 0, bias)
        runs = [
            checkpoint(self._rows, rows, k, v, index * BLOCK, bias, use_reentrant=False, preserve_rng_state=False)
            for index, rows in enumerate(q.split(BLOCK, dim=2))
        ]
        return torch.cat(runs, dim=2)

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, first: int, bias: ScoreBias | None) -> Tensor:
        """The queries of the slots from `first` on, q (batch, heads, queries, head_dim), k and v all keys."""
        causal = self.layer.scan.causal
        end = first + q.shape[2] if causal else k.shape[2]
        query, key = (
            torch.arange(first, first + q.shape[2], device=q.device)[:, None],
            torch.arange(end, device=q.device),
        )
        attn_mask = (key <= query) if causal else None
        if bias is not None:
            scores = bias(query, key[None]).to(q.dtype)
            attn_mask = scores if attn_mask is None else scores.masked_fill(~attn_mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end], attn_mask=attn_mask)

    def _seen_by(self, slot: int, device: torch.device) -> tuple[Tensor, None, int]:
        return torch.arange(slot + 1, device=device), None, slot

    def pairs(self) -> int:
        n = self.layer.size
        return n * (n + 1) // 2 if self.layer.scan.causal else n * n
