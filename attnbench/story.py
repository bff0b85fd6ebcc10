"""`python -m attnbench.story`: the README's part that tells what the reference results say, from the records alone."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from attnbench import cli, storage
from attnbench.config import RunConfig, Settings
from attnbench.errors import Refusal

BEGIN, END = "<!-- story -->", "<!-- end of story -->"


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
    cards = page.cards(verdicts.judge(runs, report.declared(results).suites))
    commits = sorted({str(frame.part(r, "environment").get("commit") or "unknown")[:8] for r in records})
    lines = [
        f"Of {len(records)} runs (commits {', '.join(commits)}), in [{here}]({here}/report/report.md); "
        f"`python -m attnbench.sweep {suite} --out {here}` makes them again, and goes on where they end.",
        "",
        *(_verdict(card) for card in cards),
        "",
        f"Every setting in the context that most were run in ({tables.leading_context(runs)}). ± is half of the 95 % "
        "interval over seeds and test images; the rank is the range of places that the significant differences "
        f"leave open; Pareto-optimal means that no other row is as good in {page.compared(front)} and better in one, "
        "by the estimates alone. A setting with more learning rates tried had more chances; where the largest was the "
        "best, a larger one may be better:",
        "",
        *_table(front),
        "",
        f"![Nats per token of {len(front)} settings against what they cost]({here}/report/figures/cost.png)",
        "",
        *_growth(results, here),
        *_beside(published.replicas(runs)),
        *_completions(results, here, runs),
        f"What of it has been run so far, {_on_gpus(records)}:",
        "",
        *_standing(results, suite),
    ]
    return "\n".join(lines)


def _verdict(card: dict[str, Any]) -> str:
    """A claim, its verdict and its numbers in a sentence."""
    first, *others = card["statements"]
    wrong = [s["correction"] for s in others if s["correction"]]
    unlike = [
        s for s in others
        if s["claim"] != first["claim"] and not s["correction"] and s["bar"] and s["verdict"] != first["verdict"]
    ]  # fmt: skip
    unlike.sort(key=lambda s: s["metric"] != first["metric"])  # what says otherwise of the same figure comes first
    parts = [f"{first['says']}: {_effect(first)}."]
    parts += [f"A further statement is {s['verdict']}: “{s['says']}”: {_effect(s)}." for s in unlike[:1]]
    parts += [f"Misstated in part: “{c['quote']}”. {c['truth']}" for c in wrong[:1]]
    return f"- **{card['claim']}, “{card['title']}”: {card['verdict']}.** {' '.join(parts)}"


def _effect(statement: dict[str, Any]) -> str:
    return statement["effect"] + (f"; {statement['why']}" if statement["why"] and statement["bar"] else "")


COLUMNS = ("setting", "rank", "seeds", "lr", "rates_tried", "largest_rate", "nats_per_token", "probe_accuracy_best",
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
        yield (
            "With the data, tokens, shape and batch of a published model, by validation loss; ± is the sampling of its "
            "images alone, not of seeds. Optimiser, rate and steps are ours: rows that have these three and the "
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
    shown = ["sides", "exponent", "exponent_low", "exponent_high", "last_exponent", "ratio_to_baseline"]
    table = passes[shown].sort_values("exponent")
    table["step_sides"], table["step_cheaper_from_side"] = step["sides"], step["cheaper_from_side"]
    table["decoding_cheaper_from_side"] = decoding["cheaper_from_side"]
    yield (
        "How the cost of the backward pass of attention alone grows with the number of pixels, and from which side a "
        f"whole training step, and decoding by attention alone, cost less than with {tables.baseline()}: interpolated, "
        "and between which measured sides. Measured by turns with it, "
        f"{', '.join(f'{name} {size}' for name, size in curves.SHAPE.items())}, batch {curves.BATCH}, "
        f"{curves.PRECISION} ({machine}, threads: {threads:.0f}); [every cost apart]({here}/report/costs.md):"
    )
    yield ""
    yield from _markdown(table.reset_index())
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
    return f"{count} of the runs on a GPU" if count else "none of it on a GPU"


def _standing(results: Path, name: str) -> Iterator[str]:
    """How far each suite that it includes, or leaves out, has come; a cell that several share counts for the first."""
    from attnbench import budget, experiment, record, schedule, suite
    from models import VARIANTS

    known = {variant.name: variant.family for variant in VARIANTS.values()}
    whole = suite.load(name)
    others = [one for one in suite.packaged() if one.name not in (name, *whole.includes)]
    done, failed, ready = Counter[str](), Counter[str](), Counter[str]()
    waiting = 0
    for one in (whole, *others):
        cells = suite.cells(one, known, RunConfig(out=results, device="cpu"))
        resolved = [cell.model_copy(update={"config": experiment.resolve(cell.config)}) for cell in cells]
        now = schedule.schedule(
            one, resolved, lambda run: record.find(results, run), lambda run, limit: budget.fit(run, limit, results)
        )
        waiting += now.waiting
        for count, found in ((done, now.done), (failed, now.failed), (ready, now.ready)):
            count.update(cell.block.partition("/")[0] if one is whole else one.name for cell in found)
    yield "| suite | runs done | failed | not run |"
    yield "|---|---:|---:|---:|"
    for title, key in [(key, key) for key in whole.includes] + [
        (f"{one.name}, not in {name}", one.name) for one in others
    ]:
        yield f"| {title} | {done[key]} | {failed[key]} | {ready[key]} |"
    if waiting:
        yield f"| of all, waiting for learning rates to be tuned or a speed to be measured | | | {waiting} |"


def fill(readme: str, story: str) -> str:
    """The README with that story between its marks. Raises Refusal without them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Refusal(f"the README has no {BEGIN} … {END}; put these two lines where the story belongs")
    return f"{before}{begin}\n{story}\n{end}{after}"


def main(argv: Iterable[str] | None = None) -> int:
    config = cli.parse(StoryConfig, None if argv is None else list(argv), prog="attnbench.story")
    root = config.readme.resolve().parent
    story = text(config.results.resolve(), config.suite, root)
    print(storage.write_text(config.readme, fill(config.readme.read_text(encoding="utf-8"), story)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
