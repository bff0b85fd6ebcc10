"""Images to tokens and back: `levels` (exact grey values), `palette` (the nearest of k colours, as iGPT) and `subpixel`
(raw R, G and B, one token each).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnbench import residual
from attnbench.config import DataConfig
from attnbench.data import Dataset
from attnbench.errors import Refusal
from attnbench.residual import Residual

Pixels = NDArray[np.uint8]
Tokens = NDArray[np.int64]
Colours = NDArray[np.float64]

FIT_PIXELS = 50_000
"""Training pixels that a palette is fitted on."""
SEED = 0
"""Of k-means: a palette depends on the training images and on nothing else."""


class Tokeniser(Protocol):
    """What cuts images into tokens 0..vocab-1, `tokens_per_pixel` to a pixel, side by side in its row."""

    @property
    def kind(self) -> str:
        """Its name in `--data.tokens`."""
        ...

    @property
    def vocab(self) -> int:
        """How many different tokens there are."""
        ...

    @property
    def tokens_per_pixel(self) -> int:
        """Columns of tokens to a column of pixels."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether the tokens determine the image."""
        ...

    def encode(self, pixels: Pixels) -> Tokens:
        """uint8 (count, height, width, channels) -> int64 (count, height, width · tokens_per_pixel)."""
        ...

    def decode(self, tokens: Tokens) -> Pixels:
        """The other way, to uint8 in 0..255, for the eye."""
        ...

    def residual_bits(self, pixels: Pixels) -> float | None:
        """Bits per channel value that the tokens of these images leave open, on average; None where it is not known."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All that `from_json` needs to build it again."""
        ...


def fit(dataset: Dataset, config: DataConfig) -> Tokeniser:
    """The tokeniser that `config.tokens` asks for; auto is levels for grey images, else palette.

    Raises Refusal: levels of RGB images, subpixel of grey ones; a palette larger than the colours there are.
    """
    channels = dataset.train.pixels.shape[-1]
    kind = config.tokens if config.tokens != "auto" else ("levels" if channels == 1 else "palette")
    if kind == "palette":
        palette = fit_palette(dataset.train.pixels, config.colours, dataset.levels)
        return with_residual(palette, dataset.train.pixels)
    if kind == "subpixel":
        if channels != 3:
            raise Refusal(
                f"subpixel cuts a pixel into R, G and B and {dataset.name} is grey, one value a pixel; "
                "choose --data.tokens levels, which is lossless too"
            )
        return SubPixels(dataset.levels)
    if channels != 1:
        raise Refusal(
            f"levels needs grey images and {dataset.name} has RGB ones; choose --data.tokens palette or subpixel"
        )
    return Levels(dataset.levels)


@dataclass(frozen=True)
class Levels:
    """A grey value is its own token; lossless."""

    vocab: int
    kind: str = "levels"
    tokens_per_pixel: int = 1
    lossless: bool = True

    def encode(self, pixels: Pixels) -> Tokens:
        """Raises ValueError for RGB images and for values beyond the levels."""
        _check_channels(pixels, 1)
        if pixels.size and pixels.max() >= self.vocab:
            raise ValueError(f"value {pixels.max()} in images of {self.vocab} levels")
        return pixels[..., 0].astype(np.int64)

    def decode(self, tokens: Tokens) -> Pixels:
        return np.rint(tokens[..., None] * (255 / max(self.vocab - 1, 1))).astype(np.uint8)

    def residual_bits(self, pixels: Pixels) -> float:
        return 0.0

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab": self.vocab}


