"""Linear-time attention whose state fades: retention, gated linear attention, state space duality, the delta rule.

None has a normaliser: as in the papers, each head's output is divided by its root mean square.  The papers' gates and
convolutions on top are projections, or act on more than q, k and v, and are left to the trunk: out.

The start token is the key of slot 0 and fades like any other.

Shapes: q, k, v (batch, heads, seq, head_dim); gates (batch, heads, seq, gates);
state (batch, heads, head_dim, head_dim).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, kernels, reference
from .mixer import Layer
from .recurrence import Recurrent, channelwise, decayed, delta
from .registry import variant

EPS = 1e-5  # added to the mean square, as in the papers' code; and the least length of a key

gated = partial(variant, family="gated", time="O(n·d²)", memory="O(n·d)", objectives=("ar",))


class Fading(Recurrent):
    """Base: S_t = exp(log_decay_t) ∘ S_{t-1} + k_t v_tᵀ, out_t = q_t S_t / √d, root mean square 1.

    "compiled": a C++ kernel for CPU, which sums slot by slot, knows no chunks and keeps no state.
    """

    backends: tuple[str, ...] = ("compiled", "blocked", "fla")
    products = 2
    """Of a slot with a state: one that adds to it, and one that reads it."""
    fla_limit = 0
    """Channels of the widest head that the kernel of flash-linear-attention takes; 0 for any."""

    def refusals(self, backend: str) -> list[str]:
        reasons = super().refusals(backend)
        if backend == "fla":
            reasons += backends.fla_reasons(self.layer.scan, self.layer.head_dim, self.fla_limit)
        if backend == "compiled" and not reasons:
            return kernels.reasons("decay")
        return reasons

    def log_decay(self, gates: Tensor | None, like: Tensor) -> Tensor:
        """(batch or 1, heads, seq or 1, 1 or head_dim), ≤ 0, in the dtype of `like`."""
        raise NotImplementedError

    def key(self, k: Tensor, gates: Tensor | None) -> Tensor:
        """The key that is written."""
        return k

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, **extras: Tensor) -> Tensor:
        scale, k, log_decay = q.shape[-1] ** -0.5, self.key(k, gates), self.log_decay(gates, q)
        if kernels.serves(self, q, k, v):
            return kernels.unit(kernels.decayed(q, k, v, log_decay, scale), EPS)
        add = backends.fla_decayed if self.backend == "fla" else self._sum
        return normalised(add(q * scale, k, v, log_decay))

    def _sum(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return decayed(q, k, v, log_decay[..., 0], self.fitting()[0])

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, **extras: Tensor) -> Tensor:
        log_decay = self.log_decay(gates, q).expand(len(q), -1, q.shape[2], -1)
        out = reference.decayed_attention(q, self.key(k, gates), v, log_decay) / q.shape[-1] ** 0.5
        return reference.unit_mean_square(out, EPS)

    def start(self, batch: int, like: Tensor) -> Tensor:
        return self.zeros(batch, like, self.layer.head_dim, self.layer.head_dim)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, gates: Tensor | None = None, **extras: Tensor
    ) -> tuple[Tensor, Tensor]:
        state = self.log_decay(gates, q).exp().mT * state + self.key(k, gates).mT @ v
        return normalised(q * q.shape[-1] ** -0.5 @ state), state

    def flops(self) -> int:
        """A state a slot, made and read, or what its chunks take."""
        if self.backend == "compiled":
            return self.layer.heads * self.layer.size * self.products * 2 * self.layer.head_dim**2
        return self.layer.heads * self._chunk_flops()

    def _chunk_flops(self) -> int:
        """Within a chunk the scores and their use, between chunks the state's making and its use."""
        d, (chunk, slots) = self.layer.head_dim, self.fitting()
        return slots * (4 * chunk * d + (4 * d * d if slots > chunk else 0))


def normalised(out: Tensor) -> Tensor:
    """(…, head_dim), divided by its root mean square over head_dim."""
    return F.rms_norm(out, out.shape[-1:], eps=EPS)


@gated(
    "retention",
    summary="a fixed decay a head",
    reference="Sun et al., Retentive Network: A Successor to Transformer, 2023",
)
class Retention(Fading):
    """The head h of H fades by 1 - 2^(-5-h) a slot, h = 0 … H - 1; no parameter, no gate."""

    log_rate: Tensor  # (heads,)

    def __init__(self, layer: Layer, *, chunk: int = 0) -> None:
        super().__init__(layer, chunk=chunk)
        head = torch.arange(layer.heads, dtype=torch.float64)
        self.register_buffer("log_rate", torch.log1p(-(2.0 ** (-5 - head))), persistent=False)

    def log_decay(self, gates: Tensor | None, like: Tensor) -> Tensor:
        return self.log_rate.to(like.dtype)[None, :, None, None]


