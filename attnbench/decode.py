"""Pictures from files and bytes to arrays of one size: opened with care, set upright, resized by area.

Nothing that a broken or hostile file does gets further than a Refusal that names it.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from attnbench.errors import Refusal

Pixels = NDArray[np.uint8]

LARGEST = 4 << 30
"""Bytes of pixels that are held in memory at most."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
GREY = {"1", "L", "LA"}
COLOUR = {"P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class Picture(NamedTuple):
    """A picture file or what stands in one, and how messages call it."""

    name: str
    file: Path | bytes


def decode(pictures: Sequence[Picture], side: int | None) -> tuple[Pixels, list[bytes]]:
    """uint8 (count, height, width, 1 or 3), grey if every picture is grey, else RGB; and their native fingerprints.

    Without a side all pictures must have one size, which is kept; with one, the central square is resized to it.
    Raises Refusal: a picture that does not decode, sizes that do not go together, more than LARGEST bytes.
    """
    headers = [_header(picture) for picture in pictures]
    mode = "L" if all(grey for grey, _, _ in headers) else "RGB"
    _check_sizes(side, pictures, [(height, width) for _, height, width in headers], 1 if mode == "L" else 3)
    images, digests = [], []
    for picture in pictures:
        native = upright(picture, mode)
        digests.append(fingerprint(native))
        images.append(native[None] if side is None else resize(_square(native)[None], side, picture.name))
        if images[-1].shape != images[0].shape:  # the camera was turned: known only now
            raise Refusal(
                f"{picture.name}: stands upright where {pictures[0].name} lies, or the reverse; "
                "bring all to one --data.side"
            )
    return np.concatenate(images), digests


def fingerprint(image: Pixels) -> bytes:
    """sha256 of one native image's shape and pixels."""
    return hashlib.sha256(np.array(image.shape, dtype="<i8").tobytes() + image.tobytes()).digest()


def resize(pixels: Pixels, side: int | None, name: str) -> Pixels:
    """(count, height, width, channels) brought to side × side by area averaging; None leaves the size as it is.

    The average is computed on integers (floats that stay below 2^53), so it is exact and the same on every machine;
    halves round to even. Values stay within the range of the input. Raises Refusal if an image would have to grow.
    """
    height, width = pixels.shape[1:3]
    if side is None or (height, width) == (side, side):
        return pixels
    if side > min(height, width):
        raise Refusal(
            f"{name}: side {side} does not fit images of {height}×{width}; "
            f"choose a side of {min(height, width)} or less"
        )
    down, along = _overlaps(height, side), _overlaps(width, side)
    resized = np.empty((len(pixels), side, side, pixels.shape[3]), dtype=np.uint8)
    chunk = max(1, (1 << 22) // (height * width))  # some tens of megabytes of float64
    for start in range(0, len(pixels), chunk):
        planes = pixels[start : start + chunk].transpose(0, 3, 1, 2).astype(np.float64)
        sums = down @ planes @ along.T
        resized[start : start + chunk] = np.rint(sums / (height * width)).transpose(0, 2, 3, 1)
    return resized


def _overlaps(native: int, side: int) -> NDArray[np.float64]:
    """(side, native): how much of each native pixel each resized one covers, in whole units of 1/side native pixel."""
    out, old = np.arange(side)[:, None] * native, np.arange(native)[None] * side
    return np.clip(np.minimum(out + native, old + side) - np.maximum(out, old), 0, None).astype(np.float64)


def _check_sizes(side: int | None, pictures: Sequence[Picture], sizes: list[tuple[int, int]], channels: int) -> None:
    """Refuses, before anything is decoded, pictures of several sizes without a side, too small for it, or too many."""
    least, smallest = min((min(size), picture.name) for size, picture in zip(sizes, pictures, strict=True))
    odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if side is None and odd is not None:
        (height, width), (other_height, other_width) = sizes[0], sizes[odd]
        raise Refusal(
            f"{pictures[odd].name} is {other_height}×{other_width} but {pictures[0].name} {height}×{width}; "
            f"bring all to one size by --data.side {min(least, 32)}"
        )
    if side is not None and side > least:
        raise Refusal(f"{smallest}: side {side} does not fit, its shorter side is {least}; choose --data.side {least}")
    height, width = (side, side) if side else sizes[0]
    if len(pictures) * height * width * channels > LARGEST:
        raise Refusal(
            f"{len(pictures)} pictures of {height}×{width} fill more than {LARGEST >> 30} GiB; set --data.side"
        )


@contextmanager
def _opened(picture: Picture) -> Iterator[Image.Image]:
    """A picture, opened lazily. Whatever it does wrong while open is a Refusal that names it."""
    file = io.BytesIO(picture.file) if isinstance(picture.file, bytes) else picture.file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except Refusal:
        raise
    except Exception as error:  # broken files raise OSError, SyntaxError, ValueError, IndexError, struct.error, ...
        raise Refusal(f"{picture.name}: does not decode ({brief(error)}); repair or remove it") from error


def _header(picture: Picture) -> tuple[bool, int, int]:
    """Whether a picture is grey, its height and its width before it is set upright; its pixels are not read."""
    with _opened(picture) as image:
        if image.mode not in GREY | COLOUR:
            raise Refusal(f"{picture.name}: mode {image.mode} is not 8 bits a channel; convert or remove it")
        return image.mode in GREY, image.height, image.width


def upright(picture: Picture, mode: str) -> Pixels:
    """One picture, upright, (height, width, 1 or 3) for mode "L" or "RGB"; transparent parts lie on white."""
    with _opened(picture) as image:
        turned = ImageOps.exif_transpose(image)
        if turned.has_transparency_data:
            sheet = Image.new("RGBA", turned.size, "white")
            sheet.alpha_composite(turned.convert("RGBA"))
            turned = sheet
        pixels = np.array(turned.convert(mode))
        return pixels.reshape(*pixels.shape[:2], -1)


def _square(image: Pixels) -> Pixels:
    """The central square of one picture (height, width, channels)."""
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def brief(error: Exception) -> str:
    """An error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