@dataclass(frozen=True)
class SubPixels:
    """R, G and B of a pixel are three tokens on the grid height × 3·width, as in PixelRNN (van den Oord et al., 2016);
    lossless, so bits per token are the published bits per dim. A window's radius counts sub-pixels along a row.
    """

    vocab: int = 256
    kind: str = "subpixel"
    tokens_per_pixel: int = 3
    lossless: bool = True

    def encode(self, pixels: Pixels) -> Tokens:
        """Raises ValueError for grey images and for values beyond the levels."""
        _check_channels(pixels, 3)
        if pixels.size and pixels.max() >= self.vocab:
            raise ValueError(f"value {pixels.max()} in images of {self.vocab} levels")
        return pixels.reshape(*pixels.shape[:2], -1).astype(np.int64)

    def decode(self, tokens: Tokens) -> Pixels:
        values = tokens.reshape(*tokens.shape[:2], -1, 3)
        return np.rint(values * (255 / max(self.vocab - 1, 1))).astype(np.uint8)

    def residual_bits(self, pixels: Pixels) -> float:
        return 0.0

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab": self.vocab}


@dataclass(frozen=True, eq=False)
class Palette:
    """A pixel's token is its nearest centre by squared distance, the first of equals (Chen et al., 2020, §3.2).

    centres: float64 (vocab, channels), channel values of 0..levels-1 scaled to [-1, 1]; residual: how the true colours
    of a token are distributed, where that was fitted.
    """

    centres: Colours
    levels: int = 256
    residual: Residual | None = None
    kind: str = "palette"
    tokens_per_pixel: int = 1
    lossless: bool = False

    @property
    def vocab(self) -> int:
        return len(self.centres)

    def encode(self, pixels: Pixels) -> Tokens:
        """Raises ValueError if the images have another number of channels than the palette."""
        _check_channels(pixels, self.centres.shape[1])
        if pixels.shape[-1] == 1:  # so few values that a table of them all is fastest
            values = np.arange(256, dtype=np.uint8)[:, None]
            return nearest(_scale(values, self.levels), self.centres)[pixels[..., 0]]
        tokens = np.empty(pixels.shape[:-1], dtype=np.int64)
        images = max(1, (1 << 22) // max(1, pixels[0].size)) if len(pixels) else 1
        for start in range(0, len(pixels), images):
            part = pixels[start : start + images]
            codes, where = np.unique(_codes(part), return_inverse=True)  # far fewer colours than pixels
            found = nearest(_scale(_colours(codes, 3), self.levels), self.centres)
            tokens[start : start + images] = found[where].reshape(part.shape[:-1])
        return tokens

    def decode(self, tokens: Tokens) -> Pixels:
        shades = np.rint((self.centres + 1) * 127.5).clip(0, 255).astype(np.uint8)
        return shades[tokens]

    def residual_bits(self, pixels: Pixels) -> float | None:
        return None if self.residual is None else self.residual.bits(pixels, self.encode(pixels)).sum() / pixels.size

    def to_json(self) -> dict[str, Any]:
        saved = {"kind": self.kind, "vocab": self.vocab, "levels": self.levels, "centres": self.centres.tolist()}
        return saved if self.residual is None else saved | {"residual": self.residual.to_json()}


def from_json(saved: dict[str, Any]) -> Tokeniser:
    """The tokeniser whose `to_json` this is. Raises ValueError or KeyError if it is no such thing."""
    if saved.get("kind") == "levels":
        return Levels(int(saved["vocab"]))
    if saved.get("kind") == "subpixel":
        return SubPixels(int(saved["vocab"]))
    if saved.get("kind") == "palette":
        centres, levels = np.array(saved["centres"], dtype=np.float64), int(saved["levels"])
        found = residual.from_json(saved["residual"], levels) if "residual" in saved else None  # older palettes lack it
        if found is not None and found.counts.shape != (centres.shape[1], len(centres), levels):
            raise ValueError(f"a residual of shape {found.counts.shape} for {len(centres)} colours")
        return Palette(centres, levels, found)
    raise ValueError(f"no tokeniser is of kind {saved.get('kind')!r}")


def with_residual(palette: Palette, pixels: Pixels) -> Palette:
    """The palette with the distribution of these training images' true colours."""
    found = residual.fit(pixels, palette.encode(pixels), palette.vocab, palette.levels)
    return replace(palette, residual=found)


def fit_palette(pixels: Pixels, colours: int, levels: int = 256) -> Palette:
    """k-means (Lloyd, 1982) of `colours` centres on training pixels (count, height, width, channels), dark to light.

    Raises Refusal if there are fewer different colours than centres.
    """
    points, weights = _sample(pixels, colours)
    centres = _kmeans(_scale(points, levels), weights, colours)
    centres = _fill(np.round(centres, 6), _scale(points, levels))  # rounded, so that a saved palette reads well
    order = np.lexsort((*centres.T, centres.sum(axis=1)))
    return Palette(centres[order], levels)


def nearest(points: Colours, centres: Colours, chunk: int = 1 << 22) -> Tokens:
    """Index (count,) of the centre (k, channels) at the least squared distance from each point (count, channels).

    At most `chunk` distances are held at once.
    """
    chosen = np.empty(len(points), dtype=np.int64)
    rows = max(1, chunk // len(centres))
    squares = (centres**2).sum(axis=1)
    for start in range(0, len(points), rows):
        part = points[start : start + rows]
        chosen[start : start + rows] = (squares - 2 * part @ centres.T).argmin(axis=1)  # |point|² is common to all
    return chosen


def _sample(pixels: Pixels, colours: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Different colours (n ≥ colours, channels) of evenly spaced pixels, and how often each was met."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    spaced = np.linspace(0, len(flat) - 1, min(len(flat), FIT_PIXELS)).astype(np.int64)
    codes, weights = np.unique(_codes(flat[spaced]), return_counts=True)
    if len(codes) < colours:
        codes, weights = np.unique(_codes(flat), return_counts=True)
    if len(codes) < colours:
        raise Refusal(
            f"a palette of {colours} is larger than the {len(codes)} different colours of the training images; "
            f"choose --data.colours {len(codes)} or less"
        )
    return _colours(codes, flat.shape[-1]), weights


def _kmeans(points: Colours, weights: NDArray[np.int64], colours: int) -> Colours:
    from sklearn.cluster import KMeans  # both take long to import, and levels do without
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn depends on it

    with threadpool_limits(1):  # threads would add up in another order each time, and a resumed run must be exact
        means = KMeans(colours, n_init=1, max_iter=50, random_state=SEED).fit(points, sample_weight=weights)
    return np.asarray(means.cluster_centers_, dtype=np.float64)


def _fill(centres: Colours, points: Colours) -> Colours:
    """Moves each centre that is nearest to no point onto the point worst served, until every centre has one.

    Ends, for every move lowers the total distance, given at least as many different points as centres.
    """
    centres = centres.copy()
    for _ in range(10 * len(centres)):
        chosen = nearest(points, centres)
        empty = np.setdiff1d(np.arange(len(centres)), chosen)
        if not len(empty):
            return centres
        centres[empty[0]] = points[((points - centres[chosen]) ** 2).sum(axis=1).argmax()]
    raise AssertionError("moving a centre did not lower the distortion")


def _codes(pixels: Pixels) -> NDArray[np.int32]:
    """Each pixel's channels (..., channels) as one whole number, flat."""
    flat = pixels.reshape(-1, pixels.shape[-1]).astype(np.int32)
    return (flat * 256 ** np.arange(flat.shape[1], dtype=np.int32)).sum(axis=1, dtype=np.int32)


def _colours(codes: NDArray[np.int32], channels: int) -> Pixels:
    """The pixels (count, channels) of `_codes`."""
    return (codes[:, None] // 256 ** np.arange(channels, dtype=np.int32) % 256).astype(np.uint8)


def _scale(colours: Pixels, levels: int) -> Colours:
    """0..levels-1 to [-1, 1]."""
    return colours / ((levels - 1) / 2) - 1


def _check_channels(pixels: Pixels, channels: int) -> None:
    if pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise ValueError(f"images of shape (count, height, width, {channels}) wanted, not {pixels.shape}")
