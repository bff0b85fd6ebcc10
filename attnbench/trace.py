"""A training step that computes nothing and allocates nothing, and yet says what it would need: torch's fake tensors.

The real model, optimiser and `train.train_step` run on tensors that have a shape and no memory; a meter adds up the
storages that are alive, by kind. It counts as torch.distributed's MemTracker does (a test compares them), without a
snapshot for every module, which took MemTracker 42 s for Image GPT-L where this takes 3 s.

Small tensors of whole numbers and truth values that follow from the grid alone (which slots a tile serves, a mask) are
computed for real, because their contents decide shapes; the kernels' own working memory is not seen.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import models
from attnbench import train
from attnbench.config import RunConfig
from attnbench.measure import Request
from attnbench.optimiser import make_optimiser
from models.igpt import ImageGPT

KINDS = ("parameters", "gradients", "optimiser", "activations", "temporaries", "overhead")
"""parameters: with the model's tables; temporaries: all that backward and the clipping make, gradients apart;
overhead: what the allocator and autograd's graph add (on CPU, see `_overhead` and NODE)."""

REAL_BYTES = 2**23
"""Whole numbers are computed for real up to this size."""

PAGE, MAPPED = 4096, 65536
"""On CPU a tensor from MAPPED bytes on has pages of its own, and one page more for malloc's header."""

NODE = 1000
"""Bytes that autograd keeps of an operation beside its tensors' contents: measured, as growth of resident memory over
30,000 operations on one number, 560 (a view) to 1,360 (a product)."""

PROCESS = 2**19
"""Bytes by which a process that trains on CPU grows beside its tensors: measured, as what was left of the peaks of
small models, 0.36 to 0.87 million (median of eleven 0.54), whatever the model, its size or its batch. Not where layers
are no blocks of one kind: measure.py has then rehearsed with the whole model."""

CUDA_BLOCK = 512
"""The allocator on CUDA gives memory in blocks of this size."""

CONVOLUTIONS = (torch.ops.aten.convolution_backward.default,)
LANES = 16
"""On CPU oneDNN takes activations LANES channels together, or the last (`_convolution_copies`)."""

Place = str
"""A stretch of a step: "forward"; what leads to one gradient, by its parameter's name, twice (see `_names`);
"backward", which follows the last gradient; "update". Stretches are so short that the peak of each is at one operation,
whatever the size."""


class TooLong(Exception):
    """The step has more operations than the trace was allowed."""


@dataclass
class Trace:
    """What a training step needs: of each stretch of it, the bytes by kind when they were most; and its operations."""

    peaks: dict[Place, Counter[str]] = field(default_factory=dict)
    operations: int = 0

    @property
    def bytes(self) -> int:
        """The peak of the whole step."""
        return sum(self.worst.values())

    @property
    def worst(self) -> Counter[str]:
        """Bytes by kind at the peak."""
        return max(self.peaks.values(), key=lambda kinds: sum(kinds.values()))


