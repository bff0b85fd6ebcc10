"""Training: warm-up and cosine, clipped; best weights by validation; resumable bit for bit.

The order of the data and the hidden pixels are pure functions of (seed, step) and of the process's number, so a resumed
run sees what an uninterrupted one would have seen, and N processes together what one would.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import models
from attnbench import checkpoint, distributed, variants
from attnbench.clock import Stopwatch
from attnbench.config import RunConfig, TrainConfig
from attnbench.errors import Refusal
from attnbench.optimiser import make_optimiser
from models import kernels

HIDDEN_SHARE = 0.15  # Image GPT's BERT objective


class Diverged(Exception):
    """The loss is no longer a finite number."""


@dataclass
class Curves:
    """What training looked like: loss every few steps, validation every `validate_every`; nats per token."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


@dataclass
class Progress:
    """Where training stands; all of it goes into a checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    curves: Curves = field(default_factory=Curves)


def make_model(
    config: RunConfig, height: int, width: int, vocab: int, channels: int = 1, classes: int = 10
) -> nn.Module:
    """The configured model on its device, its initial weights a function of config.seed.  Raises Refusal.

    Only a supervised model reads channels and tells classes apart.
    """
    torch.manual_seed(config.seed)
    settings = config.model
    variants.find(config.variant)
    try:
        model = models.build(
            config.variant, height=height, width=width, vocab=vocab, dim=settings.dim, depth=settings.depth,
            heads=settings.heads, objective=settings.objective, backend=settings.backend, position=config.position,
            scan=config.scan, channels=channels, classes=classes, **settings.options,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        told = str(error)
        raise Refusal(told if ";" in told or "did you mean" in told else f"{told}; choose another") from error
    if config.device != "cpu":
        model = model.to(config.device)
    if config.train.recompute:
        _recompute(model, config.variant)
    if config.train.compile:
        if config.device != "cpu":  # on a CPU the kernels that come first serve
            _settle(model, config)
        model.compile()
    return model


def _settle(model: nn.Module, config: RunConfig) -> None:
    """Lets each attention choose the backend that takes the run's tensors: in its first call it would be too late, and
    the model compiled twice.  Raises Refusal where one that was asked for cannot."""
    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    for mixer in (module for module in model.modules() if isinstance(module, models.Mixer)):
        like = torch.empty(0, mixer.layer.heads, 0, mixer.layer.head_dim, device=config.device, dtype=dtype)
        try:
            kernels.serves(mixer, like)
        except ValueError as error:
            raise Refusal(f"{error}; choose another") from error


def _recompute(model: nn.Module, variant: str) -> None:
    """The backward pass runs each block again instead of having kept what is inside.  Raises Refusal."""
    if not isinstance(blocks := getattr(model, "blocks", None), nn.ModuleList):
        raise Refusal(f"recompute: {variant} has no blocks to compute again; leave --train.recompute out")
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def generator(*words: str | int) -> torch.Generator:
    """A generator on the CPU that is a function of these words alone, on any machine."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def batch_indices(seed: int, step: int, batch: int, count: int) -> Tensor:
    """int64 (batch,): which of `count` images this step sees; every epoch is a permutation of its own."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // count
    orders = {int(e): torch.randperm(count, generator=generator("order", seed, int(e))) for e in epochs.unique()}
    return torch.stack([orders[int(e)][p % count] for e, p in zip(epochs, places, strict=True)])


def hidden_pixels(shape: tuple[int, ...], seed: int, step: int) -> Tensor:
    """bool of this shape: the 15 % of positions whose content "bert" zeroes, at least one an image."""
    draw = torch.rand(shape, generator=generator("hidden", seed, step))
    return (draw < HIDDEN_SHARE) | (draw == draw.flatten(1).amin(1).view(-1, *[1] * (len(shape) - 1)))


def autocast(config: RunConfig) -> AbstractContextManager[Any]:
    """bfloat16 autocast where the configuration asks for it."""
    if config.train.precision == "bfloat16":
        return torch.autocast(config.device, dtype=torch.bfloat16)
    return nullcontext()


def token_nats(model: nn.Module, tokens: Tensor, hidden: Tensor | None) -> Tensor:
    """-log p of each token, float32 (batch, height, width); where `hidden` is given, only those are meaningful."""
    logits = model(tokens) if hidden is None else model(tokens, hidden)
    return F.cross_entropy(logits.movedim(-1, 1).float(), tokens, reduction="none")


def class_nats(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """-log p of each picture's class, float32 (batch,)."""
    return F.cross_entropy(model(images).float(), labels, reduction="none")


