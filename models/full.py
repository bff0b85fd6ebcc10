"""Dense attention: every query sees every earlier pixel. The members differ only in their positional encoding."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import geometry
from .geometry import Predicate
from .mixer import Cache, ExactMixer, ScoreBias
from .registry import variant

_IGPT = "Chen et al., Generative Pretraining from Pixels, ICML 2020"
dense = partial(variant, family="dense", time="O(n²)", memory="O(n)")


@dense("dense1d", summary="learned table, one vector a slot: iGPT itself", reference=_IGPT)
@dense("dense-none", summary="causal mask only", reference=_IGPT, position="none")
@dense("dense2d", summary="learned row vector + learned column vector", reference=_IGPT, position="learned2d")
class Dense(ExactMixer):
    """softmax(QKᵀ/√d)V by a fused kernel ("sdpa"), or with the n×n scores laid out ("math")."""

    backends = ("sdpa", "math")

    def visible(self) -> Predicate:
        return geometry.everything(self.layer.scan)

    def last_use(self) -> Tensor:
        return torch.full((self.layer.size,), self.layer.size - 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None) -> Tensor:
        if self.backend == "math":
            return self.oracle(q, k, v, bias)
        causal = self.layer.scan.causal
        if bias is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        slot = torch.arange(q.shape[2], device=q.device)
        scores = bias(slot[:, None], slot[None, :]).to(q.dtype)
        if causal:
            scores = scores.masked_fill(slot[:, None] < slot[None, :], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=scores)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Cache, bias: ScoreBias | None = None
    ) -> tuple[Tensor, Cache]:
        t = state.slot
        state.k[:, :, t], state.v[:, :, t] = k[:, :, 0], v[:, :, 0]
        scores = None
        if bias is not None:
            slot = torch.arange(t + 1, device=q.device)
            scores = bias(slot[t:], slot)[:, None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, state.k[:, :, : t + 1], state.v[:, :, : t + 1], attn_mask=scores)
        state.slot += 1
        return out, state

    def pairs(self) -> int:
        n = self.layer.size
        return n * (n + 1) // 2 if self.layer.scan.causal else n * n
