"""Records as runs write them, with planted effects, so that what the report says of them can be known beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnbench import record
from attnbench.config import RunConfig
from attnbench.cost import ROOM as COSTS

IMAGES = 40
FAMILIES = {"dense1d": "dense", "dense-none": "dense", "dense2d": "dense", "local1d": "local", "local2d": "local",
            "linear": "linear"}  # fmt: skip
EFFECTS = {"dense1d": 0.0, "dense-none": 0.12, "dense2d": -0.03, "local1d": 0.05, "local2d": -0.06, "linear": 0.022}
EXPONENTS = {"linear": 1.0, "local1d": 1.0, "local2d": 1.0}
"""Of training time; 2.0 for the others."""


def one(
    variant: str,
    seed: int = 0,
    *,
    side: int = 8,
    steps: int = 250,
    lr: float = 5e-3,
    status: str = "ok",
    cost: bool = False,
    nats: float | None = None,
    data: str = "digits",
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of one run; `cost` measures memory and throughput and neither likelihood by image nor probes."""
    told: dict[str, Any] = {
        "variant": variant, "seed": seed, "data": {"name": data, "side": None if side == 8 else side},
        "model": {"dim": 32, "depth": 4, "heads": 4}, "train": {"steps": steps, "batch": 32, "lr": lr, "warmup": 0},
        "measure": cost, "device": "cpu",
    }  # fmt: skip
    for group, values in (settings or {}).items():
        told[group] = told.get(group, {}) | values if isinstance(values, dict) else values
    config = RunConfig.model_validate(told)
    name = record.identify(config)
    of = f"{variant} {side} {lr} {status} {cost} {data} {settings}"  # not the id, which defaults have a part in
    draw = np.random.default_rng([seed, steps, *of.encode()])
    done: dict[str, Any] = {
        "id": name, "status": status, "variant": variant, "family": FAMILIES.get(variant, "own"), "backend": "math",
        "seed": seed, "config": config.identity(),
        "environment": {"commit": "0123456789abcdef", "dirty": False, "cpu": "a CPU", "gpu": None,
                        "time": "2024-01-01T00:00:00+00:00",
                        "command": f"python -m attnbench.run --variant {variant} --seed {seed}"},
        "data": {"name": data, "checksum": f"{data}{side}", "height": side, "width": side, "vocab": 17},
        "metrics": {}, "curves": {}, "per_image_nats": None, "nll_map": None,
    }  # fmt: skip
    if status != "ok":
        return done | {"reason": f"it ended in {status}"}
    level = 1.4 + EFFECTS.get(variant, 0.0) + 20 / steps if nats is None else nats
    done["metrics"] = _metrics(variant, side, steps, level, draw) | (_cost(variant, side, draw) if cost else {})
    images = np.random.default_rng(7).normal(0, 0.2, IMAGES)  # the same images are hard for every model
    per_image = level + draw.normal(0, 0.004) + images - images.mean() + draw.normal(0, 0.01, IMAGES)
    done["per_image_nats"] = per_image.tolist()
    done["metrics"]["nats_per_token"] = float(per_image.mean())
    done["nll_map"] = (level + draw.normal(0, 0.01, (side, side))).tolist()
    if variant == "local1d":
        for row in done["nll_map"]:
            row[0] += 0.1
    return done


def _metrics(variant: str, side: int, steps: int, level: float, draw: np.random.Generator) -> dict[str, Any]:
    probe = np.array([0.6, 0.7, 0.8, 0.75, 0.65]) + draw.normal(0, 0.005, 5) - 0.2 * (level - 1.4)
    return {
        "parameters": 50_000 + (2_000 if variant != "dense-none" else 0), "train_flops_per_image": 1e6 * side**2,
        "bits_per_dim": level * 1.44, "validation_nats_per_token": level + draw.normal(0, 0.003),
        "probe_accuracy": probe.tolist(), "probe_accuracy_best": float(probe.max()), "steps": steps, "seconds": 3.0,
    }  # fmt: skip


def _cost(variant: str, side: int, draw: np.random.Generator) -> dict[str, Any]:
    growth = EXPONENTS.get(variant, 2.0)
    tokens = side * side
    return {
        "train_peak_bytes": 2**22 + 20_000.0 * tokens * draw.normal(1, 0.01),
        "train_images_per_second": 2e5 / tokens**growth * draw.normal(1, 0.01),
        "sample_images_per_second": 1e4 / tokens, "eval_images_per_second": 4e5 / tokens**growth,
        "state_bytes_per_image": 4096 if variant == "linear" else 64 * tokens,
    }  # fmt: skip


def write(out: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Writes them to out/runs as runs do."""
    for done in records:
        record.write(out, done, replace=True)
    return out


def study(seeds: int = 5) -> list[dict[str, Any]]:
    """What `sweep quick` leaves, with planted effects."""
    quality = [one(v, s, steps=250) for v, s in itertools.product(EFFECTS, range(seeds))]
    early = [one(v, s, steps=40) for v, s in itertools.product(EFFECTS, range(min(seeds, 3)))]
    cost = [
        one(v, s, side=side, steps=1, cost=True, data="source:above", settings={"train": {"batch": 4}})
        for v, side, s in itertools.product(("dense1d", "local2d", "linear"), (8, 16, 32), range(min(seeds, 3)))
    ]
    return quality + early + cost


def cost_cell(
    folder: Path, variant: str, side: int, seconds: float, machine: str = "A", status: str = "ok", n: int = 3,
    threads: int = 1, against: bool = True, phase: str = "forward", **model: Any,
) -> None:  # fmt: skip
    """Writes a cost cell of attention in which one phase took so long, 50 / side of what the baseline took."""
    spread = {"median": seconds, "low": seconds, "high": seconds, "n": n}
    ratio = {"ratio": spread | {"median": 50 / side, "low": 49 / side, "high": 51 / side}} if against else {}
    found: dict[str, Any] = {
        "id": f"{variant}-{side}-{machine}-{threads}-{len(model)}", "kind": "cost", "variant": variant,
        "scope": "attention", "side": side, "tokens": side**2, "status": status,
        "environment": {"cpu": machine, "threads": threads}, "config": {"model": model},
        "metrics": {"peak_bytes": None, "phases": {phase: {"own": spread, **ratio}} if seconds else {}},
    }  # fmt: skip
    record.write(folder, found, room=COSTS)
