"""One run = one JSON file, out/runs/<id>.json, with provenance and a checksum; finished ones are never lost.

Example: `write(out, {"id": identify(config), "status": "ok", "metrics": {...}, "environment": environment()})`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attnbench import storage
from attnbench.config import RunConfig
from attnbench.errors import Refusal

ERA = 1
"""Part of every id. Raise it when the meaning of a default changes, so that old records are not taken for new ones."""

LARGEST = 1 << 28
"""Bytes of a record at most; one with a value for each of a million test images is a tenth of it."""

STATUSES = ("ok", "oom", "nan", "timeout", "crash")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_NUMERICAL = ("torch", "numpy", "scipy", "einops", "scikit-learn", "scikit-image", "triton", "xformers", "natten")
_OTHERS = ("attnbench", "pandas", "pydantic", "tyro", "safetensors", "flash-linear-attention", "ray", "submitit")
_PROJECT = Path(__file__).resolve().parent.parent


class Corrupt(Refusal):
    """A record that is not what was written; the message names the file and what is wrong with it."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged: {why}; delete it and run that cell again")
        self.path = path
        self.why = why


def identify(config: RunConfig) -> str:
    """The run's id, for example local2d-digits-s0-3f2a9c01de: a hash of every setting that is not at its default, and
    of the code of an attention that is not of the catalogue.

    Settings at their default are left out, so that a new setting does not rename the records that never knew it.
    """
    name = config.data.name
    told = config.identity(exclude_defaults=True)
    told |= {"variant": config.variant, "seed": config.seed, "data": told.get("data", {}) | {"name": name}}
    if config.code is not None:
        told["code"] = config.code
    if name.startswith("folder:"):  # the hash has the whole path; the name is for people
        name = f"folder-{Path(name).name}"
    digest = hashlib.sha256(canonical({"era": ERA, **told})).hexdigest()[:10]
    return f"{_slug(config.variant)}-{_slug(name)}-s{config.seed}-{digest}"


def canonical(value: object) -> bytes:
    """The JSON whose SHA-256 counts: sorted keys, no spaces, ASCII. Raises ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.  Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: Path, record: dict[str, Any], replace: bool = False, room: str = "runs") -> Path:
    """Write `record` (with `id` and `status`) as folder/<room>/<id>.json, adding its `sha256`; the path.

    What stood there is first kept as folder/runs/superseded/<id>.<n>.json. A finished ("ok") one is superseded only
    with `replace`. Raises Refusal otherwise, and where nothing can be written.
    """
    path = _path(folder, str(record["id"]), room)
    if record["status"] not in STATUSES:
        raise ValueError(f"status {record['status']!r} is none of {', '.join(STATUSES)}")
    content = plain({key: value for key, value in record.items() if key != "sha256"})
    data = _serialise(content | {"sha256": _checksum(content)})
    if storage.create_exclusive(path, data):
        return path
    if not replace and find(folder, content["id"], "ok", warn=False, room=room) is not None:
        raise Refusal(f"{path} is finished already; --force runs it again and keeps the old record aside")
    _keep_aside(path)
    return storage.write_bytes(path, data)


def read(path: Path) -> dict[str, Any]:
    """The record in a file, every byte of it verified. Raises Corrupt, which names the file and what is wrong."""
    try:
        if not path.is_file() and path.exists():  # reading a pipe or a device would never end
            raise Corrupt(path, "it is no regular file")
        if path.stat().st_size > LARGEST:
            raise Corrupt(path, f"it is larger than {LARGEST >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise Corrupt(path, f"it cannot be read ({error.strerror})") from error
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(path, f"it is not JSON ({str(error)[:80]})") from error
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise Corrupt(path, "it has no id")
    checksum = _checksum({key: value for key, value in record.items() if key != "sha256"})
    if checksum is None or record.get("sha256") != checksum:
        raise Corrupt(path, "its content is not what its sha256 says")
    if data != _serialise(record):  # 1e-05 for 1E-05 or a lost line end: the values stand, but nobody meant to write it
        raise Corrupt(path, "its bytes are not those that were written")
    if path.name.split(".")[0] != record["id"]:
        raise Corrupt(path, f"it holds {record['id']!r}, which belongs in another file")
    return record


def find(
    folder: Path, id: str, status: str | None = None, warn: bool = True, room: str = "runs"
) -> dict[str, Any] | None:
    """The record of that id (and that status, if given), or None; a damaged one is named in a warning and is None."""
    path = _path(folder, id, room)
    if not path.exists():
        return None
    try:
        record = read(path)
    except Corrupt as corrupt:
        if warn:
            warnings.warn(str(corrupt), stacklevel=2)
        return None
    return record if status is None or record.get("status") == status else None


def read_all(folder: Path, room: str = "runs") -> tuple[list[dict[str, Any]], list[str]]:
    """Every sound record of folder/<room> in the order of their ids, and a line for every damaged one."""
    records, problems = [], []
    for path in sorted((folder / room).glob("*.json")):
        if path.name.startswith("."):
            continue
        try:
            records.append(read(path))
        except Corrupt as corrupt:
            problems.append(str(corrupt))
    return records, problems


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and arrays as lists, paths as text, NaN and infinity as null.

    Raises TypeError for what is none of these.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return plain(value.tolist())
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    raise TypeError(f"a record cannot hold a {type(value).__name__}")


def environment() -> dict[str, Any]:
    """Where and with what the run is made: versions, CPU and GPU, threads, commit, command line, time (UTC)."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit, dirty = _checkout(_PROJECT)
    return {
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "commit": commit,
        "dirty": dirty,
        "command": _command(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _path(folder: Path, id: str, room: str) -> Path:
    """Where a record stands; an id comes from files too, and must not lead out of the folder."""
    if _ID.fullmatch(id) is None:
        raise Refusal(f"{id!r} is no record's id; an id has letters, digits, '-' and '_' only")
    return folder / room / f"{id}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-_")[:40] or "unnamed"


def _checksum(content: dict[str, Any]) -> str | None:
    try:
        return hashlib.sha256(canonical(content)).hexdigest()
    except (ValueError, RecursionError):  # NaN, which Python reads from a file and JSON does not have
        return None


def _serialise(record: dict[str, Any]) -> bytes:
    """A line a key: readable, and a list of ten thousand numbers is still one line."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _keep_aside(path: Path) -> None:
    """Keep a record's bytes, as they are, under the first free number."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    aside = path.parent / "superseded"
    number = 1
    while not storage.create_exclusive(aside / f"{path.stem}.{number}.json", data):
        number += 1


def _versions() -> dict[str, str]:
    """Versions of the packages that could change a number, of those that are installed."""
    found = {}
    for package in (*_NUMERICAL, *_OTHERS):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `root`, and whether its code differs from it; (None, None) where it is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None  # installed into somebody else's repository
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "attnbench", "models"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _command() -> str:
    """The command line as a person types it, without what absolute paths tell of the person's machine."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    shortened = [re.sub(r"(^|[=:])/(?:[^/]*/)*", r"\1", argument) for argument in sys.argv[1:]]
    return shlex.join([*program, *shortened])
