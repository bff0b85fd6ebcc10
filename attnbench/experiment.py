"""One run, from a configuration to a record: train, likelihood, probe, pictures, memory, throughput."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import models
from attnbench import (
    checkpoint,
    data,
    distributed,
    evaluate,
    measure,
    pictures,
    probe,
    record,
    regret,
    storage,
    supervised,
    tokens,
    train,
    variants,
)  # fmt: skip
from attnbench.config import RunConfig, threads
from attnbench.draw import draw, shown
from attnbench.errors import Refusal

Watch = Callable[[str, int, float], None]
"""Told the stage ("train", "test", "probe", …), the step and the loss."""


@dataclass(frozen=True)
class Prepared:
    """The data of a run as tokens int64 (count, height, width), with labels, by split.

    supervised: whether the model takes the pictures themselves.
    """

    dataset: data.Dataset
    tokeniser: tokens.Tokeniser
    splits: dict[str, probe.Split]
    supervised: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """height, width, vocab; in pixels where the model takes pictures, which are narrower than their sub-pixels."""
        taken = self.dataset.train.pixels if self.supervised else self.splits["train"][0]
        return taken.shape[1], taken.shape[2], self.tokeniser.vocab

    @property
    def pictures(self) -> dict[str, int]:
        """channels and classes, what a supervised model wants to know besides."""
        return data.pictures(self.dataset)

    def request(self, config: RunConfig) -> measure.Request:
        """What a measuring process is told of a run on these data."""
        return measure.Request(config, *self.shape, **self.pictures)


def resolve(config: RunConfig, cuda: bool | None = None) -> RunConfig:
    """Every "auto" that depends on the machine, decided, and without what the variant would have untold.

    `cuda`: whether the machine that the run is for has it; none: this one.  Raises Refusal where CUDA is asked for and
    absent, and where an own attention is no longer the code that was resolved before.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    if config.device == "cuda" and not cuda:
        raise Refusal("device cuda: this machine has no CUDA GPU that torch can use; leave --device at auto")
    device = config.device if config.device != "auto" else "cuda" if cuda else "cpu"
    code = variants.code(config.variant)
    if config.code not in (None, code):
        raise Refusal(f"{config.variant} has been changed since this run was asked for; ask for it again")
    decided = variants.with_objective(config).model_copy(
        update={
            "device": device,
            "code": code,
            "parallel": distributed.resolve(config.parallel),
            "train": config.train.on(device),
        }
    )
    return variants.plain(decided)


def prepare(config: RunConfig) -> Prepared:
    """Loads and tokenises the data.  Raises Refusal."""
    dataset = data.load(config.data)
    tokeniser = tokens.fit(dataset, config.data)
    splits = {
        name: (torch.from_numpy(tokeniser.encode(images.pixels)), images.labels)
        for name, images in (("train", dataset.train), ("validation", dataset.validation), ("test", dataset.test))
    }
    limit = config.evaluate.images
    splits["test"] = (splits["test"][0][:limit], splits["test"][1][:limit])
    return Prepared(dataset, tokeniser, splits, supervised=config.model.objective == models.SUPERVISED)


def artifacts(config: RunConfig) -> Path:
    """Folder of what a run leaves beside its record: weights, palette, pictures."""
    return config.out / "artifacts" / record.identify(config)


def execute(
    config: RunConfig,
    watch: Watch = lambda stage, step, loss: None,
    said: Collection[str] = (),
    held: Callable[[], bool] = lambda: True,
) -> Path:
    """The whole of a resolved run; the path of its record.

    A finished record is returned as it is unless config.force.  A loss that is no longer finite, or memory that does
    not suffice, ends in a record that says so, with the last lines that were `said`.  A run that is no longer `held`
    saves no checkpoint.  Of several processes each calls this; the first alone writes, and the others' path may not be
    there yet.  Raises Refusal before anything is written.
    """
    name = record.identify(config)
    first = distributed.first()
    done = record.find(config.out, name, status="ok") if first and not config.force else None
    if done is not None:
        _same_pictures(config, done)
    if distributed.tell(done is not None):
        return config.out / "runs" / f"{name}.json"
    torch.set_num_threads(threads())
    if first:
        storage.check_writable(config.out)
    prepared = prepare(config)
    _probed(prepared, config)
    model, folder = None, checkpoints(config)
    try:
        model = train.make_model(config, *prepared.shape, **prepared.pictures)
        outcome = {"status": "ok", **_outcome(model, prepared, config, watch, folder, held)}
    except train.Diverged as error:
        outcome = {"status": "nan", "reason": str(error), "tail": list(said)}
    except (RuntimeError, MemoryError) as error:
        # On CPU torch has no exception of its own for it; CUDA's OutOfMemoryError is a RuntimeError too.
        if not measure.about_memory(f"{type(error).__name__}: {error}"):
            raise
        outcome = {"status": "oom", "reason": str(error), "tail": list(said)}
    if not first and outcome["status"] != "oom":  # who runs out of memory alone cannot ask the first to say so
        return config.out / "runs" / f"{name}.json"
    watch("record", 0, 0.0)
    path = record.write(config.out, _identity(model, prepared, config) | outcome, replace=config.force)
    if outcome["status"] != "oom":  # with more memory it goes on from there
        checkpoint.clear(folder)
    return path


