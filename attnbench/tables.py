"""The tables of the report: functions from the frame of records to a frame. What was not run is missing.

A figure that is a mean over seeds has its interval in `NAME_low` and `NAME_high` beside it and n in `seeds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from attnbench import frame, stats
from attnbench.config import RunConfig

COSTS = ("train_flops_per_image", "train_peak_bytes", "train_images_per_second", "sample_images_per_second",
         "state_bytes_per_image")  # fmt: skip
MEMORIES = {"8 GB": 8e9, "24 GB": 24e9, "80 GB": 80e9}
MOST_RANKED = 60
"""Beyond so many settings in one context the pairwise tests would separate nothing."""

Table = Callable[[pd.DataFrame], pd.DataFrame]


def baseline() -> str:
    """The variant that the others are held against: the one of a run that names none."""
    return RunConfig().variant


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that ended well, at the learning rate that validation chose."""
    return runs[(runs["status"] == "ok") & runs["chosen"].astype(bool)]


def trained(runs: pd.DataFrame) -> pd.DataFrame:
    """Finished runs of more than the single step that measuring a cost takes."""
    known = finished(runs)
    return known[known["steps"] > 1]


def leading_context(runs: pd.DataFrame) -> str | None:
    """The context in which most settings were run; of several, the one with most runs, then most steps."""
    known = finished(runs).dropna(subset=["nats_per_token"])
    if known.empty:
        return None
    sizes = {
        str(context): (rows["setting"].nunique(), len(rows), rows["steps"].max())
        for context, rows in known.groupby("context")
    }
    return max(sizes, key=lambda context: sizes[context])


