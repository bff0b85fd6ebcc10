"""One cost cell: a variant and the baseline by turns in one process, with a matrix product as the machine's yardstick.

Runs in a child, as attnbench.measure does, under a limit of memory. Nothing is timed before its oracle has passed here.
Shapes: q, k, v (batch, heads, seq, head_dim).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbench import measure, train
from attnbench.clock import Stopwatch
from attnbench.measure import PeakMeter, Request, Timing

PRODUCT = 1024
"""Rows and columns of the yardstick's matrices."""

TIMES = 3
"""Turns at least, where the budget allows two of them."""

Phases = dict[str, Callable[[], float]]
"""Phase -> a call that returns its seconds."""


@dataclass(frozen=True)
class Inputs:
    """What a mixer is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    extras: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        """The tensors that backward gives gradients for."""
        return [self.q, self.k, self.v, *(x for x in self.extras.values() if isinstance(x, Tensor))]

    def slot(self, t: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """One slot of everything."""
        extras = {n: x[:, :, t : t + 1] if isinstance(x, Tensor) else x for n, x in self.extras.items()}
        return self.q[:, :, t : t + 1], self.k[:, :, t : t + 1], self.v[:, :, t : t + 1], extras


def time_cell(told: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every phase, of the variant and (if `baseline` is given) of the baseline, and of the matrix product.

    told: `request`, `scope` ("attention" or "step"), `baseline` (a request or None), `budget` seconds, `memory` bytes.
    Raises AssertionError where an oracle is missed.
    """
    limit_memory(told.get("memory"))
    request = Request.parse(told["request"])
    sides = {"own": phases_of(request, told["scope"])}
    if told.get("baseline"):
        sides["baseline"] = phases_of(Request.parse(told["baseline"]), told["scope"])
    found = by_turns(sides, product(request.config.device, request.config.train.precision), told["budget"])
    return {"phases": found, "flops": _flops(request, told["scope"]), "backend": _backend(request)}


def by_turns(sides: dict[str, Phases], yardstick: Callable[[], float], budget: float) -> dict[str, Any]:
    """Every phase of every side in turn, again and again: {phase: {side: timing, "ratio": timing, "product": timing}}.

    A ratio is taken within a turn, own over baseline, so that what slows a whole turn slows both.
    """
    seconds: dict[str, dict[str, list[float]]] = {phase: {} for phase in sides["own"]}
    for phase, kept in seconds.items():
        for calls in sides.values():
            calls[phase]()  # warm-up
        watch, turns, share = Stopwatch(), 0, budget / len(seconds)
        while turns == 0 or watch.seconds < share * (1 if turns >= TIMES else TIMES):
            kept.setdefault("product", []).append(yardstick())
            for side in list(sides) if turns % 2 == 0 else list(sides)[::-1]:
                kept.setdefault(side, []).append(sides[side][phase]())
            turns += 1
        if "baseline" in kept:
            kept["ratio"] = [a / b for a, b in zip(kept["own"], kept["baseline"], strict=True)]
    return {phase: {side: asdict(Timing.of(v)) for side, v in kept.items()} for phase, kept in seconds.items()}


def peak_cell(told: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of the attention's forward and backward pass, inputs and gradients included; of `request`."""
    limit_memory(told.get("memory"))
    request = Request.parse(told["request"])
    rehearsal = Request(request.config, 8, 8, request.vocab)
    _there_and_back(*attention(rehearsal))
    meter = PeakMeter(request.config.device)
    _there_and_back(*attention(request))
    return {"peak_bytes": meter.bytes()}


def limit_memory(size: int | None) -> None:
    """Lets this process have `size` bytes more than it has; what goes beyond raises. Linux; elsewhere no limit."""
    if not size or not sys.platform.startswith("linux"):
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + size, hard))


def product(device: str, precision: str) -> Callable[[], float]:
    """Seconds of a PRODUCT³ matrix product in the precision of the cell."""
    size = PRODUCT if device == "cpu" else 8 * PRODUCT
    matrix = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    return lambda: measure._seconds(lambda: matrix @ matrix, device)


def product_flops(device: str) -> int:
    """FLOPs of that product."""
    return 2 * (PRODUCT if device == "cpu" else 8 * PRODUCT) ** 3


