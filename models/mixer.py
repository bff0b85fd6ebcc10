"""What an attention must provide to stand in the trunk: q, k, v → out, an oracle, a step, and its cost.

Shapes: q, k, v, out (batch, heads, seq, head_dim); gates (batch, heads, seq, gates); one slot: seq = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, geometry, reference
from .geometry import Predicate, Scan, Tiles

ScoreBias = Callable[..., Tensor]
"""Like a Predicate, but returns what is added to the scores: (heads, …) for slots of shape (…); or, told a head as its
third argument, (…) for that head alone, as FlexAttention asks."""


@dataclass(frozen=True)
class Layer:
    """Where a mixer stands: the sequence it reads, its shape, and which of the trunk's layers it is."""

    scan: Scan
    heads: int
    head_dim: int
    index: int = 0
    depth: int = 1
    backend: str = "auto"
    biased: bool = False
    """Whether the position will add a bias to the scores."""
    by_offset: bool = False
    """Whether that bias depends on (Δrow, Δcol) alone, and for the start token on nothing."""
    relates: str = ""
    """What it depends on for pixels: "offset" (Δrow, Δcol) or "distance" along the scan; none: on anything."""

    @property
    def size(self) -> int:
        return self.scan.grid.size


class Mixer(nn.Module):
    """Base of every attention.  Its own settings are the keyword-only arguments of its constructor.

    gates: how many input-dependent channels a head the trunk shall project for it.
    carries: which positional encodings it can carry: "embed" (added to the input), "rotate", "bias".
    backends: the implementations it has, the fastest first.
    unit: slots that a loop over the sequence takes at a time; from a few of them on, memory is linear in their number.
    """

    gates: int = 0
    unit: int = 1
    carries: ClassVar[frozenset[str]] = frozenset({"embed"})
    backends: tuple[str, ...] = ("math",)

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.backend = self._choose_backend(layer.backend)

    def refusals(self, backend: str) -> list[str]:
        """Every reason why this backend cannot run this mixer here; empty if it can."""
        return [] if backend in self.backends else [f"has no such implementation (it has {', '.join(self.backends)})"]

    def _choose_backend(self, wanted: str) -> str:
        if wanted == "auto":
            return next(name for name in self.backends if not self.refusals(name))
        if reasons := self.refusals(wanted):
            raise ValueError(f"backend {wanted!r} cannot run {type(self).__name__}: {'; '.join(reasons)}")
        return wanted

    def _lacks(self, method: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no {method}; write one, as its base class describes it")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **extras: Any) -> Tensor:
        """The whole sequence at once.  extras: `bias`, a ScoreBias, if carried; `gates` if asked for."""
        raise self._lacks("forward")

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **extras: Any) -> Tensor:
        """The same from its definition, by reference.py."""
        raise self._lacks("oracle")

    def start(self, batch: int, like: Tensor) -> Any:
        """The state before the first slot, in the dtype and on the device of `like`."""
        raise self._lacks("start")

    def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any, *args: Any, **extras: Any) -> tuple[Tensor, Any]:
        """One slot more: q, k, v (batch, heads, 1, head_dim).  The state may be changed in place."""
        raise self._lacks("step")

    def keep(self, state: Any) -> Kept | None:
        """Moves the state on by a slot for a kernel that does what `step` does, if that is a softmax over kept keys.

        None, and the state as it was, where `step` must be asked.
        """
        return None

    def flops(self) -> int:
        """Forward FLOPs of one image, a multiplication and an addition being two."""
        raise self._lacks("flops")


AHEAD = 64
"""Slots for which decoding works out at a time who sees whom, and where they are kept."""


@dataclass
class Cache:
    """Keys and values that later slots may see; a slot takes the place of one that no later slot sees."""

    k: Tensor  # (batch, heads, kept, head_dim)
    v: Tensor
    slot: int = 0


class Ahead(NamedTuple):
    """Of AHEAD slots from `first` on: the slots that they or later ones see, and of each what `_seen_by` returns."""

    first: int
    held: Tensor
    each: list[tuple[Tensor, Tensor, int]]


class Kept(NamedTuple):
    """Where a slot's own key and value go, and which it sees."""

    k: Tensor  # (batch, heads, places, head_dim)
    v: Tensor
    place: int
    keys: Tensor
    """Slots, int64 (count,)."""
    places: Tensor | None
    """Theirs, int64 (count,); none: as many as they are, from the first on."""
    scores: Tensor | None = None
    """What the position adds to the scores, (heads, count)."""
    turns: Tensor | None = None
    """Cosines, then sines, by which it turns the query, then the key, (4, heads, head_dim / 2)."""


