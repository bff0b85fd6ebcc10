"""What the page shows: frames as tables of text that sort by number, verdicts in words, pictures inlined."""

from __future__ import annotations

import base64
import math
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attnbench import contents, figures, frame, tables
from attnbench.config import RunConfig
from attnbench.verdicts import CLAIMS, Verdict, texts

PICTURE_BYTES = 1_000_000
"""What the inlined pictures may take together: a page of a thousand runs stays under 3 MB."""
MOST_MAPS = 24
MOST_ROWS = 400
"""Of a table; all of them are in its CSV. The table of every run has them all."""
MOST_ORIGINS = 400


@dataclass(frozen=True)
class Column:
    """How a column is headed and its numbers are written."""

    head: str
    write: Callable[[float], str] = lambda value: f"{value:.4g}"
    scale: float = 1.0
    missing: str = "–"


@dataclass(frozen=True)
class Field:
    """A table's cell: the text, the number to sort by (None: by text), the anchor that it leads to."""

    text: str
    order: float | None = None
    href: str = ""


@dataclass(frozen=True)
class Shown:
    """A table ready for the page; `blank` stands there if it has no rows."""

    key: str
    claim: str
    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Field, ...], ...]
    blank: str
    left_out: int = 0


def compared(front: pd.DataFrame) -> str:
    """What the front table's settings are compared by, in words."""
    words = {"train_flops_per_image": "FLOPs", "train_peak_bytes": "peak memory"}
    found = ["likelihood", *(words[name] for name in tables.pareto_costs(front))]
    return " and ".join([", ".join(found[:-1]), found[-1]] if found[1:] else found)