def groups(known: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(context, setting, its runs of distinct seeds), in order of appearance."""
    distinct = known.drop_duplicates(["context", "setting", "seed"])
    for (context, setting), rows in distinct.groupby(["context", "setting"], sort=False):
        yield str(context), str(setting), rows


def likelihoods(rows: pd.DataFrame) -> np.ndarray:
    """Nats per token as (seeds, images), or (seeds, 1) where the runs were not tested on the same images."""
    images = [record.get("per_image_nats") for record in rows["record"]]
    sizes = {len(found) if isinstance(found, list) else 0 for found in images}
    if len(sizes) == 1 and 0 not in sizes:
        table = frame.numbers(images)
        if table is not None and np.allclose(table.mean(axis=1), rows["nats_per_token"], atol=1e-4):
            return table
    return rows["nats_per_token"].to_numpy(float)[:, None]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Every setting in every context, one row: seeds, likelihood and probe with intervals, costs as medians."""
    known = finished(runs)
    rows = [_summary_row(context, setting, own) for context, setting, own in groups(known)]
    if not rows:
        return pd.DataFrame()
    costs = (
        known.groupby(["context", "setting"])[["parameters", *COSTS, "training_flops", "seconds"]]
        .median()
        .reset_index()
    )
    table = pd.DataFrame(rows).merge(costs, on=["context", "setting"])
    table["commit"] = table.pop("commit")
    return table.sort_values(["context", "nats_per_token"], ignore_index=True)


def _summary_row(context: str, setting: str, own: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": setting, "family": own["family"].iloc[0], "context": context, "seeds": len(own)}
    nats = own["nats_per_token"].to_numpy(float)
    row |= _figure("nats_per_token", likelihoods(own[~np.isnan(nats)]) if not np.isnan(nats).all() else None)
    for name in ("bits_per_dim", "regret_nats_per_token", "probe_accuracy_best"):
        values = own[name].to_numpy(float)
        values = values[~np.isnan(values)]
        row |= _figure(name, values[:, None] if len(values) else None)
    commits = sorted({str(frame.part(r, "environment").get("commit") or "unknown")[:8] for r in own["record"]})
    return row | {"commit": " ".join(commits[:3]) + (" …" if len(commits) > 3 else "")}


def _figure(name: str, values: np.ndarray | None) -> dict[str, float]:
    if values is None:
        return {name: math.nan, f"{name}_low": math.nan, f"{name}_high": math.nan}
    found = stats.interval(values, resamples=500)
    return {name: found.estimate, f"{name}_low": _nan(found.low), f"{name}_high": _nan(found.high)}


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def front(runs: pd.DataFrame) -> pd.DataFrame:
    """Every setting of the leading context, one row: what it wins, what it costs, and which are Pareto-optimal."""
    context = leading_context(runs)
    if context is None:
        return pd.DataFrame()
    known = finished(runs)
    known = known[(known["context"] == context) & known["nats_per_token"].notna()]
    table = summary(known).drop(columns=["context"])
    own = {setting: by_seed(rows) for _, setting, rows in groups(known)}
    order = table["setting"].tolist()
    places = stats.ranks([own[s] for s in order]) if len(order) <= MOST_RANKED else [(1, len(order))] * len(order)
    table.insert(1, "rank", [f"{a}" if a == b else f"{a}–{b}" for a, b in places])
    # Not by images a second, which tell of the machine and of what else it did.
    points = table[["nats_per_token", *COSTS[:2]]].dropna(axis="columns", how="any")
    table = table.drop(columns=["training_flops", "seconds"])
    table.insert(2, "pareto", ["yes" if mark else "" for mark in stats.pareto(points.to_numpy(float).tolist())])
    table.insert(3, "against_baseline", _gains(table, own))
    return table


def by_seed(rows: pd.DataFrame) -> dict[int, np.ndarray]:
    """Nats per token of each test image by seed."""
    return {int(seed): values for seed, values in zip(rows["seed"], likelihoods(rows), strict=True)}


def _gains(table: pd.DataFrame, own: dict[str, dict[int, np.ndarray]]) -> list[str]:
    """What each setting wins and costs against the baseline, in words, likelihood paired by seed and test image."""
    base = table[table["setting"] == baseline()]
    if base.empty:
        return ["not run: " + baseline()] * len(table)
    reference = base.iloc[0]
    words = []
    for _, row in table.iterrows():
        if row["setting"] == reference["setting"]:
            words.append("the baseline")
            continue
        values = stats.paired(own[row["setting"]], own[reference["setting"]])
        found = stats.interval(values, resamples=500) if values.size else None
        told = [f"{found.estimate:+.3f} nats"] if found else ["no seed in common"]
        if found and found.high is not None:
            told[0] = f"{found.estimate:+.3f} ± {found.high - found.estimate:.3f} nats"
        for name, label in (("train_peak_bytes", "memory"), ("train_images_per_second", "speed"),
                            ("sample_images_per_second", "sampling"), ("train_flops_per_image", "FLOPs")):  # fmt: skip
            if row[name] > 0 and reference[name] > 0:
                told.append(f"{row[name] / reference[name]:.2f}× {label}")
        words.append(", ".join(told))
    return words


def ladder(runs: pd.DataFrame) -> pd.DataFrame:
    """C1: what each setting costs and reaches at each side, where it was run at two sides at least."""
    known = finished(runs)
    sides = known.groupby(["setting", "data"])["tokens"].transform("nunique") if len(known) else pd.Series(dtype=float)
    rows = [
        {
            "setting": setting, "data": own["data"].iloc[0], "side": own["side"].iloc[0],
            "tokens": own["tokens"].iloc[0], "seeds": len(own), "parameters": own["parameters"].median(),
            "train_flops_per_image": own["train_flops_per_image"].median(),
            "predicted_train_peak_bytes": own["predicted_train_peak_bytes"].median(),
            "train_peak_bytes": own["train_peak_bytes"].median(),
            "train_images_per_second": own["train_images_per_second"].median(),
            "nats_per_token": own["nats_per_token"].mean(), "probe_accuracy_best": own["probe_accuracy_best"].mean(),
            "context": context,
        }
        for context, setting, own in groups(known[sides > 1])
    ]  # fmt: skip
    return pd.DataFrame(rows).sort_values(["data", "setting", "tokens"], ignore_index=True) if rows else pd.DataFrame()


def exponents(runs: pd.DataFrame) -> pd.DataFrame:
    """C1, C5: how time, memory and decoding state grow with the tokens, as the exponent of a power law over all sides.

    The crossover is the side from which the setting is faster to train than the baseline, where the two fitted lines
    meet within ten times the range that was measured. The largest sides are those lines extended: extrapolated.
    """
    known = finished(runs)
    lines = {
        (setting, data, batch): own
        for (setting, data, batch), own in known.groupby(["setting", "data", _batch(known)], sort=False)
        if own.dropna(subset=["seconds_per_image"])["tokens"].nunique() > 1
    }
    rows = []
    for (setting, data, batch), own in lines.items():
        row: dict[str, Any] = {"setting": setting, "data": data, "batch": batch, "sides": own["tokens"].nunique()}
        row["seeds"] = own["seed"].nunique()
        for name in ("seconds_per_image", "train_peak_bytes", "state_bytes_per_image"):
            row |= _figure(f"exponent_{name}", _slopes(own, name))
        row["crossover_side"] = _crossover(own, lines.get((baseline(), data, batch)))
        row |= {f"side_within_{label}": _largest(own, limit) for label, limit in MEMORIES.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _batch(known: pd.DataFrame) -> pd.Series:
    found = [frame.lookup(record, "train.batch") for record in known["record"]]
    return pd.Series(found, index=known.index, name="batch", dtype=object)


def _slopes(own: pd.DataFrame, name: str) -> np.ndarray | None:
    found = [
        stats.slope(np.log(rows["tokens"].to_numpy(float)), np.log(rows[name].to_numpy(float)))
        for _, rows in own[own[name] > 0].groupby("seed")
        if rows["tokens"].nunique() > 1
    ]
    return np.asarray(found)[:, None] if found else None


def _line(own: pd.DataFrame | None, name: str) -> tuple[float, float] | None:
    """Slope and intercept of log figure on log tokens over all seeds."""
    known = own[(own[name] > 0) & own["tokens"].notna()] if own is not None else pd.DataFrame()
    if own is None or len(known) < 2 or known["tokens"].nunique() < 2:
        return None
    x, y = np.log(known["tokens"].to_numpy(float)), np.log(known[name].to_numpy(float))
    slope = stats.slope(x, y)
    return slope, float(y.mean() - slope * x.mean())


def _crossover(own: pd.DataFrame, base: pd.DataFrame | None) -> float:
    mine, other = _line(own, "seconds_per_image"), _line(base, "seconds_per_image")
    if mine is None or other is None or mine == other or mine[0] >= other[0]:
        return math.nan
    side = math.exp((mine[1] - other[1]) / (other[0] - mine[0]) / 2)
    return round(side, 1) if side < 10 * math.sqrt(own["tokens"].max()) else math.nan


def _largest(own: pd.DataFrame, limit: float) -> float:
    line = _line(own, "train_peak_bytes")
    if line is None or line[0] <= 0:
        return math.nan
    side = (math.log(limit) - line[1]) / line[0] / 2
    return math.floor(math.exp(side)) if side < 16 else math.nan  # beyond a million pixels a side nothing is known


def cnns(runs: pd.DataFrame) -> pd.DataFrame:
    """C1: every CNN beside the trunk's settings of the same data, by parameters."""
    beside = summary(runs[runs["context"].isin(runs[runs["family"] == "cnn"]["context"])])
    if beside.empty:
        return beside
    return beside[["setting", "family", "context", "seeds", "parameters", *_spread("nats_per_token"),
                   *_spread("probe_accuracy_best")]].sort_values(["context", "parameters"])  # fmt: skip


def scans(runs: pd.DataFrame) -> pd.DataFrame:
    """C2: nats per token by setting and scan order, where more than one order was run."""
    known = finished(runs).copy()
    known["scan"] = [frame.lookup(record, "scan") or "raster" for record in known["record"]]
    if known["scan"].nunique() < 2:
        return pd.DataFrame()
    both = known[known["data"].isin(known[known["scan"] != "raster"]["data"])]
    table = both.pivot_table(index=["data", "setting"], columns="scan", values="nats_per_token", aggfunc="mean")
    return table.reset_index().rename_axis(columns=None)


def places(runs: pd.DataFrame) -> pd.DataFrame:
    """C2: nats at row starts, in the first row and in the interior."""
    rows = [
        {"setting": setting, "context": context, "seeds": len(own)}
        | {name: own[name].mean() for name in ("row_start_nats", "first_row_nats", "interior_nats")}
        | {"row_start_excess": (own["row_start_nats"] - own["interior_nats"]).mean()}
        for context, setting, own in groups(trained(runs).dropna(subset=["row_start_nats"]))
    ]
    return pd.DataFrame(rows)


def regrets(source: str) -> Table:
    """Regret over the optimum on one synthetic source, by setting."""

    def make(runs: pd.DataFrame) -> pd.DataFrame:
        known = trained(runs)
        table = summary(known[(known["data"] == source) & known["regret_nats_per_token"].notna()])
        if table.empty:
            return table
        return table[["setting", "context", "seeds", *_spread("regret_nats_per_token"), "nats_per_token"]]

    return make


def positions(runs: pd.DataFrame) -> pd.DataFrame:
    """C3: nats per token by what mixes and by positional encoding, where more than one was run."""
    from attnbench import variants  # imports torch

    known = finished(runs).copy()
    known["position"] = [frame.lookup(record, "position") for record in known["record"]]
    known["mixer"] = known["variant"].map(variants.mixer)
    table = known.pivot_table(index=["context", "mixer"], columns="position", values="nats_per_token", aggfunc="mean")
    table = table[table.notna().sum(axis=1) > 1].dropna(axis="columns", how="all")
    return table.reset_index().rename_axis(columns=None) if len(table) else pd.DataFrame()


def windows(runs: pd.DataFrame) -> pd.DataFrame:
    """C4: likelihood, memory and throughput by radius or window, with the baseline of the same context."""
    reach = {setting: _reach(own["record"].iloc[0]) for setting, own in runs.groupby("setting")}
    local = runs[(runs["family"] == "local") | runs["setting"].map(reach).notna()]
    beside = runs[runs["context"].isin(local["context"]) & (runs["setting"] == baseline())]
    table = summary(pd.concat([local, beside]).drop_duplicates("id"))
    if table.empty:
        return table
    table["reach"] = table["setting"].map(reach)
    return table[["setting", "reach", "context", "seeds", *_spread("nats_per_token"), *COSTS]]


def _reach(record: frame.Record) -> float:
    """How far a setting sees along the rows or the scan, in pixels; missing where it has no such option."""
    found = [frame.number(frame.lookup(record, f"model.options.{name}")) for name in ("radius", "window")]
    return next((float(reach) for reach in found if reach is not None), math.nan)


def decoding(runs: pd.DataFrame) -> pd.DataFrame:
    """C5: images decoded a second, and what decoding must keep, by side."""
    known = finished(runs).dropna(subset=["sample_images_per_second"])
    rows = [
        {"setting": setting, "data": own["data"].iloc[0], "side": own["side"].iloc[0], "tokens": own["tokens"].iloc[0],
         "seeds": len(own), "sample_images_per_second": own["sample_images_per_second"].median(),
         "state_bytes_per_image": own["state_bytes_per_image"].median(), "context": context}
        for context, setting, own in groups(known)
    ]  # fmt: skip
    return pd.DataFrame(rows).sort_values(["data", "tokens", "setting"], ignore_index=True) if rows else pd.DataFrame()


def correlations(runs: pd.DataFrame) -> pd.DataFrame:
    """S1: rank correlation of loss and probe accuracy over all runs of a setting on one data set."""
    known = finished(runs).dropna(subset=["nats_per_token", "probe_accuracy_best"])
    rows = []
    for (data, setting), own in known.groupby(["data", "setting"], sort=False):
        by_seed = [
            stats.rank_correlation(rows["nats_per_token"].tolist(), rows["probe_accuracy_best"].tolist())
            for _, rows in own.groupby("seed")
        ]
        values = np.asarray([value for value in by_seed if not math.isnan(value)])
        if len(values):
            rows.append({"data": data, "setting": setting, "runs": len(own), "seeds": len(values)}
                        | _figure("rank_correlation", values[:, None]))  # fmt: skip
    return pd.DataFrame(rows)


def peaks(runs: pd.DataFrame) -> pd.DataFrame:
    """S2: where along the depth the probe is best (0 is the embedding), and how far it stands above both ends."""
    known = finished(runs).dropna(subset=["probe_depth"])
    rows = []
    for context, setting, own in groups(known):
        depths = [frame.depths(record) for record in own["record"]]
        row: dict[str, Any] = {"setting": setting, "context": context, "seeds": len(own), "layers": len(depths[0]) - 1}
        row |= _figure("best_depth", own["probe_depth"].to_numpy(float)[:, None])
        for name, column in (("embedding", "probe_first"), ("best", "probe_accuracy_best"), ("last", "probe_last")):
            row[f"accuracy_{name}"] = own[column].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def tuning(runs: pd.DataFrame) -> pd.DataFrame:
    """Every learning rate that was tried where there was a choice: tries, validation loss, which was chosen."""
    rows = []
    for _, cell in runs.groupby("cell", sort=False):
        if cell["lr"].nunique() < 2:
            continue
        for lr, tries in cell.groupby("lr"):
            first = tries.iloc[0]
            rows.append({
                "setting": first["setting"], "context": first["context"], "lr": lr, "runs": len(tries),
                "rates_tried": cell["lr"].nunique(), "failed": int((tries["status"] != "ok").sum()),
                "validation": tries["validation"].mean(),
                "chosen": "yes" if bool(first["chosen"]) else "",
            })  # fmt: skip
    return pd.DataFrame(rows)


def failures(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run that did not end well, and why."""
    lost = runs[runs["status"] != "ok"]
    table = lost[["id", "status", "setting", "context", "seed"]].copy()
    table["reason"] = [str(record.get("reason") or "")[:200] for record in lost["record"]]
    return table


def published(runs: pd.DataFrame) -> pd.DataFrame:
    """What others published; never the same protocol."""
    table = pd.DataFrame(_published())
    table["protocol"] = "another"
    return table[["data", "model", "value", "unit", "note", "protocol"]]


def replicas(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with the data, tokens, shape and batch of a published model, ranked with it by validation loss.

    `share_of_steps`: of its number of training steps. Rate and optimiser are ours to choose.
    """
    rows = []
    for other in _published():
        own = frame.select(runs, other["like"]) if "like" in other else runs.head(0)
        beside = [_beside(other, setting, tries) for _, setting, tries in groups(own[own["validation"].notna()])]
        if beside:
            known = {"validation": other["value"], "share_of_steps": 1.0, "lr": other["lr"]}
            rows += [*beside, dict.fromkeys(beside[0], "–") | {"setting": f"published: {other['model']}"} | known]
    return pd.DataFrame(rows).sort_values("validation", ignore_index=True) if rows else pd.DataFrame()


def _beside(other: dict[str, Any], setting: str, own: pd.DataFrame) -> dict[str, Any]:
    first, validation = own.iloc[0], own["validation"].mean()
    optimiser = frame.lookup(first["record"], "train.optimiser") or RunConfig().train.optimiser
    return {
        "setting": setting, "validation": validation, "against_published": validation - other["value"],
        "share_of_steps": first["steps"] / other["steps"], "nats_per_token": own["nats_per_token"].mean(),
        "probe_accuracy_best": own["probe_accuracy_best"].mean(), "optimiser": optimiser, "lr": first["lr"],
        "parameters": own["parameters"].median(), "seeds": len(own),
    }  # fmt: skip


def _published() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return found


def every_run(runs: pd.DataFrame) -> pd.DataFrame:
    """All runs: also those that failed and the learning rates that lost."""
    kept = ["id", "status", "setting", "context", "seed", "lr", "chosen", "nats_per_token", "probe_accuracy_best",
            "train_peak_bytes", "train_images_per_second", "seconds"]  # fmt: skip
    table = runs[kept].copy()
    table["chosen"] = ["yes" if chosen else "no" for chosen in runs["chosen"]]
    environments = [frame.part(record, "environment") for record in runs["record"]]
    table["commit"] = [str(e.get("commit") or "unknown")[:8] + ("+" if e.get("dirty") else "") for e in environments]
    return table


def _spread(name: str) -> Sequence[str]:
    return name, f"{name}_low", f"{name}_high"