def allot(last_use: list[int]) -> tuple[list[int], int]:
    """A place for every slot, from its own step to its last use, and how many places that takes: the fewest."""
    free: list[int] = []
    leaving: dict[int, list[int]] = {}
    places: list[int] = []
    count = 0
    for slot, last in enumerate(last_use):
        free += leaving.pop(slot - 1, [])
        if not free:
            free.append(count)
            count += 1
        places.append(free.pop())
        leaving.setdefault(last, []).append(places[-1])
    return places, count


def take(x: Tensor, slots: Tensor) -> Tensor:
    """(batch, heads, seq, width) at slots (tiles, places) -> (batch, heads, tiles, places, width); -1 takes slot 0."""
    return x.index_select(2, slots.clamp(min=0).flatten()).unflatten(2, slots.shape)


def put_back(x: Tensor, slots: Tensor, size: int) -> Tensor:
    """`take` undone, where each slot is named once: (batch, heads, tiles, places, width) -> (…, seq, width)."""
    place = torch.argsort(torch.where(slots < 0, size, slots).flatten(), stable=True)[:size]
    return x.flatten(2, 3).index_select(2, place)


class ExactMixer(Mixer):
    """Exact softmax over the keys that `visible` names.

    A subclass states the predicate; with tiles it is also "blocked": time and memory O(tiles · queries · keys).
    "flex": FlexAttention, on CUDA.  "math": n² scores laid out, the oracle itself.
    """

    carries = frozenset({"embed", "rotate", "bias"})
    backends: tuple[str, ...] = ("blocked", "flex", "math")

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._tiles: tuple[Tensor, Tensor, Tensor] | None = None
        self._last_use: Tensor | None = None
        self._places: tuple[Tensor, int] = torch.empty(0, dtype=torch.long), 0
        self._seen: Ahead | None = None
        self._flex_plan: backends.FlexPlan | None = None

    def refusals(self, backend: str) -> list[str]:
        reasons = super().refusals(backend)
        if backend == "blocked" and type(self).tiles is ExactMixer.tiles:
            reasons.append("states no tiles")
        return reasons + (backends.flex_reasons(self.layer.head_dim) if backend == "flex" else [])

    def visible(self) -> Predicate:
        """The mask, as a predicate over slots."""
        raise self._lacks("visible")

    def tiles(self) -> Tiles:
        """Which queries are served together, and all keys that they may see; by default all and all."""
        slots = torch.arange(self.layer.size)[None]
        return Tiles(slots, slots)

    def block_order(self) -> Tensor | None:
        """int64 (n,): all slots, tile by tile, if so fewer blocks of FlexAttention's hold a visible pair; else none."""
        if type(self).tiles is ExactMixer.tiles:
            return None
        queries, keys, mask = self._tables(torch.device("cpu"))
        by_tile = queries[queries >= 0]

        def blocks(order: Tensor) -> int:
            block = torch.argsort(order) // backends.FLEX_BLOCK
            pairs = block[queries][:, :, None] * len(order) + block[keys][:, None, :]
            return len(pairs[mask].unique())

        return by_tile if blocks(by_tile) < blocks(torch.arange(self.layer.size)) else None

    def last_use(self) -> Tensor:
        """int64 (n,): the last slot that may see each slot; decoding forgets a slot after it."""
        queries, keys, mask = self._tables(torch.device("cpu"))
        seen = torch.where(mask, queries[:, :, None], -1).amax(dim=1)
        return torch.arange(self.layer.size).scatter_reduce(0, keys.clamp(min=0).flatten(), seen.flatten(), "amax")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None) -> Tensor:
        if self.backend == "math":
            return self.oracle(q, k, v, bias)
        if self.backend == "flex":
            if self._flex_plan is None or self._flex_plan.block_mask.kv_num_blocks.device != q.device:
                self._flex_plan = backends.flex_plan(self.visible(), q.shape[2], q.device, self.block_order())
            return backends.flex(q, k, v, self._flex_plan, bias)
        return self._blocked(q, k, v, bias)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None = None) -> Tensor:
        size = q.shape[2]
        mask = geometry.matrix(self.visible(), size).to(q.device)
        slot = torch.arange(size, device=q.device)
        return reference.softmax_attention(q, k, v, mask, None if bias is None else bias(slot[:, None], slot[None, :]))

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Query slots (tiles, queries), key slots (tiles, keys) and mask (tiles, queries, keys), made once a device."""
        if self._tiles is None or self._tiles[0].device != device:
            with torch.inference_mode(False):  # kept for later passes, which may be training
                tiles = self.tiles()
                mask = tiles.mask(self.visible())
            self._tiles = (tiles.queries.to(device), tiles.keys.to(device), mask.to(device))
        return self._tiles

    def _blocked(self, q: Tensor, k: Tensor, v: Tensor, bias: ScoreBias | None) -> Tensor:
        queries, keys, mask = self._tables(q.device)
        # A padded query sees its tile's first key, so that no row is empty; it is dropped below.
        seen = mask | ((queries < 0)[:, :, None] & (torch.arange(keys.shape[1], device=q.device) == 0))
        attn_mask: Tensor = seen
        if bias is not None:
            scores = bias(queries.clamp(min=0)[:, :, None], keys.clamp(min=0)[:, None, :])  # (heads, tiles, q, k)
            attn_mask = scores.masked_fill(~seen, float("-inf")).to(q.dtype)
        gathered = (take(x, slots) for x, slots in ((q, queries), (k, keys), (v, keys)))
        flat_q, flat_k, flat_v = (x.flatten(1, 2) for x in gathered)  # (batch, heads · tiles, slots, head_dim)
        attn_mask = attn_mask.expand(q.shape[1], *seen.shape).flatten(0, 1)[None]  # 4D, else SDPA is not fused
        out = F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=attn_mask)
        return put_back(out.unflatten(1, (q.shape[1], -1)), queries, q.shape[2])

    def start(self, batch: int, like: Tensor) -> Cache:
        if self._last_use is None:
            self._last_use = self.last_use()
            places, count = allot(self._last_use.tolist())
            self._places = torch.tensor(places), count
        shape = batch, self.layer.heads, self._places[1], self.layer.head_dim
        return Cache(like.new_empty(shape), like.new_empty(shape))  # no place is read before it is written

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Cache, bias: ScoreBias | None = None
    ) -> tuple[Tensor, Cache]:
        kept_k, kept_v, place, keys, places, *_ = self._next(state)
        kept_k[:, :, place], kept_v[:, :, place] = k[:, :, 0], v[:, :, 0]
        scores = None
        if bias is not None:
            scores = bias(keys.new_tensor([state.slot - 1]), keys)[:, None].to(q.dtype)
        seen_k, seen_v = (
            x[:, :, : len(keys)] if places is None else x.index_select(2, places) for x in (kept_k, kept_v)
        )
        return F.scaled_dot_product_attention(q, seen_k, seen_v, attn_mask=scores), state

    def keep(self, state: Cache) -> Kept | None:
        return self._next(state) if type(self).step is ExactMixer.step else None

    def _next(self, state: Cache) -> Kept:
        keys, places, place = self._seen_by(state.slot, state.k.device)
        state.slot += 1
        return Kept(state.k, state.v, place, keys, places)

    def _seen_by(self, slot: int, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
        """Which slots this one sees, their places in the cache (none: the first, as many as they are), and its own."""
        first, seen = slot - slot % AHEAD, self._seen
        if seen is None or seen.first != first or seen.each[0][0].device != device:
            self._seen = seen = self._look_ahead(first, seen, device)
        return seen.each[slot - first]

    def _look_ahead(self, first: int, before: Ahead | None, device: torch.device) -> Ahead:
        assert self._last_use is not None, "a state comes from start"
        with torch.inference_mode(False):  # kept for later steps, which may be training
            slots = torch.arange(first, min(first + AHEAD, self.layer.size))
            earlier = before.held if before and before.first == first - AHEAD else torch.arange(first)
            held = torch.cat([earlier, slots])
            held = held[self._last_use[held] >= first]
            mask = self.visible()(slots[:, None], held)
            keys = held[mask.nonzero()[:, 1]]
            places, counts = self._places[0], mask.sum(dim=1).tolist()
            split = (x.to(device).split(counts) for x in (keys, places[keys]))
            return Ahead(first, held, list(zip(*split, places[slots].tolist(), strict=True)))

    def pairs(self) -> int:
        """How many (query, key) pairs are visible."""
        return self.tiles().pairs(self.visible())

    def flops(self) -> int:
        return 4 * self.layer.heads * self.layer.head_dim * self.pairs()
