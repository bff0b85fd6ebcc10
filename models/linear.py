"""Linear-time attention by feature maps: a sum over keys becomes a state of fixed size.

Shapes: q, k, v (batch, heads, seq, head_dim); φ(q), φ(k) (batch, heads, seq, width).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import backends, kernels, reference
from .full import Dense
from .mixer import Layer, Mixer
from .recurrence import Recurrent, cut, decayed, summed
from .registry import positive, variant


@dataclass
class Sums:
    """What decoding keeps: memory Σ φ(k) vᵀ (batch, heads, width, head_dim + 1), the mass Σ φ(k) as last column."""

    memory: Tensor
    slot: int = 0


def _with_ones(v: Tensor) -> Tensor:
    """A last channel of ones: its sum is the normaliser, carried along for nothing."""
    return F.pad(v, (0, 1), value=1.0)


@variant(
    "linear",
    family="linear",
    time="O(n·d²)",
    memory="O(n·d)",
    summary="φ = elu + 1",
    reference="Katharopoulos et al., Transformers are RNNs, ICML 2020",
)
class Linear(Recurrent):
    """φ(q) Σ φ(k) vᵀ / φ(q) Σ φ(k), φ(x) = elu(x) + 1.

    The normaliser is at least `floor`, which the paper's code adds to it: φ can be 0 in floating point.
    "compiled": a C++ kernel for CPU, which sums slot by slot and knows no chunks.
    """

    carries = frozenset({"embed"})  # φ(q)·φ(k) of rotated queries and keys would not depend on the offset alone
    backends: tuple[str, ...] = ("compiled", "blocked", "fla")
    floor = 1e-6

    def __init__(self, layer: Layer, *, chunk: int = 0) -> None:
        super().__init__(layer, chunk=chunk)
        self.width = layer.head_dim
        self.floor = type(self).floor  # an instance's: torch.compile with dynamic=True cannot lift a class's

    def refusals(self, backend: str) -> list[str]:
        reasons = super().refusals(backend)
        if backend == "fla" and not reasons:
            return backends.fla_reasons(self.layer.scan)
        if backend != "compiled" or reasons:
            return reasons
        if not self.layer.scan.causal:
            reasons.append(f"serves objective 'ar' only, not {self.layer.scan.objective!r}")
        return reasons + kernels.reasons("linear")

    def feature(self, x: Tensor, first: int = 0) -> Tensor:
        """φ of queries or keys of consecutive slots, of which `first` is the first."""
        return x.clamp(max=0).exp() + x.relu()  # elu(x) + 1, but to the last digit below 0 too

    def normalised(self, out: Tensor) -> Tensor:
        """(…, head_dim + 1), sums and as last channel their normaliser -> (…, head_dim)."""
        return out[..., :-1] / out[..., -1:].clamp(min=self.floor)

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        if kernels.serves(self, q, k, v):
            return self.compiled(q, k, v)
        q, k, v = self.feature(q), self.feature(k), _with_ones(v)
        if self.backend == "fla":
            return self.normalised(backends.fla_decayed(q, k, v))
        if self.layer.scan.causal:
            return self.normalised(summed(q, k, v, min(self.chunk, q.shape[2])))
        return self.normalised(q @ (k.mT @ v))

    def compiled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`parallel` by the C++ kernel, (batch, heads, seq, head_dim)."""
        return kernels.linear(q, k, v, "elu+1", self.floor)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        return reference.linear_attention(q, k, v, lambda x: F.elu(x) + 1, self.layer.scan.causal, self.floor)

    def start(self, batch: int, like: Tensor) -> Sums:
        return Sums(self.zeros(batch, like, self.width, self.layer.head_dim + 1))

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Sums, **extras: Tensor) -> tuple[Tensor, Sums]:
        memory = state.memory + self.feature(k, state.slot).mT @ _with_ones(v)
        return self.normalised(self.feature(q, state.slot) @ memory), Sums(memory, state.slot + 1)

    def flops(self) -> int:
        """Within a chunk the scores and their use, between chunks the state's making and its use."""
        channels, state = self.layer.head_dim + 1, 4 * self.width * (self.layer.head_dim + 1)
        if not self.layer.scan.causal or self.backend == "compiled":
            return self.layer.heads * self.layer.size * state
        chunk, slots = self.fitting()
        return self.layer.heads * slots * (2 * chunk * (self.width + channels) + (state if slots > chunk else 0))


