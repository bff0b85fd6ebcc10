"""What others published (published.yaml): the figures, and our runs beside those that were trained as ours are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from attnbench import frame, stats, tables
from attnbench.config import RunConfig

EQUAL = 0.05
"""As large as the baseline is what has as many parameters, up to this share."""


def figures(runs: pd.DataFrame) -> pd.DataFrame:
    """What others published; never the same protocol."""
    table = pd.DataFrame(_entries())
    table["protocol"] = "another"
    return table[["data", "model", "value", "unit", "note", "protocol"]]


def replicas(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with the data, tokens, shape and batch of a published model, the longest first, then by validation loss.

    Intervals are those of one run over its images; `validation`: as its test images spread, of as many as it validated
    on; `differs`: whether the published loss lies outside. `share_of_steps`: of the model's training steps. Rate and
    optimiser are ours to choose. `equal_parameters`: as many as the baseline's, up to EQUAL; a table of biases adds.
    """
    found = []
    for other in _entries():
        own = frame.select(runs, other["like"]) if "like" in other else runs.head(0)
        own = own[own["validation"].notna()]
        if own.empty:
            continue
        base = own[own["setting"] == tables.baseline()]["parameters"].median()
        rows = [_beside(other, base, setting, tries) for _, setting, tries in tables.groups(own)]
        known = {"validation": other["value"], "share_of_steps": 1.0, "lr": other["lr"]}
        rows.append(dict.fromkeys(rows[-1], None) | {"setting": f"published: {other['model']}"} | known)
        found += sorted(rows, key=lambda row: (-row["share_of_steps"], row["validation"]))
    return pd.DataFrame(found)


def _beside(other: dict[str, Any], base: float, setting: str, own: pd.DataFrame) -> dict[str, Any]:
    first, validation, parameters = own.iloc[0], own["validation"].mean(), own["parameters"].median()
    images, nats = tables.likelihoods(own).mean(axis=0), own["nats_per_token"].mean()
    low, high = stats.unit_interval(images)
    shown = (
        frame.number(frame.lookup(first["record"], "train.validation_images")) or RunConfig().train.validation_images
    )
    reach = (high - low) / 2 * math.sqrt(len(images) / shown) if len(images) > 1 else math.nan
    optimiser = frame.lookup(first["record"], "train.optimiser") or RunConfig().train.optimiser
    return {
        "setting": setting, "validation": validation, "validation_low": validation - reach,
        "validation_high": validation + reach, "against_published": validation - other["value"],
        "differs": None if math.isnan(reach) else "yes" if abs(validation - other["value"]) > reach else "no",
        "share_of_steps": first["steps"] / other["steps"], "parameters": parameters,
        "equal_parameters": "yes" if abs(parameters - base) <= EQUAL * base else "",
        "test_nats": nats, "test_nats_low": low, "test_nats_high": high,
        "probe_accuracy_best": own["probe_accuracy_best"].mean(),
        "optimiser": optimiser, "lr": first["lr"], "seeds": len(own),
    }  # fmt: skip


def _entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return found
