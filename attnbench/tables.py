"""The tables of the report: functions from the frame of records to a frame. What was not run is missing.

A figure that is a mean over seeds has its interval in `NAME_low` and `NAME_high` beside it and n in `seeds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from attnbench import frame, stats
from attnbench.config import RunConfig

COSTS = ("train_flops_per_image", "train_peak_bytes", "train_images_per_second", "sample_images_per_second",
         "state_bytes_per_image")  # fmt: skip
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
    return finished(at_any_rate(runs))


def at_any_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """Trained runs that ended well, at every learning rate that was tried."""
    return runs[(runs["status"] == "ok") & (runs["steps"] > 1)]


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


def leading(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the leading context, but for those that ended well without a likelihood."""
    without = runs["nats_per_token"].isna() & (runs["status"] == "ok")
    return runs[(runs["context"] == leading_context(runs)) & ~without]


def groups(known: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(context, setting, its runs of distinct seeds), in order of appearance; of several learning rates the first's."""
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
    """Every setting in every context, one row: seeds, likelihood and probe with intervals, costs.

    Costs are the latest that were measured, at any learning rate: they do not depend on it, but on the code.
    """
    rows = [_summary_row(context, setting, own) for context, setting, own in groups(finished(runs))]
    if not rows:
        return pd.DataFrame()
    well = runs[runs["status"] == "ok"].sort_values("time", kind="stable")
    latest = well.groupby(["context", "setting"])
    costs = latest[["parameters", *COSTS, "training_flops", "seconds"]].last()  # of each figure that is there
    tried = runs.groupby(["context", "setting"])["lr"]
    costs["rates_tried"], costs["least"], costs["most"] = tried.nunique(), tried.min(), tried.max()
    table = pd.DataFrame(rows).merge(costs.reset_index(), on=["context", "setting"])
    at_edge = (table["lr"] == table.pop("least")) | (table["lr"] == table.pop("most"))
    table["edge_rate"] = np.where((table["rates_tried"] > 1) & at_edge, "yes", "")
    table["commit"] = table.pop("commit")
    return table.sort_values(["context", "nats_per_token"], ignore_index=True)


def _summary_row(context: str, setting: str, own: pd.DataFrame) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": setting, "family": own["family"].iloc[0], "context": context, "seeds": len(own)}
    row["lr"] = own["lr"].iloc[0]
    nats = own["nats_per_token"].to_numpy(float)
    by_image = likelihoods(own[~np.isnan(nats)]) if not np.isnan(nats).all() else None
    row |= _figure("nats_per_token", by_image)
    bits = _values(own, "bits_per_dim")
    if by_image is not None and len(bits) == len(nats) and np.ptp(bits / nats) < 1e-6:  # the same, in another unit
        row |= _figure("bits_per_dim", by_image * (bits / nats)[0])
    else:
        row |= _figure("bits_per_dim", bits[:, None])
    row |= _figure("regret_nats_per_token", _values(own, "regret_nats_per_token")[:, None])
    row |= _figure("probe_accuracy_best", _values(own, "probe_accuracy_best")[:, None], _counted(own))
    commits = sorted({str(frame.part(r, "environment").get("commit") or "unknown")[:8] for r in own["record"]})
    return row | {"commit": " ".join(commits[:3]) + (" …" if len(commits) > 3 else "")}


def _values(own: pd.DataFrame, name: str) -> np.ndarray:
    return own[name].dropna().to_numpy(float)


def _counted(own: pd.DataFrame) -> tuple[float, int]:
    """The standard error of an accuracy that is a share of the test images, and their number."""
    counts = [frame.number(frame.part(frame.part(r, "data"), "images").get("test")) for r in own["record"]]
    known = [int(count) for count in counts if count]
    share = float(np.mean(_values(own, "probe_accuracy_best"))) if own["probe_accuracy_best"].notna().any() else 0.0
    return (math.sqrt(max(0.0, share * (1 - share)) / min(known)), min(known)) if known else (0.0, 0)


def _figure(name: str, values: np.ndarray | None, images: tuple[float, int] = (0, 0)) -> dict[str, float]:
    """Mean and 95 % interval of (seeds, units), or of nothing."""
    if values is None or not len(values):
        return {name: math.nan, f"{name}_low": math.nan, f"{name}_high": math.nan}
    found = stats.interval(values, resamples=500, images=images)
    return {name: found.estimate, f"{name}_low": _nan(found.low), f"{name}_high": _nan(found.high)}


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def front(runs: pd.DataFrame) -> pd.DataFrame:
    """Every setting of the leading context, one row: what it wins, what it costs, and which are Pareto-optimal."""
    beside = leading(runs)
    if beside.empty:
        return pd.DataFrame()
    table = summary(beside).drop(columns=["context"])
    own = {setting: by_seed(rows) for _, setting, rows in groups(finished(beside))}
    order = table["setting"].tolist()
    places = stats.ranks([own[s] for s in order]) if len(order) <= MOST_RANKED else [(1, len(order))] * len(order)
    table.insert(1, "rank", [f"{a}" if a == b else f"{a}–{b}" for a, b in places])
    points = table[pareto_costs(table)].map(lambda cost: float(f"{cost:.3g}"))  # as printed: what looks equal is equal
    points.insert(0, "nats_per_token", table["nats_per_token"].round(4))
    table = table.drop(columns=["training_flops", "seconds"])
    table.insert(2, "pareto", ["yes" if mark else "" for mark in stats.pareto(points.to_numpy(float).tolist())])
    table.insert(3, "against_baseline", _gains(table, own))
    return table


def pareto_costs(table: pd.DataFrame) -> list[str]:
    """What settings are compared by beside their likelihood: of FLOPs and peak memory what all of them have.

    Not images a second, which tell of the machine and of what else it did.
    """
    return [name for name in COSTS[:2] if name in table and table[name].notna().all()]


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
        told = [gain(own[row["setting"]], own[reference["setting"]])]
        for name, label in (("train_peak_bytes", "memory"), ("train_flops_per_image", "FLOPs")):
            if row[name] > 0 and reference[name] > 0:
                told.append(f"{row[name] / reference[name]:.2f}× {label}")
        words.append(", ".join(told))
    return words


def gain(own: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> str:
    """Nats per token less the other's, both as of `by_seed`, paired by seed and test image, in words."""
    values = stats.paired(own, other)
    if not values.size:
        return "no seed in common"
    found = stats.interval(values, resamples=500)
    reach = f" ± {found.high - found.estimate:.3f}" if found.high is not None else ""
    return f"{found.estimate:+.3f}{reach} nats"


def ladder(runs: pd.DataFrame) -> pd.DataFrame:
    """C1: what each setting costs and reaches at each side, where nothing but the side differs between two at least."""
    rows = [
        {
            "setting": setting, "data": own["data"].iloc[0], "side": own["side"].iloc[0],
            "tokens": own["tokens"].iloc[0], "seeds": len(own), "parameters": own["parameters"].median(),
            "train_flops_per_image": own["train_flops_per_image"].median(),
            "predicted_train_peak_bytes": own["predicted_train_peak_bytes"].median(),
            "train_peak_bytes": own["train_peak_bytes"].median(),
            "train_images_per_second": own["train_images_per_second"].median(),
            "nats_per_token": own["nats_per_token"].mean(), "probe_accuracy_best": own["probe_accuracy_best"].mean(),
            "context": frame.context(own["record"].iloc[0], ("side",)),
        }
        for _, setting, own in groups(at_several_sides(finished(runs)))
    ]  # fmt: skip
    order = ["data", "context", "setting", "tokens"]
    return pd.DataFrame(rows).sort_values(order, ignore_index=True) if rows else pd.DataFrame()


def at_several_sides(known: pd.DataFrame) -> pd.DataFrame:
    """The runs whose setting was run at another side too, all else being equal; `line`: what such runs share."""
    known = known.assign(line=frame.alike(known, "side"))
    sides = known.groupby(["setting", "line"])["tokens"].transform("nunique")
    return known[sides > 1]


def leading_line(known: pd.DataFrame) -> pd.DataFrame:
    """Of these, the runs of the line with the most points: settings at sides."""
    points = known.drop_duplicates(["line", "setting", "tokens"])["line"].value_counts(sort=False)
    return known[known["line"] == points.idxmax()]


def exponents(runs: pd.DataFrame) -> pd.DataFrame:
    """C1, C5: how time, memory and decoding state grow with the tokens, as exponents of a power law.

    Over all sides, and for time and memory between the two largest, where what a small image costs anyway weighs least;
    of what was timed on one machine with as many threads.
    """
    measured = at_several_sides(finished(runs).dropna(subset=["seconds_per_image"]))
    measured[["machine", "threads"]] = pd.DataFrame(
        [frame.place(record) for record in measured["record"]], columns=["machine", "threads"], index=measured.index
    )
    alike = ["setting", "line", "machine", "threads"]
    rows = []
    for (setting, _, _, threads), own in measured.groupby(alike, sort=False, dropna=False):
        if own["tokens"].nunique() < 2:
            continue
        row: dict[str, Any] = {"setting": setting, "sides": own["tokens"].nunique(), "seeds": own["seed"].nunique()}
        row["threads"] = threads
        last = own[own["tokens"].isin(sorted(own["tokens"].unique())[-2:])]
        for name in ("seconds_per_image", "train_peak_bytes"):
            row |= _figure(f"exponent_{name}", _slopes(own, name))
            row |= _figure(f"last_exponent_{name}", _slopes(last, name))
        row |= _figure("exponent_state_bytes_per_image", _slopes(own, "state_bytes_per_image"))
        rows.append(row | {"context": frame.context(own["record"].iloc[0], ("side",))})
    return pd.DataFrame(rows)


def _slopes(own: pd.DataFrame, name: str) -> np.ndarray | None:
    found = [
        stats.slope(np.log(rows["tokens"].to_numpy(float)), np.log(rows[name].to_numpy(float)))
        for _, rows in own[own[name] > 0].groupby("seed")
        if rows["tokens"].nunique() == own["tokens"].nunique()
    ]
    return np.round(found, 9)[:, None] if found else None  # beyond it lie the roundings of logarithms


def cnns(runs: pd.DataFrame) -> pd.DataFrame:
    """C1: every CNN beside the trunk's settings of the same data, by parameters."""
    beside = summary(runs[runs["context"].isin(runs[runs["family"] == "cnn"]["context"])])
    if beside.empty:
        return beside
    return beside[["setting", "family", "context", "seeds", "parameters", *_spread("nats_per_token"),
                   *_spread("probe_accuracy_best")]].sort_values(["context", "parameters"])  # fmt: skip


def scans(runs: pd.DataFrame) -> pd.DataFrame:
    """C2: nats per token by setting and scan order, where nothing but the order differs between two at least."""
    known = at_any_rate(runs).dropna(subset=["nats_per_token"])
    known = known.assign(
        scan=[frame.lookup(record, "scan") or "raster" for record in known["record"]], line=frame.alike(known, "scan")
    )
    rows = [
        {"setting": setting, "lr": lr, "seeds": own.groupby("scan")["seed"].nunique().min()}
        | own.groupby("scan")["nats_per_token"].mean().to_dict()
        | {"context": frame.context(own["record"].iloc[0], ("scan",))}
        for (setting, _, lr), own in known.groupby(["setting", "line", "lr"], sort=False)
        if own["scan"].nunique() > 1
    ]
    return pd.DataFrame(rows)


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
    """Regret over the optimum on one synthetic source, by setting; beside it what its receptive field costs anybody."""

    def make(runs: pd.DataFrame) -> pd.DataFrame:
        known = trained(runs)
        known = known[(known["data"] == source) & known["regret_nats_per_token"].notna()]
        table = summary(known)
        if table.empty:
            return table
        gaps = known.groupby(["context", "setting"], as_index=False)["gap_nats_per_token"].mean()
        table = table.merge(gaps, on=["context", "setting"])
        names = (
            "setting",
            "context",
            "seeds",
            *_spread("regret_nats_per_token"),
            "gap_nats_per_token",
            "nats_per_token",
        )
        return table[list(names)]

    return make


def positions(runs: pd.DataFrame) -> pd.DataFrame:
    """C3: nats per token by what mixes, as it comes, and by positional encoding, where more than one was run.

    At one learning rate a row: the encodings of a row differ in nothing else.
    """
    from attnbench import variants  # imports torch

    known = at_any_rate(runs)
    plain = [not any(path.startswith("model.") for path in frame.told(record)) for record in known["record"]]
    known = known[np.asarray(plain, dtype=bool)].copy()
    known["position"] = [frame.lookup(record, "position") for record in known["record"]]
    known["mixer"] = known["variant"].map(variants.mixer)
    rows = ["context", "mixer", "lr"]
    table = known.pivot_table(index=rows, columns="position", values="nats_per_token", aggfunc="mean")
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


def radii(runs: pd.DataFrame) -> pd.DataFrame:
    """C4: nats per token by radius and what is otherwise the same setting, in the context with most radii."""
    found = []
    for row in frame.rows(trained(runs).dropna(subset=["nats_per_token"])):
        radius = frame.number(frame.lookup(row.record, "model.options.radius"))
        if radius is not None:
            words = [word for word in str(row.setting).split() if word != f"radius={radius}"]
            found.append((" ".join(words), row.context, float(radius), row.nats_per_token))
    table = pd.DataFrame(found, columns=["setting", "context", "radius", "nats_per_token"])
    several = table.groupby(["setting", "context"])["radius"].transform("nunique")
    table = table[several > 1]
    if table.empty:
        return table
    most = table.groupby("context")["radius"].agg(["nunique", "size"]).apply(tuple, axis=1).idxmax()
    return table[table["context"] == most]


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
    """S1: rank correlation of loss and probe accuracy over a setting's lengths of training, all else being equal."""
    known = trained(runs).dropna(subset=["nats_per_token", "probe_accuracy_best"])
    known = known.assign(line=frame.alike(known, "train.steps"))
    rows = []
    for (setting, _), own in known.groupby(["setting", "line"], sort=False):
        by_seed = [
            stats.rank_correlation(rows["nats_per_token"].tolist(), rows["probe_accuracy_best"].tolist())
            for _, rows in own.groupby("seed")
        ]
        values = np.asarray([value for value in by_seed if not math.isnan(value)])
        if len(values):
            context = frame.context(own["record"].iloc[0], ("train.steps",))
            row = {"setting": setting, "context": context, "runs": len(own), "seeds": len(values)}
            figure = _figure("rank_correlation", values[:, None])
            rows.append(row | {name: float(np.clip(value, -1, 1)) for name, value in figure.items()})  # NaN stays
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
                "chosen": "yes" if bool(tries["chosen"].any()) else "",
            })  # fmt: skip
    return pd.DataFrame(rows)


def failures(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run that did not end well, and why."""
    lost = runs[runs["status"] != "ok"]
    table = lost[["id", "status", "setting", "context", "seed"]].copy()
    table["reason"] = [str(record.get("reason") or "")[:200] for record in lost["record"]]
    return table


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