def _count(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS: dict[str, Column] = {
    "nats_per_token": Column("nats/token", "{:.4f}".format),
    "bits_per_dim": Column("bits/dim", "{:.3f}".format),
    "validation": Column("validation loss (nats)", "{:.4f}".format),
    "images": Column("test images", _count),
    "cost_nats_per_token": Column("cost of the cut (nats/token)", "{:+.4f}".format),
    "regret_nats_per_token": Column("regret (nats/token)", "{:.4f}".format),
    "probe_accuracy_best": Column("best probe accuracy", "{:.3f}".format),
    "accuracy_embedding": Column("accuracy at the embedding", "{:.3f}".format),
    "accuracy_best": Column("accuracy at the best layer", "{:.3f}".format),
    "accuracy_last": Column("accuracy at the last layer", "{:.3f}".format),
    "best_depth": Column("best layer", "{:.2f}".format),
    "parameters": Column("parameters", _count),
    "equal_parameters": Column("as many as the baseline"),
    "train_flops_per_image": Column("training GFLOPs/image", "{:.3g}".format, 1e-9),
    "training_flops": Column("PFLOPs of the whole training", "{:.3g}".format, 1e-15),
    "train_peak_bytes": Column("training MiB at peak", "{:,.1f}".format, 2.0**-20, missing="not measured"),
    "predicted_train_peak_bytes": Column("predicted MiB", "{:,.1f}".format, 2.0**-20),
    "train_images_per_second": Column("training images/s", "{:,.1f}".format),
    "sample_images_per_second": Column("sampling images/s", "{:,.1f}".format),
    "state_bytes_per_image": Column("decoding state KiB/image", "{:,.1f}".format, 2.0**-10, missing="not measured"),
    "exponent_seconds_per_image": Column("exponent of training time", "{:.2f}".format),
    "exponent_train_peak_bytes": Column("exponent of training memory", "{:.2f}".format),
    "exponent_state_bytes_per_image": Column("exponent of decoding state", "{:.2f}".format),
    "last_exponent_seconds_per_image": Column("of time, two largest sides", "{:.2f}".format),
    "last_exponent_train_peak_bytes": Column("of memory, two largest sides", "{:.2f}".format),
    "gap_nats_per_token": Column("what its field cannot know (nats/token)", "{:.4f}".format),
    "exponent_sides": Column("sides of the exponent"),
    "exponent": Column("exponent", "{:.2f}".format),
    "last_exponent": Column("exponent, two largest sides", "{:.2f}".format),
    "ratio_to_baseline": Column("times the baseline's at the largest side", "{:.3g}".format),
    "cheaper_from_side": Column("cheaper than the baseline from image side"),
    "given_up": Column("given up at image side"),
    "step_sides": Column("sides of the step"),
    "step_cheaper_from_side": Column("training step cheaper from image side"),
    "decoding_cheaper_from_side": Column("attention's decoding cheaper from image side"),
    "row_start_nats": Column("nats at row starts", "{:.4f}".format),
    "first_row_nats": Column("nats in the first row", "{:.4f}".format),
    "interior_nats": Column("nats inside", "{:.4f}".format),
    "row_start_excess": Column("row starts less inside", "{:+.4f}".format),
    "rank_correlation": Column("rank correlation", "{:.2f}".format),
    "against_baseline": Column("against the baseline"),
    "test_nats": Column("test nats/token", "{:.4f}".format),
    "differs": Column("by more than its ±"),
    "against_published": Column("less the published loss", "{:+.4f}".format),
    "share_of_steps": Column("share of its steps", "{:.2g}".format),
    "tokens": Column("tokens", _count),
    "seeds": Column("n (seeds)", _count),
    "seed": Column("seed", _count),
    "runs": Column("runs", _count),
    "sides": Column("sides", _count),
    "seconds": Column("seconds of training", _count),
    "lr": Column("learning rate", "{:g}".format),
    "rates_tried": Column("rates tried", _count),
    "edge_rate": Column("best rate at the grid's edge"),
    "pareto": Column("Pareto-optimal"),
}


def shown(
    key: str, claim: str, title: str, table: pd.DataFrame, need: str, links: dict[str, str] | None = None,
    most: int = MOST_ROWS,
) -> Shown:  # fmt: skip
    """A frame as the page shows it. `need`: what fills it (see Entry). `links`: anchors by the first column's text."""
    table = table.dropna(axis="columns", how="all")
    names = [str(name) for name in table.columns if not str(name).endswith(("_low", "_high"))]
    rows = table.head(most).to_dict("records")
    fields = tuple(
        tuple(
            _field(row, name, (links or {}).get(str(row[name]), "") if i == 0 else "") for i, name in enumerate(names)
        )
        for row in rows
    )
    heads = tuple(COLUMNS[name].head if name in COLUMNS else name.replace("_", " ") for name in names)
    return Shown(key, claim, title, heads, fields, contents.blank(need), max(0, len(table) - most))


def _field(row: dict[Any, Any], name: str, href: str) -> Field:
    value = row[name]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Field(COLUMNS.get(name, Column(name)).missing, math.inf)
    if not isinstance(value, int | float):
        return Field(str(value), None, href)
    column = COLUMNS.get(name, Column(name))
    text = column.write(value * column.scale)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is not None and high is not None and not (math.isnan(low) or math.isnan(high)):
        text += f" ± {column.write((high - low) / 2 * column.scale).lstrip('+')}"
    return Field(minus(text), float(value), href)


def minus(text: str) -> str:
    """Numbers with the sign that is as wide as a plus."""
    return text.replace("-", "−")


@dataclass(frozen=True)
class Image:
    """A picture inlined as a data address."""

    caption: str
    alt: str
    data: str


def inlined(results: Path, runs: pd.DataFrame) -> dict[str, list[Image]]:
    """Samples and completions of one seed a setting, error maps and receptive fields, within PICTURE_BYTES together."""
    known = tables.finished(runs)
    context = tables.leading_context(runs)
    first = pd.concat([known[known["context"] == context], known[known["context"] != context]])
    first = first.drop_duplicates(["context", "setting"])
    leading = first[first["context"] == context]
    found = {"error maps": _maps(leading), "receptive fields": [], "completions": [], "samples": []}
    left = PICTURE_BYTES
    wanted = [("receptive fields", variant, results / "fields" / f"{variant}.png") for variant in _plain(leading)]
    for row in frame.rows(first):
        where, folder = f"{row.setting}, {row.context}, seed {row.seed:.0f}", results / "artifacts" / str(row.id)
        wanted += [(kind, where, folder / f"{kind}.png") for kind in ("completions", "samples")]
    for kind, where, path in wanted:
        data = _file(path, left, results)
        if data is not None:
            left -= len(data)
            found[kind].append(Image(where, f"{kind.removesuffix('s')} of {where}", data))
    return {kind: images for kind, images in found.items() if images}


def _plain(runs: pd.DataFrame) -> list[str]:
    """The variants whose name is a file's name too; somebody's own may be a path."""
    return [name for name in dict.fromkeys(map(str, runs["variant"])) if re.fullmatch(r"[\w-]+", name)]


def _maps(leading: pd.DataFrame) -> list[Image]:
    found = []
    for row in frame.rows(leading.head(MOST_MAPS)):
        nats = frame.nll_map(row.record)
        if nats:
            low, high = min(map(min, nats)), max(map(max, nats))
            caption = f"{row.setting}: {low:.2f} (pale) to {high:.2f} (dark) nats"
            found.append(Image(caption, f"Mean nats of each pixel, {caption}", _base64(figures.heat(nats))))
    return found


def _file(path: Path, left: int, results: Path) -> str | None:
    """A PNG in base64, if it is one, lies within the results wherever links lead, and fits."""
    try:
        within = path.resolve().is_relative_to(results.resolve())
        if not within or not path.is_file() or path.stat().st_size * 4 / 3 > left:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    return _base64(data) if data.startswith(b"\x89PNG\r\n") else None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def anchors(runs: pd.DataFrame) -> dict[str, str]:
    """The anchor of each setting's origin: how it was run, at which commit."""
    settings = list(dict.fromkeys(runs["setting"]))[:MOST_ORIGINS]
    return {setting: f"origin-{number}" for number, setting in enumerate(settings)}


def origins(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """For each setting and context its command, commits and seeds: where every number comes from."""
    links = anchors(runs)
    known = runs[runs["setting"].isin(links)]
    found = []
    for setting, own in known.groupby("setting", sort=False):
        contexts = []
        for context, rows in own.groupby("context", sort=False):
            environments = [frame.part(record, "environment") for record in rows["record"]]
            contexts.append({
                "context": context,
                "seeds": sorted({int(seed) for seed in rows["seed"].dropna()}),
                "commits": sorted({str(e.get("commit") or "unknown")[:12] for e in environments}),
                "dirty": any(e.get("dirty") for e in environments),
                "command": command(rows["record"].iloc[0]),
                "machine": environments[0].get("gpu") or environments[0].get("cpu") or "unknown",
            })  # fmt: skip
        found.append(
            {"anchor": links[str(setting)], "setting": setting, "contexts": contexts[:6], "more": len(contexts) - 6}
        )
    return found


def command(done: dict[str, Any]) -> str:
    """What makes this run again: as it was told, or of a sweep's cell by what is not as by default."""
    told = str(frame.part(done, "environment").get("command") or "unknown")
    if not told.endswith("attnbench.cell"):
        return told
    usual, config = (frame.flat(told) for told in (RunConfig().identity(), frame.part(done, "config")))
    differs = [(path, value) for path, value in config.items() if value != usual.get(path)]
    flags = [_flag(path, value) for path, value in differs if value is not None and path != "device"]
    return " ".join(["python -m attnbench.run", *flags])


def _flag(path: str, value: Any) -> str:
    group, dot, name = path.replace("_", "-").rpartition(".")
    if isinstance(value, bool) and not path.startswith(("model.options.", "data.options.")):
        return f"--{group}{dot}{'' if value else 'no-'}{name}"
    return f"--{path.replace('_', '-')} {shlex.quote(str(value))}"


WORDS = {
    "supported": "The records support it.",
    "refuted": "The records speak against it.",
    "undecided": "The records do not decide it.",
    "misstated": "It is not so stated in the paper, or not so by definition.",
}


def cards(found: Iterable[Verdict]) -> list[dict[str, Any]]:
    """One card a claim: its words, the leading statement, the further ones."""
    by_claim: dict[str, list[Verdict]] = {claim: [] for claim in CLAIMS}
    for verdict in found:
        by_claim[verdict.claim[:2]].append(verdict)
    told = texts()["claims"]
    cards = []
    for claim in CLAIMS:
        own = by_claim[claim]
        first = next((verdict for verdict in own if verdict.claim == claim), None)
        cards.append({
            "claim": claim, "title": told[claim]["title"], "asks": told[claim]["asks"],
            "verdict": first.verdict if first else "undecided",
            "words": WORDS[first.verdict] if first else "No rule is declared for it.",
            "statements": [_statement(v) for v in own if v is first or v.effect is not None],
            "open": [_statement(v) for v in own if v is not first and v.effect is None],
        })  # fmt: skip
    return cards


def _statement(verdict: Verdict) -> dict[str, Any]:
    return {
        "claim": verdict.claim, "suite": verdict.suite, "says": verdict.rule.says, "verdict": verdict.verdict,
        "metric": verdict.rule.metric, "effect": effect_text(verdict), "rule": verdict.rule.text(), "why": verdict.why,
        "parts": [(part.label, part.why_not or interval_text(verdict, part.found)) for part in verdict.parts],
        "correction": verdict.correction if verdict.verdict == "misstated" else None,
        "bar": bar(verdict), "threshold": _signed(verdict, verdict.rule.threshold), "records": len(verdict.ids),
    }  # fmt: skip


UNITS = {"nats_per_token": " nats/token", "regret_nats_per_token": " nats/token", "row_start_nats": " nats/token",
         "probe_accuracy_best": " accuracy", "parameters": " parameters"}  # fmt: skip


def effect_text(verdict: Verdict) -> str:
    """The effect with its interval and n, in words."""
    if verdict.effect is None:
        return f"not run: {verdict.why.removeprefix('not run: ')}"
    kind, metric = verdict.rule.kind, verdict.rule.metric
    unit = {"ratio": "×", "exponent": " (exponent)", "correlation": " (rank correlation)"}.get(
        kind, UNITS.get(metric, "")
    )
    n = f"n = {verdict.seeds} seed{'s' if verdict.seeds != 1 else ''}"
    n += f" × {verdict.units} test images" if verdict.units > 1 else ""
    if verdict.rule.exact:
        return f"{_signed(verdict, verdict.effect)}{unit}, exact"
    if verdict.low is None or verdict.high is None:
        return f"{_signed(verdict, verdict.effect)}{unit}, no interval ({n})"
    ends = f"{_signed(verdict, verdict.low)} to {_signed(verdict, verdict.high)}"
    return f"{_signed(verdict, verdict.effect)}{unit}, {verdict.level * 100:.3g} % interval {ends} ({n})"


def interval_text(verdict: Verdict, found: Any) -> str:
    """A part's effect with its interval."""
    back = math.exp if verdict.rule.kind == "ratio" else float
    if found.low is None:
        return _signed(verdict, back(found.estimate)) + ", no interval (one seed)"
    effect, low, high = (_signed(verdict, back(value)) for value in (found.estimate, found.low, found.high))
    return f"{effect} ({low} to {high})"


def _signed(verdict: Verdict, value: float) -> str:
    """An effect as its kind is written."""
    kind, metric = verdict.rule.kind, verdict.rule.metric
    if metric == "parameters" and kind == "difference":
        return minus(f"{value:+,.0f}")
    form = {"ratio": "{:.3g}", "difference": "{:+.3f}", "rise-and-fall": "{:+.3f}"}.get(kind, "{:.2f}")
    return minus(form.format(value))


def bar(verdict: Verdict) -> dict[str, float] | None:
    """An interval and its threshold as shares of a line from 0 to 100, for the little drawing beside a verdict."""
    if verdict.effect is None or verdict.low is None or verdict.high is None:
        return None
    ends = [verdict.low, verdict.high, verdict.rule.threshold]
    low, high = min(ends), max(ends)
    margin = 0.15 * (high - low) or 1.0
    low, width = low - margin, high - low + 2 * margin

    def share(value: float) -> float:
        return round(100 * (value - low) / width, 2)

    return {
        "low": share(verdict.low), "high": share(verdict.high), "effect": share(verdict.effect),
        "threshold": share(verdict.rule.threshold),
    }  # fmt: skip
