"""Images and their fixed splits: by name (digits, photos, fashion-mnist) or by scheme (folder:PATH, hub:OWNER/NAME,
source:NAME).

A split is a function of an image's own pixels (a hash), never of a random state, so the same picture always falls on
the same side and two copies of it never straddle a boundary. Sizes are brought to `--data.side` by exact area
averaging, which is what the down-sampling of C1 means. Only hub: fetches, and writes to the hub's own cache alone.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attnbench import hub, photos
from attnbench.config import DataConfig
from attnbench.decode import LARGEST, Picture, Pixels, brief, decode, fingerprint, resize
from attnbench.errors import Refusal, nearest
from attnbench.source import Source
from attnbench.sources import build_source

Labels = NDArray[np.int64]

SPLITS = ("train", "validation", "test")
PHOTOS_SIDE = 32
"""Side of `photos` when none is asked for."""


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures and their classes: pixels uint8 (count, height, width, channels 1 or 3), labels int64 (count,)."""

    pixels: Pixels
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of one kind of image.

    levels: number of values a channel can take, 0..levels-1. checksum: sha256 (hex) over every native image's pixels,
    label and split, in order; it does not depend on the side that the images were resized to. source: what drew the
    images, if their exact likelihood is known; then all have one class, and a pixel's value is its colour. revision:
    the commit of a repository that the images were read from.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    levels: int
    checksum: str
    source: Source | None = None
    revision: str | None = None


def load(config: DataConfig) -> Dataset:
    """The data set that `config.name` names, at `config.side`.

    Raises Refusal: an unknown name, a side that does not fit, files that are missing or do not decode, an empty split.
    """
    if config.side is not None and config.side < 1:
        raise Refusal(f"side {config.side} does not fit; choose --data.side 1 or more")
    scheme, colon, rest = config.name.partition(":")
    if scheme != "source" and (told := [name for name in OF_SOURCES if getattr(config, name) not in (None, {})]):
        raise Refusal(f"--data.{told[0]} is for source:NAME, not for {config.name}; leave it out")
    if scheme != "hub" and config.revision is not None:
        raise Refusal(f"--data.revision is for hub:OWNER/NAME, not for {config.name}; leave it out")
    if colon and scheme in SCHEMES:
        return SCHEMES[scheme](config, rest)
    if config.name in NAMED:
        return NAMED[config.name](config)
    known = [*NAMED, *(f"{scheme}:..." for scheme in SCHEMES)]
    raise Refusal(f"unknown data {config.name!r}; {nearest((f'{scheme}:...' if colon else scheme).lower(), known)}")


def pictures(dataset: Dataset) -> dict[str, int]:
    """channels and classes, what a supervised model wants to know of its images."""
    return {"channels": dataset.train.pixels.shape[-1], "classes": max(2, len(dataset.classes))}


# --- from native images to a data set ---------------------------------------------------------------------------------


def split_of(digest: bytes, validation: float, test: float) -> str:
    """The split of an image by its fingerprint, which is as good as uniform: the given shares, the rest is train."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def _assemble(
    name: str,
    pixels: Pixels,
    labels: Labels,
    splits: Sequence[str],
    digests: Sequence[bytes],
    classes: Sequence[str],
    levels: int = 256,
) -> Dataset:
    """A data set of images in their final size; `digests` are the fingerprints of the native ones.

    A split is in the order of its digests: a fixed shuffle, so that its first images are a fair sample of its classes.
    """
    checksum = hashlib.sha256()
    for digest, label, split in zip(digests, labels, splits, strict=True):
        checksum.update(digest + int(label).to_bytes(8, "little") + split.encode())
    parts = {}
    shuffled = sorted(range(len(digests)), key=digests.__getitem__)
    for split in SPLITS:
        chosen = [index for index in shuffled if splits[index] == split]
        if not chosen:
            raise Refusal(
                f"{name}: {len(digests)} images ({len(set(digests))} different) leave the {split} split empty; "
                "add more pictures, 50 or more as a rule"
            )
        parts[split] = Images(pixels[chosen], labels[chosen])
    train, validation, test = (parts[split] for split in SPLITS)
    return Dataset(name, train, validation, test, tuple(classes), levels, checksum.hexdigest())


# --- digits and photos: shipped within wheels -------------------------------------------------------------------------


def _digits(config: DataConfig) -> Dataset:
    """1,797 grey 8×8 digits of 17 levels (Alpaydin and Kaynak, 1998; scikit-learn): 70 / 10 / 20 % by hash."""
    from sklearn.datasets import load_digits  # takes a second to import, and other data do without

    bunch = load_digits()
    pixels = bunch.images.astype(np.uint8)[..., None]
    digests = [fingerprint(image) for image in pixels]
    splits = [split_of(digest, validation=0.1, test=0.2) for digest in digests]
    small = resize(pixels, config.side, "digits")
    return _assemble("digits", small, bunch.target.astype(np.int64), splits, digests, "0123456789", levels=17)


def _photos(config: DataConfig) -> Dataset:
    """RGB fields of ten photographs, one class each; the splits come from regions of a photograph that do not touch."""
    pixels, labels, splits = photos.gather()
    digests = [fingerprint(image) for image in pixels]
    small = resize(pixels, config.side or PHOTOS_SIDE, "photos")
    return _assemble("photos", small, labels, splits, digests, list(photos.FILES))


# --- fashion-mnist: IDX files -----------------------------------------------------------------------------------------

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist installs its files."""
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IDX_LIMIT = 1 << 28
"""Bytes that an IDX file may unpack to: five times Fashion-MNIST, and no bomb."""