class Meter(TorchDispatchMode):
    """Adds up the storages that are alive. `phase` is what the step is at; autograd's own work is told from it."""

    def __init__(self, device: str, limit: int | None) -> None:
        super().__init__()
        self.phase = "build"
        self.trace = Trace()
        self._device = device
        self._limit = limit
        self._alive: dict[int, tuple[str, int, Any]] = {}
        self._now: Counter[str] = Counter()
        self._most: Counter[str] = Counter()
        self._layered = False
        self._total = self._peak = self._nodes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # what autograd asks more often than it computes
        if self.phase != "backward" and torch._C._current_graph_task_id() != -1:
            self.enter("backward")
        out = _run(func, args, kwargs or {})
        made = (out,) if isinstance(out, Tensor) else out if isinstance(out, tuple | list) else ()
        self.trace.operations += max(1, len(made))  # it takes as long to fake so many
        if self.phase == "forward" and self._device == "cpu":
            self._nodes += 1
            self._count("overhead", NODE)
        if self._limit is not None and self.trace.operations > self._limit:
            raise TooLong(f"more than {self._limit} operations")
        for tensor in made:
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if self._device == "cpu" and func in CONVOLUTIONS:
            self._note_with(_convolution_copies(*args))
        return out

    def watch(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Learns what is a parameter, and is told when forward begins, a gradient is ready, the update begins."""
        if self._device == "cpu" and isinstance(model, ImageGPT):
            self._count("overhead", PROCESS)
        for parameter, names in zip(model.parameters(), _names([n for n, _ in model.named_parameters()]), strict=True):
            parameter.register_post_accumulate_grad_hook(partial(self._ready, names))
        model.register_forward_pre_hook(lambda *_: self.enter("forward"))
        optimiser.register_step_pre_hook(lambda *_: self.enter("update"))

    def enter(self, phase: str) -> None:
        """From now on the step is at this phase."""
        self._close(self.phase)
        self.phase, self._layered = phase, False
        if phase == "update":  # autograd's graph is gone
            self._count("overhead", -NODE * self._nodes)
            self._nodes = 0

    def begin_step(self) -> None:
        """Forgets the peaks so far: what counts is the step that follows."""
        self.enter("forward")
        self.trace = Trace()

    def _ready(self, names: tuple[Place, Place], parameter: Tensor) -> None:
        layered = len(set(names)) > 1
        self._close(*names, over=layered or not self._layered)
        self._layered |= layered
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self._alive:
            kind, size, reference = self._alive[key]
            self._alive[key] = ("gradients", size, reference)
            self._now[kind] -= size
            self._now["gradients"] += size

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        kind = {"build": "parameters", "update": "optimiser", "forward": "activations"}.get(self.phase, "temporaries")
        self._alive[key] = (kind, size, weakref.ref(storage, lambda _: self._drop(key)))
        self._count(kind, size)
        self._count("overhead", _overhead(size, self._device))
        self._note()

    def _drop(self, key: int) -> None:
        kind, size, _ = self._alive.pop(key)
        self._count(kind, -size)
        self._count("overhead", -_overhead(size, self._device))

    def _count(self, kind: str, size: int) -> None:
        self._now[kind] += size
        self._total += size

    def _note_with(self, size: int) -> None:
        """Keeps what is alive with `size` bytes more, which the operation took and gave back."""
        self._count("temporaries", size)
        self._note()
        self._count("temporaries", -size)

    def _note(self) -> None:
        """Keeps what is alive if it is the most that this stretch has seen."""
        if self._total > self._peak:
            self._peak, self._most = self._total, Counter(self._now)

    def _close(self, *places: Place, over: bool = True) -> None:
        """The stretch, known by these names, ends here; or goes on under the next gradient's name, unless `over`:
        what all layers share is ready in the midst of the first, wherever that is."""
        for place in places:
            if self._peak > self.trace.peaks.get(place, Counter()).total():
                self.trace.peaks[place] = self._most
        if over:
            self._peak, self._most = self._total, Counter(self._now)


def _names(given: list[str]) -> list[tuple[Place, Place]]:
    """Each parameter's name with the layers counted from the first on, and from the last on: of three blocks,
    blocks.2.norm.gain is blocks.-1.norm.gain too. So the outer layers of models of any depth share names."""
    counts: dict[str, int] = {}
    for name in given:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            before = name[: number.start()]
            counts[before] = max(counts.get(before, 0), int(number[0]) + 1)

    def from_last(number: re.Match[str]) -> str:
        return str(int(number[0]) - counts[number.string[: number.start()]])

    return [(name, re.sub(r"(?<=\.)\d+(?=\.)", from_last, name)) for name in given]


def _convolution_copies(gradient: Tensor, x: Tensor, _weight: Tensor, _bias: Any, stride: list[int], *rest: Any) -> int:
    """Bytes that a convolution's backward on CPU takes for a while beside what it returns.

    For the weights' gradient it copies both activations (batch, channels, height, width), LANES channels together.  For
    that of x, where there is a stride, it writes channels last, and moves them twice to have them first.  Found by
    noting every block that malloc gave up to the peak of a ResNet's step, and in oneDNN's own account (x86, AVX-512).
    """
    asked = rest[-1]
    shapes = [tuple(given.shape) for given in (gradient, x) if given.dim() == 4]
    copies = sum(4 * n * -(-c // LANES) * LANES * h * w for n, c, h, w in shapes)
    return max(copies, 2 * x.numel() * x.element_size() if asked[0] and max(stride) > 1 else 0)


def _overhead(size: int, device: str) -> int:
    """What the allocator adds to a tensor of `size` bytes where measure.py measures."""
    if device == "cuda":
        return -size % CUDA_BLOCK
    return PAGE if size >= MAPPED else 0


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on fake tensors; for real where it has none and gives small whole numbers.

    A sum or product of real tensors FakeTensorMode computes before it asks for their shape, however large (torch 2.13).
    """
    if any(isinstance(x, FakeTensor) for x in args) or any(
        isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))
    ):
        return func(*args, **kwargs)
    mode = active_fake_mode()
    assert mode is not None
    lifted = func in mode.lift_fns  # a constant, which a fake one is not
    fake_args, fake_kwargs = (args, kwargs) if lifted else tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
    try:
        out = func(*fake_args, **fake_kwargs)
        real = all(_is_small_table(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    except (DataDependentOutputException, DynamicOutputShapeException):
        real = True
    if not real:
        return out
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _is_small_table(tensor: Tensor) -> bool:
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    return whole and tensor.numel() * tensor.element_size() <= REAL_BYTES


def step(request: Request, limit: int | None = None) -> Trace:
    """A training step of the request's run, after one that made the optimiser's state.

    The batch is not counted; nothing is compiled.  Raises Refusal as `train.make_model`, and TooLong where the step has
    more than `limit` operations, or where contents decide shapes and are too large to be computed.
    """
    config, device = _eager(request.config), request.config.device
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        inputs, labels = _batch(request)
        with Meter(device, limit) as meter:
            try:
                model = _made(config, request.shape)
                optimiser = make_optimiser(model, config)
                meter.watch(model, optimiser)
                model.train()
                _first_update(model, optimiser)
                meter.begin_step()
                train.train_step(model, optimiser, inputs, 1, config, labels)
                meter.enter("after")
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise TooLong(f"contents decide the shape of {error}") from error
    return meter.trace


def build(request: Request) -> nn.Module:
    """The request's model, its parameters without memory.  Raises Refusal as `train.make_model`."""
    fork, fake = torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True)
    with fork, fake, Meter(request.config.device, None):
        return _made(_eager(request.config), request.shape)


def _made(config: RunConfig, shape: tuple[int, ...]) -> nn.Module:
    """The fake model on its device: torch moves no fake parameters, so they are made there again."""
    model = train.make_model(config.model_copy(update={"device": "cpu"}), *shape)
    if config.device == "cpu":
        return model
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=config.device)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=config.device))
    return model


def _batch(request: Request) -> tuple[Tensor, Tensor | None]:
    """Fake inputs, and labels where the model is supervised."""
    batch, sides, device = request.config.train.batch, (request.height, request.width), request.config.device
    if request.config.model.objective != models.SUPERVISED:
        return torch.zeros((batch, *sides), dtype=torch.long, device=device), None
    images = torch.zeros((batch, request.channels, *sides), device=device)
    return images, torch.zeros(batch, dtype=torch.long, device=device)


def _eager(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})


def _first_update(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """An update without a step before it: it makes the optimiser's state and leaves no gradient."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
