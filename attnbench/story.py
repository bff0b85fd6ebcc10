"""`python -m attnbench.story`: the README's part that tells what the reference results say, from the records alone."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnbench import cli, storage
from attnbench.config import RunConfig, Settings
from attnbench.errors import Refusal

BEGIN, END = "<!-- story -->", "<!-- end of story -->"
RUN = re.compile(r"(<!-- run (\S+) -->\n).*?(<!-- end of run -->)", re.DOTALL)
"""Marks around the table of a variant's run at its defaults."""
BESIDE = {
    "cost": "costs/*.json", "surgery": "surgery/*.csv", "transfer": "transfer/*.csv",
    "attention_map": "artifacts/*/attention_map.json",
}  # fmt: skip
"""Commands that measure beside the runs, and the files that they write."""


class StoryConfig(Settings):
    """Writes what the reference results say between two marks of the README."""

    results: Path = Path("results/reference")
    """Folder of results, with its report."""
    readme: Path = Path("README.md")
    """File that has the marks."""
    suite: str = "reference"
    """The suite that the results are to fill."""


def text(results: Path, suite: str, root: Path) -> str:
    """The story in Markdown, its links relative to the folder `root`. Raises Refusal where nothing was run."""
    from attnbench import frame, page, published, record, report, tables, verdicts

    records, _ = record.read_all(results)
    runs = frame.frame(records)
    front = tables.front(runs)
    if front.empty:
        raise Refusal(
            f"{results} holds no finished run with a likelihood; python -m attnbench.sweep {suite} makes them"
        )
    here = results.relative_to(root)
    rules = report.declared(results)
    judged = verdicts.judge(runs, rules.suites)
    late = report.late(rules, judged, runs)
    return "\n".join([
        *_origin(records, results, suite, here),
        *(_verdict(card, late) for card in page.cards(judged)),
        "",
        *_by_side(runs),
        "### Every setting, side by side",
        "",
        f"In the context that most were run in ({tables.leading_context(runs)}). ± is half of the 95 % "
        "interval over seeds and test images; the rank is the range of places that the significant differences "
        f"leave open; Pareto-optimal means that no other row is as good in {page.compared(front)} and better in one, "
        "by the estimates alone. The best layer of a probe is chosen on the test images. A setting with more learning "
        "rates tried had more chances; where the best lies at the edge of the grid, one beyond may be better. Memory "
        "and decoding are of the latest run that measured them:",
        "",
        *_table(front),
        "",
        *_trade(results, here, runs),
        *_completions(results, here, runs),
        *_growth(results, here),
        *_beside(published.replicas(runs)),
        "### How far it has come",
        "",
        f"Each suite so far, {_on_gpus(records)}. A run that several share counts in each:",
        "",
        *_standing(results, suite),
    ])  # fmt: skip


def _origin(records: list[dict[str, Any]], results: Path, suite: str, here: Path) -> Iterator[str]:
    """What was run, by which commands, and how far it reaches."""
    from attnbench import frame

    told = [frame.part(done, "environment") for done in records]
    commits = len({one.get("commit") for one in told})
    others = [
        f"{count} file{'s' * (count > 1)} of `attnbench.{command}`"
        for command, files in BESIDE.items()
        if (count := len(list(results.glob(files))))
    ]
    yield (
        f"These are {len(records):,} runs of {commits} commit{'s' * (commits != 1)} in "
        f"[{here}]({here}/report/report.md); "
        f"`python -m attnbench.sweep {suite} --out {here}` makes them again, and goes on where they end."
        + (f" Beside them lie {', '.join(others)}." if others else "")
    )
    yield ""
    largest = max(frame.number(frame.part(done, "metrics").get("parameters")) or 0 for done in records)
    shapes = [frame.part(done, "data") for done in records]
    longest = max(int(shape.get("height") or 0) * int(shape.get("width") or 0) for shape in shapes)
    machines = sorted({str(one.get("gpu") or one.get("cpu") or "a processor unknown") for one in told})
    cores = sorted({int(one["cores"]) for one in told if one.get("cores")})
    precisions = {str(frame.lookup(done, "train.precision")) for done in records}
    yield (
        f"They reach to models of {largest:,.0f} parameters and images of {longest:,} pixels, in "
        f"{' and '.join(sorted(precisions))} on {' and '.join(machines)}"
        + (f" with {' or '.join(map(str, cores))} core{'s' * (cores != [1])}" if cores else "")
        + "; of models as large as the paper's, of 76 million parameters and more, they say nothing."
    )
    yield ""


