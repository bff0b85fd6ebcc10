"""One cost cell: a variant and the baseline by turns in one process, with a matrix product as the machine's yardstick.

Attention alone is that of a layer; where a trunk's layers differ, the mean over them.

Runs in a child, as attnbench.measure does, under a limit of memory. Nothing is timed before its oracle has passed here.
Shapes: q, k, v (batch, heads, seq, head_dim).
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.attention import SDPBackend

from attnbench import measure, predict, train, variants
from attnbench.clock import Stopwatch, seconds_of
from attnbench.config import RunConfig
from attnbench.measure import PeakMeter, Request, Timing
from attnbench.optimiser import make_optimiser
from models import Layer, Mixer

PRODUCT = 1024
"""Rows and columns of the yardstick's matrices."""

ORACLE = 11, 13
"""The grid on which oracles are asked: more slots than two of the blocks that kernels work in."""

EXACT, LOW = 1e-10, 0.02
"""How far results may be from the oracle's, in float64 and in low precision: what differs, as a part of the whole."""

WARMUPS = 3
"""Passes before a CUDA graph is captured."""

TIMES = 3
"""Turns at least, whatever the budget, where the cell's limit of time allows them."""

PIECE = 2**24
"""Bytes that malloc is asked for at a time for what it is to hold: it would not keep a larger piece everywhere."""

Phases = dict[str, Callable[[], float]]
"""Phase -> a call that returns its seconds, of a layer or of a step."""


class OracleMissed(AssertionError):
    """An attention that does not compute what it stands for; it is not timed."""


class Uncaptured(Exception):
    """A pass that no CUDA graph holds. The attempt leaves torch's stream, generator and allocator amid a capture."""


