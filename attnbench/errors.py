"""The one exception that a person at the terminal is meant to read, and its most frequent way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Refusal(Exception):
    """Bad input: a single line that names the cause and the way out; commands end with exit status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The way out for a name that is not among the known ones: the nearest that is, or all of them."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
