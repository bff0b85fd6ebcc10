"""The trunk: Image GPT (Chen et al., Generative Pretraining from Pixels, ICML 2020), its attention left open.

Shapes: tokens (batch, height, width); x (batch, seq, dim); q, k, v (batch, heads, seq, head_dim); seq = height · width.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import kernels
from .decoding import check_step
from .geometry import Scan
from .mixer import Kept, Layer, Mixer
from .position import TABLE_SIGMA, Position, Shape

MakeMixer = Callable[[Layer], Mixer]
Projected = tuple[Tensor, Tensor, Tensor, dict[str, Any]]
"""q, k, v, and what else the mixer takes: `bias`, `gates`."""


class Norm(nn.Module):
    """Root mean square with a gain: it does not centre."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        return F.rms_norm(x, self.gain.shape, self.gain, eps=self.eps)


class Attention(nn.Module):
    """Projections around a mixer."""

    def __init__(self, dim: int, mixer: Mixer, position: Position) -> None:
        super().__init__()
        self.mixer, self.heads, self.index = mixer, mixer.layer.heads, mixer.layer.index
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.gates = nn.Linear(dim, self.heads * mixer.gates, bias=False) if mixer.gates else None
        self.out = nn.Linear(dim, dim, bias=False)
        self.position = [position]  # in a list: its parameters belong to the trunk

    def gated(self, x: Tensor) -> Tensor | None:
        """The gates that the mixer asks for, (batch, seq, heads · gates); None where it asks for none."""
        return None if self.gates is None else self.gates(x)

    def project(self, x: Tensor, slots: Tensor) -> Projected:
        """x (batch, seq, dim) at these slots (seq,), projected, as a mixer takes it."""
        return self.split(self.qkv(x), self.gated(x), slots)

    def split(self, qkv: Tensor, gates: Tensor | None, slots: Tensor) -> Projected:
        """What was projected, (batch, seq, 3 · dim) and (batch, seq, heads · gates), as a mixer takes it."""
        # Split before turning: the three gradients are then put together in the order that the projection reads.
        parts = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)  # (batch, heads, seq, head_dim)
        q, k = self.position[0].rotate(q, k, slots, self.index)
        extras: dict[str, Any] = {}
        if (bias := self.position[0].bias(self.index)) is not None:
            extras["bias"] = bias
        if gates is not None:
            extras["gates"] = rearrange(gates, "b n (h g) -> b h n g", h=self.heads)
        return q, k, v, extras

    def checked(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What the mixer made, for a kernel, which reads it as it reads x: of its shape and dtype, else ValueError."""
        if (mixed.shape, mixed.dtype) != (x.shape, x.dtype):
            made, wanted = (f"{tuple(y.shape)} in {y.dtype}" for y in (mixed, x))
            raise ValueError(f"{type(self.mixer).__name__} made {made} where {wanted} is wanted, as of q, k and v")
        return mixed

    def mix(self, q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any]) -> Tensor:
        """What the mixer makes of them, (batch, seq, dim), before `out`."""
        return rearrange(self.mixer(q, k, v, **extras), "b h n d -> b n (h d)")

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """x (batch, seq, dim) at these slots (seq,) -> (batch, seq, dim)."""
        return self.out(self.mix(*self.project(x, slots)))

    def keep(self, slots: Tensor, state: Any) -> Kept | None:
        """The mixer's `keep`, and what the position does to scores, queries and keys."""
        if (kept := self.mixer.keep(state)) is None:
            return None
        position, dtype = self.position[0], kept.k.dtype
        if (bias := position.bias(self.index)) is not None:
            kept = kept._replace(scores=bias(slots, kept.keys).to(dtype).contiguous())
        if (angles := position.angles(slots, self.index)) is not None:
            turns = torch.stack([wave(angle) for wave in (torch.cos, torch.sin) for angle in angles]).to(dtype)
            kept = kept._replace(turns=turns.view(4, -1, turns.shape[-1]).expand(4, self.heads, -1).contiguous())
        return kept

    def step(self, qkv: Tensor, gates: Tensor | None, slots: Tensor, state: Any) -> tuple[Tensor, Any]:
        """What the mixer makes of a slot's projections, (batch, 1, dim), before `out`."""
        q, k, v, extras = self.split(qkv, gates, slots)
        mixed, state = self.mixer.step(q, k, v, state, **extras)
        return mixed.transpose(1, 2).flatten(2), state


class MLP(nn.Module):
    """Four times as wide, with x·σ(1.702x) between.

    That is silu(1.702x) / 1.702, one fused operation; the factors go to the weights where those are fewer than the
    activations.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) -> (…, dim)."""
        up, down = self.up, self.down
        if x.numel() < up.in_features**2 or not (plain(up) and plain(down)):
            return down(F.silu(1.702 * up(x)) / 1.702)
        x = F.silu(F.linear(x, 1.702 * up.weight, None if up.bias is None else 1.702 * up.bias))
        return F.linear(x, down.weight / 1.702, down.bias)


def plain(matrix: nn.Linear) -> bool:
    """Whether the product with its weight is all that it does: no hook makes the weight, no adapter adds to it."""
    return type(matrix) is nn.Linear and not (matrix._forward_hooks or matrix._forward_pre_hooks)


def fuses(x: Tensor, norms: tuple[Norm, ...], matrices: tuple[nn.Linear, ...]) -> bool:
    """Whether a kernel takes norm, product and what follows in one go."""
    if not all(plain(m) and m.bias is None for m in matrices):
        return False
    return kernels.block.serves(x, *(norm.gain for norm in norms), *(m.weight for m in matrices))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, mixer: Mixer, position: Position) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(dim), Attention(dim, mixer, position)
        self.mlp_norm, self.mlp = Norm(dim), MLP(dim)

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """x (batch, seq, dim) at these slots (seq,) -> (batch, seq, dim).  Raises ValueError as `checked`."""
        attention, mlp, norm, last = self.attention, self.mlp, self.attention_norm, self.mlp_norm
        matrices = attention.qkv, attention.out, mlp.up, mlp.down
        if not fuses(x, (norm, last), matrices):
            x = x + attention(norm(x), slots)
            return x + mlp(last(x))
        qkv, outer, up, down = (matrix.weight for matrix in matrices)
        gates = attention.gated(norm(x)) if attention.gates else None
        projected = attention.split(kernels.block.project(x, norm.gain, norm.eps, qkv), gates, slots)
        mixed = attention.checked(attention.mix(*projected), x)
        return kernels.block.finish(x, mixed, outer, last.gain, last.eps, up, down)

    def step(self, x: Tensor, slots: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x (batch, 1, dim) at one slot (1,) and the mixer's state -> (batch, 1, dim) and its next state."""
        attention, normed = self.attention, self.attention_norm(x)
        mixed, state = attention.step(attention.qkv(normed), attention.gated(normed), slots, state)
        x = x + attention.out(mixed)
        return x + self.mlp(self.mlp_norm(x)), state

    def parts(self) -> kernels.Parts:
        """What decoding by kernel reads."""
        attention, mlp = self.attention, self.mlp
        return self.attention_norm, attention.qkv, attention.gates, attention.out, self.mlp_norm, mlp.up, mlp.down


@dataclass
class State:
    """What decoding keeps: the next slot, each layer's own state, and for the kernel where the weights are."""

    slot: int
    batch: int
    layers: list[Any]
    stack: kernels.Stack | None = None


class ImageGPT(nn.Module):
    """The trunk around any mixer and any position.

    tokens int64 (batch, height, width) -> logits (batch, height, width, vocab); logits[b, r, c] predicts
    tokens[b, r, c].  With objective "ar" it depends on earlier pixels only; with "bert" on all that are not hidden.
    """

    slots: Tensor  # (seq,)
    order: Tensor  # (seq,): the raster index of the pixel that each slot predicts

    def __init__(
        self, make_mixer: MakeMixer, position: type[Position], scan: Scan, *,
        vocab: int, dim: int, depth: int, heads: int, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads {heads} does not divide dim {dim}")
        self.scan, self.vocab, self.depth, self.heads = scan, vocab, depth, heads
        self.tokens = nn.Parameter(torch.empty(vocab, dim))
        self.start_token = nn.Parameter(torch.empty(dim)) if scan.causal else None
        self.position = position(Shape(scan, dim, depth, heads))
        bias = position.needs == "bias", position.by_offset, position.relates
        layers = [Layer(scan, heads, dim // heads, index, depth, backend, *bias) for index in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, make_mixer(layer), self.position) for layer in layers)
        self.norm = Norm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.register_buffer("slots", torch.arange(scan.grid.size), persistent=False)
        self.register_buffer("order", scan.path, persistent=False)
        initialise(self)

    @property
    def mixers(self) -> list[Mixer]:
        """One a block, the first block's first."""
        return [cast(Block, block).attention.mixer for block in self.blocks]

    @property
    def backend(self) -> str:
        """What really runs, a name for each kind of layer."""
        return "+".join(dict.fromkeys(mixer.backend for mixer in self.mixers))

    def embed(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(batch, height, width) -> (batch, seq, dim); the content of hidden pixels is zeroed, their position kept.

        Raises ValueError for images of another height or width.
        """
        grid = self.scan.grid
        for what, given in (("tokens", tokens), ("hidden", hidden)):
            if given is not None and given.shape[1:] != (grid.height, grid.width):
                raise ValueError(f"{what} (batch, {grid.height}, {grid.width}) wanted, not {tuple(given.shape)}")
        x = self.tokens[self._along(tokens)]
        if hidden is not None:
            x = x * ~self._along(hidden.bool())[:, :, None]
        if self.start_token is not None:
            x = torch.cat([self.start_token.expand(len(x), 1, -1), x[:, :-1]], dim=1)
        where = self.position.embed(self.slots)
        return x if where is None else x + where

    def _along(self, pixels: Tensor) -> Tensor:
        """(batch, height, width) -> (batch, seq), as the scan reads."""
        flat = pixels.flatten(1)
        return flat if self.scan.order == "raster" else flat[:, self.order]

    def features(self, tokens: Tensor, hidden: Tensor | None = None) -> list[Tensor]:
        """The residual stream, depth + 1 tensors (batch, seq, dim), the embedding first."""
        stream = [self.embed(tokens, hidden)]
        for block in self.blocks:
            stream.append(block(stream[-1], self.slots))
        return stream

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Tokens, and bool (batch, height, width) of those that are hidden -> logits.  Raises ValueError as `embed`."""
        x = self.embed(tokens, hidden)
        for block in self.blocks:
            x = block(x, self.slots)
        if fuses(x, (self.norm,), (self.head,)):
            logits = kernels.block.project(x, self.norm.gain, self.norm.eps, self.head.weight)
        else:
            logits = self.head(self.norm(x))
        if self.scan.order != "raster":
            logits = logits[:, torch.argsort(self.order)]
        return rearrange(logits, "b (h w) v -> b h w v", h=self.scan.grid.height)

    def start(self, batch: int) -> State:
        """The state before the first pixel of `batch` images; "ar" only, else ValueError."""
        if self.start_token is None:
            raise ValueError('objective "bert" has no order to decode in; build the model with objective="ar"')
        return State(0, batch, [mixer.start(batch, self.tokens) for mixer in self.mixers])

    def step(self, pixel: Tensor | None, state: State) -> tuple[Tensor, State]:
        """The previous pixel along the scan, int64 (batch,), None at the first -> logits (batch, vocab) of the next.

        Raises ValueError for other pixels, and after the last.
        """
        check_step(pixel, state.slot, state.batch, self.scan.grid.size)
        assert self.start_token is not None
        slots = self.slots[state.slot : state.slot + 1]
        x = (self.start_token.expand(state.batch, -1) if pixel is None else self.tokens[pixel])[:, None]
        where = self.position.embed(slots)
        x = x if where is None else x + where
        if kernels.decodes(x) and (stack := self._stack(state)).dtype == x.dtype:
            logits = self._run(stack, x, slots, state)
        else:
            for index, block in enumerate(self.blocks):
                x, state.layers[index] = cast(Block, block).step(x, slots, state.layers[index])
            logits = self.head(self.norm(x))
        state.slot += 1
        return logits[:, 0], state

    def _run(self, stack: kernels.Stack, x: Tensor, slots: Tensor, state: State) -> Tensor:
        """The kernel goes through layer after layer, except for the mixers that it must ask."""
        attentions = [cast(Block, block).attention for block in self.blocks]
        kept = [attention.keep(slots, own) for attention, own in zip(attentions, state.layers, strict=True)]
        stack.keep(kept)
        asked = [index for index, known in enumerate(kept) if known is None]
        first, mixed = 0, None
        for index in asked:
            x, projected = stack.run(x, mixed, first, index)
            qkv, gates = projected.split([3 * x.shape[2], projected.shape[2] - 3 * x.shape[2]], dim=2)
            attention = attentions[index]
            step = attention.step(qkv, gates if attention.gates else None, slots, state.layers[index])
            (mixed, state.layers[index]), first = step, index + 1
            mixed = attention.checked(mixed, x)
        return stack.run(x, mixed, first, self.depth)[1]

    def _stack(self, state: State) -> kernels.Stack:
        """Where the weights are; worked out once a state, and again where they have moved."""
        if state.stack is None or not state.stack.current:
            blocks = [cast(Block, block) for block in self.blocks]
            state.stack = kernels.Stack([block.parts() for block in blocks], (self.norm, self.head), self.heads)
        return state.stack

    def flops(self) -> int:
        """Forward FLOPs of one image: two for every weight of a matrix and slot, and the attention."""
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * matrices * self.scan.grid.size + sum(mixer.flops() for mixer in self.mixers)


@torch.no_grad()
def initialise(model: ImageGPT) -> None:
    """Image GPT's initial weights.

    Each parameter is drawn from a generator of its own, seeded by torch.manual_seed's last seed and the parameter's
    name, so that variants which share a name share its initial weights whatever else they have.
    """
    seed = torch.initial_seed()
    dim = model.tokens.shape[1]
    for name, parameter in model.named_parameters():
        if parameter.is_meta or ".mixer." in name:
            continue  # a mixer initialises what it owns
        generator = torch.Generator().manual_seed((seed + zlib.crc32(name.encode())) % 2**63)
        if name.endswith("gain"):
            parameter.fill_(1.0)
        elif name == "head.weight":
            parameter.zero_()
        else:
            parameter.normal_(0.0, _sigma(name, dim, model.depth), generator=generator)
    model.position.initialise()


def _sigma(name: str, dim: int, depth: int) -> float:
    if name.startswith("position."):
        return TABLE_SIGMA
    if name.endswith((".qkv.weight", ".gates.weight")):
        return dim**-0.5
    if name.endswith("attention.out.weight"):
        return (dim * depth) ** -0.5
    return 0.02