@dataclass(frozen=True)
class Inputs:
    """What a mixer is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    extras: dict[str, Any]

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that backward gives gradients for, by name."""
        tensors = {name: x for name, x in self.extras.items() if isinstance(x, Tensor)}
        return {"q": self.q, "k": self.k, "v": self.v, **tensors}

    def wide(self) -> Inputs:
        """The same in float64, as leaves of their own."""
        leaves = {name: x.detach().double().requires_grad_() for name, x in self.leaves().items()}
        extras = {name: leaves.get(name, x) for name, x in self.extras.items()}
        return Inputs(leaves["q"], leaves["k"], leaves["v"], extras)

    def slot(self, t: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """One slot of everything."""
        extras = {n: x[:, :, t : t + 1] if isinstance(x, Tensor) else x for n, x in self.extras.items()}
        return self.q[:, :, t : t + 1], self.k[:, :, t : t + 1], self.v[:, :, t : t + 1], extras


def time_cell(told: dict[str, Any]) -> Iterator[measure.Answer]:
    """Seconds of every phase, of the variant and (if `baseline` is given) of the baseline, and of the matrix product;
    again after each phase, so that one which does not end loses none before it.

    told: `request`, `scope` ("attention" or "step"), `baseline` (a request or None), `budget` seconds, `memory` bytes,
    `decoding`, whether that is timed too, `graphs`, whether CUDA replays the passes, `deadline`, in seconds since 1970,
    `reserve`, the bytes that malloc is to hold, `known`, phases to leave out.  Raises OracleMissed, Uncaptured.
    """
    request = Request.parse(told["request"])
    limit_memory(told.get("memory"), request.config.device)
    reserve(told.get("reserve") or 0)
    how = told["scope"], told.get("decoding", True), told.get("graphs", True)
    own = subject_of(request, *how)
    sides = {"own": {phase: call for phase, call in own.phases.items() if phase not in told.get("known", ())}}
    if told.get("baseline"):
        sides["baseline"] = subject_of(Request.parse(told["baseline"]), *how).phases
    yardstick = product(request.config.device, request.config.train.precision)
    known: measure.Answer = {"phases": {}, "flops": _flops(request, told["scope"]), "fused": fused(request)}
    yield known
    for phase, timings in by_turns(sides, yardstick, told["budget"], told.get("deadline", math.inf) - time.time()):
        known["phases"][phase] = timings
        backends = dict.fromkeys(str(module.backend) for module in own.modules)
        yield known | {"backend": " and ".join(backends)}


def fused(request: Request) -> str:
    """Which of torch's kernels serves dense attention of such tensors: on CUDA flash_attention or another."""
    heads, dim = request.config.model.heads, request.config.model.dim
    shape = request.config.train.batch, heads, request.height * request.width, dim // heads
    like = torch.empty(shape, device=request.config.device, dtype=getattr(torch, request.config.train.precision))
    return str(SDPBackend(torch._fused_sdp_choice(like, like, like, is_causal=True)).name).lower()


def by_turns(
    sides: dict[str, Phases], yardstick: Callable[[], float], budget: float, limit: float = math.inf
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One phase after another, every side in turn, again and again: phase, {side, "ratio" and "product": timing}.

    A ratio is taken within a turn, own over baseline, so that what slows a whole turn slows both. No turn but the first
    begins that might not end within `limit` seconds, of which each phase has its share of what the ones before left.
    """
    whole, share, phases = Stopwatch(), budget / max(1, len(sides["own"])), list(sides["own"])
    for done, phase in enumerate(phases):
        kept: dict[str, list[float]] = {}
        ends = whole.seconds + (limit - whole.seconds) / (len(phases) - done)
        for calls in sides.values():
            calls[phase]()  # warm-up
        watch, turns = Stopwatch(), 0
        # Room for two turns must be left to begin one, since none takes exactly as long as those before.
        while turns == 0 or (
            (turns < TIMES or watch.seconds < share) and whole.seconds + 2 * watch.seconds / turns < ends
        ):
            kept.setdefault("product", []).append(yardstick())
            for side in list(sides) if turns % 2 == 0 else list(sides)[::-1]:
                kept.setdefault(side, []).append(sides[side][phase]())
            turns += 1
        if "baseline" in kept:
            kept["ratio"] = [a / b for a, b in zip(kept["own"], kept["baseline"], strict=True)]
        yield phase, {side: _timing(values) for side, values in kept.items()}


def _timing(values: list[float]) -> dict[str, Any]:
    """The summary; a single value has no quartiles."""
    found = asdict(Timing.of(values))
    return found if len(values) > 1 else found | {"low": None, "high": None}


def peak_cell(told: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of `request`: of a training step, or of the attention's passes, inputs and gradients included.

    Where layers differ, of the one that takes most: they run one after another.
    """
    request = Request.parse(told["request"])
    limit_memory(told.get("memory"), request.config.device)
    if told["scope"] == "step":
        return measure._measure_memory(told["request"])
    _there_and_back(*attentions(request))  # the rehearsal: as measure's, at the same size, for another loads other code
    meter = PeakMeter(request.config.device)
    _there_and_back(*attentions(request))
    return {"peak_bytes": meter.bytes()}


def both_cell(told: dict[str, Any]) -> Iterator[measure.Answer]:
    """What `peak_cell` and then `time_cell` say, where memory is counted by an allocator: the libraries load once."""
    yield (peak := peak_cell(told))
    yield from (peak | known for known in time_cell(told))


def limit_memory(size: int | None, device: str = "cpu") -> None:
    """Lets this process have `size` bytes more than it has (on CUDA: in all); more raises. Linux or CUDA only."""
    if size and device == "cuda":
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole))
    if not size or device == "cuda" or not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + size, hard))


