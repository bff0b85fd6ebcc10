"""The only clock and memory meter: what training, evaluating and sampling cost, each measured in a process of its own.

Memory on CPU is the growth of the process's peak resident memory over the model, the optimiser and two real training
steps: parameters + gradients + optimiser state + activations. The meter is VmHWM of /proc/self/status, which is what
`ru_maxrss` means to be; `ru_maxrss` itself also keeps the peak of the process that forked, so that a child of a large
parent seems to need nothing. MALLOC_MMAP_THRESHOLD_=65536 makes malloc give freed tensors back at once.

`python -m attnbench.measure KIND` reads a request as JSON and prints the answer as its last line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attnbench.clock import Stopwatch, seconds_of
from attnbench.config import RunConfig, threads

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCHES = 4
"""Different batches that the timed steps take in turn, so that none stays in the cache for the next."""

SAMPLED = 16
"""Images drawn at a time."""

Answer = dict[str, Any]
Kinds = dict[str, Callable[[dict[str, Any]], Answer | Iterator[Answer]]]
"""Kind of request -> what answers it: at once, or with what it knows so far, again and again."""

_TAIL = 20
_PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Request:
    """What a measuring process is told: a run's resolved settings and the data's shape, never the data.

    Raises ValueError where the device or the precision is still "auto".
    """

    config: RunConfig
    height: int
    width: int
    vocab: int
    channels: int = 1
    classes: int = 10

    def __post_init__(self) -> None:
        if "auto" in (self.config.device, self.config.train.precision):
            raise ValueError("measure what runs: resolve device and precision first")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """height, width, vocab, channels, classes."""
        return self.height, self.width, self.vocab, self.channels, self.classes

    def dump(self) -> dict[str, Any]:
        """As JSON can hold it."""
        shape = dict(zip(("height", "width", "vocab", "channels", "classes"), self.shape, strict=True))
        return {"config": self.config.model_dump(mode="json"), **shape}

    @classmethod
    def parse(cls, told: dict[str, Any]) -> Request:
        """Back from `dump`."""
        shape = (told[name] for name in ("height", "width", "vocab", "channels", "classes"))
        return cls(RunConfig.model_validate(told["config"]), *shape)


@dataclass(frozen=True)
class Timing:
    """Repeated timings as a rate: the median, the quartiles `low` and `high`, and the number of repeats `n`."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> Timing:
        """Summary of at least one value."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high, len(values))


class ChildFailed(Exception):
    """A measuring process that did not end well: how it ended, the last lines of what it said, and what it knew."""

    def __init__(self, kind: str, ending: str, tail: list[str], answer: Answer | None = None) -> None:
        super().__init__(f"measuring {kind}: the process {ending}" + (f": {tail[-1].strip()}" if tail else ""))
        self.kind = kind
        self.ending = ending
        self.tail = tail
        self.answer = answer

    @property
    def out_of_memory(self) -> bool:
        """Whether its last words were about memory; a kill by the system leaves none."""
        return about_memory("\n".join(self.tail))


def about_memory(text: str) -> bool:
    """Whether a program's last words are that memory did not suffice: Python's, torch's, C++'s or OpenMP's."""
    said = r"out of memory|allocate memory|MemoryError|std::bad_alloc|Thread creation failed"
    return re.search(said, text, re.I) is not None


def peak_bytes(request: Request, timeout: float = 600.0) -> int:
    """Peak bytes of training: parameters, gradients, optimiser state and activations. Raises ChildFailed."""
    return int(in_child("memory", request.dump(), timeout)["peak_bytes"])


def throughput(request: Request, budget: float = 6.0, timeout: float = 600.0) -> dict[str, Any]:
    """Images per second of training, evaluating and sampling, and the bytes that decoding keeps. Raises ChildFailed.

    Keys `train_images_per_second`, `eval_images_per_second`, `sample_images_per_second`: a `Timing` as a dict;
    `state_bytes_per_image`: int. The latter two are None for a model that does not decode (objective "bert"), or whose
    decoding of 16 images takes longer than ten budgets. `budget`: seconds of timing for all three together.
    """
    return in_child("time", request.dump() | {"budget": budget}, timeout)


def in_child(kind: str, request: dict[str, Any], timeout: float = 600.0) -> dict[str, Any]:
    """The last answer of `python -m attnbench.measure kind` to `request`, within `timeout` seconds. Raises ChildFailed.

    "module:kind" asks another module that answers through `main`.
    """
    give_back()  # the child may need it
    try:
        done = subprocess.run(
            _command(kind),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=_environment(kind),
        )
    except subprocess.TimeoutExpired as expired:
        said, known = (
            text.decode(errors="replace") if isinstance(text, bytes) else text or ""
            for text in (expired.stderr, expired.stdout)
        )
        ending = f"took more than {timeout:g} s"
        raise ChildFailed(kind, ending, said.splitlines()[-_TAIL:], _answer(known)) from None
    tail, answer = done.stderr.splitlines()[-_TAIL:], _answer(done.stdout)
    if done.returncode < 0:
        raise ChildFailed(kind, f"was ended by {signal.Signals(-done.returncode).name}", tail, answer)
    if done.returncode > 0:
        raise ChildFailed(kind, f"ended with exit status {done.returncode}", tail, answer)
    if answer is None:
        raise ChildFailed(kind, "gave no answer", tail)
    return answer