@gated(
    "gla",
    summary="an input-dependent decay for every channel of the key",
    reference="Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, ICML 2024",
)
class GatedLinear(Fading):
    """log decay = logsigmoid(gate) / 16, a gate for every channel of the key.

    A gate of 0, the mean at initialisation, halves a channel in 16 slots; the paper's 16 is there to forget slowly.
    chunk: a power of two, at least 2.
    """

    def __init__(self, layer: Layer, *, chunk: int = 0) -> None:
        super().__init__(layer, chunk=chunk)
        self.gates = layer.head_dim
        if self.chunk < 2 or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk must be a power of two, at least 2, or 0 for a fitting one, not {chunk!r}")

    def log_decay(self, gates: Tensor | None, like: Tensor) -> Tensor:
        assert gates is not None
        return F.logsigmoid(gates) / 16

    def fitting(self) -> tuple[int, int]:
        chunk = min(self.chunk, max(2, 1 << (self.layer.size - 1).bit_length()))
        return chunk, -(-self.layer.size // chunk) * chunk

    def _sum(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return channelwise(q, k, v, log_decay, self.fitting()[0])

    def _chunk_flops(self) -> int:
        """As of the others, but that only pairs with the key earlier are multiplied."""
        d, (chunk, slots) = self.layer.head_dim, self.fitting()
        return slots * (2 * (chunk - 1) * d + (4 * d * d if slots > chunk else 0))


class Discretised(Fading):
    """Base: the decay of Mamba-2.  Δ = softplus(gate + bias), log decay = -A·Δ; A > 0 and bias learned a head.

    Over the heads, Δ is spread from 0.001 to 0.1 in equal ratios and A from 1 to 16 in equal steps, the ranges that
    the paper draws from: at a gate of 0 the heads remember from a thousand slots down to one.
    """

    def __init__(self, layer: Layer, *, chunk: int = 0) -> None:
        super().__init__(layer, chunk=chunk)
        time_step = torch.logspace(-3, -1, layer.heads)
        self.bias = nn.Parameter(time_step.expm1().log())  # the inverse of softplus
        self.log_rate = nn.Parameter(torch.linspace(1, 16, layer.heads).log())

    def time_step(self, gate: Tensor) -> Tensor:
        """Δ of gates (batch, heads, seq, 1)."""
        return F.softplus(gate + self.bias.to(gate.dtype)[:, None, None])

    def log_decay(self, gates: Tensor | None, like: Tensor) -> Tensor:
        assert gates is not None
        return -self.log_rate.to(like.dtype).exp()[:, None, None] * self.time_step(gates[..., :1])


@gated(
    "ssd",
    summary="one input-dependent decay a head: Mamba-2's state space duality",
    reference="Dao & Gu, Transformers are SSMs, ICML 2024",
)
class StateSpaceDual(Discretised):
    """q, k, v in the places of C, B and X: S_t = exp(-A·Δ_t) S_{t-1} + Δ_t k_t v_tᵀ."""

    gates = 1

    def key(self, k: Tensor, gates: Tensor | None) -> Tensor:
        assert gates is not None
        return k * self.time_step(gates)


@gated(
    "deltanet",
    summary="gated delta rule: erase, then write",
    reference="Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, ICLR 2025",
)
class DeltaNet(Discretised):
    """S_t = (I - β_t k_t k_tᵀ) exp(-A·Δ_t) S_{t-1} + β_t k_t v_tᵀ, q and k of length 1.

    Two gates a head: the decay's, and β = sigmoid(gate), ½ at a gate of 0.  "compiled" solves for the values that are
    written, β_t (v_t - what k_t reads), which are then summed like any others.
    """

    gates = 2
    products = 4
    fla_limit = 256

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, **extras: Tensor) -> Tensor:
        q, k, log_decay, beta = self._prepared(q, k, gates)
        scale = q.shape[-1] ** -0.5
        if kernels.serves(self, q, k, v):
            log_decay, beta = log_decay[..., None], beta[..., None]
            written = kernels.solved(beta * k, k, beta * v, log_decay)
            return kernels.unit(kernels.decayed(q, k, written, log_decay, scale), EPS)
        q = q * scale
        if self.backend == "fla":
            return normalised(backends.fla_delta(q, k, v, log_decay, beta))
        return normalised(delta(q, k, v, log_decay, beta, self.fitting()[0]))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None, **extras: Tensor) -> Tensor:
        _, _, log_decay, beta = self._prepared(q, k, gates)
        q, k = (reference.unit_length(x, EPS) for x in (q, k))
        out = reference.delta_rule(q, k, v, log_decay, beta) / q.shape[-1] ** 0.5
        return reference.unit_mean_square(out, EPS)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, gates: Tensor | None = None, **extras: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, log_decay, beta = self._prepared(q, k, gates)
        state = log_decay.exp()[..., None] * state
        state = state + k.mT @ (beta[..., None] * (v - k @ state))
        return normalised(q * q.shape[-1] ** -0.5 @ state), state

    def _prepared(self, q: Tensor, k: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k of length 1; log decay and β (batch, heads, seq)."""
        assert gates is not None
        q, k = (F.normalize(x, dim=-1, eps=EPS) for x in (q, k))
        return q, k, self.log_decay(gates, q)[..., 0], gates[..., 1].sigmoid()

    def _chunk_flops(self) -> int:
        """Two kinds of scores, the triangular system and the writes' use, and the states."""
        d, (chunk, slots) = self.layer.head_dim, self.fitting()
        a_slot = 4 * chunk * d + 2 * chunk * d + 2 * chunk * d  # scores, the system's 2d right sides, the writes' use
        if slots > chunk:
            a_slot += 2 * d * d + 2 * d * d + 2 * d * d + 2 * chunk * d  # added, erased, read; scores of the erased
        return slots * a_slot + (slots // chunk - 1) * 2 * d**3