def _verdict(card: dict[str, Any], late: Mapping[tuple[str, str], Any]) -> str:
    """A claim, its verdict and its numbers in a sentence."""
    first, *others = card["statements"]
    wrong = [s["correction"] for s in others if s["correction"]]
    unlike = [
        s for s in others
        if s["claim"] != first["claim"] and not s["correction"] and s["bar"] and s["verdict"] != first["verdict"]
    ]  # fmt: skip
    unlike.sort(key=lambda s: s["metric"] != first["metric"])  # what says otherwise of the same figure comes first
    parts = [f"{first['says']}: {_effect(first, late)}."]
    parts += [f"A further statement is {s['verdict']}: “{s['says']}”: {_effect(s, late)}." for s in unlike[:1]]
    parts += [f"Misstated in part: “{c['quote']}”. {c['truth']}" for c in wrong[:1]]
    return f"- **{card['claim']}, “{card['title']}”: {card['verdict']}.** {' '.join(parts)}"


def _effect(statement: dict[str, Any], late: Mapping[tuple[str, str], Any]) -> str:
    told = [statement["effect"]]
    if statement["why"] and statement["bar"]:
        told.append(statement["why"])
    if behind := late.get((statement["suite"], statement["claim"])):
        told.append(f"the rule is younger than {behind.older} of its {behind.used} runs")
    return "; ".join(told)


def _by_side(runs: Any) -> Iterator[str]:
    """Likelihood against the side of the image, of the settings that were trained at most of them, all else equal."""
    from attnbench import frame, page, tables

    known = tables.at_several_sides(tables.trained(runs).dropna(subset=["nats_per_token"]))
    if known.empty:
        return
    known = tables.leading_line(known)
    sides = list(dict.fromkeys(known.sort_values("tokens")["side"]))
    own = {(str(rows["side"].iloc[0]), setting): rows for _, setting, rows in tables.groups(known)}
    base = tables.baseline()

    def cell(side: str, setting: str) -> str:
        rows, beside = own.get((side, setting)), own.get((side, base))
        if rows is None:
            return "not run"
        told = [f"{rows['nats_per_token'].mean():.3f}", f"n = {len(rows)}"]
        if setting != base and beside is not None:
            told.insert(1, tables.gain(tables.by_seed(rows), tables.by_seed(beside)))
        return page.minus(", ".join(told))

    rates = known["lr"].unique()
    rate = f"all at the rate {rates[0]:g}" if len(rates) == 1 else "each at its own rate"
    yield "### What wins at which length"
    yield ""
    yield (
        "Nats per token and, paired by seed and test image, the difference from "
        f"{base}, less being better, ± half of the 95 % interval. All have the same data, steps and depth, "
        f"{rate} ({frame.context(known['record'].iloc[0], ('side',))}):"
    )
    yield ""
    yield "| setting | " + " | ".join(sides) + " |"
    yield "|---" * (len(sides) + 1) + "|"
    for setting in sorted({setting for _, setting in own}):
        yield f"| {setting} | " + " | ".join(cell(side, setting) for side in sides) + " |"
    yield ""


COLUMNS = ("setting", "rank", "seeds", "lr", "rates_tried", "edge_rate", "nats_per_token", "probe_accuracy_best",
           "train_flops_per_image", "train_peak_bytes", "state_bytes_per_image", "pareto")  # fmt: skip


def _table(front: Any) -> Iterator[str]:
    spread = [name for name in front.columns if name.rpartition("_")[0] in COLUMNS and name.endswith(("_low", "_high"))]
    yield from _markdown(front[[*(n for n in COLUMNS if n in front), *spread]])


