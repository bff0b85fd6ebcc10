"""What a source of synthetic images is: its exact likelihood is known, which turns a model's loss into a regret.

A source states one thing, p(pixel | earlier pixels in raster order), in closed form; drawing images and taking their
likelihood both follow from it, so the two cannot disagree. It also knows how many nats a pixel is worth on average
(`entropy`) and, where that can be computed, how many more it costs whoever sees only part of what came earlier (`gap`).

Shapes: images int64 (count, height, width), colours 0..colours-1; n = height · width, pixels in raster order; maps
float64 (height, width). Everything is in nats. No torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnbench.errors import Refusal

Images = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

CHUNK = 1 << 24
"""Random numbers held at once."""


@dataclass(frozen=True)
class Source(ABC):
    """A distribution over height × width images of `colours` colours; a subclass's further fields are its options.

    Raises Refusal: an empty grid, fewer than two colours, an option out of its range.
    """

    name: ClassVar[str]

    height: int
    width: int
    colours: int

    def __post_init__(self) -> None:
        whole("height", self.height, least=1)
        whole("width", self.width, least=1)
        whole("colours", self.colours, least=2)

    @abstractmethod
    def conditional(self, images: Images, row: int, col: int) -> Floats:
        """p of every colour at (row, col) given the raster-earlier pixels, (count, colours); no other pixel is read."""

    @abstractmethod
    def entropy(self) -> Floats | None:
        """Expected nats of each pixel given all earlier ones, the best that any model can do; None: no closed form."""

    @abstractmethod
    def gap(self, visible: Mask) -> Floats | None:
        """Expected nats that a pixel costs beyond `entropy` for whoever sees only part of the earlier pixels.

        visible: bool (n, n), target × content: which pixels a model uses to predict which; what it holds of the target
        itself and of later pixels is ignored. None where it cannot be computed.
        """

    @property
    def size(self) -> int:
        """n, pixels an image."""
        return self.height * self.width

    def sample(self, count: int, seed: int) -> Images:
        """`count` images, a function of the seed alone; fewer images of the same seed are the first of more."""
        whole("count", count, least=0)
        random, parts = np.random.default_rng(seed), []
        for first in range(0, count, part := max(1, CHUNK // self.size)):
            uniform = random.random((min(part, count - first), self.size))
            images = np.zeros((len(uniform), self.height, self.width), dtype=np.int64)
            for t, (row, col) in enumerate(np.ndindex(self.height, self.width)):
                edges = self.conditional(images, row, col).cumsum(axis=1)
                # Against the last edge, not 1: rounding must not reach a colour beyond the last possible one.
                images[:, row, col] = (uniform[:, t, None] * edges[:, -1:] >= edges[:, :-1]).sum(axis=1)
            parts.append(images)
        return np.concatenate(parts) if parts else np.zeros((0, self.height, self.width), dtype=np.int64)

    def log_prob(self, images: ArrayLike) -> Floats:
        """log p of each pixel given the earlier ones, (count, height, width); -inf for what cannot be.

        Raises ValueError: images of another shape, not of whole numbers, or with a colour that there is not.
        """
        known = self._checked(images)
        chances = np.empty(known.shape)
        for row, col in np.ndindex(self.height, self.width):
            of_colours = self.conditional(known, row, col)
            chances[:, row, col] = np.take_along_axis(of_colours, known[:, row, col, None], axis=1)[:, 0]
        with np.errstate(divide="ignore"):
            return np.log(chances)

    def optimum_nats_per_token(self) -> float | None:
        """The mean of `entropy`."""
        return None if (entropy := self.entropy()) is None else float(entropy.mean())

    def _checked(self, images: ArrayLike) -> Images:
        found = np.asarray(images)
        if found.ndim != 3 or found.shape[1:] != (self.height, self.width):
            raise ValueError(f"images of shape (count, {self.height}, {self.width}) wanted, not {found.shape}")
        if found.dtype.kind not in "iu":
            raise ValueError(f"images of whole numbers wanted, not of {found.dtype}")
        if found.size and not 0 <= found.min() <= found.max() < self.colours:
            raise ValueError(f"colours 0 to {self.colours - 1} wanted, not {found.min()} to {found.max()}")
        return found.astype(np.int64)

    def uniform(self, count: int) -> Floats:
        """(count, colours): every colour as likely as any other."""
        return np.full((count, self.colours), 1 / self.colours)

    def copied(self, colours: Images, noise: float) -> Floats:
        """(count, colours) of pixels that are copies of these (count,), but drawn afresh with probability `noise`."""
        chances = np.full((len(colours), self.colours), noise / self.colours)
        chances[np.arange(len(colours)), colours] += 1 - noise
        return chances

    def copy_nats(self, noise: float | Floats) -> Floats:
        """Entropy of such a pixel, given what it was copied from."""
        other = np.asarray(noise) / self.colours
        return (self.colours - 1) * surprise(other) + surprise(1 - (self.colours - 1) * other)


def earlier(source: Source, visible: Mask) -> Mask:
    """`visible` (n, n) without the target itself and the pixels after it.  Raises ValueError: another shape."""
    found = np.asarray(visible, dtype=bool)
    if found.shape != (source.size, source.size):
        raise ValueError(f"a mask of shape ({source.size}, {source.size}) wanted, not {found.shape}")
    return np.tril(found, -1)


def surprise(chances: ArrayLike) -> Floats:
    """-p log p, 0 at 0."""
    p = np.asarray(chances, dtype=np.float64)
    nats: Floats = -p * np.log(np.where(p > 0, p, 1))
    return nats


def whole(name: str, value: object, least: int) -> None:
    """Raises Refusal unless the value is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise Refusal(f"a source needs {name} to be a whole number, {least} or more, not {value!r}; choose another")


def flag(name: str, value: object) -> None:
    """Raises Refusal unless the value is true or false."""
    if not isinstance(value, bool):
        raise Refusal(f"a source needs {name} to be true or false, not {value!r}; choose one")


def number(name: str, value: object, low: float, high: float) -> None:
    """Raises Refusal unless the value is a number from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refusal(f"a source needs {name} to be a number from {low} to {high}, not {value!r}; choose another")


def share(name: str, value: object) -> None:
    """Raises Refusal unless the value is a number from 0 to 1."""
    number(name, value, 0, 1)
