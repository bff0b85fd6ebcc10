"""Tables of what lies beside the runs, in folders of its own: cost cells, and what was done with trained models.

Those were cut (surgery), moved to another side (transfer) or looked into; nothing must take a cut model for one that
was trained that way.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from attnbench import cost, curves, frame, record
from attnbench.errors import Refusal
from attnbench.frame import number, part


def costs(results: Path) -> pd.DataFrame:
    """C1, C5: how each cost grows with the number of tokens, and the side from which it is below the baseline's.

    Of cells measured by turns with the baseline, n turns at least: the ratio is at the largest side that both reached,
    `ratio_at_side`. The exponent is that of `exponent_sides`. `given_up`: the sides of cells that did not end, and how;
    a phase that had ended by then is there. Cells of different machines, or with other numbers of threads, are kept
    apart; of anyone's own attention those of its latest code are shown.
    """
    rows = []
    for (machine, threads), cells in curves.by_place(record.read_all(results, cost.ROOM)[0]).items():
        given_up, measured = _given_up(cells), set()
        for curve in curves.curves(cells):
            measured.add((curve.label, curve.scope))
            reached = {point["side"] for point in curve.points}
            left = given_up.get((curve.label, curve.scope), {})
            fit, ratio = curve.fit, curve.ratios[-1] if curve.ratios else None
            rows.append({
                "setting": curve.label, "scope": curve.scope, "cost": curve.cost,
                "sides": _span(curve.points), "exponent_sides": _span(curve.fitted) if curve.fit else None,
                "n": min(point["n"] for point in curve.points),
                "exponent": fit and fit.value, "exponent_low": fit and fit.low, "exponent_high": fit and fit.high,
                "last_exponent": curve.last,
                "ratio_to_baseline": ratio and ratio.median, "ratio_at_side": ratio and ratio.side,
                "cheaper_from_side": curve.cheaper_from, "given_up": _told(left, reached),
                "machine": machine, "threads": threads,
            })  # fmt: skip
        for label, scope in given_up.keys() - measured:
            nothing = {"setting": label, "scope": scope, "given_up": _told(given_up[label, scope])}
            rows.append(nothing | {"machine": machine, "threads": threads})
    return _sorted(rows, ["machine", "threads", "scope", "cost", "setting"])


def _given_up(cells: list[dict[str, Any]]) -> dict[tuple[str, str], dict[Any, str]]:
    """By label and scope: the sides that did not end, with their status."""
    found: dict[tuple[str, str], dict[Any, str]] = {}
    for done in sorted(cells, key=lambda done: float(number(done.get("side")) or 0)):
        if done.get("status") != "ok":
            found.setdefault((curves.label(done), str(done.get("scope"))), {})[done.get("side")] = str(done["status"])
    return found


def _told(given_up: dict[Any, str], reached: Collection[int] = ()) -> str | None:
    return ", ".join(f"{side} ({how})" for side, how in given_up.items() if side not in reached) or None


def _span(points: list[dict[str, Any]]) -> str:
    first, last = points[0]["side"], points[-1]["side"]
    return str(first) if first == last else f"{first}–{last}"


def surgery(results: Path) -> pd.DataFrame:
    """C4: what a trained model loses under a mask it was not trained with; ± over its test images.

    `context` is that of the run `weights_of`; `weights` says in a few words what they are.
    """
    known = record.read_all(results / "surgery")[0]
    weights, rows = _sources(results, (part(done, "surgery").get("source") for done in known)), []
    for done in known:
        told = part(done, "surgery")
        source = weights.get(str(told.get("source")), {})
        rows.append({
            "mask": done.get("variant"), "reach": number(told.get("value")),
            "weights": source.get("weights", str(told.get("source"))), "weights_of": told.get("source"),
            "fine_tuned_steps": number(told.get("finetune")), "images": _images(done),
            "nats_per_token": number(part(done, "metrics").get("nats_per_token")),
            "cost_nats_per_token": number(told.get("cost_nats_per_token")),
            "cost_nats_per_token_low": number(told.get("cost_low")),
            "cost_nats_per_token_high": number(told.get("cost_high")), "context": source.get("context"),
        })  # fmt: skip
    return _sorted(rows, ["weights_of", "mask", "fine_tuned_steps", "reach"])


def _sources(results: Path, ids: Iterable[Any]) -> dict[str, dict[str, str]]:
    """By the id of each run whose record is here: its `setting`, its `context`, and both in a few words (`weights`)."""
    found = []
    for id in sorted({id for id in ids if isinstance(id, str)}):
        with contextlib.suppress(Refusal):  # others' weights have a name, and no record
            found.append(record.find(results, id, warn=False))
    sources = {}
    for run in frame.rows(frame.frame(done for done in found if done is not None)):
        side = f" {run.side}" if run.side else ""
        steps = f", {run.steps:,.0f} step{'s' if run.steps != 1 else ''}" if run.steps == run.steps else ""
        words = f"{run.setting}, {run.data}{side}{steps}"
        sources[run.id] = {"setting": run.setting, "context": run.context, "weights": words}
    return sources


def transfer(results: Path) -> pd.DataFrame:
    """C3: a trained model's likelihood at other sides; `context` is that of its training."""
    known = record.read_all(results / "transfer")[0]
    weights, rows = _sources(results, (part(done, "transfer").get("source") for done in known)), []
    for done in known:
        told, data, metrics = part(done, "transfer"), part(done, "data"), part(done, "metrics")
        source = weights.get(str(told.get("source")), {})
        rows.append({
            "setting": source.get("setting", done.get("variant")), "weights_of": told.get("source"),
            "trained_at": f"{told.get('trained_height')}×{told.get('trained_width')}",
            "tokens": (number(data.get("height")) or 0) * (number(data.get("width")) or 0) or None,
            "side": f"{data.get('height')}×{data.get('width')}",
            "tables": "interpolated" if told.get("interpolated") else "carried over", "images": _images(done),
            "nats_per_token": number(metrics.get("nats_per_token")), "context": source.get("context"),
        })  # fmt: skip
    return _sorted(rows, ["setting", "weights_of", "tokens"])


def _images(done: dict[str, Any]) -> int | None:
    """Test images that its nats are the mean of."""
    nats = done.get("per_image_nats")
    return len(nats) if isinstance(nats, list) else None


def attention(results: Path) -> pd.DataFrame:
    """C2, C4: where trained models look, by layer and head: mean 2D distance, share of attention within a radius."""
    rows = []
    for path in sorted((results / "artifacts").glob("*/attention_map.json")):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            rows += _heads(told)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue  # not what attention_map writes; the table then lacks it
    runs = _sources(results, (row["run"] for row in rows))
    for row in rows:
        source = runs.get(row["run"], {})
        row |= {"setting": source.get("setting", row["setting"]), "context": source.get("context")}
    return pd.DataFrame(rows)


def _heads(told: dict[str, Any]) -> list[dict[str, Any]]:
    found = told["attention"]
    return [
        {
            "setting": str(told["variant"]), "run": str(told["id"]), "images": found.get("images"),
            "layer": layer + 1, "head": head + 1,
            "mean_distance": number(distance),
            "mean_distance_if_uniform": number(found["uniform_mean_distance"][layer]),
        }
        | {f"share_within_{radius}": number(share[layer][head]) for radius, share in found["within"].items()}
        for layer, heads in enumerate(found["mean_distance"])
        for head, distance in enumerate(heads)
    ]  # fmt: skip


def _sorted(rows: list[dict[str, Any]], by: list[str]) -> pd.DataFrame:
    return pd.DataFrame(rows).sort_values(by, ignore_index=True) if rows else pd.DataFrame()
