"""Records as a pandas frame: one row a record, with what is derived from it. What a record lacks is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from attnbench.config import RunConfig
from attnbench.suite import Selector

Record = dict[str, Any]

RUN = ("id", "status", "variant", "family", "backend", "seed")
METRICS = (
    "nats_per_token", "bits_per_token", "bits_per_dim", "validation_nats_per_token", "regret_nats_per_token",
    "gap_nats_per_token", "probe_accuracy_best", "parameters", "train_flops_per_image", "train_peak_bytes",
    "predicted_train_peak_bytes",
    "train_images_per_second", "eval_images_per_second", "sample_images_per_second", "state_bytes_per_image",
    "steps", "seconds",
)  # fmt: skip
DERIVED = (
    "seconds_per_image", "training_flops", "validation", "row_start_nats", "interior_nats", "first_row_nats",
    "probe_first", "probe_last", "probe_depth",
)  # fmt: skip
KEYS = (
    "data",
    "side",
    "height",
    "width",
    "tokens",
    "objective",
    "lr",
    "setting",
    "context",
    "cell",
    "chosen",
    "time",
    "record",
)
COLUMNS = (*RUN, *METRICS, *DERIVED, *KEYS)

SETTING = ("variant", "position", "model.options", "model.backend")
"""What makes a subject of comparison; whatever else was set is the context in which it was compared."""
_COLUMN_OF = {"variant": "variant", "family": "family", "data": "data", "data.name": "data", "side": "height"}
_NOT_CONTEXT = ("seed", "train.lr", "measure", "sample", "data.root", "probe.enabled", "train.checkpoint_every")
_SHOWN = {
    "data.name",
    "data.side",
    "model.dim",
    "model.depth",
    "model.objective",
    "train.steps",
    "train.batch",
    "device",
}


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record, columns COLUMNS; `record` is the record itself, `chosen` False for a rate that lost."""
    runs = pd.DataFrame([_row(record) for record in records], columns=list(COLUMNS))
    numbers = [*METRICS, *DERIVED, "height", "width", "tokens", "seed", "lr"]
    runs[numbers] = runs[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    runs["chosen"] = _chosen(runs) & runs["seed"].notna()  # a run without a seed cannot be paired
    runs["chosen"] &= ~_twice(runs)
    return runs


def rows(runs: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples."""
    return iter(runs.itertuples())


def by_seed(runs: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """(seed, its runs)."""
    return ((int(str(seed).partition(".")[0]), own) for seed, own in runs.groupby("seed"))


def lookup(record: Record, path: str) -> Any:
    """A record's value by a selector's key: its own keys, `data` (name), `side` (height), or a dotted setting.

    Where nothing was told, it is what the variant has of its own.
    """
    if path in RUN:
        return record.get(path)
    if path in ("data", "data.name"):
        return part(record, "data").get("name") or part(part(record, "config"), "data").get("name")
    if path == "side":
        return part(record, "data").get("height")
    found: Any = record.get("config")
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return _untold(record).get(path) if found is None else found


def told(record: Record) -> Record:
    """What of its subject (SETTING) a record was told to be other than the variant is of its own, by dotted setting."""
    config, own = part(record, "config"), _untold(record)
    model = part(config, "model")
    options = {f"model.options.{name}": value for name, value in part(model, "options").items()}
    found = {"position": config.get("position"), **options, "model.backend": model.get("backend")}
    nothing = {"position": None, "model.backend": "auto"}
    return {path: value for path, value in found.items() if value not in (own.get(path), nothing.get(path), None)}


def _untold(record: Record) -> Mapping[str, Any]:
    from attnbench import variants  # imports torch, which a report without records does without

    name = record.get("variant")
    return variants.untold(name) if isinstance(name, str) else {}


def matches(record: Record, selector: Selector) -> bool:
    """Whether a record is one that a selector means; one that names a variant means it at its own position, options and
    backend, but for those that it names too."""
    if "variant" in selector and any(path not in selector for path in told(record)):
        return False
    return all(
        lookup(record, path) in (value if isinstance(value, tuple) else (value,)) for path, value in selector.items()
    )


def select(runs: pd.DataFrame, *selectors: Selector) -> pd.DataFrame:
    """The finished runs that all the selectors mean, at the rate that they name or else at the chosen one."""
    kept = (runs["status"] == "ok") & runs["seed"].notna()
    kept &= ~_twice(runs) if any("train.lr" in selector for selector in selectors) else runs["chosen"].astype(bool)
    for selector in selectors:
        for path, value in selector.items():
            if path in _COLUMN_OF:  # by column first: most records are out before anyone looks into them
                kept &= runs[_COLUMN_OF[path]].isin(value if isinstance(value, tuple) else (value,))
    found = runs[kept]
    chosen = [all(matches(record, selector) for selector in selectors) for record in found["record"]]
    return found[np.asarray(chosen, dtype=bool)]


def context_key(record: Record, without: Iterable[str] = ()) -> str:
    """Everything that two runs must share to be compared, but for the settings named in `without`.

    Settings at their default are left out, so that records which never knew a new one compare with those that do.
    """
    left_out = (
        {*without} | ({"data.name"} if "data" in without else set()) | ({"data.side"} if "side" in without else set())
    )
    told = {
        path: value
        for path, value in flat(part(record, "config")).items()
        if not _under(path, (*SETTING, *_NOT_CONTEXT, *left_out))
        and (path not in _DEFAULTS or value != _DEFAULTS[path])
    }
    if "side" not in without and "data" not in without:
        told["checksum"] = part(record, "data").get("checksum")
    return json.dumps(told, sort_keys=True, default=str)


def alike(runs: pd.DataFrame, *without: str) -> pd.Series:
    """The context_key of every run: equal where runs differ in no setting but those named and their subject."""
    return pd.Series([context_key(record, without) for record in runs["record"]], index=runs.index, dtype=object)


def part(record: Mapping[str, Any], key: str) -> Record:
    """A record's sub-dictionary, empty where there is none."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def place(record: Record) -> tuple[str, float | None]:
    """Where it was timed: the machine, and its number of threads."""
    where = part(record, "environment")
    return str(where.get("gpu") or where.get("cpu") or "unknown"), number(where.get("threads"))


def _row(record: Record) -> dict[str, Any]:
    config, data, metrics = part(record, "config"), part(record, "data"), part(record, "metrics")
    height, width = number(data.get("height")), number(data.get("width"))
    row: dict[str, Any] = {key: record.get(key) for key in RUN}
    row |= {key: number(metrics.get(key)) for key in METRICS}
    row |= _derived(record, metrics)
    row |= {
        "data": lookup(record, "data"),
        "side": f"{height:.0f}×{width:.0f}" if height and width else None,
        "height": height,
        "width": width,
        "tokens": height * width if height and width else None,
        "objective": part(config, "model").get("objective"),
        "lr": number(part(config, "train").get("lr")),
        "setting": setting(record),
        "context": context(record),
        "cell": f"{setting(record)}|{context_key(record)}",
        "chosen": True,
        "time": str(part(record, "environment").get("time") or ""),
        "record": record,
    }
    row["steps"] = row["steps"] if row["steps"] is not None else number(part(config, "train").get("steps"))
    return row


def _derived(record: Record, metrics: Record) -> dict[str, float | int | None]:
    speed = number(metrics.get("train_images_per_second"))
    found: dict[str, float | int | None] = {"seconds_per_image": 1 / speed if speed else None}
    cost, steps = number(metrics.get("train_flops_per_image")), number(metrics.get("steps"))
    batch = number(part(part(record, "config"), "train").get("batch"))
    found["training_flops"] = cost * steps * batch if cost and steps and batch else None
    found["validation"] = number(metrics.get("validation_nats_per_token"))
    if found["validation"] is None:  # a supervised run has a loss of its own
        found["validation"] = number(metrics.get("validation_nats_per_label"))
    found |= _by_place(record.get("nll_map"))
    probe = depths(record)
    if probe:
        found |= {"probe_first": probe[0], "probe_last": probe[-1], "probe_depth": probe.index(max(probe))}
    return found


def depths(record: Record) -> list[float]:
    """Probe accuracy by depth, embedding first; empty where it was not probed."""
    found = part(record, "metrics").get("probe_accuracy")
    numbers = [number(value) for value in found] if isinstance(found, list) else []
    return [value for value in numbers if value is not None] if None not in numbers else []


def nll_map(record: Record) -> list[list[float]] | None:
    """The error map (height × width), nats; None where there is none or it is no rectangle of numbers."""
    found = record.get("nll_map")
    if not isinstance(found, list) or not found or not all(isinstance(row, list) and row for row in found):
        return None
    rows = [[number(value) for value in row] for row in found]
    if len({len(row) for row in rows}) != 1 or any(value is None for row in rows for value in row):
        return None
    return [[float(value or 0.0) for value in row] for row in rows]


def numbers(lists: Any) -> NDArray[np.float64] | None:
    """Equally long lists of finite numbers as an array; None where they are something else."""
    try:
        found = np.asarray(lists, dtype=float)
    except (TypeError, ValueError):
        return None
    return found if found.size and np.isfinite(found).all() else None


def _by_place(found: Any) -> dict[str, float | int | None]:
    """Mean nats of the first row, of the row starts below it, and of what has a neighbour on every earlier side."""
    rows = nll_map({"nll_map": found})
    if rows is None or len(rows) < 2 or len(rows[0]) < 3:
        return {}
    inside = [value for row in rows[1:] for value in row[1:-1]]
    return {
        "first_row_nats": sum(rows[0]) / len(rows[0]),
        "row_start_nats": sum(row[0] for row in rows[1:]) / (len(rows) - 1),
        "interior_nats": sum(inside) / len(inside),
    }


def setting(record: Record) -> str:
    """The subject in words: the variant, its position if not its own, its options, its backend if not automatic."""
    found, words = told(record), [str(record.get("variant"))]
    if position := found.pop("position", None):
        words.append(f"+ {position}")
    backend = found.pop("model.backend", None)
    words += [f"{path.removeprefix('model.options.')}={value}" for path, value in sorted(found.items())]
    return " ".join([*words, *([f"({backend})"] if backend else [])])


def context(record: Record, without: Iterable[str] = ()) -> str:
    """Where it was compared, in words: data, shape of the trunk, budget, whatever else is not at its default.

    What is named in `without` is left out.
    """
    config, data = part(record, "config"), part(record, "data")
    if not config:
        return "unknown"
    model, train = part(config, "model"), part(config, "train")
    side = part(config, "data").get("side") or "?"  # a run that failed early does not know more
    size = "" if "side" in without else f" {data.get('height', side)}×{data.get('width', side)}"
    words = [f"{lookup(record, 'data')}{size}"]
    count = train.get("steps")
    steps = "steps" if "train.steps" in without else f"{count} step{'' if count == 1 else 's'}"
    words.append(f"{model.get('depth')} layers of {model.get('dim')}, {steps} of {train.get('batch')}")
    if config.get("device") == "cuda":
        words.append("CUDA")
    if model.get("objective") != "ar":
        words.append(str(model.get("objective")))
    words += [
        f"{path.removeprefix('train.').replace('.', ' ')} {value}"
        for path, value in flat(config).items()
        if not _under(path, (*SETTING, *_NOT_CONTEXT, *_SHOWN, *without)) and value not in _usual(path)
    ]
    return ", ".join(words)


def _usual(path: str) -> tuple[Any, ...]:
    """What a setting's value need not be mentioned for: its default, and the precision that a CPU falls back to."""
    return (*(["float32"] if path == "train.precision" else []), *([_DEFAULTS[path]] if path in _DEFAULTS else []))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _under(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def number(value: Any) -> float | int | None:
    """A finite number as it is; None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _chosen(runs: pd.DataFrame) -> pd.Series:
    """Of the rates that a cell tried on most seeds, the best by validation on the seeds that tried them all.

    A failure loses; so does what was tried on fewer seeds, for a sweep repeats what it chose.
    """
    chosen = pd.Series(True, index=runs.index, dtype=bool)
    for _, tried in runs.groupby("cell", sort=False):
        if tried["lr"].nunique() < 2:
            continue
        loss = tried["validation"].where(tried["status"] == "ok", math.inf).fillna(math.inf)
        table = tried.assign(loss=loss).pivot_table(
            index="seed", columns="lr", values="loss", aggfunc="min", dropna=False
        )
        seeds = np.isfinite(table).sum()
        table = table.loc[:, seeds == seeds.max()]
        shared = table.dropna()
        means = (shared if len(shared) else table.fillna(math.inf)).mean()
        chosen[tried.index] = tried["lr"] == means.idxmin()
    return chosen


def _twice(runs: pd.DataFrame) -> pd.Series:
    """Which repeat a finished run of the same cell, rate and seed that tells as much; of several, all but one.

    Of an own attention's versions the latest counts.
    """
    known = runs[runs["status"] == "ok"].sort_values("train_peak_bytes", kind="stable", na_position="last")
    own = np.array([bool(record.get("code")) for record in known["record"]], dtype=bool)
    known = known.assign(own=known["time"].where(own, "")).sort_values("own", kind="stable", ascending=False)
    repeated = known.duplicated(["cell", "lr", "seed"])
    return repeated.reindex(runs.index, fill_value=False)


_DEFAULTS = flat(RunConfig.model_construct(variant="").model_dump(mode="json"))
