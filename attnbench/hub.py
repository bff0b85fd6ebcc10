"""Image data sets of the Hugging Face hub, or a local copy of one's repository, by the library `datasets` (extra hub).

The library is imported only here and only when such data is asked for. No code of a data set is run: of what the
library reads, parquet, Arrow and folders of pictures are let in. Whether the hub can be reached is asked first, with
one connection and a short patience, for the library itself retries for 23 s before it gives up.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from attnbench.decode import Picture, brief
from attnbench.errors import Refusal

Labels = NDArray[np.int64]

READERS = ("parquet", "arrow", "imagefolder")
"""Those of the library's readers that may open a data set."""
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Ours, and what data sets call them."""
PATIENCE = 0.7
"""Seconds until the hub counts as out of reach."""
ANSWER = 20.0
"""Seconds that the hub may take to name a commit."""
FIND = "choose another at https://huggingface.co/datasets"


@dataclass(frozen=True)
class Part:
    """A split as the data set has it: pictures, read from its files one by one, and labels int64 (count,)."""

    pictures: Sequence[Picture]
    labels: Labels


@dataclass(frozen=True)
class Repository:
    """What was read: "train" and, where there are such, "validation" and "test"; the commit, where it is known."""

    parts: dict[str, Part]
    classes: tuple[str, ...]
    revision: str | None


class _Rows(Sequence[Picture]):
    """The pictures of a split, which stay in their files until they are asked for."""

    def __init__(self, split: Any, column: str, where: str) -> None:
        self._split, self._column, self._where = split, column, where
        # A row of a table may name any file of this machine: only a folder's own pictures are opened by their path.
        self._has_files = split.info.builder_name == "imagefolder"

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: Any) -> Any:
        found, name = self._split[index][self._column], f"{self._where}[{index}]"
        if found and found["bytes"] is not None:
            return Picture(name, found["bytes"])
        if found and found["path"] and self._has_files:
            return Picture(name, Path(found["path"]))
        raise Refusal(f"{name}: there is no picture; choose a data set without gaps")

    def __iter__(self) -> Iterator[Picture]:
        return (self[index] for index in range(len(self)))


def read(name: str, root: Path | None = None, revision: str | None = None) -> Repository:
    """The data set OWNER/NAME at a commit, tag or branch; root: a local copy of its repository, read in its place.

    Raises Refusal: a name that is none or that the hub does not know, the hub out of reach, a data set without pictures
    or without a train split, pictures without a class.
    """
    _check_name(name)
    if root is None:
        if Path(name).exists():  # which the library would take for it
            raise Refusal(f"hub:{name}: a folder of that name stands here; start elsewhere, or name it by --data.root")
        check_reachable(name)
        library = _library(name)
        revision = _commit(name, revision)
        found = _splits(library, name, name, revision)
    else:
        place = root.expanduser().resolve()
        if not place.is_dir():
            raise Refusal(f"hub:{name}: no folder {root}; name a local copy of its repository by --data.root")
        library = _library(name)
        found = _splits(library, name, str(place), None)
    own = {ours: found[theirs[0]] for ours, names in SPLITS.items() if (theirs := [n for n in names if n in found])}
    if "train" not in own:
        raise Refusal(f"hub:{name} has no split train, only {', '.join(found)}; choose a data set that has one")
    column = _picture_column(library, name, own["train"].features)
    labels, classes = _labels(library, name, own)
    parts = {}
    for ours, split in own.items():
        rows = split.select_columns([column]).cast_column(column, library.Image(decode=False))
        parts[ours] = Part(_Rows(rows, column, f"hub:{name} {ours}"), labels[ours])
    return Repository(parts, classes, revision)


def _check_name(name: str) -> None:
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise Refusal(f"hub:{name}: data sets of the hub are named OWNER/NAME, such as hub:uoft-cs/cifar10")


def check_reachable(name: str) -> None:
    """Raises Refusal, within PATIENCE, where the hub does not answer or may not be asked; for a name that is none."""
    _check_name(name)
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    told = {os.environ.get(variable, "").upper() for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
    if told & {"1", "ON", "YES", "TRUE"}:
        why = "HF_HUB_OFFLINE forbids to ask the hub"
    elif _answers(endpoint.scheme, endpoint.hostname or "", endpoint.port):
        return
    else:
        why = f"{endpoint.hostname} cannot be reached from here"
    raise Refusal(
        f"hub:{name}: {why}; where it can, `hf download {name} --repo-type dataset --local-dir FOLDER`, "
        "and give that folder by --data.root"
    )


def _answers(scheme: str, host: str, port: int | None) -> bool:
    """Whether something takes a connection there, or at the proxy on the way."""
    proxy = urllib.request.getproxies().get(scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        way = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        scheme, host, port = way.scheme, way.hostname or "", way.port
    taken = threading.Event()

    def knock() -> None:
        with suppress(OSError), socket.create_connection((host, port or (443 if scheme == "https" else 80)), PATIENCE):
            taken.set()

    # A thread, for looking up a name has no time limit of its own.
    knocking = threading.Thread(target=knock, daemon=True)
    knocking.start()
    knocking.join(PATIENCE)
    return taken.is_set()


def _library(name: str) -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise Refusal(f"hub:{name} needs the library datasets; pip install datasets (attnbench's extra hub)") from error


def _commit(name: str, revision: str | None) -> str:
    """The commit that a revision, or the newest, is at now."""
    api = import_module("huggingface_hub")
    try:
        commit = str(api.HfApi().dataset_info(name, revision=revision, timeout=ANSWER).sha)
    except api.errors.RevisionNotFoundError as error:
        raise Refusal(f"hub:{name} has no commit, tag or branch {revision!r}; leave --data.revision out") from error
    except api.errors.RepositoryNotFoundError as error:
        raise Refusal(f"hub:{name}: the hub knows no such data set, or shows it to its members only; {FIND}") from error
    except Exception as error:  # of the library, of the one below it, and of the network
        raise Refusal(f"hub:{name}: the hub does not tell its commit ({brief(error)[:200]}); try again") from error
    if revision != commit:
        warnings.warn(f"hub:{name} is read at commit {commit}; --data.revision {commit} pins it", stacklevel=2)
    return commit


def _splits(library: Any, name: str, place: str, revision: str | None) -> dict[str, Any]:
    """The splits as the library's tables, by the data set's own names."""
    library.disable_progress_bars()  # those of making tables; the hub's own, of fetching, stay
    try:
        builder = library.load_dataset_builder(place, revision=revision)
        reader = type(builder).__module__.rpartition(".")[2]
        if reader in READERS:
            builder.download_and_prepare()
            return dict(builder.as_dataset())
    except Exception as error:  # broken files raise whatever the library or pyarrow has
        raise Refusal(f"hub:{name} cannot be read ({brief(error)[:200]}); {FIND}") from error
    raise Refusal(f"hub:{name} is kept as {reader}, and only {', '.join(READERS)} are read; {FIND}")


def _picture_column(library: Any, name: str, features: Any) -> str:
    """The first column of pictures; parquet that says nothing of its columns has them as bytes and path."""
    for column, kind in features.items():
        if isinstance(kind, library.Image) or (isinstance(kind, dict) and set(kind) == {"bytes", "path"}):
            return str(column)
    raise Refusal(f"hub:{name} has no pictures, only {', '.join(features)}; choose an image data set")


def _labels(library: Any, name: str, splits: dict[str, Any]) -> tuple[dict[str, Labels], tuple[str, ...]]:
    """Labels by split and the classes: the column `label`, or the first that names its classes, or none at all."""
    features = splits["train"].features
    named = [column for column, kind in features.items() if isinstance(kind, library.ClassLabel)]
    column = "label" if "label" in features else named[0] if named else None
    if column is None:
        return {ours: np.zeros(len(split), dtype=np.int64) for ours, split in splits.items()}, ("all",)
    told = {ours: split.select_columns([column])[:][column] for ours, split in splits.items()}
    if column in named:
        classes = [str(word) for word in features[column].names]
        place: dict[str | int, int] = {index: index for index in range(len(classes))}
    else:
        met = sorted({label for labels in told.values() for label in labels if isinstance(label, str | int)})
        classes, place = [str(label) for label in met], {label: index for index, label in enumerate(met)}
    for ours, labels in told.items():
        odd = next((n for n, label in enumerate(labels) if label not in place), None)
        if odd is not None:
            raise Refusal(f"hub:{name} {ours}[{odd}]: {labels[odd]!r} is none of its {len(classes)} classes; {FIND}")
    placed = {ours: np.array([place[label] for label in labels], dtype=np.int64) for ours, labels in told.items()}
    return placed, tuple(classes)
