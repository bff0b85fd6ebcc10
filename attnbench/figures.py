"""The figures of the report: seaborn on matplotlib's Agg, imported only when something is drawn.

A figure is drawn from the frame of records, or not at all where the records do not carry it; its caption says what is
drawn, its text alternative also the points. Colours of text and axes follow the page (light or dark): the SVG says
`currentColor`.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from attnbench import afterwards, frame, stats, tables
from attnbench.pictures import raster

INK = "#010203"  # stands for the colour of the page's text until the SVG is written
MOST_LINES = 7
"""At most so many settings as lines of one figure: more are not told apart."""
MOST_DOTS = 9
"""At most so many settings as dots of a colour each."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<")
SEEDS = "from the least to the greatest of all seeds"


class Told(NamedTuple):
    """A figure in words: what is drawn, on what, what a bar or band is; and the points, for those who do not see it."""

    caption: str
    points: str


@dataclass(frozen=True)
class Picture:
    """A drawn figure; `svg` is an element, `png` bytes or None where none was asked for."""

    key: str
    claim: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes | None


@dataclass(frozen=True)
class Drawing:
    """How a figure is made: `draw(axes, runs)` tells what it drew, None where there is nothing to draw.

    `draw` is given the folder of results where `outside` the runs.
    """

    key: str
    claim: str
    title: str
    draw: Callable[[Any, Any], Told | None]
    outside: bool = False


def pictures(runs: pd.DataFrame, results: Path, only: set[str] | None = None, png: bool = False) -> Iterator[Picture]:
    """Every figure that the records and what lies beside them in `results` carry (of `only` these keys, if given)."""
    if tables.finished(runs).empty:
        return
    for drawing in DRAWINGS:
        if only is None or drawing.key in only:
            found = _picture(drawing, results if drawing.outside else runs, png)
            if found is not None:
                yield found


def _picture(drawing: Drawing, given: pd.DataFrame | Path, png: bool) -> Picture | None:
    with _style(drawing.key) as plt:
        figure, axes = plt.subplots(figsize=(5.4, 3.8))
        try:
            told = drawing.draw(axes, given)
            if told is None:
                return None
            picture = raster(figure, bbox_inches="tight", facecolor="white") if png else None
            alt, vector = f"{drawing.title}. {told.points}", _vector(figure, drawing.key)
            return Picture(drawing.key, drawing.claim, drawing.title, told.caption, alt, vector, picture)
        finally:
            plt.close(figure)


@contextmanager
def _style(key: str) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn

    coloured = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    ink: dict[Any, Any] = dict.fromkeys(coloured, INK)
    plain: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": key, "figure.facecolor": "none", "axes.facecolor": "none",
        "grid.color": "#88888855", "legend.frameon": False, "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "savefig.facecolor": "none",
    }  # fmt: skip
    with (
        seaborn.axes_style("whitegrid"),
        seaborn.color_palette(_colours()),
        plt.rc_context({**ink, **plain}),
    ):
        yield plt


def _vector(figure: Any, key: str) -> str:
    """The figure as an <svg> element whose ids are its own and whose ink is the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", text)  # a record's text may have what XML may not
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{key}-", text)
    text = text.replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    text = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\n\s+", "\n", text))  # a hundredth of a point will do
    return re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text))


def _colours() -> Any:
    """Seaborn's for the colour-blind without its yellow, which white hides; the first of them are least alike."""
    import seaborn

    ten = seaborn.color_palette("colorblind")
    return [ten[place] for place in (0, 1, 2, 4, 9, 3, 7, 5, 6)]


def _looks(count: int) -> list[tuple[Any, str]]:
    """As many colours and marks; both begin again, but not together."""
    return list(itertools.islice(zip(itertools.cycle(_colours()), itertools.cycle(MARKS), strict=False), count))


