"""From records to pages: `python -m attnbench.report RUNS --out DIR` writes tables, figures, verdicts and index.html.

Written are runs.csv, a CSV and a Markdown file for every other table (verdicts, rules, front and those of `contents`),
figures as SVG and PNG, report.md with the first rows of each table, and one self-contained index.html.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from attnbench import cli, record, storage
from attnbench.config import Settings
from attnbench.errors import Refusal


class ReportConfig(Settings):
    """Tables, figures, verdicts and one self-contained page from a folder of results."""

    runs: Annotated[Path, tyro.conf.Positional] = Path("results")
    """Folder of results, the one that has runs/ in it."""
    out: Path | None = None
    """Folder to write to; RUNS/report if none is named."""


def refresh(out: Path) -> Path:
    """Writes out/report from out/runs/*.json, with one figure so that it takes no time; the page's path."""
    return write(out, out / "report", quick=True)


@dataclass(frozen=True)
class Declared:
    """The suites whose rules apply, and what must be said about when they were declared."""

    suites: list[Any]
    notes: list[str]
    since: dict[tuple[str, str], str]
    """By the name of a swept suite and a claim: since when what its rule judges has stood as it is."""
    swept: tuple[str, ...] = ()
    """Names of the suites that were swept here, without those that another of them includes."""


def declared(results: Path) -> Declared:
    """The rules of the suites that were swept here, as they stood before, and those that come with attnbench."""
    from pydantic import ValidationError

    from attnbench import suite

    found: dict[str, list[tuple[str, suite.Suite]]] = {}
    notes = []
    for path in sorted((results / "suites").glob("*.json")):
        try:
            if not path.is_file():
                raise ValueError("a pipe or a device")
            told = json.loads(path.read_text(encoding="utf-8"))
            one = suite.Suite.model_validate(told["suite"])
            found.setdefault(one.name, []).append((str(told["declared"]), one))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
            notes.append(f"{path.name} is no suite that can be read ({type(error).__name__}); its rules are left out.")
    for versions in found.values():
        versions.sort(key=lambda version: version[0])
    suites = [versions[-1][1] for _, versions in sorted(found.items())]
    since = {
        (one.name, rule.claim): min(when for versions in found.values() if (when := _stands_since(rule, versions)))
        for one in suites
        for rule in one.rules
    }
    suites = [_own_rules(one, suites) for one in suites]
    included = {name for one in suites for name in one.includes}
    swept = {one.name for one in suites} | included
    unswept = [one for one in suite.packaged() if one.name not in swept]
    return Declared(suites + unswept, notes, since, tuple(sorted(swept - included)))


def _own_rules(one: Any, suites: list[Any]) -> Any:
    """The suite without the rules that stand in one that it includes and that was swept by itself too."""
    known = [rule for other in suites if other.name in one.includes for rule in other.rules]
    return one.model_copy(update={"rules": tuple(rule for rule in one.rules if rule not in known)})


def _stands_since(rule: Any, versions: list[tuple[str, Any]]) -> str:
    """When the last unbroken row of a suite's declarations begins that judge by this rule; "" if the last does not.

    In whatever words, and in whatever suite: one that includes others declares their rules too.
    """
    since = ""
    for when, one in reversed(versions):
        if _judges(rule) not in map(_judges, one.rules):
            break
        since = when
    return since


def _judges(rule: Any) -> Any:
    return rule.model_copy(update={"says": "", "correction": None})


@dataclass(frozen=True)
class Late:
    """A rule that was declared, or changed, `since` when `older` of the `used` runs that it judges were made."""

    since: str
    older: int
    used: int


def late(rules: Declared, judged: list[Any], runs: Any) -> dict[tuple[str, str], Late]:
    """Of the suites that were swept, by suite and claim, the rules that came after runs that they judge."""
    from attnbench import frame

    made = {str(row.id): str(row.time) for row in frame.rows(runs)}
    found = {}
    for verdict in judged:
        since = rules.since.get((verdict.suite, verdict.claim))
        if since is not None and (older := sum("" < made[id] < since for id in verdict.ids)):
            found[verdict.suite, verdict.claim] = Late(since, older, len(verdict.ids))
    return found


def _beforehand(rules: Declared, judged: list[Any], runs: Any) -> list[str]:
    """Of each swept suite, which of its rules were declared, or changed, after runs that they judge were made."""
    behind = late(rules, judged, runs)
    notes = []
    for name in dict.fromkeys(name for name, _ in rules.since):
        used = dict.fromkeys(v.claim for v in judged if v.suite == name and v.ids)
        told = [
            f"{claim} since {one.since}, {one.older} of its {one.used} runs older"
            for claim in used
            if (one := behind.get((name, claim)))
        ]
        stood = f"{len(used) - len(told)} of the {len(used)} rules that judge runs stood before all of them"
        before = stood if used else "its rules judge no run yet"
        notes.append(f"Suite {name}: {before}" + (f"; but {'; '.join(told)}." if told else "."))
    return notes


def write(results: Path, folder: Path, quick: bool = False) -> Path:
    """Writes the whole report into `folder`; the page's path. Damaged records are named on it. Raises Refusal."""
    from attnbench import (
        contents,
        figures,
        frame,
        page,
        tables,
        verdicts,
    )  # pandas takes a second: --help answers without it

    if not results.is_dir():
        raise Refusal(f"{results} is no folder; name the folder of results that has runs/ in it")
    records, problems = record.read_all(results)
    runs = frame.frame(records)
    rules = declared(results)
    judged = verdicts.judge(runs, rules.suites)
    pictures = list(figures.pictures(runs, results, {"cost"} if quick else None, png=not quick))
    front = tables.front(runs)
    made = {entry.key: entry.make(results if entry.outside else runs) for entry in contents.ENTRIES}
    _write_tables(folder, runs, front, made, verdicts.table(judged), verdicts.rules(judged))
    for picture in pictures:
        storage.write_text(folder / "figures" / f"{picture.key}.svg", picture.svg)
        if picture.png:
            storage.write_bytes(folder / "figures" / f"{picture.key}.png", picture.png)
    links = page.anchors(runs)
    context: dict[str, Any] = {
        "count": len(records),
        "commands": [f"python -m attnbench.sweep {name} --out {_named(results)}" for name in rules.swept],
        "failed": int((runs["status"] != "ok").sum()),
        "problems": problems,
        "notes": [*rules.notes, *_beforehand(rules, judged, runs)],
        "cards": page.cards(judged),
        "context": tables.leading_context(runs),
        "compared": page.compared(front),
        "front": page.shown("front", "front", "Every variant, one row", front, "any finished run", links),
        "tables": [page.shown(e.key, e.claim, e.title, made[e.key], e.note, links) for e in contents.ENTRIES],
        "runs": page.shown("runs", "all", "Every run", tables.every_run(runs), "any run", most=len(runs)),
        "figures": pictures,
        "images": page.inlined(results, runs),
        "origins": page.origins(runs),
        "commits": sorted({str(frame.part(r, "environment").get("commit") or "unknown")[:12] for r in records}),
        "claims": verdicts.CLAIMS,
        "corrections": verdicts.texts()["corrections"].values(),
    }
    storage.write_text(folder / "report.md", _render("report.md", context))
    return storage.write_text(folder / "index.html", _render("page.html", context))


def _named(results: Path) -> str:
    """The folder as a command names it, without what an absolute path tells of a machine."""
    return results.name if results.is_absolute() else str(results)


def _write_tables(folder: Path, runs: Any, front: Any, made: dict[str, Any], judged: Any, rules: Any) -> None:
    from attnbench import contents

    blanks = {entry.key: contents.blank(entry.note) for entry in contents.ENTRIES}
    storage.write_text(folder / "runs.csv", runs.drop(columns=["record", "cell"]).to_csv(index=False))
    for name, table in {"verdicts": judged, "rules": rules, "front": front, **made}.items():
        storage.write_text(folder / f"{name}.csv", table.to_csv(index=False))
        storage.write_text(folder / f"{name}.md", _markdown(table, blanks.get(name, "Not run.")) + "\n")


def _markdown(table: Any, blank: str = "") -> str:
    """Without the spaces that would line up columns: in a long table they are more than half of the bytes."""
    if not len(table):
        return blank
    safe = table.map(lambda value: _markdown_cell(value) if isinstance(value, str) else value)
    text: str = safe.rename(columns=_markdown_cell).to_markdown(index=False, floatfmt=".4g")
    head, rule, *rows = re.sub(" {2,}", " ", text).split("\n")
    return "\n".join([head, re.sub("-{4,}", "---", rule), *rows])


def _render(template: str, context: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=lambda name: str(name).endswith((".html", ".css", ".js")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["inf"] = math.inf
    environment.filters["cell"] = _markdown_cell
    return environment.get_template(template).render(**context)


def _markdown_cell(value: object) -> str:
    """Text that stays in its cell of a Markdown table, whatever it holds."""
    text = " ".join(str(value).split())
    for sign in "\\`|*_<>[]":
        text = text.replace(sign, f"\\{sign}" if sign != "<" else "&lt;")
    return text


def main(argv: list[str] | None = None) -> int:
    config = cli.parse(ReportConfig, argv, prog="attnbench.report")
    print(write(config.runs, config.out or config.runs / "report"))
    return 0


if __name__ == "__main__":
    sys.exit(cli.command(main)())