def _markdown(table: Any) -> Iterator[str]:
    from attnbench import page

    shown = page.shown("story", "story", "", table, "")
    yield "| " + " | ".join(shown.heads) + " |"
    yield "|---" * len(shown.heads) + "|"
    for row in shown.rows:
        yield "| " + " | ".join(field.text for field in row) + " |"


def _beside(replicas: Any) -> Iterator[str]:
    """Runs beside published models that they share everything but the attention and the budget with."""
    if not replicas.empty:
        yield "### Beside a published model"
        yield ""
        yield (
            "With the data, tokens, shape and batch of a published model, longest training first; ± is the sampling "
            "of images alone, not of seeds. Optimiser, rate and steps are ours: rows that have these three and the "
            "parameters in common differ in nothing but the attention, and no others:"
        )
        yield ""
        yield from _markdown(replicas)
        yield ""


def _growth(results: Path, here: Path) -> Iterator[str]:
    """How the cost of each attention grows, and from which side it is below the baseline's; needs cost cells.

    Of several machines or numbers of threads, those that most was measured with.
    """
    from attnbench import afterwards, curves, tables

    costs = afterwards.costs(results)
    if costs.empty:
        return
    costs = max((rows for _, rows in costs.groupby(["machine", "threads"], dropna=False)), key=len)
    machine, threads = costs[["machine", "threads"]].iloc[0]
    passes, step, decoding = (
        costs[(costs["scope"] == scope) & (costs["cost"] == cost)].set_index("setting")
        for scope, cost in (("attention", "backward"), ("step", "training"), ("attention", "decoding"))
    )
    shown = ["exponent_sides", "exponent", "exponent_low", "exponent_high", "last_exponent", "ratio_to_baseline",
             "given_up"]  # fmt: skip
    table = passes[shown].sort_values("exponent")
    table["step_sides"], table["step_cheaper_from_side"] = step["sides"], step["cheaper_from_side"]
    table["decoding_cheaper_from_side"] = decoding["cheaper_from_side"]
    yield "### How cost grows"
    yield ""
    yield (
        "The backward pass of one layer's attention: the exponent of its time in the number of pixels, from "
        f"{curves.FROM:,} on where three sides have as many; and the image side from which a whole training step, and "
        f"decoding by attention alone, take less time than with {tables.baseline()}: interpolated, in brackets the "
        "measured sides around it. Interleaved with it, "
        f"{', '.join(f'{name} {size}' for name, size in curves.SHAPE.items())}, batch {curves.BATCH}, "
        f"{curves.PRECISION} ({machine}, threads: {threads:.0f}); [every cost apart]({here}/report/costs.md):"
    )
    yield ""
    yield from _markdown(table.reset_index())
    yield ""


def _trade(results: Path, here: Path, runs: Any) -> Iterator[str]:
    """The figure of likelihood against cost, with what it shows in words."""
    from attnbench import figures

    for picture in figures.pictures(runs, results, only={"cost"}):
        yield f"![{picture.title}]({here}/report/figures/{picture.key}.png)"
        yield ""
        yield picture.caption
        yield ""


def _completions(results: Path, here: Path, runs: Any) -> Iterator[str]:
    """The completions of the setting of the least loss that left any."""
    from attnbench import tables

    known = tables.finished(runs)
    known = known[known["context"] == tables.leading_context(runs)].sort_values("nats_per_token")
    for _, run in known.iterrows():
        if (results / "artifacts" / str(run["id"]) / "completions.png").exists():
            yield f"![completions by {run['setting']}]({here}/artifacts/{run['id']}/completions.png)"
            yield ""
            yield f"Half-image completions by {run['setting']}: what it was shown, what it drew, what was true."
            yield ""
            return


def _on_gpus(records: Iterable[dict[str, Any]]) -> str:
    from attnbench import frame

    count = sum(bool(frame.part(done, "environment").get("gpu")) for done in records)
    return f"{count} of the runs on a GPU" if count else "nothing on a GPU"


