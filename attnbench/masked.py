"""Trained weights under another mask: what does a window cost that the model was not trained with (C4)?

The weights are a finished run's, or others' (a Hugging Face ImageGPT folder with its own colours). Nothing but the mask
changes, unless a few steps of fine-tuning are asked for. Every cut is a record like a run's, in a folder of its own,
so that no table takes it for a model that was trained that way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import models
from attnbench import checkpoint, data, evaluate, experiment, record, stats, storage, tokens, train, trained, variants
from attnbench.config import DataConfig, ModelConfig, ProbeConfig, RunConfig, Scalar
from attnbench.errors import Refusal
from models.mixer import ExactMixer

LR_SHARE = 0.1
"""Fine-tuning's learning rate, as a part of the run's own."""


@dataclass(frozen=True)
class Subject:
    """Weights and the images to try them on.

    config: the settings that a record of the uncut model would have; cut: the model under a variant's mask, its options
    given, and raises Refusal where that mask wants others; images: tokens (count, height, width) of a split; pixels:
    what they are of (count, height, width, channels); data: that part of the records; sha256: of the run's record,
    where source does not tell other weights by itself.
    """

    source: str
    config: RunConfig
    tokeniser: tokens.Tokeniser
    cut: Callable[[RunConfig], nn.Module]
    images: Callable[[str], Tensor]
    pixels: Callable[[str], tokens.Pixels]
    data: dict[str, Any]
    sha256: str | None = None


def of_record(path: Path, root: Path | None = None, own: str | None = None) -> Subject:
    """A finished run. Raises Refusal as `trained.load`, and where the run has no softmax over visible keys."""
    run = trained.load(path, root, own)
    chosen = variants.find(run.config.variant)
    if not (issubclass(chosen.cls, ExactMixer) and run.config.model.objective == "ar"):
        raise Refusal(f"{run.record['id']} has no causal softmax over visible pixels; choose a run that has")
    config = run.config.model_copy(update={"position": run.config.position or chosen.position})

    def cut(masked: RunConfig) -> nn.Module:
        model = train.make_model(masked, *run.shape)
        try:
            model.load_state_dict(run.weights)
        except RuntimeError as error:
            raise Refusal(f"{masked.variant} has other weights than {config.variant}; choose an exact mask") from error
        return model

    return Subject(
        run.record["id"], config, run.tokeniser, cut, cache(run.images), cache(run.pixels), run.record["data"],
        run.record["sha256"],
    )  # fmt: skip


def of_folder(folder: Path, name: str, root: Path | None = None) -> Subject:
    """Others' weights, tried on the data set `name` in their own colours. Raises Refusal."""
    try:
        model = models.load_imagegpt(folder)
        centres = _clusters(folder, model.vocab)
    except ValueError as error:
        raise Refusal(str(error)) from error
    grid = model.scan.grid
    settings = DataConfig(name=name, side=grid.height, tokens="palette", colours=model.vocab, root=root)
    dataset = data.load(settings)
    shape = ModelConfig(dim=model.tokens.shape[1], depth=model.depth, heads=model.mixers[0].layer.heads)
    config = RunConfig(data=settings, model=shape, probe=ProbeConfig(enabled=False), measure=False)
    config = experiment.resolve(config.model_copy(update={"position": variants.find(config.variant).position}))
    del model

    def cut(masked: RunConfig) -> nn.Module:
        try:
            found = models.load_imagegpt(folder, masked.variant, **masked.model.options)  # type: ignore[arg-type]
        except ValueError as error:
            raise Refusal(str(error)) from error
        return found.to(config.device)

    try:
        palette = tokens.with_residual(centres, dataset.train.pixels)
    except ValueError as error:
        raise Refusal(f"{name} is not in colour; choose other --data for these weights") from error

    def pixels(split: str) -> tokens.Pixels:
        return np.asarray(getattr(dataset, split).pixels[: config.evaluate.images if split == "test" else None])

    def images(split: str) -> Tensor:
        return torch.from_numpy(palette.encode(pixels(split)))

    told = {"name": dataset.name, "checksum": dataset.checksum, "height": grid.height, "width": grid.width}
    counts = {split: len(getattr(dataset, split)) for split in ("train", "validation", "test")}
    told |= {"vocab": palette.vocab, "tokens": palette.kind, "images": counts}
    return Subject(_fingerprint(folder), config, palette, cut, cache(images), pixels, told)


def masked(subject: Subject, variant: str, options: dict[str, Scalar], finetune: int, lr: float | None) -> RunConfig:
    """The settings of a cut. Raises Refusal for a variant that is no exact mask, and for an option that it lacks."""
    if not issubclass(variants.find(variant).cls, ExactMixer):
        raise Refusal(f"{variant} is no softmax over visible pixels, as these weights want; choose an exact mask")
    base = subject.config
    told: dict[str, Any] = {
        "variant": variant,
        "code": variants.code(variant),
        "model": base.model.model_copy(update={"options": options, "backend": "auto"}),
    }
    if finetune:
        schedule = {
            "steps": finetune, "warmup": finetune // 12, "lr": lr or LR_SHARE * base.train.lr,
            "validate_every": min(finetune, base.train.validate_every),
        }  # fmt: skip
        told["train"] = base.train.model_copy(update=schedule)
    return base.model_copy(update=told)


