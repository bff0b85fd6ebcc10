"""Attention with a state of fixed size: the base of its mixers, and its sums as matrix products in chunks of slots.

What each of them sums is S_t = decay_t ∘ S_{t-1} + k_t v_tᵀ, read by out_t = q_t S_t.  Inside a chunk that is a masked
product of scores; between chunks only the state at a chunk's start is kept.  A decay enters as its logarithm, ≤ 0, and
an exponential is only ever taken of a sum of logarithms over the slots between a key and a later query: ≤ 0 too.

Shapes: q, k (batch, heads, seq, width); v, out (batch, heads, seq, channels); S (batch, heads, width, channels);
cut into chunks: (batch, heads, chunks, chunk, …).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .mixer import Layer, Mixer
from .registry import positive


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least: a sum over thousands of slots in bfloat16 stops growing at 256."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class Recurrent(Mixer):
    """Base: a subclass writes `parallel` and `advance` for float32 or wider, whatever the trunk computes in.

    chunk: slots a chunk; 0 for the least power of two that is 32 and head_dim at least, where neither the scores nor
    the states kept for the backward pass outgrow q, k and v.  A rotation can be carried where only q·k is used, as it
    then depends on the offset alone.
    """

    carries = frozenset({"embed", "rotate"})
    backends: tuple[str, ...] = ("blocked",)

    def __init__(self, layer: Layer, *, chunk: int = 0) -> None:
        super().__init__(layer)
        chosen = positive("chunk", chunk, zero="a fitting one")
        self.chunk = self.unit = chosen or max(32, 1 << (layer.head_dim - 1).bit_length())

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        """The whole sequence at once; extras: `gates`, if asked for."""
        raise NotImplementedError

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Tensor) -> tuple[Tensor, Any]:
        """One slot more."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        with _without_autocast(q.device.type):
            wide = {name: widened(x)[0] for name, x in extras.items()}
            return self.parallel(*widened(q, k, v), **wide).to(q.dtype)

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, **extras: Tensor) -> tuple[Tensor, Any]:
        with _without_autocast(q.device.type):
            wide = {name: widened(x)[0] for name, x in extras.items()}
            out, state = self.advance(widened(q)[0], widened(k)[0], widened(v)[0], state, **wide)
            return out.to(q.dtype), state

    def zeros(self, batch: int, like: Tensor, *shape: int) -> Tensor:
        """(batch, heads, *shape) for a state."""
        return widened(like)[0].new_zeros(batch, self.layer.heads, *shape)

    def fitting(self) -> tuple[int, int]:
        """The chunk in use, no longer than the sequence, and the number of slots in whole chunks."""
        chunk = min(self.chunk, self.layer.size)
        return chunk, -(-self.layer.size // chunk) * chunk


def cut(x: Tensor, chunk: int) -> Tensor:
    """(batch, heads, seq, …) -> (batch, heads, chunks, chunk, …), filled up with zeros, which change no sum."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk))


def carried(added: Tensor, kept: Tensor, dim: int = 2, backward: bool = False, matrices: bool = False) -> Tensor:
    """S_i = kept_i ∘ S_{i-1} + added_i along a dimension, or from its end.

    kept broadcasts against added, and may be one for all along `dim`.  matrices: S_i = kept_i S_{i-1} + added_i, the
    last two dimensions of kept square, those before `dim` as added's, and `dim` the third last.
    """
    out: Tensor = _Walk.apply(added, kept[(None,) * (added.dim() - kept.dim())], dim, backward, matrices)
    return out


class _Walk(torch.autograd.Function):
    """An operation a place and one more backward; autograd's own would be six, and keep every state twice."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, kept: Tensor, dim: int, backward: bool, matrices: bool) -> Tensor:
        states = added.clone()
        _walk(states, kept, dim, backward, matrices)
        ctx.save_for_backward(kept, states if ctx.needs_input_grad[1] else None)
        ctx.settings = dim, backward, matrices
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept, states), (dim, backward, matrices) = ctx.saved_tensors, ctx.settings
        grads = grad.clone()
        # What place i leaves to the next, that one gets back: with its own factor, the other way round.
        shift, turned = 1 if backward else -1, kept.mT if matrices else kept
        _walk(grads, turned if kept.shape[dim] == 1 else turned.roll(shift, dim), dim, not backward, matrices)
        if states is None:
            return grads, None, None, None, None
        size = grads.shape[dim]
        later, earlier = grads.narrow(dim, 0 if backward else 1, size - 1), states.narrow(dim, int(backward), size - 1)
        slopes = later @ earlier.mT if matrices else later * earlier
        if kept.shape[dim] > 1:  # the first place's factor has nothing to act on
            around = [0, 0] * (slopes.dim() - dim)
            around[-1 if backward else -2] = 1
            slopes = F.pad(slopes, around)
        return grads, slopes.sum_to_size(kept.shape), None, None, None