def train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, tokens: Tensor, step: int, config: RunConfig,
    labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One optimiser step on tokens (batch, height, width), of which every process is given its share.

    Returns this process's part of the mean loss in nats per token, detached; over all processes the parts add up to it.
    With labels (batch,), `tokens` are pictures (batch, channels, height, width) and the nats are those of the class.
    `model` is what distributed.spread made of the model.
    """
    train, processes = config.train, distributed.size()
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, train)
    hidden = None
    counted: Tensor | int = processes * (tokens if labels is None else labels).numel()
    if config.model.objective == "bert":
        batch = len(tokens) * processes
        everywhere = hidden_pixels((batch, *tokens.shape[1:]), config.seed, step)
        counted = everywhere.sum()  # no two processes hide equally many
        hidden = everywhere[distributed.share(batch)].to(tokens.device)
    optimiser.zero_grad(set_to_none=True)
    total = torch.zeros((), device=tokens.device)
    none = [None] * train.accumulate
    parts = zip(
        tokens.chunk(train.accumulate),
        none if hidden is None else hidden.chunk(train.accumulate),
        none if labels is None else labels.chunk(train.accumulate),
        strict=True,
    )
    for number, (part, holes, classes) in enumerate(parts, 1):
        with distributed.synchronising(model, last=number == train.accumulate):
            with autocast(config):
                nats = token_nats(model, part, holes) if classes is None else class_nats(model, part, classes)
            loss = (nats if holes is None else nats.masked_fill(~holes, 0.0)).sum() / counted
            (loss * processes).backward()  # DDP and FSDP take the mean over processes; it is the sum that is wanted
            total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), train.clip)
    optimiser.step()
    return total


def fit(
    model: nn.Module,
    tokens: Tensor,
    validate: Callable[[nn.Module], float],
    config: RunConfig,
    folder: Path,
    report: Callable[[int, float], None] = lambda step, loss: None,
    labels: Tensor | None = None,
    data: str | None = None,
    held: Callable[[], bool] = lambda: True,
) -> Progress:
    """Trains to config.train.steps, resuming from `folder`; leaves the best weights by validation in the model.

    tokens int64 (count, height, width), or pictures with their labels (count,) as `train_step` takes them; `validate`
    gives nats per token (or label); `report` is told step and loss; data: a checksum of what is trained on, without
    which what `folder` holds is not asked whether it is of the same; held: whether the run may still write there. Of
    several processes each calls this with the same arguments.  Ctrl-C saves a checkpoint, when the step is done, before
    it goes on.  Raises Diverged, and Refusal for a checkpoint that does not fit the model.
    """
    train = config.train
    trained = distributed.spread(model, config.parallel)
    optimiser = make_optimiser(model, config)
    progress, best = _resume(model, optimiser, folder, data)
    before, watch = progress.seconds, Stopwatch()

    def save() -> None:
        progress.seconds = before + watch.seconds
        everything = distributed.gathered(_tensors(model, optimiser, best))
        if distributed.first() and held():
            checkpoint.save(folder, progress.step, everything, asdict(progress) | {"data": data})

    model.train()
    try:
        with distributed.Interrupt() as interrupt:
            while progress.step < train.steps:
                interrupt.check()
                chosen = batch_indices(config.seed, progress.step, train.batch, len(tokens))
                chosen = chosen[distributed.share(train.batch)]
                inputs = _there(tokens[chosen], config.device)
                told = None if labels is None else _there(labels[chosen], config.device)
                loss = train_step(trained, optimiser, inputs, progress.step, config, told)
                progress.step += 1
                _log(progress, loss, train, report)
                if progress.step % train.validate_every == 0 or progress.step == train.steps:
                    best = _validate(model, validate, progress, best)
                if progress.step % train.checkpoint_every == 0 or progress.step == train.steps:
                    save()  # after the last step too: probing and measuring may take longer than training
            interrupt.check()
    except KeyboardInterrupt:
        save()
        raise
    progress.seconds = before + watch.seconds
    model.load_state_dict(best)
    return progress


def _there(x: Tensor, device: str) -> Tensor:
    """On the device; to CUDA from pinned memory, for from any other a step waits until the device is idle."""
    return x.pin_memory().to(device, non_blocking=True) if device == "cuda" else x.to(device)


def _log(progress: Progress, loss: Tensor, train: TrainConfig, report: Callable[[int, float], None]) -> None:
    if progress.step % 10 and progress.step < train.steps:
        return  # reading the loss would make an accelerator wait
    value = float(distributed.total(loss))
    if not math.isfinite(value):
        raise Diverged(f"the loss is {value} at step {progress.step}")
    progress.curves.steps.append(progress.step)
    progress.curves.loss.append(value)
    report(progress.step, value)


def _validate(
    model: nn.Module, validate: Callable[[nn.Module], float], progress: Progress, best: dict[str, Tensor]
) -> dict[str, Tensor]:
    value = validate(model)
    model.train()
    progress.curves.validation_steps.append(progress.step)
    progress.curves.validation.append(value)
    if value < progress.best:
        progress.best = value
        best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return best


def _tensors(model: nn.Module, optimiser: torch.optim.Optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that resuming needs, under flat names; "adam" is that of whichever optimiser."""
    flat = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    flat |= {f"best.{name}": tensor for name, tensor in best.items()}
    for index, state in optimiser.state_dict()["state"].items():
        flat |= {f"adam.{index}.{key}": value for key, value in state.items()}
    return flat