def read_idx(path: Path, dims: int) -> Pixels:
    """A gzip IDX file of unsigned bytes with `dims` dimensions (the format of LeCun's MNIST page, 1998).

    Raises Refusal if the file is not exactly as long as its header says, or is no such file.
    """
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
                raise Refusal(f"{path}: not an IDX file of bytes with {dims} dimensions; fetch it again")
            shape = [int(size) for size in np.frombuffer(header, dtype=">u4", offset=4)]
            expected = math.prod(shape)
            if not 0 < expected <= IDX_LIMIT:
                raise Refusal(f"{path}: header says {shape}, beyond 1 to {IDX_LIMIT} bytes; fetch it again")
            body = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(f"{path}: does not unpack ({brief(error)}); fetch it again") from error
    if len(body) != expected:
        raise Refusal(f"{path}: {'more' if len(body) > expected else 'less'} data than its header says; fetch it again")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _fashion(config: DataConfig) -> Dataset:
    """70,000 grey 28×28 pieces of clothing (Xiao et al., 2017): the official test, a tenth of train to validation."""
    folder = (config.root or FASHION_FOLDER).expanduser()
    (train, train_labels), (test, test_labels) = (_idx_pair(folder, part) for part in ("train", "t10k"))
    if train.shape[1:] != test.shape[1:]:
        raise Refusal(f"{folder}: train images are {train.shape[1:3]}, test images {test.shape[1:3]}; fetch them again")
    pixels = np.concatenate([train, test])
    digests = [fingerprint(image) for image in pixels]
    splits = [split_of(digest, validation=0.1, test=0.0) for digest in digests[: len(train)]] + ["test"] * len(test)
    small = resize(pixels, config.side, "fashion-mnist")
    labels = np.concatenate([train_labels, test_labels])
    return _assemble("fashion-mnist", small, labels, splits, digests, FASHION_CLASSES)


