"""Checkpoints: one self-certifying safetensors file each, its SHA-256 in its name. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from attnbench import storage

_NAME = re.compile(r"step-(?P<step>\d{8,})-(?P<digest>[0-9a-f]{16})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to go on: `tensors` on the CPU by name, and `meta`, anything that JSON can hold."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int = 2) -> Path:
    """Write folder/step-<step>-<hash>.safetensors, whole or not at all, then delete all but the last `keep`; the path.

    A file of a later step than this one belongs to a run that was given up, and is deleted too, so that `latest` never
    goes back to it. `meta` comes back exactly, infinities included. Raises Refusal where nothing can be written.
    """
    header = {"meta": json.dumps({"step": step, "meta": meta})}
    data = safetensors.torch.save(_separate(tensors), metadata=header)
    name = f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    path = storage.write_bytes(folder / name, data)
    earlier = [other for other in _files(folder) if _step(other) < step]
    for other in _files(folder):
        if other != path and other not in earlier[: keep - 1]:
            storage.remove(other)
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint, or None; each damaged one is named in a warning and skipped for the next older."""
    for path in _files(folder):
        try:
            return load(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged and skipped: {error}", stacklevel=2)
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint in a file. Raises ValueError unless its bytes are those that its name certifies, OSError."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError("its name is no checkpoint's name")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != match["digest"]:
        raise ValueError("its bytes do not have the hash in its name")
    try:
        header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["meta"])
        step, meta = header["step"], header["meta"]
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not a checkpoint ({str(error)[:80]})") from error
    if step != int(match["step"]):
        raise ValueError(f"it holds step {step}; it was renamed")
    return Checkpoint(step, tensors, meta)


def clear(folder: Path) -> None:
    """Delete every checkpoint of a folder, as before a run that starts anew."""
    for path in _files(folder):
        storage.remove(path)


def _files(folder: Path) -> list[Path]:
    """The regular files with a checkpoint's name, newest step first; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match["step"])


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, which is what the format can hold."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        part = tensor.detach().contiguous()
        address = part.untyped_storage().data_ptr()
        result[name] = part.clone() if address in seen or part.untyped_storage().nbytes() != part.nbytes else part
        seen.add(address)
    return result