def _same_pictures(config: RunConfig, done: dict[str, Any]) -> None:
    """Raises Refusal where a finished run is of other pictures than its folder holds now: ids say where, not what."""
    if not config.data.name.startswith("folder:"):
        return
    if data.load(config.data).checksum != done["data"]["checksum"]:
        raise Refusal(
            f"{done['id']} is finished, but of other pictures than {config.data.name} holds now; --force runs it anew "
            "and keeps its record aside, another --out leaves it where it is"
        )


def checkpoints(config: RunConfig) -> Path:
    """Folder of a run's checkpoints; of one that is forced over a finished record, one that goes with that record.

    So the same command finds what it left when it was stopped, and never what the finished run may have left.
    """
    name = record.identify(config)
    done = record.find(config.out, name, status="ok", warn=False) if config.force else None
    return config.out / "checkpoints" / (name if done is None else f"{name}-over-{done['sha256'][:8]}")


def _identity(model: nn.Module | None, prepared: Prepared, config: RunConfig) -> dict[str, Any]:
    height, width, vocab = prepared.shape
    return {
        "id": record.identify(config),
        "variant": config.variant,
        "code": config.code,
        "family": variants.find(config.variant).family,
        "backend": None if model is None else model.backend,
        "seed": config.seed,
        "config": config.identity(),
        "environment": record.environment() | {"parallel": config.parallel, "processes": distributed.size()},
        "data": {
            "name": prepared.dataset.name,
            "checksum": prepared.dataset.checksum,
            "revision": prepared.dataset.revision,
            "height": height,
            "width": width,
            "vocab": vocab,
            "tokens": prepared.tokeniser.kind,
            "images": {split: len(labels) for split, (_, labels) in prepared.splits.items()},
        },
    }


def _outcome(
    model: nn.Module, prepared: Prepared, config: RunConfig, watch: Watch, folder: Path, held: Callable[[], bool]
) -> dict[str, Any]:
    """Everything that a run finds out; folder: of its checkpoints."""
    if config.model.objective == models.SUPERVISED:
        return _supervised(model, prepared, config, watch, folder, held)
    splits = prepared.splits
    validation = splits["validation"][0][: config.train.validation_images]
    progress = train.fit(
        model, splits["train"][0],
        lambda m: evaluate.likelihood(m, validation, config).nats_per_token,
        config, folder, lambda step, loss: watch("train", step, loss), data=prepared.dataset.checksum, held=held,
    )  # fmt: skip
    watch("likelihood", 0, 0.0)
    test = evaluate.likelihood(model, splits["test"][0], config)
    seen = prepared.dataset.test.pixels[: len(splits["test"][0])]
    watch("probe", 0, 0.0)
    accuracies: list[float] | None = None
    if _probed(prepared, config):
        accuracies = probe.accuracies(model, splits["train"], splits["validation"], splits["test"], config)
    watch("pictures", 0, 0.0)
    left = _leave(model, prepared, config)
    watch("memory and throughput", 0, 0.0)
    metrics = {
        "nats_per_token": test.nats_per_token,
        **evaluate.bits(test.nats_per_token, prepared.tokeniser, seen, config),
        "validation_nats_per_token": progress.best,
        **_yardsticks(model, test, prepared, config),
        "probe_accuracy": accuracies,
        "probe_accuracy_best": max(accuracies) if accuracies else None,
        **_effort(model, progress, prepared, config),
    }
    return {
        "metrics": metrics,
        "artifacts": left,
        "curves": asdict(progress.curves),
        **test.recorded(),
    }


def _probed(prepared: Prepared, config: RunConfig) -> bool:
    """Whether the layers are probed.  Raises Refusal where a probe would be shown a single class."""
    if not config.probe.enabled or prepared.supervised or len(prepared.dataset.classes) < 2:
        return False
    shown = prepared.splits["train"][1][: config.probe.images]
    if len(set(shown.tolist())) < 2:
        raise Refusal(
            f"the first {len(shown)} training images, which the probe is shown, are all of one class; raise "
            "--probe.images, or give --probe.no-enabled"
        )
    return True


