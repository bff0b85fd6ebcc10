"""The register of variants: a frozen description beside each class. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Cls = TypeVar("Cls", bound=type)

OBJECTIVES = ("ar", "bert")
SUPERVISED = "supervised"
"""The objective of a model that is told the classes, and has no likelihood."""


@dataclass(frozen=True)
class Variant:
    """One subject of the benchmark.

    `time` and `memory` are those of the attention of one layer, as text in n, the number of tokens.
    `cls` is a Mixer, which the trunk wraps, or a whole model.  `position` is the encoding it comes with.
    """

    name: str
    family: str
    time: str
    memory: str
    summary: str
    reference: str
    cls: type[Any]
    position: str = "learned1d"
    objectives: tuple[str, ...] = OBJECTIVES


VARIANTS: dict[str, Variant] = {}


def variant(
    name: str,
    *,
    family: str,
    time: str,
    memory: str,
    summary: str,
    reference: str,
    position: str = "learned1d",
    objectives: tuple[str, ...] = OBJECTIVES,
) -> Callable[[Cls], Cls]:
    """Class decorator that puts the class into VARIANTS; one class may carry several names.

    Raises ValueError if the name is taken by another class.
    """

    def register(cls: Cls) -> Cls:
        if name in VARIANTS and VARIANTS[name].cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"variant {name!r} is registered twice: {VARIANTS[name].cls} and {cls}")
        VARIANTS[name] = Variant(name, family, time, memory, summary, reference, cls, position, objectives)
        return cls

    return register


MOST = 2**31 - 1
"""Beyond any image; sums of a few such numbers still are slots that a tensor can hold."""


def positive(name: str, value: object, zero: str = "") -> int:
    """The value, if it is a whole number from 1 to MOST, or 0 where that stands for `zero`; else ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < (0 if zero else 1):
        or_zero = f", or 0 for {zero}" if zero else ""
        raise ValueError(f"{name} must be a whole number, at least 1{or_zero}, not {value!r}")
    if value > MOST:
        raise ValueError(f"{name} must be at most {MOST:,}, not {value!r}")
    return value


def choose(what: str, name: str, known: object) -> ValueError:
    """The error for a name that is not among the known ones, with the nearest that is."""
    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}"
    return ValueError(f"unknown {what} {name!r}; {hint}")
