"""PNG files: sheets of images, and figures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

EDGE = 112  # a picture is enlarged to about this many screen pixels
GAP = 8
PAPER = (255, 255, 255)
UNKNOWN = (214, 222, 235)  # what a completion did not see


def sheet(rows: list[Pixels], columns: int = 8) -> bytes:
    """PNG of images uint8 (count, height, width, 1 or 3), enlarged without smoothing.

    Several arrays of equal length are shown under each other, image by image; each band holds `columns` images.
    """
    rows = [_rgb(row) for row in rows]
    count, height, width = rows[0].shape[:3]
    scale = max(1, EDGE // max(height, width))
    columns = min(columns, count)
    bands = -(-count // columns)
    tall, wide = height * scale + GAP, width * scale + GAP
    band = len(rows) * tall + GAP
    paper = np.full((bands * band + GAP, columns * wide + GAP, 3), PAPER, dtype=np.uint8)
    for index in range(count):
        for place, row in enumerate(rows):
            top = GAP + (index // columns) * band + place * tall
            left = GAP + (index % columns) * wide
            paper[top : top + height * scale, left : left + width * scale] = (
                row[index].repeat(scale, 0).repeat(scale, 1)
            )
    return _png(paper)


def completions(truth: Pixels, completed: Pixels, shown: NDArray[np.bool_]) -> bytes:
    """PNG of three rows: what the model was shown (bool (height, width) of each image), what it drew, what was true."""
    given = _rgb(truth).copy()
    given[:, ~shown] = UNKNOWN
    return sheet([given, completed, truth])


def raster(figure: Any, **options: Any) -> bytes:
    """PNG of a figure of matplotlib, saved with these options, in 256 colours, rare ones too: a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, **options)
    return _bytes(Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE))


def _rgb(images: Pixels) -> Pixels:
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


def _png(pixels: Pixels) -> bytes:
    """Exactly these colours (height, width, 3); up to 256 of them by number, which takes a third less."""
    colours, numbers = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    picture = Image.fromarray(pixels)
    if len(colours) <= 256:
        picture = Image.fromarray(numbers.reshape(pixels.shape[:2]).astype(np.uint8), mode="P")
        picture.putpalette(b"".join(int(colour).to_bytes(3, "big") for colour in colours))
    return _bytes(picture)


def _bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