def _legend(axes: Any, columns: int = 3, size: int = 9) -> None:
    if axes.get_legend_handles_labels()[0]:
        # Below the axes: beside them, the letters of both would be too small on a phone.
        legend = axes.legend(
            title="", ncols=columns, fontsize=size, loc="upper center", bbox_to_anchor=(0.45, -0.16), columnspacing=1.0
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name with a dollar is a name


def _leading(runs: pd.DataFrame) -> pd.DataFrame:
    """The best MOST_LINES settings of the leading context."""
    known = _in_leading_context(runs)
    best = known.groupby("setting")["nats_per_token"].mean().nsmallest(MOST_LINES).index
    return known[known["setting"].isin(best)]


def _in_leading_context(runs: pd.DataFrame) -> pd.DataFrame:
    known = tables.finished(runs)
    return known[(known["context"] == tables.leading_context(runs)) & known["nats_per_token"].notna()]


def _of(shown: int, known: int, which: str = "best") -> str:
    """How many settings are drawn, where not all are."""
    return f"the {shown} {which} of {known} settings" if shown < known else "every setting"


def _lines(axes: Any, table: pd.DataFrame, x: str, y: str, apart: float = 0) -> None:
    """A line a setting through the means of its seeds, with bars from the least to the greatest, `apart` side by side.

    Those that are not set apart grow thinner, and their open marks smaller, so that what lies underneath is seen.
    """
    settings = table.groupby("setting", sort=False)
    count = settings.ngroups
    for order, ((name, own), (colour, mark)) in enumerate(zip(settings, _looks(count), strict=True)):
        ends = own.groupby(x)[y].agg(["mean", "min", "max"])
        reach = [(ends["mean"] - ends["min"]).clip(0), (ends["max"] - ends["mean"]).clip(0)]
        later = 1 if apart else order / max(1, count - 1)
        axes.errorbar(
            ends.index + apart * (order - (count - 1) / 2), ends["mean"], reach, label=str(name), color=colour,
            marker=mark, markerfacecolor="none", markersize=9 - 3 * later, linewidth=2.6 - 1.8 * later, elinewidth=0.8,
        )  # fmt: skip


def likelihood_against_cost(axes: Any, runs: pd.DataFrame) -> Told | None:
    """Nats per token against peak memory of training, or FLOPs where no memory was measured: a colour and mark for each
    family, a number for each setting of the Pareto front. Settings whose memory was not measured are left out by name.
    """
    table = tables.summary(tables.leading(runs))
    if table.empty:
        return None
    measured = table["train_peak_bytes"].notna().sum() > 1
    column, scale, label = (
        ("train_peak_bytes", 2**20, "training memory at peak (MiB)")
        if measured
        else ("train_flops_per_image", 1e9, "training cost (GFLOPs/image)")
    )
    means = table.dropna(subset=[column]).set_index("setting").assign(nats=lambda rows: rows["nats_per_token"])
    if means.empty:
        return None
    means = means.assign(cost=means[column] / scale, low=means["nats_per_token_low"], high=means["nats_per_token_high"])
    means[["low", "high"]] = means[["low", "high"]].apply(lambda ends: ends.fillna(means["nats"]))
    families = means.groupby("family", sort=False)
    for (family, rows), (colour, mark) in zip(families, _looks(families.ngroups), strict=True):
        reach = [(rows["nats"] - rows["low"]).clip(0), (rows["high"] - rows["nats"]).clip(0)]
        axes.errorbar(
            rows["cost"], rows["nats"], reach, linestyle="none", marker=mark, markersize=4.5, color=colour,
            label=str(family), elinewidth=0.6, alpha=0.85,
        )  # fmt: skip
    best = means[stats.pareto(means[["cost", "nats"]].to_numpy(float).tolist())].sort_values("cost")
    axes.plot(best["cost"], best["nats"], color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xlabel=label, ylabel="nats/token (less is better)")
    axes.margins(0.12)
    if means["cost"].min() > 0 and means["cost"].max() / means["cost"].min() > 2:
        axes.set_xscale("log")
        _ticks(axes.xaxis, means["cost"])
    _number(axes, best[["cost", "nats"]].to_numpy(float), [str(name) for name in best.index])
    _legend(axes)
    points = "; ".join(f"{name} {row['nats']:.3f} nats at {row['cost']:.4g}" for name, row in means.iterrows())
    absent = [str(name) for name in table["setting"] if name not in means.index]
    fewer = f" {len(absent)} more settings have no such figure." if absent else ""
    left_out = f" Not measured, so not here: {', '.join(absent)}." if absent else ""
    caption = (
        f"Nats per token against {label.partition(' (')[0]}, a point a setting, on {tables.leading_context(runs)}; the "
        "bar: the 95 % interval over seeds and test images. Dotted and numbered: those that none beats in both."
    )
    none_beats = f"None beats {', '.join(map(str, best.index))} in both."
    return Told(caption + fewer, f"{none_beats} {points}.{left_out}")


def _ticks(axis: Any, values: pd.Series) -> None:
    """Ticks of a logarithmic axis in plain numbers, as many as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    wide = values.max() / values.min()
    subs = (1.0,) if wide > 100 else (1.0, 2.0, 5.0) if wide > 10 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _number(axes: Any, front: np.ndarray, names: list[str]) -> None:
    """Numbers the points of a front (count, 2): below and left of them, where no point can lie, and none on another."""
    axes.autoscale_view()  # else the limits, and so the places, are not yet those that will be drawn
    places = axes.transData.transform(front) * 72 / axes.figure.dpi
    taken = list(places)
    for number, (point, place, name) in enumerate(zip(front, places, names, strict=True), 1):
        for reach, angle in itertools.product((12, 22, 32, 42), np.radians([200, 225, 180, 250])):
            spot = place + reach * np.array([np.cos(angle), np.sin(angle)])
            if min(np.hypot(*(spot - other)) for other in taken) > 9:
                break
        taken.append(spot)
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": INK, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(str(number), point, spot - place, textcoords="offset points", ha="center", va="center",
                      fontsize=8, arrowprops=line)  # fmt: skip
        axes.plot([], [], linestyle="none", marker=f"${number}$", color=INK, markeredgewidth=0, label=name)


def learning_curves(axes: Any, runs: pd.DataFrame) -> Told | None:
    """Validation loss against steps, a line a setting, the band its seeds."""
    import seaborn

    rows = [
        {"step": step, "nats": value, "setting": row.setting}
        for row in frame.rows(_leading(runs))
        for step, value in _validation(row.record)
    ]
    table = pd.DataFrame(rows)
    if table.empty or table["step"].nunique() < 2:
        return None
    seaborn.lineplot(table, x="step", y="nats", hue="setting", ax=axes, errorbar=("pi", 100),
                     err_kws={"alpha": 0.1, "linewidth": 0})  # fmt: skip
    axes.set(xlabel="step", ylabel="validation nats/token")
    _legend(axes)
    drawn = _of(table["setting"].nunique(), _in_leading_context(runs)["setting"].nunique())
    caption = f"Validation loss by step of {drawn} on {tables.leading_context(runs)}; the band: {SEEDS}."
    return Told(caption, "At the last step: " + _last(table, "step", "nats"))


def _validation(record: frame.Record) -> list[tuple[float, float]]:
    curves = frame.part(record, "curves")
    steps, values = curves.get("validation_steps"), curves.get("validation")
    if not isinstance(steps, list) or not isinstance(values, list):
        return []
    pairs = zip(steps, values, strict=False)
    return [(s, v) for s, v in pairs if isinstance(s, int | float) and isinstance(v, int | float)]


def _last(table: pd.DataFrame, x: str, y: str) -> str:
    ends = table[table[x] == table[x].max()].groupby("setting", sort=False)[y].mean()
    return "; ".join(f"{name} {value:.4g}" for name, value in ends.items()) + "."


def _growth(column: str, scale: float, label: str) -> Callable[[Any, pd.DataFrame], Told | None]:
    def draw(axes: Any, runs: pd.DataFrame) -> Told | None:
        from matplotlib.ticker import NullLocator

        known = tables.at_several_sides(tables.finished(runs).dropna(subset=[column, "tokens"]))
        if known.empty:
            return None
        known = tables.leading_line(known)
        most = frame.context(known["record"].iloc[0], ("side", "model.backend"))
        kept, settings = list(dict.fromkeys(known["setting"]))[:MOST_LINES], known["setting"].nunique()
        known = known[known["setting"].isin(kept)].assign(value=known[column] * scale)
        _lines(axes, known, "tokens", "value")
        axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(sorted(known["tokens"].unique()), [f"{t:.0f}" for t in sorted(known["tokens"].unique())])
        axes.xaxis.set_minor_locator(NullLocator())
        _ticks(axes.yaxis, known["value"])
        _legend(axes)
        drawn = _of(len(kept), settings, "first")
        caption = f"{label[:1].upper()}{label[1:]} of {drawn} on {most}; the bar: {SEEDS}.{_alike(known)}"
        return Told(caption, "At the largest side: " + _last(known, "tokens", "value"))

    return draw


def _alike(known: pd.DataFrame) -> str:
    """Which lines of the same sides lie on one another: at most 5 % apart at every one, which is a line's width."""
    means = known.groupby(["setting", "tokens"], sort=False)["value"].mean().unstack()
    together: list[list[str]] = []
    for name in means.index:
        own = next((own for own in together if _near(means.loc[[*own, name]])), [])
        if not own:
            together.append(own)
        own.append(str(name))
    found = [", ".join(own) for own in together if len(own) > 1]
    return f" Within 5 % of one another everywhere: {'; '.join(found)}." if found else ""


def _near(lines: pd.DataFrame) -> bool:
    return bool(lines.isna().nunique().eq(1).all() and (lines.max() / lines.min() < 1.05)[lines.notna().all()].all())


def by_reach(axes: Any, runs: pd.DataFrame) -> Told | None:
    """Nats per token against the radius of a 2D window, a line for what is otherwise the same setting."""
    import seaborn

    known = tables.radii(runs)
    if known.empty:
        return None
    seaborn.lineplot(known, x="radius", y="nats_per_token", hue="setting", marker="o", ax=axes, errorbar=("pi", 100))
    axes.set(xlabel="radius of the window (pixels)", ylabel="nats/token")
    axes.set_xticks(sorted(known["radius"].unique()))
    _legend(axes)
    means = known.groupby(["setting", "radius"], sort=False)["nats_per_token"].mean().reset_index()
    told = "; ".join(f"{row.setting} {row.radius:.0f}: {row.nats_per_token:.3f}" for row in frame.rows(means))
    return Told(f"Nats per token by radius on {known['context'].iloc[0]}; the band: {SEEDS}.", f"{told}.")


def by_cut(axes: Any, results: Path) -> Told | None:
    """What a trained model loses when each pixel is cut off from all beyond a radius, a line a model, the band its test
    images."""
    cuts = afterwards.surgery(results)
    if cuts.empty:
        return None
    cuts = cuts.dropna(subset=["reach", "cost_nats_per_token"])
    told = []
    alike = cuts.groupby("weights")["weights_of"].nunique() > 1
    for _, own in cuts.groupby(["mask", "weights_of", "fine_tuned_steps"], dropna=False):
        own = own.sort_values("reach")
        first = own.iloc[0]
        tuned = f", tuned for {first['fine_tuned_steps']:.0f} steps" if first["fine_tuned_steps"] > 0 else ""
        which = f" ({first['weights_of']})" if alike[first["weights"]] else ""
        name = f"{first['weights']}{which}, under {first['mask']}{tuned}"
        axes.plot(own["reach"], own["cost_nats_per_token"], marker="o", label=name)
        axes.fill_between(own["reach"], own["cost_nats_per_token_low"], own["cost_nats_per_token_high"], alpha=0.2)
        points = ", ".join(f"{row.reach:.0f}: {row.cost_nats_per_token:+.3f}" for row in own.itertuples())
        told.append(f"{name}: {points}")
    if not told:
        return None
    axes.axhline(0, color=INK, linewidth=0.6, linestyle=":")
    axes.set(xlabel="radius or window that is left (pixels)", ylabel="cost of the cut (nats/token)")
    axes.set_xticks(sorted(cuts["reach"].unique()))
    _legend(axes, columns=1, size=8)
    caption = (
        "What it costs a trained model to see nothing beyond a radius; the band: the 95 % interval over test images."
    )
    return Told(caption, f"{'; '.join(told)}.")


def loss_against_probe(axes: Any, runs: pd.DataFrame) -> Told | None:
    """Probe accuracy against loss, a dot a run: S1."""
    known = tables.trained(runs).dropna(subset=["nats_per_token", "probe_accuracy_best"])
    if len(known) < 3:
        return None
    most = known["data"].value_counts().index[0]
    known = known[known["data"] == most]
    settings = known["setting"].nunique()
    kept = known["setting"].value_counts().index[:MOST_DOTS]
    known = known[known["setting"].isin(kept)].head(2000)
    # Lines of markers alone: a marker is then drawn once and placed again, where a scatter draws every dot anew.
    for (name, own), (colour, mark) in zip(known.groupby("setting"), _looks(len(kept)), strict=False):
        axes.plot(own["nats_per_token"], own["probe_accuracy_best"], linestyle="none", marker=mark, markersize=4,
                  markerfacecolor="none", markeredgewidth=0.7, color=colour, label=str(name))  # fmt: skip
    axes.set(xlabel="nats/token (better to the right)", ylabel="best probe accuracy")
    axes.invert_xaxis()
    _legend(axes)
    rho = stats.rank_correlation(known["nats_per_token"].tolist(), known["probe_accuracy_best"].tolist())
    drawn = f"the {len(kept)} settings with most runs" if len(kept) < settings else "every setting"
    minus = "−" if rho < 0 else ""
    caption = f"{len(known)} runs on {most} of {drawn}; rank correlation {minus}{abs(rho):.2f}, all runs together."
    counts = known.groupby("setting").size()
    return Told(caption, "Runs: " + ", ".join(f"{name} {count}" for name, count in counts.items()) + ".")


def probe_by_depth(axes: Any, runs: pd.DataFrame) -> Told | None:
    """Probe accuracy against depth, a line a setting, the bar its seeds: S2."""
    rows = [
        {"depth": depth, "accuracy": value, "setting": row.setting}
        for row in frame.rows(_leading(runs))
        for depth, value in enumerate(frame.depths(row.record))
    ]
    if not rows:
        return None
    table = pd.DataFrame(rows)
    _lines(axes, table, "depth", "accuracy", apart=0.1)
    axes.set(xlabel="layer (0 is the embedding)", ylabel="probe accuracy")
    axes.set_xticks(sorted(table["depth"].unique()))
    _legend(axes)
    best = table.groupby(["setting", "depth"], sort=False)["accuracy"].mean().unstack().idxmax(axis=1)
    drawn = _of(table["setting"].nunique(), _in_leading_context(runs)["setting"].nunique())
    caption = f"Probe accuracy by layer of {drawn} on {tables.leading_context(runs)}; the bar: {SEEDS}."
    return Told(caption, "; ".join(f"{name} is best at layer {depth}" for name, depth in best.items()) + ".")


def heat(rows: list[list[float]], edge: int = 112) -> bytes:
    """PNG of an error map (height × width, nats), from pale (least) to dark (most)."""
    from matplotlib import colormaps
    from PIL import Image

    values = np.asarray(rows)
    spread = float(np.ptp(values)) or 1.0
    shade = (colormaps["cividis_r"]((values - values.min()) / spread)[..., :3] * 255).astype(np.uint8)
    scale = max(1, edge // max(values.shape))
    buffer = io.BytesIO()
    Image.fromarray(shade.repeat(scale, 0).repeat(scale, 1)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


DRAWINGS = (
    Drawing("cost", "front", "Likelihood against cost", likelihood_against_cost),
    Drawing("curves", "front", "Learning curves", learning_curves),
    Drawing("time", "C1", "Training time against sequence length",
            _growth("seconds_per_image", 1e3, "training time (ms/image)")),
    Drawing("memory", "C1", "Training memory against sequence length",
            _growth("train_peak_bytes", 2.0**-20, "training memory at peak (MiB)")),
    Drawing("reach", "C4", "Likelihood against the reach of a window", by_reach),
    Drawing("surgery", "C4", "A trained model under narrower masks", by_cut, outside=True),
    Drawing("state", "C5", "What decoding keeps against sequence length",
            _growth("state_bytes_per_image", 2.0**-10, "decoding state (KiB/image)")),
    Drawing("representation", "S1", "Probe accuracy against loss", loss_against_probe),
    Drawing("depth", "S2", "Probe accuracy by depth", probe_by_depth),
)  # fmt: skip
