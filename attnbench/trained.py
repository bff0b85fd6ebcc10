"""A run that is done, opened again: its record, its settings, its tokeniser and its best weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

import models
from attnbench import data, experiment, record, tokens, train
from attnbench.config import DataConfig, RunConfig
from attnbench.errors import Refusal


@dataclass(frozen=True)
class Trained:
    """What a finished run left. Its config is resolved for this machine; `weights` are on the CPU."""

    record: dict[str, Any]
    config: RunConfig
    tokeniser: tokens.Tokeniser
    weights: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """height, width, vocab."""
        told = self.record["data"]
        return told["height"], told["width"], told["vocab"]

    def model(self) -> nn.Module:
        """The model as it was trained. Raises Refusal where the weights are not those of its settings."""
        known = {}
        if self.config.model.objective == models.SUPERVISED:
            known = data.pictures(data.load(self.config.data))
        model = train.make_model(self.config, *self.shape, **known)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise Refusal(f"{self.record['id']}: its weights are of another shape than its settings") from error
        return model

    def images(self, split: str, side: int | None = None) -> Tensor:
        """Tokens int64 (count, height, width) of "train", "validation" or "test", as the run cut them; at any side."""
        return torch.from_numpy(self.tokeniser.encode(self.pixels(split, side)))

    def pixels(self, split: str, side: int | None = None) -> tokens.Pixels:
        """What those tokens are of: uint8 (count, height, width, channels)."""
        limit = self.config.evaluate.images if split == "test" else None
        return np.asarray(getattr(data.load(self.at(side)), split).pixels[:limit])

    def at(self, side: int | None) -> DataConfig:
        """The settings of its data at side × side pixels, None: as it was trained."""
        square = {} if side is None else {"side": side, "height": None, "width": None}
        return self.config.data.model_copy(update=square)


def load(path: Path, root: Path | None = None, own: str | None = None) -> Trained:
    """The run whose record this is, OUT/runs/ID.json, with OUT/artifacts/ID beside it; root: where its data lies now.

    own: the attention of somebody's own that the run had, as FILE.py:CLASS; a record alone runs nobody's code.
    Raises Refusal: a record that is damaged or not "ok", settings of another version, artifacts missing or damaged, an
    own attention that is not named.
    """
    if not path.exists():
        raise Refusal(f"{path} cannot be read: there is no such file; name a run's record, OUT/runs/ID.json")
    done = _read(path)
    if done.get("status") != "ok":
        raise Refusal(f"{path} is the record of a run that ended with {done.get('status')!r}; name a finished one")
    folder = path.resolve().parent.parent
    try:
        read = {"root": root, "revision": done["data"].get("revision")}  # the commit, also where it was not asked for
        settings = done["config"] | {"out": folder, "device": "auto", "data": done["config"]["data"] | read}
        config = RunConfig.model_validate(settings)
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{path} has settings that this version does not know; run that cell again") from error
    if ":" in config.variant and own != config.variant:
        raise Refusal(f"{path} is of {config.variant}, code that is not ours; --own {config.variant} runs it")
    place = folder / "artifacts" / str(done["id"])
    try:
        paths = [_within(folder, place / name) for name in ("tokeniser.json", "weights.safetensors")]
        left = done.get("artifacts", {})  # older records do not certify what lies beside them
        for path in paths:
            if path.name in left and record.digest(path) != left[path.name]:
                raise ValueError(f"{path.name} is not the file that the run left")
        tokeniser = tokens.from_json(json.loads(paths[0].read_text(encoding="utf-8")))
        weights = safetensors.torch.load_file(paths[1])
    except OSError as error:
        raise Refusal(f"{place} lacks what the run left beside its record ({error.strerror}); run it again") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal(f"{place} is damaged: {' '.join(str(error).split())[:100]}; run it again") from error
    shape = done["data"] if isinstance(done.get("data"), dict) else {}
    if not all(isinstance(shape.get(name), int) for name in ("height", "width", "vocab")):
        raise Refusal(f"{path} does not say which shape its images have; run that cell again")
    config = experiment.resolve(config)
    if done.get("code") not in (None, config.code):
        warnings.warn(f"{config.variant} has been changed since {done['id']}, whose weights it is given", stacklevel=2)
    return Trained(done, config, tokeniser, weights)


def _read(path: Path) -> dict[str, Any]:
    """A record; of a file that only a slip of the keyboard can have named, no word that it be deleted."""
    try:
        return record.read(path)
    except record.Corrupt as corrupt:
        if path.suffix == ".json" and path.parent.name == "runs":
            raise
        raise Refusal(f"{path} is no run's record: {corrupt.why}; name a run's record, OUT/runs/ID.json") from corrupt


def _within(folder: Path, path: Path) -> Path:
    """The path of a regular file, if no link leads out of the folder. Raises ValueError, OSError."""
    if not path.resolve(strict=True).is_relative_to(folder) or not path.is_file():
        raise ValueError(f"{path.name} is no file in {folder}")
    return path