def _supervised(
    model: nn.Module, prepared: Prepared, config: RunConfig, watch: Watch, folder: Path, held: Callable[[], bool]
) -> dict[str, Any]:
    """The same of a model that is told the classes."""
    progress, test = supervised.fit(
        model, prepared.dataset, config, folder, lambda step, loss: watch("train", step, loss), held
    )
    left = _leave(model, prepared, config)
    watch("memory and throughput", 0, 0.0)
    figures = dict.fromkeys(regret.YARDSTICKS) | supervised.metrics(progress, test)
    return {
        "metrics": figures | _effort(model, progress, prepared, config),
        "artifacts": left,
        "curves": asdict(progress.curves),
        "per_image_nats": None,
        "per_image_correct": test.correct.tolist(),
        "nll_map": None,
    }


def _effort(model: nn.Module, progress: train.Progress, prepared: Prepared, config: RunConfig) -> dict[str, Any]:
    """What the run took."""
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_flops_per_image": 3 * model.flops(),  # type: ignore[operator]
        "predicted_train_peak_bytes": _predicted(prepared, config),
        "steps": progress.step,
        "seconds": progress.seconds,
        **_cost(prepared, config),
    }


def _yardsticks(model: nn.Module, test: evaluate.Likelihood, prepared: Prepared, config: RunConfig) -> dict[str, Any]:
    """Regret and what it is measured against; null but for images of a source, whose likelihood is known."""
    if prepared.dataset.source is None or config.model.objective != "ar":
        return dict.fromkeys(regret.YARDSTICKS)
    images = prepared.splits["test"][0].numpy()
    return regret.yardsticks(model, test.per_image.numpy(), prepared.dataset.source, images)


def _predicted(prepared: Prepared, config: RunConfig) -> int | None:
    """Peak bytes of training by a step of fake tensors; None, with the reason in a warning, where one fails."""
    if not config.measure or not distributed.first():
        return None
    from attnbench import predict  # what it imports takes a second

    try:
        return predict.peak_bytes(prepared.request(config))
    except Exception as error:  # whatever an attention does with fake tensors, its run is worth more
        warnings.warn(f"peak memory is not predicted: {type(error).__name__}: {error}", stacklevel=2)
        return None


def _cost(prepared: Prepared, config: RunConfig) -> dict[str, Any]:
    """Memory and throughput, each measured in a process of its own; null with the reason where that failed."""
    cost: dict[str, Any] = dict.fromkeys(
        ("train_peak_bytes", "train_images_per_second", "eval_images_per_second", "sample_images_per_second",
         "state_bytes_per_image")
    )  # fmt: skip
    if not config.measure or not distributed.first():
        return cost
    request = prepared.request(config)
    try:
        cost["train_peak_bytes"] = measure.peak_bytes(request)
        found = measure.throughput(request)
    except measure.ChildFailed as error:
        warnings.warn(str(error), stacklevel=2)
        return cost | {"measurement_failed": str(error)}
    spreads = {name: value for name, value in found.items() if isinstance(value, dict)}
    cost |= {name: value["median"] if isinstance(value, dict) else value for name, value in found.items()}
    return cost | {"spread": spreads}


def _leave(model: nn.Module, prepared: Prepared, config: RunConfig) -> dict[str, str]:
    """Writes weights, tokeniser and pictures beside the record; the SHA-256 of the first two, by file name."""
    folder = artifacts(config)
    weights = distributed.gathered(model.state_dict())
    left: dict[str, str] = {}
    if distributed.first():
        whole = {name: tensor.contiguous() for name, tensor in weights.items()}
        paths = (
            storage.write_bytes(folder / "weights.safetensors", save(whole)),
            storage.write_json(folder / "tokeniser.json", prepared.tokeniser.to_json()),
        )
        left = {path.name: record.digest(path) for path in paths}
    count = min(config.sample.count, len(prepared.splits["test"][0]))
    if config.model.objective != "ar" or not count:
        return left
    generator = train.generator("samples", config.seed)
    truth = prepared.splits["test"][0][:count]

    def show(*rows: Tensor) -> list[Any]:
        return [prepared.tokeniser.decode(row.cpu().numpy()) for row in rows]

    samples, each = draw(model, count, generator, config.sample.temperature), prepared.tokeniser.tokens_per_pixel
    completed = draw(model, count, generator, config.sample.temperature, truth, 0.5, each)
    if not distributed.first():
        return left
    storage.write_bytes(folder / "samples.png", pictures.sheet(show(samples)))
    whole, drawn = show(truth, completed)
    storage.write_bytes(folder / "completions.png", pictures.completions(whole, drawn, shown(model, 0.5, each)))
    return left