def operate(
    subject: Subject, config: RunConfig, value: Scalar | None, uncut: Tensor, finetune: int, out: Path, force: bool
) -> dict[str, Any]:
    """Cuts, fine-tunes if asked, evaluates; the record, written to out/runs; one of these weights that is there already
    is returned.

    config: from `masked`; value: of the option that is varied; uncut: nats of each test image under the mask that was
    trained, (count,).
    """
    name = _name(subject, config, finetune, len(uncut))
    before = record.find(out, name, status="ok")
    if before is not None and not force and before.get("source_sha256", subject.sha256) == subject.sha256:
        return before
    model, progress = subject.cut(config), train.Progress()
    if finetune:
        validation = subject.images("validation")[: config.train.validation_images]
        folder = out / "checkpoints" / name
        progress = train.fit(
            model, subject.images("train"), lambda m: evaluate.likelihood(m, validation, config).nats_per_token,
            config, folder, data=f"{subject.data['checksum']} {subject.sha256}",
        )  # fmt: skip
        checkpoint.clear(folder)
    test = evaluate.likelihood(model, subject.images("test")[: len(uncut)], config)
    seen = subject.pixels("test")[: len(uncut)]
    cost = test.per_image - uncut
    low, high = stats.unit_interval(cost.tolist()) if len(cost) > 1 else (None, None)
    about = {"source": subject.source, "value": value, "finetune": finetune}
    found = {
        "id": name, "status": "ok", "variant": config.variant, "family": variants.find(config.variant).family,
        "backend": model.backend, "seed": config.seed, "config": config.identity(),
        "environment": record.environment(), "data": subject.data, "source_sha256": subject.sha256,
        "surgery": about | {"uncut_nats_per_token": float(uncut.mean()), "cost_nats_per_token": float(cost.mean()),
                            "cost_low": low, "cost_high": high},
        "metrics": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "nats_per_token": test.nats_per_token,
            **evaluate.bits(test.nats_per_token, subject.tokeniser, seen, config),
            "steps": progress.step, "seconds": progress.seconds,
        },
        **test.recorded(),
    }  # fmt: skip
    return record.read(record.write(out, found, replace=before is not None))


def uncut(subject: Subject, images: int | None) -> Tensor:
    """Nats of each test image under the mask that was trained, float64 (count,)."""
    model = subject.cut(subject.config)
    return evaluate.likelihood(model, subject.images("test")[:images], subject.config).per_image


def write_csv(out: Path, source: str) -> Path:
    """A line for every cut of this source that is recorded: what a figure of loss against R is drawn from."""
    import pandas as pd

    found = [done for done in record.read_all(out)[0] if done.get("surgery", {}).get("source") == source]
    rows = [
        {"variant": done["variant"]} | done["surgery"] | {"nats_per_token": done["metrics"]["nats_per_token"]}
        for done in found
    ]
    table = pd.DataFrame(rows).sort_values(["variant", "finetune", "value"])
    return storage.write_text(out / f"{source}.csv", table.to_csv(index=False))


def _name(subject: Subject, config: RunConfig, finetune: int, images: int) -> str:
    """Not the id of a run that was trained so."""
    told = record.canonical({"source": subject.source, "finetune": finetune, "images": images, "data": subject.data})
    return f"{record.identify(config)}-cut-{hashlib.sha256(told).hexdigest()[:8]}"


def _clusters(folder: Path, vocab: int) -> tokens.Palette:
    """The colours of the tokens. Raises ValueError."""
    path = folder / "preprocessor_config.json"
    try:
        centres = np.asarray(json.loads(path.read_text(encoding="utf-8"))["clusters"], dtype=np.float64)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); it says which colours the tokens are") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has no clusters, which say what colours the tokens are") from error
    if centres.shape != (vocab, 3) or not np.isfinite(centres).all():
        raise ValueError(f"{path} has clusters of shape {centres.shape}, but the weights want ({vocab}, 3)")
    return tokens.Palette(centres)


def _fingerprint(folder: Path) -> str:
    """A name for others' weights: the folder's, and a hash of its settings, its colours and its weights."""
    paths = sorted(path for kind in ("*config.json", "*.safetensors") for path in folder.glob(kind))
    told = [(path.name, record.digest(path)) for path in paths]
    digest = hashlib.sha256(record.canonical(told)).hexdigest()[:10]
    return f"{''.join(c if c.isalnum() else '-' for c in folder.resolve().name)}-{digest}"