def _walk(states: Tensor, kept: Tensor, dim: int, backward: bool, matrices: bool) -> None:
    """The recurrence, in place."""
    kept = kept.expand(*(states.shape[dim] if place == dim else size for place, size in enumerate(kept.shape)))
    if matrices:  # in one dimension of batches a product is one operation
        states, kept, dim = states.flatten(0, dim - 1), kept.flatten(0, dim - 1), 1
    places = list(zip(states.unbind(dim), kept.unbind(dim), strict=True))
    if backward:
        places.reverse()
    for (before, _), (state, keep) in pairwise(places):
        if matrices:
            state.add_(torch.bmm(keep, before))
        else:
            state.addcmul_(keep, before)


def shifted(x: Tensor) -> Tensor:
    """What each chunk finds of the one before it, zeros for the first; what is one for all chunks stays."""
    return x if x.shape[2] == 1 else F.pad(x, (0, 0, 0, 0, 1, -1))


def summed(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Σ over keys no later than the query of (q·k) v.

    O(n·(chunk + width)·channels) time, O(n·(chunk + width·channels / chunk)) memory.
    """
    size = q.shape[2]
    q, k, v = (cut(x, chunk) for x in (q, k, v))
    out = (q @ k.mT).tril() @ v
    if q.shape[2] > 1:
        out = out + q @ shifted((k.mT @ v).cumsum(dim=2))
    return out.flatten(2, 3)[:, :, :size]


def spans(log_decay: Tensor) -> Tensor:
    """(…, chunk) -> (…, query, key): the sum of log decays after the key up to the query, -∞ where the key is later.

    Summed apart for every key: a difference of two long sums would lose the digits of a short span.
    """
    chunk = log_decay.shape[-1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=log_decay.device).triu()
    after = log_decay[..., :, None].expand(*log_decay.shape, chunk).masked_fill(later, 0.0)
    return after.cumsum(dim=-2).masked_fill(later.triu(1), float("-inf"))


def decayed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int) -> Tensor:
    """The same with a decay a slot: each key's part fades by all decays after it, up to the query's own.

    log_decay (batch, heads, seq), or (1, heads, 1) for one decay at every slot.  Time and memory as summed.
    """
    size = q.shape[2]
    if log_decay.shape[2] == 1 < size:
        log_decay = log_decay[..., None].expand(-1, -1, -1, chunk)
    else:
        log_decay = cut(log_decay[..., None], chunk)[..., 0]
    q, k, v = (cut(x, chunk) for x in (q, k, v))
    weight = spans(log_decay).exp()
    out = (q @ k.mT * weight) @ v
    if q.shape[2] > 1:
        entering = log_decay.cumsum(dim=-1).exp()
        added = (k * weight[..., -1, :, None]).mT @ v
        out = out + (q * entering[..., None]) @ carried(shifted(added), shifted(entering[..., -1:, None]))
    return out.flatten(2, 3)[:, :, :size]


def channelwise(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int) -> Tensor:
    """The same with a decay for every slot and channel of the state: log_decay (batch, heads, seq, width).

    exp(b_i - b_j), b the running sum, would have to be split between query and key, and exp(-b_j) overflows.  So each
    chunk, a power of two, is halved and halved again: from the left half of a piece to its right half, both factors
    are relative to the middle and ≤ 1.  O(n·(chunk + width)·channels) time, O(n·(width·log chunk + chunk)) memory and
    a state a chunk.
    """
    size = q.shape[2]
    q, k, v, log_decay = (cut(x, chunk) for x in (q, k, v, log_decay))
    out = (q * k).sum(-1, keepdim=True) * v  # what a slot reads of itself, undecayed
    since, until = (
        log_decay,
        torch.zeros_like(log_decay),
    )  # sums from the piece's start to here, and after here to its end
    half = 1
    while half < chunk:
        pieces = [x.unflatten(3, (-1, 2, half)).unbind(4) for x in (q, k, v, since, until)]
        (_, late_q), (early_k, _), (early_v, _), (early_since, late_since), (early_until, late_until) = pieces
        late = ((late_q * late_since.exp()) @ (early_k * early_until.exp()).mT) @ early_v
        out = out + torch.stack([torch.zeros_like(late), late], dim=4).flatten(3, 5)
        since = torch.stack([early_since, late_since + early_since[..., -1:, :]], dim=4).flatten(3, 5)
        until = torch.stack([early_until + late_since[..., -1:, :], late_until], dim=4).flatten(3, 5)
        half *= 2
    if q.shape[2] > 1:
        added, kept = (k * until.exp()).mT @ v, since[..., -1, :, None].exp()
        out = out + (q * since.exp()) @ carried(shifted(added), shifted(kept))
    return out.flatten(2, 3)[:, :, :size]


def delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, chunk: int) -> Tensor:
    """The delta rule: fade, erase what k reads, write v.  log_decay, beta (batch, heads, seq), k of length ≤ 1.

        S' = exp(g_t) S_{t-1};   u_t = β_t (v_t - k_t S');   S_t = S' + k_tᵀ u_t;   out_t = q_t S_t

    Inside a chunk that starts with S, with Γ_ij = exp(g_{j+1} + … + g_i), j ≤ i, and γ_i = exp(g_1 + … + g_i), the
    writes solve a triangular system, (I + β ∘ (Γ ∘ KKᵀ below the diagonal)) U = β ∘ V - β ∘ γ ∘ K S, whose two right
    sides do not wait for S (the WY representation; Yang et al., 2024): U = U₀ - W S.  What follows is matrix products:

        out = (Γ ∘ QKᵀ) U + γ ∘ Q S,    S_next = γ_end S + K̂ᵀ U = γ_end S - (K̂ᵀ W) S + K̂ᵀ U₀,   K̂_j = Γ_end,j k_j

    O(n·(chunk + width)·(width + channels)) time; memory as summed.
    """
    size = q.shape[2]
    q, k, v = (cut(x, chunk) for x in (q, k, v))
    log_decay, beta = (cut(x[..., None], chunk) for x in (log_decay, beta))
    weight, entering = spans(log_decay[..., 0]).exp(), log_decay.cumsum(dim=3).exp()
    system = beta * weight * (k @ k.mT)
    wanted = torch.cat([beta * v, beta * entering * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    written, erasing = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = q @ k.mT * weight
    out = scores @ written
    if q.shape[2] > 1:
        leaving = (k * weight[..., -1, :, None]).mT
        fading = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) * entering[..., -1:, :]
        kept = fading - leaving @ erasing
        before = carried(shifted(leaving @ written), shifted(kept), matrices=True)
        out = out + (q * entering - scores @ erasing) @ before
    return out.flatten(2, 3)[:, :, :size]