def _idx_pair(folder: Path, part: str) -> tuple[Pixels, Labels]:
    """Images (count, height, width, 1) and labels (count,) of one half of the files."""
    paths = [folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"]
    for path in paths:
        if not path.is_file():
            raise Refusal(
                f"fashion-mnist: no {path.name} in {folder}; install Debian's package dataset-fashion-mnist, "
                "or name a folder with its four gzip IDX files by --data.root"
            )
    pixels, labels = read_idx(paths[0], dims=3), read_idx(paths[1], dims=1)
    if len(pixels) != len(labels):
        raise Refusal(f"{paths[1]}: {len(labels)} labels for {len(pixels)} images; fetch both files again")
    if labels.max() >= len(FASHION_CLASSES):
        raise Refusal(f"{paths[1]}: label {labels.max()}, but the classes are 0 to 9; fetch it again")
    return pixels[..., None], labels.astype(np.int64)


# --- folder:PATH, one sub-folder a class ------------------------------------------------------------------------------

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def _folder(config: DataConfig, place: str) -> Dataset:
    """Pictures of one's own, one sub-folder a class: 80 / 10 / 10 % by hash; grey if every picture is grey, else RGB.

    Without a side all pictures must have one size, which is kept; with one, the central square is resized to it.
    """
    files = _pictures(place)
    pixels, digests = decode([Picture(str(path), path) for path in files], config.side)
    classes = sorted({path.parent.name for path in files})
    labels = np.array([classes.index(path.parent.name) for path in files], dtype=np.int64)
    splits = [split_of(digest, validation=0.1, test=0.1) for digest in digests]
    return _assemble(f"folder:{place}", pixels, labels, splits, digests, classes)


def _pictures(place: str) -> list[Path]:
    """The picture files in the sub-folders of `place`, in a fixed order."""
    root = Path(place).expanduser()
    if not place or not root.is_dir():
        raise Refusal(f"folder:{place}: no such folder; name one that holds a sub-folder of pictures for each class")
    try:
        classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        files = [path for folder in classes for path in sorted(folder.iterdir())]
    except OSError as error:
        raise Refusal(f"folder:{place}: cannot be listed ({brief(error)}); make it readable") from error
    files = [path for path in files if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise Refusal(f"folder:{place}: no pictures in its sub-folders; put each class's PNG or JPEG files into one")
    return files


# --- hub:OWNER/NAME, with the library datasets ------------------------------------------------------------------------


def _hub(config: DataConfig, name: str) -> Dataset:
    """A data set of the hub. Its own test and validation splits are kept; one that it lacks is a tenth of train, by
    hash."""
    found = hub.read(name, config.root, config.revision)
    own = [split for split in SPLITS if split in found.parts]
    pixels, digests = decode([picture for split in own for picture in found.parts[split].pictures], config.side)
    labels = np.concatenate([found.parts[split].labels for split in own])
    held = {split: 0.0 if split in own else 0.1 for split in ("validation", "test")}
    training = len(found.parts["train"].pictures)
    splits = [split_of(digest, **held) for digest in digests[:training]]
    splits += [split for split in own[1:] for _ in found.parts[split].pictures]
    assembled = _assemble(f"hub:{name}", pixels, labels, splits, digests, found.classes)
    return replace(assembled, revision=found.revision)


# --- source:NAME, drawn here ------------------------------------------------------------------------------------------

OF_SOURCES = ("height", "width", "levels", "count", "options")
"""Settings that only sources have."""
SOURCE_SIDE, SOURCE_LEVELS, SOURCE_COUNT = 8, 4, 10_000


def _source(config: DataConfig, name: str) -> Dataset:
    """Images of exactly known likelihood: `count` to train on and a fifth each to validate and to test, all alike."""
    if config.tokens not in ("auto", "levels"):
        raise Refusal(f"source:{name}: its likelihood is that of its own colours; leave --data.tokens at auto")
    side, levels = config.side or SOURCE_SIDE, config.levels or SOURCE_LEVELS
    if not 2 <= levels <= 256:
        raise Refusal(f"source:{name}: {levels} colours, but a source has 2 to 256; choose --data.levels within")
    source = build_source(
        name, height=config.height or side, width=config.width or side, colours=levels, **config.options
    )
    count = config.count or SOURCE_COUNT
    counts = (count, max(1, count // 5), max(1, count // 5))
    if sum(counts) * source.size > LARGEST:
        raise Refusal(f"source:{name}: {count} images fill more than {LARGEST >> 30} GiB; choose a lower --data.count")
    parts: dict[str, Images] = {}
    checksum = hashlib.sha256(repr(source).encode())
    for seed, (split, images) in enumerate(zip(SPLITS, counts, strict=True)):
        pixels = source.sample(images, seed).astype(np.uint8)[..., None]
        checksum.update(split.encode() + pixels.tobytes())
        parts[split] = Images(pixels, np.zeros(images, dtype=np.int64))
    return Dataset(
        f"source:{name}",
        parts["train"],
        parts["validation"],
        parts["test"],
        classes=(name,),
        levels=levels,
        checksum=checksum.hexdigest(),
        source=source,
    )


# --- names and schemes ------------------------------------------------------------------------------------------------

NAMED: dict[str, Callable[[DataConfig], Dataset]] = {
    "digits": _digits,
    "photos": _photos,
    "fashion-mnist": _fashion,
}
"""Data by name."""
SCHEMES: dict[str, Callable[[DataConfig, str], Dataset]] = {"folder": _folder, "hub": _hub, "source": _source}
"""Data as scheme:rest; a loader is given the settings and the rest."""