def _answer(output: str) -> Answer | None:
    """The last whole line of a child's output that is an answer."""
    for line in output.splitlines()[::-1]:
        with suppress(ValueError, TypeError):
            return dict(json.loads(line))
    return None


def _command(kind: str) -> list[str]:
    module, _, name = kind.rpartition(":")
    return [sys.executable, "-m", module or "attnbench.measure", name]


def _environment(kind: str) -> dict[str, str]:
    """The child's environment: the same package, the same threads; malloc that gives back, where memory is measured."""
    paths = [str(_PROJECT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["OMP_NUM_THREADS"] = str(threads())
    if kind.rpartition(":")[2] != "time":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    return environment


# --- memory -----------------------------------------------------------------------------------------------------------


def keep_freed() -> bool:
    """Makes glibc's malloc keep what is freed for the next tensor, as CUDA's allocator does; whether it will.

    By itself it takes every large tensor from the system and gives it back: of a training step at 256×256 a quarter was
    spent on new pages.  Nothing is done where malloc was given settings, as where memory is measured.
    """
    told = [name for name in os.environ if name.startswith("MALLOC_")]
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
    # Tensors up to 256 MiB come from the heap, which then never shrinks; before glibc 2.35 32 MiB is the most.
    # Larger ones, such as the scores of 64×64 pixels, would leave gaps of their size: the heap held thrice what lived.
    return any(mallopt(mmap_threshold, size) for size in (2**28, 2**25)) and bool(mallopt(trim_threshold, -1))


def give_back() -> None:
    """Makes glibc's malloc, and torch's allocator on CUDA, give back what is freed and kept."""
    with suppress(OSError, AttributeError, TypeError):  # another libc; Windows
        ctypes.CDLL(None).malloc_trim(0)
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class PeakMeter:
    """Growth of this process's peak memory since it was made, in bytes; on CUDA of what torch allocated there."""

    def __init__(self, device: str) -> None:
        import torch

        gc.collect()
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return
        give_back()  # what the warm-up freed must not hide what comes
        with suppress(OSError):  # sets the peak back to the present; without it, the imports' peak is the base
            Path("/proc/self/clear_refs").write_text("5")
        self._base = _resident_peak()

    def bytes(self) -> int:
        """The growth so far."""
        if not self._cuda:
            return _resident_peak() - self._base
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._base


def _resident_peak() -> int:
    """Peak resident bytes of this process."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _measure_memory(told: dict[str, Any]) -> dict[str, Any]:
    """Two training steps of the real model, after two that load what the libraries need."""
    request = Request.parse(told)
    batches = _batches(request)
    _train(_rehearsal(request), batches[:2])
    meter = PeakMeter(request.config.device)
    _train(request, batches[:2])
    return {"peak_bytes": meter.bytes()}


def _rehearsal(request: Request) -> Request:
    """The same with one layer, and eager; the whole where layers are no blocks of one kind, as a CNN's.

    It has the whole batch, because products of another size use other code; code is memory too, and each convolution
    of another shape is compiled anew, which for a small ResNet was a seventh of its peak.
    """
    from attnbench import variants

    config = request.config
    eager = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
    single = eager.model_copy(update={"model": config.model.model_copy(update={"depth": 1})})
    return Request(single if variants.attends(config.variant) else eager, *request.shape)


def _check_meter(told: dict[str, Any]) -> dict[str, Any]:
    """What the meter says of `bytes` bytes, asked for in tensors of `each` bytes, written to, and given back."""
    import torch

    torch.ones(1000).sum()
    meter = PeakMeter("cpu")
    held = [torch.ones(told["each"], dtype=torch.uint8) for _ in range(told["bytes"] // told["each"])]
    del held
    return {"peak_bytes": meter.bytes()}


# --- time -------------------------------------------------------------------------------------------------------------


def rates(work: Callable[[], object], images: int, budget: float, device: str = "cpu", warmup: int = 2) -> Timing:
    """Images per second of `work`, which handles `images` at a call, after `warmup` untimed calls.

    Repeats until `budget` seconds are used, three times at least unless that took four budgets. On CUDA the clock is a
    pair of events.
    """
    watch = Stopwatch()
    for _ in range(warmup):
        work()
        if watch.seconds > budget:
            break
    values: list[float] = []
    watch = Stopwatch()
    with _undisturbed():
        while watch.seconds < budget * (1 if len(values) >= 3 else 4) or not values:
            values.append(images / seconds_of(work, device))
    return Timing.of(values)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection inside a timed region."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _measure_time(told: dict[str, Any]) -> dict[str, Any]:
    """All that `throughput` promises; a third of the budget for each of the three."""
    import torch

    from attnbench import train
    from attnbench.optimiser import make_optimiser

    request, share = Request.parse(told), told["budget"] / 3
    config = request.config
    model = train.make_model(config, *request.shape)
    optimiser = make_optimiser(model, config)
    batches = deque(_batches(request))

    def step() -> None:
        batches.rotate()
        train.train_step(model, optimiser, batches[0].inputs, 0, config, batches[0].labels)

    def evaluate() -> None:
        batches.rotate()
        with torch.no_grad(), train.autocast(config):
            model(batches[0].inputs)

    def rate(work: Callable[[], None]) -> dict[str, float]:
        return asdict(rates(work, config.train.batch, share, config.device))

    model.train()
    trained = rate(step)
    model.eval()
    evaluated = rate(evaluate)
    timings = {"train_images_per_second": trained, "eval_images_per_second": evaluated}
    return timings | _sampling(model, request, share)


def _sampling(model: nn.Module, request: Request, budget: float) -> dict[str, Any]:
    """Rate of drawing SAMPLED images at a time, and the bytes an image's decoding keeps after its last pixel."""
    import torch

    from attnbench.draw import draw

    result: dict[str, Any] = {"sample_images_per_second": None, "state_bytes_per_image": None}
    if request.config.model.objective != "ar" or not hasattr(model, "start"):
        return result
    state = _decode(model, request, limit=30 * budget)
    if state is None:
        return result
    result["state_bytes_per_image"] = state_bytes(state, model) // SAMPLED
    generator = torch.Generator().manual_seed(0)
    timing = rates(lambda: draw(model, SAMPLED, generator), SAMPLED, budget, request.config.device, warmup=1)
    return result | {"sample_images_per_second": asdict(timing)}


def _decode(model: nn.Module, request: Request, limit: float) -> object | None:
    """The state after every pixel of SAMPLED images, or None where that takes more than `limit` seconds."""
    import torch

    watch = Stopwatch()
    pixel = None
    with torch.no_grad():
        state = model.start(SAMPLED)  # type: ignore[operator]
        for _ in range(request.height * request.width):
            _, state = model.step(pixel, state)  # type: ignore[operator]
            pixel = torch.zeros(SAMPLED, dtype=torch.long, device=request.config.device)
            if watch.seconds > limit:
                return None
    return state


def state_bytes(state: object, model: nn.Module | None = None) -> int:
    """Bytes of the memory behind the tensors in `state`, each once, without the model's own parameters and buffers."""
    own = [*model.parameters(), *model.buffers()] if model is not None else []
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(state)}
    return sum(size for address, size in storages.items() if address not in known)


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in a structure of dataclasses, lists, tuples, dicts and plain objects."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple | set | deque):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type) and not callable(value):
        yield from tensors(vars(value))


# --- what both children do --------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Tokens int64 (batch, height, width); or pictures (batch, channels, height, width) and their labels (batch,)."""

    inputs: Tensor
    labels: Tensor | None = None


def _batches(request: Request) -> list[Batch]:
    """BATCHES random batches."""
    import torch

    generator = torch.Generator().manual_seed(0)
    config, sides = request.config, (request.height, request.width)

    def draw() -> Batch:
        if config.model.objective != "supervised":
            tokens = torch.randint(request.vocab, (config.train.batch, *sides), generator=generator)
            return Batch(tokens.to(config.device))
        images = torch.rand((config.train.batch, request.channels, *sides), generator=generator)
        labels = torch.randint(request.classes, (config.train.batch,), generator=generator)
        return Batch(images.to(config.device), labels.to(config.device))

    return [draw() for _ in range(BATCHES)]


def _train(request: Request, batches: list[Batch]) -> None:
    """Build the model and its optimiser, and train a step on each batch."""
    from attnbench import train
    from attnbench.optimiser import make_optimiser

    model = train.make_model(request.config, *request.shape)
    optimiser = make_optimiser(model, request.config)
    model.train()
    for step, (inputs, labels) in enumerate(batches):
        train.train_step(model, optimiser, inputs, step, request.config, labels)


KINDS: Kinds = {"memory": _measure_memory, "time": _measure_time, "meter": _check_meter}


def main(kinds: Kinds) -> None:
    """Answer one request. What the work prints goes to standard error; each answer is a line of standard output."""
    import torch

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    keep_freed()
    torch.set_num_threads(threads())
    result = kinds[sys.argv[1]](json.load(sys.stdin))
    for known in [result] if isinstance(result, dict) else result:
        print(json.dumps(known, allow_nan=False), file=answer, flush=True)
    answer.close()


if __name__ == "__main__":
    main(KINDS)
