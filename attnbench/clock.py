"""The clock that training and measuring share."""

from __future__ import annotations

import time
from collections.abc import Callable

ROW = 10
"""Most calls in a row between two events on CUDA."""

ENOUGH = 0.5
"""Seconds that such a row shall take at most."""


class Stopwatch:
    """Seconds of wall-clock since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Seconds of one call, all of its work on the device included.

    On CUDA the mean of several in a row: a single one, from an idle device, would be timed with Python's launches, of
    which training and evaluating hide all that end before the device does.
    """
    if device != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    once = _between_events(work, 1)
    calls = min(ROW, int(ENOUGH / max(once, ENOUGH / ROW)))
    return _between_events(work, calls) / calls if calls > 1 else once


def _between_events(work: Callable[[], object], calls: int) -> float:
    """Seconds from an event before the calls to one after them, on CUDA."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000