def reserve(size: int) -> None:
    """Makes malloc hold `size` bytes of pages that were written to, where it keeps what is freed.

    Aligned tensors leave gaps between them, so that for many calls a freed one does not fit where it was and new pages
    are taken: of a backward pass of few turns up to three quarters, and not the attention's doing.
    """
    if size and measure.keep_freed():
        _ = [torch.zeros(PIECE, dtype=torch.uint8) for _ in range(size // PIECE)]


def product(device: str, precision: str) -> Callable[[], float]:
    """Seconds of a PRODUCT³ matrix product in the precision of the cell."""
    size = PRODUCT if device == "cpu" else 8 * PRODUCT
    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    return lambda: seconds_of(lambda: matrix @ matrix, device)


def product_flops(device: str) -> int:
    """FLOPs of that product."""
    return 2 * (PRODUCT if device == "cpu" else 8 * PRODUCT) ** 3


class Subject(NamedTuple):
    """What is timed: mixers or a model, whose backend is settled once they have run, and the phases."""

    modules: list[Any]
    phases: Phases


def subject_of(request: Request, scope: str, decoding: bool = True, graphs: bool = True) -> Subject:
    """The subject of a cell. Raises OracleMissed, Uncaptured."""
    check_oracle(request, decoding)
    return _attention(request, decoding, graphs) if scope == "attention" else _step(request)


def check_oracle(request: Request, decoding: bool = True) -> None:
    """Every attention of the trunk against its float64 oracle, two heads on a small grid: what comes out, the gradients
    and, slot by slot, what decoding gives. Raises OracleMissed.

    On a CPU in float64 too; on CUDA as it will be timed, for what runs there may know no other dtype. A model of its
    own has none.
    """
    config = request.config
    if not variants.attends(config.variant):
        return
    heads = min(2, config.model.heads)
    narrow = config.model.model_copy(update={"heads": heads, "dim": heads * config.model.dim // config.model.heads})
    few = config.model_copy(update={"model": narrow, "train": config.train.model_copy(update={"batch": 2})})
    exact = config.device != "cuda"
    shared, given = attentions(Request(few, *ORACLE, 5), torch.float64 if exact else None)
    wide = given.wide()
    for mixer in shared:
        found, want = _passes(mixer, given), _passes(mixer.oracle, wide)
        if decoding and config.model.objective == "ar":
            with torch.no_grad():
                found["decoding"], want["decoding"] = torch.cat([*_slots(mixer, given)], dim=2), want["output"]
        for name, tensor in found.items():
            off = _off(tensor, want[name], worst=exact or name == "output")
            if not off <= (EXACT if exact else LOW):
                raise OracleMissed(f"{config.variant} misses its oracle: its {name} is off by {off:.2g} of the whole")


def _off(got: Tensor, want: Tensor, worst: bool) -> float:
    """The norm of the difference, as a part of the wanted one's; `worst`: or the greatest difference of the largest
    value, if that is more, for a single one may be lost in a norm."""
    differs = got.double() - want
    orders = (2.0, math.inf) if worst else (2.0,)
    parts = [float(vector_norm(differs, p) / vector_norm(want, p).clamp(min=EXACT)) for p in orders]
    return math.nan if any(map(math.isnan, parts)) else max(parts)


def _passes(attend: Callable[..., Tensor], given: Inputs) -> dict[str, Tensor]:
    """What comes out, and the gradients, of which those that are not there are nought."""
    out = attend(given.q, given.k, given.v, **given.extras)
    leaves = given.leaves()
    grads = torch.autograd.grad(out, [*leaves.values()], torch.cos(out.detach()), allow_unused=True)
    named = zip(leaves.items(), grads, strict=True)
    return {"output": out.detach()} | {
        f"gradient of {name}": torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in named
    }


def attentions(request: Request, dtype: torch.dtype | None = None) -> tuple[dict[Mixer, float], Inputs]:
    """The trunk's attentions that differ, each with its share of the layers, and what the projections give them.

    All are given the first layer's. Raises AssertionError where the variant is a model of its own.
    """
    config = request.config.model_copy(update={"model": request.config.model.model_copy(update={"depth": 1})})
    assert variants.attends(config.variant), "a model of its own has no attention to measure alone"
    model: Any = train.make_model(config, *request.shape)
    model = model.to(dtype or getattr(torch, config.train.precision))
    layer, size = model.blocks[0].attention, request.height * request.width
    x = torch.randn(config.train.batch, size, config.model.dim, device=config.device, dtype=model.tokens.dtype)
    with torch.no_grad():
        q, k, v, extras = layer.project(x, model.slots)
    q, k, v = (t.contiguous().requires_grad_() for t in (q, k, v))
    extras = {n: t.contiguous().requires_grad_() if isinstance(t, Tensor) else t for n, t in extras.items()}
    return _shares(request.config, layer.mixer.layer, x), Inputs(q, k, v, extras)


def _shares(config: RunConfig, first: Layer, like: Tensor) -> dict[Mixer, float]:
    """One mixer of each kind among the trunk's layers, with its share of them."""
    cls, depth = variants.find(config.variant).cls, config.model.depth
    kinds: dict[Any, Mixer] = {}
    shares: Counter[Mixer] = Counter()
    for index in range(depth):
        mixer = cls(replace(first, index=index, depth=depth), **config.model.options).to(like.device, like.dtype)
        shares[kinds.setdefault(tuple(map(predict.kind, mixer.modules())), mixer)] += 1
    return {mixer: count / depth for mixer, count in shares.items()}


def _there_and_back(shared: dict[Mixer, float], given: Inputs) -> None:
    for mixer in shared:
        out = mixer(given.q, given.k, given.v, **given.extras)
        torch.autograd.grad(out, [*given.leaves().values()], torch.ones_like(out), allow_unused=True)
        del out


def _attention(request: Request, decoding: bool, graphs: bool) -> Subject:
    shared, given = attentions(request)
    each = {mixer: _phases(mixer, given, request, decoding, graphs) for mixer in shared}

    def mean(phase: str) -> float:
        return sum(share * each[mixer][phase]() for mixer, share in shared.items())

    return Subject([*shared], {phase: partial(mean, phase) for phase in next(iter(each.values()))})


def _phases(mixer: Mixer, given: Inputs, request: Request, decoding: bool, graphs: bool) -> Phases:
    device, leaves = request.config.device, [*given.leaves().values()]

    def run() -> Tensor:
        out: Tensor = mixer(given.q, given.k, given.v, **given.extras)
        return out

    def forward() -> float:
        with torch.no_grad():
            return seconds_of(run, device)

    def backward() -> float:
        out = run()
        grad = torch.ones_like(out)
        again = device == "cuda"  # there the clock calls several times
        return seconds_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=again, allow_unused=True), device)

    phases: Phases = {"forward": forward, "backward": backward}
    if device == "cuda" and graphs:
        phases = {
            phase: lambda replay=replay: seconds_of(replay, device)  # type: ignore[misc]
            for phase, replay in zip(phases, _replays(run, leaves), strict=True)
        }
    if decoding and request.config.model.objective == "ar":
        phases["decoding"] = lambda: _decoding(mixer, given, device)
    return phases


def _replays(run: Callable[[], Tensor], leaves: list[Tensor]) -> list[Callable[[], None]]:
    """The forward and the backward pass as CUDA graphs. Raises Uncaptured where something in them cannot be captured.

    A replay is the device's work without Python's launching, which for a short pass takes longer than the pass.
    """
    stream, graphs = torch.cuda.Stream(), (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):  # kernels are compiled, libraries loaded
            grad = torch.ones_like(out := run())
            torch.autograd.grad(out, leaves, grad, allow_unused=True)
            del out
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graphs[0], stream=stream):
            out = run()
        with torch.cuda.graph(graphs[1], pool=graphs[0].pool(), stream=stream):
            grads = torch.autograd.grad(out, leaves, grad, retain_graph=True, allow_unused=True)
    except Exception as error:  # whatever stops a capture, what is half captured serves nobody
        raise Uncaptured(f"no CUDA graph: {error}") from error
    kept = (out, grad, grads)  # a graph reads and writes where they lie, and keeps none of them

    def replay(graph: torch.cuda.CUDAGraph, kept: object) -> None:
        graph.replay()

    return [partial(replay, graph, kept) for graph in graphs]


def _decoding(mixer: Any, given: Inputs, device: str) -> float:
    """Seconds of all slots, one after another."""
    with torch.no_grad():
        return seconds_of(lambda: deque(_slots(mixer, given), maxlen=0), device)


def _slots(mixer: Any, given: Inputs) -> Iterator[Tensor]:
    """What decoding gives for each slot, (batch, heads, 1, head_dim)."""
    state = mixer.start(len(given.q), given.q)
    for t in range(given.q.shape[2]):
        q, k, v, extras = given.slot(t)
        out, state = mixer.step(q, k, v, state, **extras)
        yield out


def _step(request: Request) -> Subject:
    config = request.config
    model = train.make_model(config, *request.shape)
    optimiser = make_optimiser(model, config)
    inputs, labels = measure._batches(request)[0]
    model.train()

    def train_once() -> object:
        return train.train_step(model, optimiser, inputs, 0, config, labels)

    return Subject([model], {"training": lambda: seconds_of(train_once, config.device)})


def _flops(request: Request, scope: str) -> dict[str, int]:
    """FLOPs by phase, of the whole batch."""
    batch = request.config.train.batch
    if scope == "step":
        model: Any = train.make_model(request.config, *request.shape)
        return {"training": 3 * model.flops() * batch}
    flops = round(sum(share * mixer.flops() for mixer, share in attentions(request)[0].items())) * batch
    return {"forward": flops, "backward": 2 * flops}


KINDS: measure.Kinds = {"time": time_cell, "memory": peak_cell, "both": both_cell}

if __name__ == "__main__":
    measure.main(KINDS)
