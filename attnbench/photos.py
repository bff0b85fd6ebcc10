"""Crops of the colour photographs inside scikit-image's and scikit-learn's wheels: pictures without a download.

Every photograph is cut, left to right, into five strips of equal width with a gap between neighbours:

    train | gap | validation | gap | train | gap | test | gap | train

All fields lie wholly within a strip, so fields of different splits never share a pixel, nor (the gap being wider than
a JPEG block) a compression block. Positions follow a sequence without chance, the same on every machine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from attnbench.errors import Refusal

FIELD = 64
"""Height and width, in pixels of the photograph, of what one image shows."""
GAP = 16
"""Columns between two strips: one JPEG block with halved chroma."""
STRIPS = ("train", "validation", "train", "test", "train")
"""The split that each strip serves, left to right."""
COUNTS = {"train": 200, "validation": 25, "test": 50}
"""Fields of each split, per photograph."""
FAINTEST = 8
"""A field whose values span less is blank (the black surround of the retina) and is passed over."""

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
FILES = {
    "astronaut": (*_SKIMAGE, "astronaut.png"),
    "chelsea": (*_SKIMAGE, "chelsea.png"),
    "coffee": (*_SKIMAGE, "coffee.png"),
    "rocket": (*_SKIMAGE, "rocket.jpg"),
    "retina": (*_SKIMAGE, "retina.jpg"),
    "ihc": (*_SKIMAGE, "ihc.png"),
    "hubble_deep_field": (*_SKIMAGE, "hubble_deep_field.jpg"),
    "motorcycle_left": (*_SKIMAGE, "motorcycle_left.png"),
    "china": (*_SKLEARN, "china.jpg"),
    "flower": (*_SKLEARN, "flower.jpg"),
}
"""Photograph -> package, folder and file. A class of `photos` is a photograph."""


class Corner(NamedTuple):
    """Upper left pixel of a FIELD × FIELD field."""

    row: int
    col: int


def strips(width: int) -> list[tuple[str, int, int]]:
    """(split, first column, column after the last) of every strip of a photograph `width` columns wide."""
    wide = (width - GAP * (len(STRIPS) - 1)) // len(STRIPS)
    return [(split, i * (wide + GAP), i * (wide + GAP) + wide) for i, split in enumerate(STRIPS)]


def corners(height: int, width: int, split: str) -> Iterator[Corner]:
    """Endless field positions of one split, in turn over its strips, spread evenly and free of chance.

    The additive recurrence R2 (Roberts, 2018, "The unreasonable effectiveness of quasirandom sequences").
    """
    mine = [(start, stop) for name, start, stop in strips(width) if name == split]
    plastic = 1.32471795724474602596  # the real root of x³ = x + 1
    step = 0
    while True:
        down, along = (0.5 + step / plastic) % 1, (0.5 + step / plastic**2) % 1
        for start, stop in mine:
            yield Corner(int(down * (height - FIELD + 1)), start + int(along * (stop - start - FIELD + 1)))
        step += 1


def cut(photograph: NDArray[np.uint8], split: str, count: int) -> NDArray[np.uint8]:
    """`count` fields (count, FIELD, FIELD, 3) of one split of a photograph (height, width, 3).

    Raises Refusal where too few of them show anything.
    """
    height, width, _ = photograph.shape
    fields = []
    for tried, (row, col) in enumerate(corners(height, width, split)):
        field = photograph[row : row + FIELD, col : col + FIELD]
        if int(field.max()) - int(field.min()) >= FAINTEST:
            fields.append(field)
        if len(fields) == count:
            return np.stack(fields)
        if tried > 20 * count:
            raise Refusal(f"photos: the {split} strips of a photograph are blank; reinstall scikit-image, scikit-learn")
    raise AssertionError("corners never ends")


def photograph(name: str) -> NDArray[np.uint8]:
    """One photograph, uint8 (height, width, 3), read from the wheel's own file: never a download.

    Raises Refusal where the file is not there or does not decode.
    """
    package, folder, file = FILES[name]
    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    places = [Path(place) / folder / file for place in (spec.submodule_search_locations or [])] if spec else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise Refusal(
            f"photos: {file} is not among the installed files of {package}; "
            "reinstall scikit-image and scikit-learn at the versions in constraints.txt"
        )
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(f"photos: {path} does not decode ({reason}); reinstall {package}") from error


def gather() -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """All fields (count, FIELD, FIELD, 3), which photograph each is of (an index into FILES), and its split."""
    pixels, labels, splits = [], [], []
    for label, name in enumerate(FILES):
        whole = photograph(name)
        for split, count in COUNTS.items():
            pixels.append(cut(whole, split, count))
            labels += [label] * count
            splits += [split] * count
    return np.concatenate(pixels), np.array(labels, dtype=np.int64), splits