@variant(
    "performer",
    family="linear",
    time="O(n·d²·log d)",
    memory="O(n·d·log d)",
    summary="FAVOR+: positive orthogonal random features of the softmax kernel",
    reference="Choromanski et al., Rethinking Attention with Performers, ICLR 2021",
)
class Performer(Linear):
    """exp(q·k/√d) as the mean over f of φ_f(q) φ_f(k), φ_f(x) = exp(w_f·x - |x|²/2), x divided by d^¼.

    The directions w_f of each head are orthogonal in groups of d and as long as Gaussian vectors (the mean stays
    unbiased); they are a function of `seed`, the layer and the head, and saved with the model.
    features: how many; 0 for d·ln d, the paper's.

    Only ratios matter, so each query's features are divided by the largest, and each key's by the largest of any key
    *so far*, whose rise is a decay of the older ones: nothing overflows, and nothing of a later key is used.
    """

    carries = frozenset({"embed", "rotate"})
    backends = ("blocked", "fla")
    floor = 1e-30  # the ratios of a query and keys with no direction in common
    directions: Tensor  # (heads, features, head_dim)

    def __init__(self, layer: Layer, *, features: int = 0, seed: int = 0, chunk: int = 0) -> None:
        super().__init__(layer, chunk=chunk)
        usual = max(1, math.ceil(layer.head_dim * math.log(layer.head_dim)))
        self.width = positive("features", features, zero="d·ln d") or usual
        positive("seed", seed, zero="the first")
        directions = orthogonal_directions(layer.heads, self.width, layer.head_dim, seed, layer.index)
        # Drawn on the CPU on any machine; then wherever the model is being built.
        self.register_buffer("directions", directions.to(torch.empty(()).device, torch.get_default_dtype()))

    def log_feature(self, x: Tensor) -> Tensor:
        """log φ of queries or keys, (batch, heads, seq, features); not yet divided by anything."""
        x = x * self.layer.head_dim**-0.25
        return x @ self.directions.to(x.dtype).mT - (x * x).sum(-1, keepdim=True) / 2

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        q, k, v = self.log_feature(q), self.log_feature(k), _with_ones(v)
        largest = k.detach().amax(-1, keepdim=True)
        causal = self.layer.scan.causal
        peak = largest.cummax(2).values if causal else largest.amax(2, keepdim=True)
        q, k = (q - q.detach().amax(-1, keepdim=True)).exp(), (k - peak).exp()
        if not causal:
            return self.normalised(q @ (k.mT @ v))
        rise = F.pad(peak[:, :, :-1] - peak[:, :, 1:], (0, 0, 1, 0))
        if self.backend == "fla":
            return self.normalised(backends.fla_decayed(q, k, v, rise))
        return self.normalised(decayed(q, k, v, rise[..., 0], min(self.chunk, q.shape[2])))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        return reference.linear_attention(q, k, v, lambda x: self.log_feature(x).exp(), self.layer.scan.causal)

    def start(self, batch: int, like: Tensor) -> Sums:
        """As a last row of the memory the logarithm by which all of it is divided."""
        memory = self.zeros(batch, like, self.width + 1, self.layer.head_dim + 1)
        memory[..., -1, :] = float("-inf")
        return Sums(memory)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, state: Sums, **extras: Tensor) -> tuple[Tensor, Sums]:
        memory, peak = state.memory[..., :-1, :], state.memory[..., -1:, :1]
        q, k = self.log_feature(q), self.log_feature(k)
        new = torch.maximum(peak, k.amax(-1, keepdim=True))
        memory = memory * (peak - new).exp() + (k - new).exp().mT @ _with_ones(v)
        out = self.normalised((q - q.amax(-1, keepdim=True)).exp() @ memory)
        return out, Sums(torch.cat([memory, new.expand(*memory.shape[:2], 1, memory.shape[3])], dim=2), state.slot + 1)

    def flops(self) -> int:
        return super().flops() + 4 * self.layer.heads * self.layer.size * self.width * self.layer.head_dim


