"""The sources: synthetic images whose exact likelihood is known, one for each thing that an attention may miss.

`noise` is everywhere the chance that a pixel is drawn afresh, uniformly from all colours, instead of being copied.
What a source promises, and the shapes, are in source.py. No torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnbench.errors import Refusal, nearest
from attnbench.source import Floats, Images, Mask, Source, earlier, flag, number, share, surprise, whole


@dataclass(frozen=True)
class Above(Source):
    """Every pixel copies the one above it; with probability `noise` it is drawn afresh. Columns are independent (C2).

    A model that cannot reach one row up is left with chance. Here two copies of 24 came out otherwise:

    >>> print(Above(height=4, width=8, colours=4).sample(1, seed=3)[0])
    [[0 0 3 2 0 1 1 0]
     [0 0 3 2 0 1 1 2]
     [0 0 3 2 0 2 1 2]
     [0 0 3 2 0 2 1 2]]
    """

    name = "above"

    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        share("noise", self.noise)

    def conditional(self, images: Images, row: int, col: int) -> Floats:
        return self.copied(images[:, row - 1, col], self.noise) if row else self.uniform(len(images))

    def entropy(self) -> Floats:
        nats = np.full((self.height, self.width), self.copy_nats(self.noise))
        nats[0] = math.log(self.colours)
        return nats

    def gap(self, visible: Mask) -> Floats:
        """From k rows up, the nearest in sight, a pixel is copied k times; with none in sight it costs log colours."""
        seen = earlier(self, visible).reshape(self.height, self.width, self.height, self.width)
        steps = np.full((self.height, self.width), np.inf)
        for row, col in np.ndindex(self.height, self.width):
            if (rows := seen[row, col, :row, col].nonzero()[0]).size:
                steps[row, col] = row - rows[-1]
        kept = np.where(np.isinf(steps), 0.0, (1 - self.noise) ** steps)
        return np.maximum(self.copy_nats(1 - kept) - self.entropy(), 0)


@dataclass(frozen=True)
class Mesh(Source):
    """A Markov mesh on the left, upper left, upper and upper right pixels: a radius of 1 is enough (C4).

    p(colour) ∝ exp(coupling · how many of the four have it); neighbours beyond the border do not count. A causal
    relative of the Potts model; meshes are due to Abend, Harley and Kanal (1965).

    >>> print(Mesh(height=4, width=8, colours=4).sample(1, seed=0)[0])
    [[2 1 0 0 2 3 3 3]
     [2 3 3 0 3 0 3 3]
     [3 3 3 3 0 0 3 3]
     [3 3 3 3 3 3 3 3]]
    """

    name = "mesh"

    coupling: float = 1.0

    OFFSETS: ClassVar[tuple[tuple[int, int], ...]] = ((0, -1), (-1, -1), (-1, 0), (-1, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        number("coupling", self.coupling, -50, 50)

    def conditional(self, images: Images, row: int, col: int) -> Floats:
        votes, everyone = np.zeros((len(images), self.colours)), np.arange(len(images))
        for above, beside in self._neighbours(row, col):
            votes[everyone, images[:, above, beside]] += 1
        weights = np.exp(self.coupling * votes)
        return weights / weights.sum(axis=1, keepdims=True)

    def entropy(self) -> None:
        """No closed form: it would take the distribution of whole rows."""

    def gap(self, visible: Mask) -> Floats | None:
        """0 where all the neighbours are in sight; else unknown."""
        seen = earlier(self, visible).reshape(self.height, self.width, self.height, self.width)
        for row, col in np.ndindex(self.height, self.width):
            if not all(seen[row, col, above, beside] for above, beside in self._neighbours(row, col)):
                return None
        return np.zeros((self.height, self.width))

    def _neighbours(self, row: int, col: int) -> list[tuple[int, int]]:
        places = ((row + down, col + right) for down, right in self.OFFSETS)
        return [(above, beside) for above, beside in places if above >= 0 and 0 <= beside < self.width]


@dataclass(frozen=True)
class Place(Source):
    """Independent pixels, each with a distribution of its own place: only who knows (row, col) can predict (C3).

    log p(colour) ∝ sharpness · u with u uniform in [0, 1), drawn once for every place and colour from a seed that is
    a function of the shape and the colours; the same for every image. Two images agree where a place is decided:

    >>> for image in Place(height=3, width=8, colours=4).sample(2, seed=0): print(image)
    [[1 3 0 0 3 3 0 3]
     [1 3 2 0 3 0 1 0]
     [1 2 1 2 1 0 3 3]]
    [[1 3 3 3 3 0 0 2]
     [1 3 2 0 3 3 2 2]
     [1 1 3 2 1 3 3 3]]
    """

    name = "place"

    sharpness: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("sharpness", self.sharpness, 0, 500)

    @cached_property
    def table(self) -> Floats:
        """p of every colour at every place, (height, width, colours)."""
        random = np.random.default_rng([self.height, self.width, self.colours])
        weights = np.exp(self.sharpness * random.random((self.height, self.width, self.colours)))
        chances: Floats = weights / weights.sum(axis=2, keepdims=True)
        return chances

    def conditional(self, images: Images, row: int, col: int) -> Floats:
        return np.tile(self.table[row, col], (len(images), 1))

    def entropy(self) -> Floats:
        nats: Floats = surprise(self.table).sum(axis=2)
        return nats

    def gap(self, visible: Mask) -> Floats:
        """0: there is nothing to see."""
        earlier(self, visible)
        return np.zeros((self.height, self.width))


@dataclass(frozen=True)
class Mirror(Source):
    """The lower half mirrors the upper, each pixel drawn afresh with probability `noise`; the rest is free (C4, C5).

    Row r copies row height - 1 - r, up to height - 1 rows away: a window reaches only the rows next to the middle. The
    middle row of an odd height belongs to the free part.

    >>> print(Mirror(height=5, width=8, colours=4).sample(1, seed=1)[0])
    [[2 3 0 3 1 1 3 1]
     [2 0 3 2 1 3 1 1]
     [0 1 0 1 3 1 1 3]
     [2 0 3 2 1 3 1 1]
     [2 3 0 3 1 1 3 1]]
    """

    name = "mirror"

    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        share("noise", self.noise)

    def conditional(self, images: Images, row: int, col: int) -> Floats:
        twin = self.height - 1 - row
        return self.copied(images[:, twin, col], self.noise) if twin < row else self.uniform(len(images))

    def entropy(self) -> Floats:
        rows = np.arange(self.height)[:, None].repeat(self.width, axis=1)
        return np.where(self.height - 1 - rows < rows, self.copy_nats(self.noise), math.log(self.colours))

    def gap(self, visible: Mask) -> Floats:
        """A pixel whose twin is out of sight costs log colours."""
        seen = earlier(self, visible).reshape(self.height, self.width, self.height, self.width)
        rows, cols = np.indices((self.height, self.width))
        known = seen[rows, cols, self.height - 1 - rows, cols]
        best = self.entropy()
        return np.where(known, 0.0, math.log(self.colours) - best)


@dataclass(frozen=True)
class Recall(Source):
    """Pairs of colours, shown above, must be looked up below: a state must hold them all (C5).

    The raster is read two pixels at a time. The first `pairs` twos show a key and its value: the keys are the colours
    from 0 on, or, `shuffled`, any different ones in any order; values are free. Every further two asks for one of the
    keys shown, at random, and answers with its value. Keys and answers are drawn afresh with probability `noise`,
    so no image is impossible: of a key shown twice the last value counts, one that was not shown has any value. An odd
    last pixel is a question without its answer. pairs: by default as many as leave half of the image to questions, and
    no more than the colours. Keys in order can be found by where they stand, in one layer; shuffled they must be found
    by what they are, in two: multi-query associative recall (Arora et al., Zoology, 2023), on a grid.

    The first row shows 0→2, 1→0, 2→7 and 3→5; the second asks for 2, 3, 3 and 2, and noise spoils an answer:

    >>> print(Recall(height=3, width=8, colours=8, pairs=4).sample(1, seed=0)[0])
    [[0 2 1 0 2 7 3 5]
     [2 7 3 0 3 5 2 7]
     [3 5 1 0 0 2 2 7]]
    """

    name = "recall"

    noise: float = 0.05
    pairs: int | None = None
    shuffled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        share("noise", self.noise)
        flag("shuffled", self.shuffled)
        if self.pairs is None:
            return
        whole("pairs", self.pairs, least=1)
        most = min(self.colours, self.size // 2 - 1)
        if self.pairs > most:
            way = f"ask for {most} or fewer" if most > 0 else "make the image larger"
            raise Refusal(
                f"{self.pairs} pairs do not fit {self.colours} colours, each a key once, and {self.size} pixels, two a "
                f"pair and two for a question; {way}"
            )

    @property
    def shown(self) -> int:
        """Pixels that show pairs, two a pair."""
        return 2 * (min(self.colours, self.size // 4) if self.pairs is None else self.pairs)

    def conditional(self, images: Images, row: int, col: int) -> Floats:
        sequence, t, shown = images.reshape(len(images), self.size), row * self.width + col, self.shown
        keys, values = sequence[:, 0:shown:2], sequence[:, 1:shown:2]
        if t < shown:
            return self.uniform(len(images)) if t % 2 else self._key(keys[:, : t // 2])
        if t % 2 == 0:
            return self._one_of(self._among(keys))
        match = keys == sequence[:, t - 1, None]
        answers = self.uniform(len(images))
        if shown:
            found = match.any(axis=1)
            last = keys.shape[1] - 1 - match[:, ::-1].argmax(axis=1)
            answers[found] = self.copied(values[found, last[found]], self.noise)
        return answers

    def entropy(self) -> Floats:
        """Exact, for of the keys shown only their number matters."""
        pairs, free = self.shown // 2, math.log(self.colours)
        sequence, different, chance = np.full(self.size, free), np.arange(pairs + 1), self._different(pairs)
        sequence[: 2 * pairs : 2] = self.copy_nats(self.noise)
        if self.shuffled:
            left = self._choice_nats(self.colours - different)
            sequence[: 2 * pairs : 2] = [self._different(pair) @ left for pair in range(pairs)]
        if pairs:
            known = 1 - self.noise + self.noise * different / self.colours
            sequence[2 * pairs :: 2] = chance @ self._choice_nats(different)
            sequence[2 * pairs + 1 :: 2] = chance @ (known * self.copy_nats(self.noise) + (1 - known) * free)
        return sequence.reshape(self.height, self.width)

    def gap(self, visible: Mask) -> Floats | None:
        """0 where each key sees the keys shown before it, and each answer its question and all pairs; else unknown."""
        seen, shown = earlier(self, visible), self.shown
        for t in range(self.size if shown else 0):
            pairs = np.arange(min(t, shown))
            if t < shown:
                needed = pairs[::2] if self.shuffled and t % 2 == 0 else pairs[:0]
            else:
                needed = np.append(pairs, t - 1) if t % 2 else pairs[::2]
            if not seen[t, needed].all():
                return None
        return np.zeros((self.height, self.width))

    def _key(self, before: Images) -> Floats:
        """The next key shown, after those before it (count, so far)."""
        if self.shuffled:
            return self._one_of(~self._among(before))
        return self.copied(np.full(len(before), before.shape[1]), self.noise)

    def _different(self, keys: int) -> Floats:
        """(pairs + 1,): the chance of each number of different colours among the first `keys` keys."""
        chance, number_of = np.zeros(self.shown // 2 + 1), np.arange(self.shown // 2 + 1)
        if self.shuffled:
            chance[0] = 1
            for _ in range(keys):
                chance = _one_more(chance, 1 - self.noise * number_of / self.colours)
            return chance
        afresh = np.ones(1)  # the chance of each number of keys drawn afresh
        for _ in range(keys):
            afresh = np.convolve(afresh, [1 - self.noise, self.noise])
        # The others all differ, and each drawn afresh may hit any colour: Horner's rule over the number of these.
        for many in reversed(range(keys + 1)):
            chance = _one_more(chance, 1 - number_of / self.colours)
            chance[keys - many] += afresh[many]
        return chance

    def _among(self, keys: Images) -> Mask:
        """bool (count, colours): which colours are among the keys (count, so far)."""
        among = np.zeros((len(keys), self.colours), dtype=bool)
        np.put_along_axis(among, keys, True, axis=1)
        return among

    def _one_of(self, allowed: Mask) -> Floats:
        """One of the allowed colours (count, colours); with probability `noise`, or where none is allowed, of all."""
        many = allowed.sum(axis=1, keepdims=True)
        chances = np.where(many > 0, allowed / np.maximum(many, 1), 1 / self.colours)
        return self.noise / self.colours + (1 - self.noise) * chances

    def _choice_nats(self, many: NDArray[np.int64]) -> Floats:
        """Entropy of such a choice among `many` allowed colours."""
        rare, often = self.noise / self.colours, self.noise / self.colours + (1 - self.noise) / np.maximum(many, 1)
        nats = (self.colours - many) * surprise(rare) + many * surprise(often)
        return np.where(many > 0, nats, math.log(self.colours))


def _one_more(chance: Floats, new: Floats) -> Floats:
    """Chances of each number of different colours after one more, which is new with probability `new`, both (many,)."""
    grown = chance * (1 - new)
    grown[1:] += (chance * new)[:-1]
    return grown


SOURCES: dict[str, type[Source]] = {source.name: source for source in (Above, Mesh, Place, Mirror, Recall)}
"""Sources by name."""


def build_source(name: str, *, height: int, width: int, colours: int, **options: Any) -> Source:
    """The source of this name, shape, number of colours and options.

    Raises Refusal: an unknown name or option (with the nearest known), a shape, colours or option that do not fit.
    """
    if name not in SOURCES:
        raise Refusal(f"unknown source {name!r}; {nearest(name, SOURCES)}")
    known = [field.name for field in dataclasses.fields(SOURCES[name])][3:]
    for option in options:
        if option not in known:
            raise Refusal(f"unknown option {option!r} of source {name}; {nearest(option, known)}")
    return SOURCES[name](height, width, colours, **options)
