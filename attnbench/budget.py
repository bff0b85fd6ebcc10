"""A budget turned into steps or width: what "equal FLOPs", "equal time" and "equal memory" mean for one run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from attnbench import record
from attnbench.config import RunConfig
from attnbench.frame import Record, context_key, part, setting
from attnbench.suite import Budget

STEPS_PER_WARMUP = 12
"""Warm-up is a twelfth of the steps, as it is by default."""


def fit(
    config: RunConfig, budget: Budget, out: Path, peak: Callable[[RunConfig], int] | None = None
) -> RunConfig | None:
    """The run with the steps (FLOPs, seconds) or the width (bytes) that the budget allows; resolved settings.

    Seconds need the throughput of the same setting, taken from any finished record of it in `out`: None where there is
    none yet. `peak` gives the peak bytes of training a run, by default measured.
    """
    if budget.bytes is not None:
        return widest(config, budget.bytes, peak or measured_peak)
    if budget.flops is not None:
        return _steps(config, budget.flops / (config.train.batch * flops_per_image(config)))
    speed = _speed(config, out)
    return None if speed is None else _steps(config, (budget.seconds or 0) * speed / config.train.batch)


def widest(config: RunConfig, limit: float, peak: Callable[[RunConfig], int]) -> RunConfig:
    """The run at the largest dim, in steps of two a head, whose peak stays within `limit` bytes, by halving.

    The narrowest where even that does not fit: the record then says what it took.
    """
    unit = 2 * config.model.heads

    def wide(units: int) -> RunConfig:
        return config.model_copy(update={"model": config.model.model_copy(update={"dim": units * unit})})

    low, high = 1, 2
    while peak(wide(high)) <= limit:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(wide(middle)) <= limit else (low, middle)
    return wide(low)


def flops_per_image(config: RunConfig) -> float:
    """FLOPs of training on one image, as the model itself counts them."""
    return _flops(config.model_copy(update={"seed": 0, "device": "cpu"}).model_dump_json())


@functools.lru_cache(maxsize=64)
def _flops(told: str) -> float:
    """Of a run as JSON: seeds and rates share the answer, and building a model takes time."""
    from attnbench import experiment, train

    config = RunConfig.model_validate_json(told)
    model = train.make_model(config, *experiment.prepare(config).shape)
    return 3.0 * float(model.flops())  # type: ignore[operator]


def measured_peak(config: RunConfig) -> int:
    """Peak bytes of training, measured in a process of its own."""
    from attnbench import experiment, measure

    return measure.peak_bytes(measure.Request(config, *experiment.prepare(config).shape))


def _speed(config: RunConfig, out: Path) -> float | None:
    """Training images a second of this setting on this kind of device, from any finished record; the median one."""
    wanted = {"variant": config.variant, "config": config.identity()}
    found = sorted(
        float(speed)
        for done in record.read_all(out)[0]
        if (speed := part(done, "metrics").get("train_images_per_second")) and _alike(done, wanted)
    )
    return found[len(found) // 2] if found else None


def _alike(done: Record, wanted: Record) -> bool:
    without = ("train.steps", "train.warmup", "data", "side", "evaluate", "probe", "train.validate_every")
    data = part(part(done, "config"), "data") == part(part(wanted, "config"), "data")
    return data and setting(done) == setting(wanted) and context_key(done, without) == context_key(wanted, without)


def _steps(config: RunConfig, steps: float) -> RunConfig:
    count = max(1, round(steps))
    train = config.train.model_copy(update={"steps": count, "warmup": count // STEPS_PER_WARMUP})
    return config.model_copy(update={"train": train})
