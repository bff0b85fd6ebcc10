"""Trains a tiny run again and again in forked processes that SIGKILL ends: `python -m tests.killed KILLS STRIDE`.

KILLS of them come at random moments, and one at every STRIDE-th boundary of a write. A process of its own, on one
thread, so that what it forks starts at once and inherits no lock. It prints JSON: the kills, and a line for whatever
was lost.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbench import checkpoint, experiment, record, storage, train
from attnbench.config import RunConfig

EVERY = 3
"""Steps between checkpoints."""
SETTINGS: dict[str, Any] = {
    "device": "cpu", "measure": False, "sample": {"count": 1}, "model": {"dim": 8, "depth": 1, "heads": 1},
    "data": {"name": "source:above", "height": 3, "width": 4, "count": 40},
    "train": {"steps": 14, "batch": 4, "validate_every": 4, "checkpoint_every": EVERY, "warmup": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """How a process ended: the steps that it said it had done, the write boundaries that it passed, its seconds."""

    steps: list[int]
    boundaries: int
    seconds: float
    killed: bool


def config(out: Path) -> RunConfig:
    return experiment.resolve(RunConfig.model_validate(SETTINGS | {"out": out}))


def attempt(out: Path, seconds: float | None = None, boundary: int | None = None) -> Attempt:
    """Runs in a fork, killed after `seconds` or at its `boundary`-th write boundary; neither: left to end."""
    ear, mouth = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(ear)
        _train(out, mouth, boundary)
    os.close(mouth)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(ear) as stream:
        told = stream.read().split()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, f"the run itself failed with {status}"
    steps = [int(word) for word in told if word != "at"]
    return Attempt(steps, told.count("at"), time.monotonic() - began, killed)


def _train(out: Path, mouth: int, boundary: int | None) -> None:
    """In the fork: trains, says so, and never returns."""
    log, passed = train._log, 0

    def spoken(progress: train.Progress, *rest: Any) -> None:
        os.write(mouth, f"{progress.step}\n".encode())
        log(progress, *rest)

    def at(step: str) -> None:
        nonlocal passed
        passed += 1
        os.write(mouth, b"at\n")
        if passed == boundary:
            os.kill(os.getpid(), signal.SIGKILL)

    train._log, storage.at = spoken, at  # type: ignore[assignment]
    try:
        experiment.execute(config(out))
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


@dataclass
class Watch:
    """What stood in a folder after each attempt, and whether it kept to the promise."""

    out: Path
    saved: int = 0
    finished: bytes | None = None

    def broken(self, ended: Attempt) -> list[str]:
        """What the promise does not allow, after an attempt."""
        found = []
        settings = config(self.out)
        path = self.out / "runs" / f"{record.identify(settings)}.json"
        _, problems = record.read_all(self.out)
        content = path.read_bytes() if path.exists() else None
        if problems or (self.finished is not None and content != self.finished):
            found.append(f"a record was lost: {problems}")
        if ended.steps and ended.steps[0] != self.saved + 1:
            found.append(f"went on at step {ended.steps[0]}, but step {self.saved} was saved")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saved = checkpoint.latest(experiment.checkpoints(settings))
        least = max(self.saved, (ended.steps[-1] - 1) // EVERY * EVERY if ended.steps else 0)
        if content is None and (0 if saved is None else saved.step) < least:
            found.append(f"step {least} was passed, but only {saved and saved.step} is saved")
        self.finished, self.saved = content, 0 if saved is None else saved.step
        return found


def left(out: Path) -> tuple[dict[str, Any], bytes]:
    """What a finished run says and leaves, but for clocks."""
    settings = config(out)
    done = record.read(out / "runs" / f"{record.identify(settings)}.json")
    done["metrics"].pop("seconds")
    told = {key: done[key] for key in ("status", "metrics", "curves", "per_image_nats", "nll_map")}
    return told, (experiment.artifacts(settings) / "weights.safetensors").read_bytes()


def at_random(folder: Path, count: int, seed: int) -> tuple[int, list[str]]:
    """`count` kills at moments drawn evenly over a whole run's time; whatever ends is as if nothing had happened."""
    whole = attempt(folder / "whole")
    draw, broken, kills, runs = random.Random(seed), [], 0, 0
    while kills < count:
        watch = Watch(folder / f"run{runs}")
        ended = None
        while ended is None or ended.killed:
            ended = attempt(watch.out, seconds=draw.uniform(0, whole.seconds) if kills < count else None)
            kills += ended.killed
            broken += watch.broken(ended)
        broken += _same(watch.out, folder / "whole")
        shutil.rmtree(watch.out)
        runs += 1
    return kills, broken


def at_boundaries(folder: Path, stride: int) -> tuple[int, list[str]]:
    """A kill at every `stride`-th boundary between two steps of a write, from the first on; then to the end."""
    whole, broken, kills = attempt(folder / "unstopped"), [], 0
    for boundary in range(1, whole.boundaries + 1, stride):
        watch = Watch(folder / f"boundary{boundary}")
        for place in (boundary, None):
            ended = attempt(watch.out, boundary=place)
            kills += ended.killed
            broken += watch.broken(ended)
        broken += _same(watch.out, folder / "unstopped")
        shutil.rmtree(watch.out)
    return kills, broken


def _same(out: Path, whole: Path) -> list[str]:
    return [] if left(out) == left(whole) else [f"{out.name} ended otherwise than the run that nothing stopped"]


def main(kills: int, stride: int) -> dict[str, Any]:
    """Both, after a run that pays for first imports, so that no fork does."""
    with tempfile.TemporaryDirectory() as place:
        experiment.execute(config(Path(place) / "warm"))
        random_kills, broken = at_random(Path(place), kills, seed=0)
        boundary_kills, also = at_boundaries(Path(place), stride)
    return {"random": random_kills, "boundaries": boundary_kills, "broken": broken + also}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