def phases_of(request: Request, scope: str) -> Phases:
    """The phases of a cell. Raises AssertionError where the oracle is missed."""
    check_oracle(request)
    return _attention_phases(request) if scope == "attention" else _step_phases(request)


def check_oracle(request: Request) -> None:
    """The attention against its oracle on a 5 × 7 grid, float64. Raises AssertionError."""
    small = request.config.model_copy(update={"device": "cpu"})
    mixer, given = attention(Request(small, 5, 7, 5), torch.float64)
    if mixer is None:
        return
    with torch.no_grad():
        out = mixer(given.q, given.k, given.v, **given.extras)
        want = mixer.oracle(given.q, given.k, given.v, **given.extras)  # type: ignore[operator]
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)


def attention(request: Request, dtype: torch.dtype | None = None) -> tuple[nn.Module | None, Inputs]:
    """The first layer's attention and what the trunk's projections give it; None for a model of its own."""
    config = request.config.model_copy(update={"model": request.config.model.model_copy(update={"depth": 1})})
    model: Any = train.make_model(config, *request.shape)
    if not hasattr(model, "blocks"):
        return None, Inputs(*(torch.zeros(0),) * 3, {})
    model = model.to(dtype or getattr(torch, config.train.precision))
    layer, size = model.blocks[0].attention, request.height * request.width
    x = torch.randn(config.train.batch, size, config.model.dim, device=config.device, dtype=model.tokens.dtype)
    with torch.no_grad():
        q, k, v, extras = layer.project(x, model.slots)
    q, k, v = (t.contiguous().requires_grad_() for t in (q, k, v))
    extras = {n: t.contiguous().requires_grad_() if isinstance(t, Tensor) else t for n, t in extras.items()}
    return layer.mixer, Inputs(q, k, v, extras)


def _there_and_back(mixer: nn.Module | None, given: Inputs) -> None:
    assert mixer is not None
    out = mixer(given.q, given.k, given.v, **given.extras)
    torch.autograd.grad(out, given.leaves(), torch.ones_like(out), allow_unused=True)


def _attention_phases(request: Request) -> Phases:
    mixer, given = attention(request)
    assert mixer is not None
    device = request.config.device

    def run() -> Tensor:
        out: Tensor = mixer(given.q, given.k, given.v, **given.extras)
        return out

    def forward() -> float:
        with torch.no_grad():
            return measure._seconds(run, device)

    def backward() -> float:
        out = run()
        grad = torch.ones_like(out)
        leaves = given.leaves()
        return measure._seconds(lambda: torch.autograd.grad(out, leaves, grad, allow_unused=True), device)

    phases: Phases = {"forward": forward, "backward": backward}
    if request.config.model.objective == "ar":
        phases["decoding"] = lambda: _decoding(mixer, given, device)
    return phases


def _decoding(mixer: Any, given: Inputs, device: str) -> float:
    """Seconds of all slots, one after another."""
    size = given.q.shape[2]

    def run() -> None:
        state = mixer.start(len(given.q), given.q)
        for t in range(size):
            q, k, v, extras = given.slot(t)
            _, state = mixer.step(q, k, v, state, **extras)

    with torch.no_grad():
        return measure._seconds(run, device)


def _step_phases(request: Request) -> Phases:
    config = request.config
    model = train.make_model(config, *request.shape)
    optimiser = train.make_optimiser(model, config)
    inputs, labels = measure._batches(request)[0]
    model.train()
    return {
        "training": lambda: measure._seconds(
            lambda: train.train_step(model, optimiser, inputs, 0, config, labels), config.device
        )
    }


def _flops(request: Request, scope: str) -> dict[str, int]:
    """FLOPs by phase, of the whole batch."""
    batch = request.config.train.batch
    if scope == "step":
        model: Any = train.make_model(request.config, *request.shape)
        return {"training": 3 * model.flops() * batch}
    mixer: Any = attention(request)[0]
    return {"forward": mixer.flops() * batch, "backward": 2 * mixer.flops() * batch}


def _backend(request: Request) -> str:
    small = request.config.model_copy(update={"model": request.config.model.model_copy(update={"depth": 1})})
    return str(train.make_model(small, *request.shape).backend)


KINDS: measure.Kinds = {"time": time_cell, "memory": peak_cell}

if __name__ == "__main__":
    measure.main(KINDS)
