"""kill -9 during a real run, at random moments and at every boundary of a write: what was promised is still there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attnbench import checkpoint, experiment, record
from tests import killed

ROOT = Path(__file__).resolve().parent.parent
STRIDE = 7
"""No write has as many steps, so that a few kills meet each of them in another write."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.timeout(1200)
@pytest.mark.promise("kill")
@pytest.mark.parametrize(("kills", "stride"), [(20, STRIDE), pytest.param(200, 1, marks=pytest.mark.soak)])
def test_a_killed_run_loses_no_more_than_was_promised(kills: int, stride: int, injected: Callable[[int], None]) -> None:
    """Each folder is run until it ends, and then holds, bit for bit, what a run that nothing stopped leaves."""
    command = [sys.executable, "-m", "tests.killed", str(kills), str(stride)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["broken"] == []
    assert said["random"] >= kills and said["boundaries"] > 50 // stride
    injected(said["random"] + said["boundaries"])


def ended(*steps: int) -> killed.Attempt:
    return killed.Attempt(list(steps), boundaries=0, seconds=0.0, killed=True)


def test_what_a_kill_must_not_lose_would_be_noticed(tmp_path: Path) -> None:
    settings = killed.config(tmp_path)
    watch = killed.Watch(tmp_path)
    assert watch.broken(ended(1, 2, 3)) == []
    assert "step 3 was passed" in watch.broken(ended(1, 2, 3, 4))[0]
    checkpoint.save(experiment.checkpoints(settings), 3, {}, {})
    assert watch.broken(ended(1, 2, 3, 4)) == []
    assert "went on at step 1" in watch.broken(ended(1, 2))[0]
    path = record.write(tmp_path, {"id": record.identify(settings), "status": "ok"})
    assert watch.broken(ended()) == []
    path.unlink()
    assert "a record was lost" in watch.broken(ended())[0]