def _standing(results: Path, name: str) -> Iterator[str]:
    """How far each suite has come, and which of its cells are not run; the cost suites too."""
    from attnbench import budget, cost, experiment, record, schedule, suite
    from models import VARIANTS

    known = {variant.name: variant.family for variant in VARIANTS.values()}
    whole = suite.load(name)
    included = whole.includes or (whole.name,)
    listed = [one for one in suite.packaged() if not one.includes]
    listed += [whole] if not {one.name for one in listed} & set(included) else []
    yield "| suite | runs done | failed | not run | which, by block |"
    yield "|---|---:|---:|---:|---|"
    for one in sorted(listed, key=lambda one: one.name not in included):
        cells = suite.cells(one, known, RunConfig(out=results, device="cpu"))
        resolved = [cell.model_copy(update={"config": experiment.resolve(cell.config)}) for cell in cells]
        now = schedule.schedule(
            one, resolved, lambda run: record.find(results, run), lambda run, limit: budget.fit(run, limit, results)
        )
        title = one.name if one.name in included else f"{one.name}, not in {name}"
        which = _by_block(now.ready) + [f"{now.waiting} that wait for a rate or a speed"] * bool(now.waiting)
        left = len(now.ready) + now.waiting
        yield f"| {title} | {len(now.done)} | {len(now.failed)} | {left} | {'; '.join(which)} |"
    for path in sorted(cost.FOLDER.glob("*.yaml")):
        found = [record.find(results, one.id, room=cost.ROOM) for one in cost.cells(cost.CostConfig(suite=path.stem))]
        count = Counter("not run" if one is None else "ok" if one["status"] == "ok" else "failed" for one in found)
        yield f"| `attnbench.cost --suite {path.stem}` | {count['ok']} | {count['failed']} | {count['not run']} | |"


def _by_block(cells: Iterable[Any]) -> list[str]:
    """Each block with its variants, and how many cells of each."""
    blocks: dict[str, Counter[str]] = {}
    for cell in cells:
        blocks.setdefault(cell.block, Counter())[cell.config.variant] += 1
    return [
        f"{block}: {', '.join(f'{variant} {count}' for variant, count in sorted(counts.items()))}"
        for block, counts in blocks.items()
    ]


def run_table(results: Path, variant: str) -> str:
    """The table that a run of the variant at its defaults prints, from its record. Raises Refusal without it."""
    from attnbench import experiment, record, terminal

    config = experiment.resolve(RunConfig(variant=variant, out=results, device="cpu"))
    done = record.find(results, record.identify(config), "ok")
    if done is None:
        raise Refusal(
            f"python -m attnbench.run --variant {variant} --out {results} makes the run that the README shows"
        )
    rows = [f"| {' | '.join(row)} |\n" for row in terminal.rows(done)]
    return "".join(["\n| figure | value | unit |\n|---|---:|---|\n", *rows, "\n"])


def fill(readme: str, story: str) -> str:
    """The README with that story between its marks. Raises Refusal without them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Refusal(f"the README has no {BEGIN} … {END}; put these two lines where the story belongs")
    return f"{before}{begin}\n{story}\n{end}{after}"


def refreshed(readme: str, results: Path, suite: str, root: Path) -> str:
    """The README with what the results say: the story, and a run's table wherever it has marks for one."""
    filled = fill(readme, text(results, suite, root))
    if len(RUN.findall(filled)) < filled.count("<!-- run "):
        raise Refusal("the README has a <!-- run VARIANT --> without its <!-- end of run -->; put that line below it")
    return RUN.sub(lambda marks: marks[1] + run_table(results, marks[2]) + marks[3], filled)


def main(argv: Iterable[str] | None = None) -> int:
    config = cli.parse(StoryConfig, None if argv is None else list(argv), prog="attnbench.story")
    readme = config.readme.read_text(encoding="utf-8")
    whole = refreshed(readme, config.results.resolve(), config.suite, config.readme.resolve().parent)
    print(storage.write_text(config.readme, whole))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
