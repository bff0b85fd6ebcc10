"""The clock that training and measuring share."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds of wall-clock since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start
