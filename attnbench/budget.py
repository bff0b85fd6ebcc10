"""A budget turned into steps or width: what "equal FLOPs", "equal time" and "equal memory" mean for one run."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from attnbench import measure, record, storage
from attnbench.config import RunConfig
from attnbench.frame import Record, context_key, part, setting
from attnbench.suite import Budget, at_rate

STEPS_PER_WARMUP = 12
"""Of the steps that a budget allows, one in so many is warm-up."""


def fit(
    config: RunConfig, budget: Budget, out: Path, peak: Callable[[RunConfig], int] | None = None, keep: bool = False
) -> RunConfig | None:
    """The run with the steps (FLOPs, seconds) or the width (bytes) that the budget allows; resolved settings.

    Seconds need the throughput of the same setting, taken from any finished record of it in `out`: None where there is
    none yet. `peak` gives the peak bytes of training a run, by default measured. What was measured, once for all seeds
    and rates, is with `keep` written down in out/budgets, and what stands there counts: measured again, it would make
    other cells of those that have run.
    """
    if budget.flops is not None:
        return _steps(config, budget.flops / (config.train.batch * flops_per_image(config)))
    path = out / "budgets" / f"{_name(config, budget)}.json"
    allowed = _kept(path)
    if allowed is None:
        if budget.bytes is not None:
            allowed = widest(config, budget.bytes, peak or measured_peak).model.dim
        elif (speed := _speed(config, out)) is not None:
            allowed = max(1, round((budget.seconds or 0) * speed / config.train.batch))
        else:
            return None
        if keep:
            storage.create_exclusive(path, json.dumps({"variant": config.variant, "allowed": allowed}).encode())
            allowed = _kept(path) or allowed  # another launcher may have been first
    return _steps(config, allowed) if budget.bytes is None else _wide(config, allowed)


def _name(config: RunConfig, budget: Budget) -> str:
    """Of what a budget allows a setting, whatever its seed and its rate."""
    setting = at_rate(config, 1.0).model_copy(update={"seed": 0})
    told = [setting.identity(), setting.code, budget.model_dump(mode="json")]
    return hashlib.sha256(record.canonical(told)).hexdigest()[:16]


def _kept(path: Path) -> int | None:
    """What was written down; None where nothing was, or what is there is something else."""
    try:
        allowed = json.loads(path.read_bytes())["allowed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return allowed if isinstance(allowed, int) and allowed > 0 else None


def widest(config: RunConfig, limit: float, peak: Callable[[RunConfig], int]) -> RunConfig:
    """The run at the largest dim, in steps of two a head, whose peak stays within `limit` bytes, by halving.

    The narrowest where even that does not fit: the record then says what it took. What cannot be measured does not fit.
    """
    unit = 2 * config.model.heads

    def fits(units: int) -> bool:
        try:
            return peak(_wide(config, units * unit)) <= limit
        except measure.ChildFailed:  # killed for its memory, as a rule
            return False

    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _wide(config, low * unit)


def _wide(config: RunConfig, dim: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"dim": dim})})


def flops_per_image(config: RunConfig) -> float:
    """FLOPs of training on one image, as the model itself counts them."""
    return _flops(config.model_copy(update={"seed": 0, "device": "cpu"}).model_dump_json())


@functools.lru_cache(maxsize=64)
def _flops(told: str) -> float:
    """Of a run as JSON: seeds and rates share the answer, and building a model takes time."""
    from attnbench import experiment, train

    config = RunConfig.model_validate_json(told)
    prepared = experiment.prepare(config)
    model = train.make_model(config, *prepared.shape, **prepared.pictures)
    return 3.0 * float(model.flops())  # type: ignore[operator]


def measured_peak(config: RunConfig) -> int:
    """Peak bytes of training, measured in a process of its own."""
    from attnbench import experiment

    return measure.peak_bytes(experiment.prepare(config).request(config))


def _speed(config: RunConfig, out: Path) -> float | None:
    """Training images a second of this setting on this kind of device, from any finished record; the median one."""
    wanted = {"variant": config.variant, "code": config.code, "config": config.identity()}
    found = sorted(
        float(speed)
        for done in record.read_all(out)[0]
        if (speed := part(done, "metrics").get("train_images_per_second")) and _alike(done, wanted)
    )
    return found[len(found) // 2] if found else None


def _alike(done: Record, wanted: Record) -> bool:
    without = ("train.steps", "train.warmup", "data", "side", "evaluate", "probe", "train.validate_every")
    data = part(part(done, "config"), "data") == part(part(wanted, "config"), "data")
    same = data and done.get("code") == wanted.get("code")
    return same and setting(done) == setting(wanted) and context_key(done, without) == context_key(wanted, without)


def _steps(config: RunConfig, steps: float) -> RunConfig:
    count = max(1, round(steps))
    train = config.train.model_copy(update={"steps": count, "warmup": count // STEPS_PER_WARMUP})
    return config.model_copy(update={"train": train})