def orthogonal_directions(heads: int, count: int, head_dim: int, seed: int, layer: int) -> Tensor:
    """float64 (heads, count, head_dim) on the CPU: orthogonal in groups of head_dim, as long as Gaussian vectors."""
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + layer) % 2**63)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    groups = -(-count // head_dim)
    turned, triangle = torch.linalg.qr(normal(heads, groups, head_dim, head_dim))
    turned = turned * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # else not uniform over rotations
    return (turned.flatten(1, 2) * normal(heads, groups * head_dim, head_dim).norm(dim=-1, keepdim=True))[:, :count]


@variant(
    "cosformer",
    family="linear",
    time="O(n·d²)",
    memory="O(n·d)",
    summary="ReLU, weighted by the cosine of the distance along the scan",
    reference="Qin et al., cosFormer: Rethinking Softmax in Attention, ICLR 2022",
)
class CosFormer(Linear):
    """Weight relu(q_i)·relu(k_j) cos(π/2 · (i - j)/n), i and j slots, so that no weight is negative; normalised.

    cos(a - b) = cos a cos b + sin a sin b makes it a feature map of twice the width.  The start token is a key at slot
    0 like any other.  A query that shares no channel with any key reads 0; the floor of 1e-6 is the paper's code's.
    """

    def __init__(self, layer: Layer, *, chunk: int = 0) -> None:
        super().__init__(layer, chunk=chunk)
        self.width = 2 * layer.head_dim

    def feature(self, x: Tensor, first: int = 0) -> Tensor:
        slot = torch.arange(first, first + x.shape[2], device=x.device, dtype=x.dtype)[:, None]
        angle = slot * (math.pi / 2 / self.layer.size)
        return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], dim=-1)

    def compiled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.linear(self.feature(q), self.feature(k), v, "none", self.floor)

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        slot = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
        distance = slot[:, None] - slot[None, :]
        weight = (distance * (math.pi / 2 / self.layer.size)).cos()
        if self.layer.scan.causal:
            weight = weight.masked_fill(distance < 0, 0.0)
        return self.normalised(reference.weighted_attention(q.relu(), k.relu(), _with_ones(v), weight[None]))


@variant(
    "based",
    family="linear",
    time="O(n·d³)",
    memory="O(n·d)",
    summary="second-order Taylor map of the softmax kernel, exact and unprojected",
    reference="Arora et al., Simple linear attention language models balance the recall-throughput tradeoff, ICML 2024",
)
class Based(Linear):
    """Weight 1 + s + s²/2 ≥ ½, s = q·k/√d; normalised.

    The paper projects q and k down to 16 channels first; here they keep all d, and the feature map of the symmetric
    square has the width 1 + d + d(d + 1)/2: the state is O(d³) a head.  Within a chunk the weight is a function of the
    score; features are made for the states alone, and made anew in the backward pass for a group of chunks at a time,
    between which a state is kept: with as many slots a group as the map is wide, that is O(n·d).

    No "fla": of that library's kernels for this map one is quadratic, the other takes heads of 16 channels at most.
    """

    carries = frozenset({"embed", "rotate"})
    backends = ("blocked",)

    def __init__(self, layer: Layer, *, chunk: int = 0) -> None:
        width = _taylor_width(layer.head_dim)
        # The fewest slots for which a state is cheaper than more scores, kept small enough for scores to be stored.
        alone = min(256, width + 64)
        super().__init__(layer, chunk=layer.size if chunk == 0 and layer.size <= alone else chunk)
        self.width = width
        self.unit = -(-max(self.width, 512) // self.chunk) * self.chunk  # a group

    def feature(self, x: Tensor, first: int = 0) -> Tensor:
        return _taylor(x * self.layer.head_dim**-0.25)

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        pieces = [x.split(self.unit, dim=2) for x in (q, k, _with_ones(v))]
        memory = q.new_zeros(*q.shape[:2], self.width, v.shape[-1] + 1)
        out = []
        if self.layer.scan.causal:
            for piece in zip(*pieces, strict=True):
                part, memory = self._again(self._read_earlier, *piece, memory)
                out.append(part)
        else:
            for piece in zip(*pieces[1:], strict=True):
                memory = self._again(self._remember, *piece, memory)
            out = [self._again(self._read, piece, memory) for piece in pieces[0]]
        return self.normalised(torch.cat(out, dim=2))

    def _again(self, work: Callable[..., Any], *given: Tensor) -> Any:
        """Work that the backward pass does anew, unless it is all in one group."""
        return checkpoint(work, *given, use_reentrant=False) if self.layer.size > self.unit else work(*given)

    def _remember(self, k: Tensor, v: Tensor, memory: Tensor) -> Tensor:
        return memory + self.feature(k).mT @ v

    def _read(self, q: Tensor, memory: Tensor) -> Tensor:
        return self.feature(q) @ memory

    def _read_earlier(self, q: Tensor, k: Tensor, v: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """A group's sums over the keys no later than each query, and the memory after it."""
        size = q.shape[2]
        q, k, v = (cut(x, self.fitting()[0]) for x in (q, k, v))
        score = q @ k.mT * self.layer.head_dim**-0.5
        out = (1 + score + score * score / 2).tril() @ v
        if self.layer.size > self.chunk:
            states = torch.cat([memory[:, :, None], self.feature(k).mT @ v], dim=2).cumsum(dim=2)
            out = out + self.feature(q) @ states[:, :, :-1]
            memory = states[:, :, -1].clone()  # a view would keep all of them
        return out.flatten(2, 3)[:, :, :size], memory

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, **extras: Tensor) -> Tensor:
        def taylor(x: Tensor) -> Tensor:
            x = x * self.layer.head_dim**-0.25
            square = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
            return torch.cat([torch.ones_like(x[..., :1]), x, square], dim=-1)

        return reference.linear_attention(q, k, v, taylor, self.layer.scan.causal)

    def flops(self) -> int:
        """As of the others, but that scores have head_dim channels, not the feature map's."""
        d, channels, state = self.layer.head_dim, self.layer.head_dim + 1, 4 * self.width * (self.layer.head_dim + 1)
        if not self.layer.scan.causal:
            return self.layer.heads * self.layer.size * state
        chunk, slots = self.fitting()
        return self.layer.heads * slots * (2 * chunk * (d + channels) + (state if slots > chunk else 0))


@torch.library.custom_op("attnbench::taylor", mutates_args=())
def _taylor(x: Tensor) -> Tensor:
    """x (…, d) -> (…, 1 + d + d(d + 1)/2): 1, the channels, √½ of their squares, and their products by pairs.

    Pairs come by their distance around a circle of channels, each distance a whole row; of those half the circle apart
    each would come up twice.  A square stands once in the sum over pairs, a product twice.  Each part is computed where
    it belongs, and backwards without the zeros that autograd would put around every row.
    """
    out = _with_room(x)
    ones, line, square, *products = out.split(_parts(x), dim=-1)
    ones.fill_(1)
    line.copy_(x)
    torch.mul(x, x, out=square).mul_(0.5**0.5)
    for product, one, other in zip(products, _firsts(x), _seconds(_circle(x), x.shape[-1]), strict=True):
        torch.mul(one, other, out=product)
    return out


@_taylor.register_fake
def _with_room(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], _taylor_width(x.shape[-1]))


