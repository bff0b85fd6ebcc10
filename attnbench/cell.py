"""One cell of a sweep in a process of its own: settings as JSON on stdin, progress and the record's path on stdout.

`python -m attnbench.cell` prints `step N` lines while it trains and the path of the record as its last line.
"""

from __future__ import annotations

import sys
import time

from attnbench.config import RunConfig
from attnbench.errors import Refusal

SECONDS = 1.0
"""Between two lines of progress."""

STOPPED = 130
"""Exit status of a cell that was told to stop (SIGINT)."""


def main() -> int:
    """0: a finished record; 1: a record of a failure; 2: refused, with the reason on stderr; 130: stopped."""
    from attnbench import experiment, record

    config = RunConfig.model_validate_json(sys.stdin.read())
    told = [0.0]

    def watch(stage: str, step: int, loss: float) -> None:
        if time.monotonic() - told[0] >= SECONDS or stage != "train":
            told[0] = time.monotonic()
            print(f"{stage} {step}", flush=True)

    try:
        path = experiment.execute(experiment.resolve(config), watch)
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # training has saved a checkpoint; the same cell resumes
        return STOPPED
    print(path)
    return 0 if record.read(path)["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