def _resume(
    model: nn.Module, optimiser: torch.optim.Optimizer, folder: Path, data: str | None
) -> tuple[Progress, dict[str, Tensor]]:
    """Puts the latest checkpoint of the folder, if any, into model and optimiser; only the first process reads it."""
    found = _latest(folder, data) if distributed.first() else None
    told = distributed.tell(None if found is None else (found.meta, list(found.tensors)))
    if told is None:
        return Progress(), {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    meta, names = told
    try:
        tensors = distributed.scattered(found.tensors if found else {}, _like(model, optimiser, names))
        _restore(model, optimiser, tensors)
        progress = {key: value for key, value in meta.items() if key != "data"}
        return Progress(**progress | {"curves": Curves(**meta["curves"])}), dict(_under("best.", tensors))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
        why = f"does not fit this model ({' '.join(str(error).split())[:120]})"
        raise Refusal(f"{folder} has a checkpoint that {why}; delete it to start anew") from error


def _latest(folder: Path, data: str | None) -> checkpoint.Checkpoint | None:
    """The latest checkpoint that is not known to be of other images; those that are go, with a warning."""
    found = checkpoint.latest(folder)
    if found is None or data is None or found.meta.get("data") in (None, data):
        return found
    warnings.warn(f"{folder} has checkpoints of other images or weights than these: training starts anew", stacklevel=2)
    checkpoint.clear(folder)
    return None


def _like(model: nn.Module, optimiser: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """For each of a checkpoint's names a tensor that is kept as that one is to be."""
    like = {f"{kind}.{name}": tensor for kind in ("model", "best") for name, tensor in model.state_dict().items()}
    for place, parameter in enumerate(p for group in optimiser.param_groups for p in group["params"]):
        like |= {f"adam.{place}.{key}": parameter for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")}
        like[f"adam.{place}.step"] = torch.zeros((), device=parameter.device)
    return {name: like[name] for name in names}


def _restore(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    model.load_state_dict(dict(_under("model.", tensors)))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("adam.", tensors):
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _under(prefix: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))