@torch.library.custom_op("attnbench::taylor_backward", mutates_args=())
def _taylor_backward(grad: Tensor, x: Tensor) -> Tensor:
    _, line, square, *products = grad.split(_parts(x), dim=-1)
    out, circle, d = torch.addcmul(line, square, x, value=2**0.5), _circle(x), x.shape[-1]
    around = torch.zeros_like(circle)
    factors = _firsts(x), _seconds(circle, d), _firsts(out), _seconds(around, d)
    for product, one, other, to_one, to_other in zip(products, *factors, strict=True):
        to_one.addcmul_(product, other)
        to_other.addcmul_(product, one)
    for part in around.split(d, dim=-1):
        out[..., : part.shape[-1]].add_(part)
    return out


@_taylor_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _slope(ctx: Any, grad: Tensor) -> Tensor:
    return _taylor_backward(grad, *ctx.saved_tensors)


_taylor.register_autograd(_slope, setup_context=_keep)


def _taylor_width(d: int) -> int:
    return 1 + d + d * (d + 1) // 2


def _parts(x: Tensor) -> list[int]:
    """Channels of each part of the map."""
    d = x.shape[-1]
    return [1, d, d, *[d] * ((d - 1) // 2), *[d // 2] * (d % 2 == 0)]


def _circle(x: Tensor) -> Tensor:
    """The channels, and once more those up to half the circle."""
    return torch.cat([x, x[..., : x.shape[-1] // 2]], dim=-1)


def _firsts(x: Tensor) -> list[Tensor]:
    """The first factor of each distance's products: a view."""
    d = x.shape[-1]
    return [x] * ((d - 1) // 2) + [x[..., : d // 2]] * (d % 2 == 0)


def _seconds(circle: Tensor, d: int) -> list[Tensor]:
    """The second factor of each distance's products: a view."""
    _, *turned = circle.unfold(-1, d, 1).unbind(-2)
    return turned if d % 2 else [*turned[:-1], turned[-1][..., : d // 2]]


@variant(
    "hybrid-linear",
    family="hybrid",
    time="mixed",
    memory="O(n·d)",
    summary="one dense layer for every `every` linear layers",
    reference="Katharopoulos et al., ICML 2020, and Chen et al., Image GPT, ICML 2020, in turns",
)
class HybridLinear(Mixer):
    """Makes `every` linear layers, then a dense one, and so on; a trunk too shallow for that ends with a dense one."""

    def __new__(cls, layer: Layer, *, every: int = 3) -> Mixer:  # type: ignore[misc]  # one of two others
        dense = layer.index % (positive("every", every) + 1) == min(every, layer.depth - 1)
        return Dense(layer) if dense else Linear(layer)
