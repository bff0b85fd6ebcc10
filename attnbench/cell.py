"""One cell of a sweep in a process of its own: an order as a line of JSON on stdin, progress and the record's path on
stdout.

`python -m attnbench.cell` prints `step N` lines while it trains and the path of the record as its last line. It ends
with the launcher that ordered it, which holds the other end of stdin, and stops when that has lost its claim.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from typing import IO, Any

from attnbench.claim import Claim
from attnbench.config import RunConfig, Settings
from attnbench.errors import Refusal

SECONDS = 1.0
"""Between two lines of progress."""

STOPPED = 130
"""Exit status of a cell that was told to stop (SIGINT)."""

TAIL = 20
"""Last lines of a cell's output that are kept."""


class Order(Settings):
    """What a launcher wants: a run, the bytes that it may have, and the claim under which its record is written."""

    config: RunConfig
    memory: int | None = None
    claim: Claim | None = None


class Heard:
    """A stream that also keeps the last lines that went through it."""

    def __init__(self, stream: IO[str], lines: deque[str]) -> None:
        self._stream, self._lines = stream, lines

    def write(self, text: str) -> int:
        self._lines.extend(line.rstrip() for line in text.splitlines() if line.strip())
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Watch:
    """Prints progress, and interrupts the run when its claim is lost: then another launcher writes the record."""

    def __init__(self, claim: Claim | None) -> None:
        self._claim = claim
        self._told = 0.0
        self._interrupted = False

    def held(self) -> bool:
        """Whether the run is still this one's, and its checkpoints with it."""
        return self._claim is None or self._claim.held()

    def __call__(self, stage: str, step: int, loss: float) -> None:
        if time.monotonic() - self._told < SECONDS and stage == "train":
            return
        self._told = time.monotonic()
        print(f"{stage} {step}", flush=True)
        if not self._interrupted and not self.held():
            self._interrupted = True  # once: training ends at the next whole step, and a second time would cut it short
            signal.raise_signal(signal.SIGINT)


def main() -> int:
    """0: a finished record; 1: a record of a failure; 2: refused, with the reason on stderr; 130: stopped."""
    order = Order.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    said: deque[str] = deque(maxlen=TAIL)
    sys.stdout, sys.stderr = Heard(sys.stdout, said), Heard(sys.stderr, said)  # type: ignore[assignment]
    try:
        from attnbench import duel, experiment, measure, record

        config = experiment.resolve(order.config)
        if order.memory is not None:
            duel.limit_memory(order.memory, config.device)
        else:  # a heap that never shrinks has gaps, which a limit would count
            measure.keep_freed()
        watch = Watch(order.claim)
        watch("start", 0, 0.0)
        path = experiment.execute(config, watch, said, watch.held)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # training has saved a checkpoint; the same cell resumes
        return STOPPED
    print(path)
    return 0 if record.read(path)["status"] == "ok" else 1


def _end_with_launcher() -> None:
    """Ends this process, and what it started, when stdin closes: a launcher that is gone cannot stop its cells.

    At once: whoever takes the cell over goes on from the last checkpoint. Read without sys.stdin, whose lock would be
    held when the interpreter ends.
    """
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
