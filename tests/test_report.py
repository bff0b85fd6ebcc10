"""A report of anything: empty, broken, hostile, huge; and what it says of what is there."""

from __future__ import annotations

import csv
import html.parser
import json
import os
import re
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from attnbench import cli, experiment, frame, page, published, record, report, suite, sweep
from attnbench.config import RunConfig
from tests import synthetic_records as synthetic

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02fe"
    "0def46b80000000049454e44ae426082"
)


class Page(html.parser.HTMLParser):
    """What a test asks of a page: its ids, its links, its text, and that every element is closed."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.tags[tag] += 1
        if told.get("id"):
            self.ids.append(str(told["id"]))
        if tag in ("a", "use") and (told.get("href") or told.get("xlink:href")):
            self.links.append(str(told.get("href") or told.get("xlink:href")))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path) -> Page:
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert page.open == []
    doubled = [name for name, count in Counter(page.ids).items() if count > 1]
    assert doubled == []
    assert [link for link in page.links if link.startswith("#") and link[1:] not in page.ids] == []
    return page


def verdicts_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "verdicts.csv").open(encoding="utf-8", newline="") as file:
        return {row["claim"]: row for row in csv.DictReader(file)}


def made(results: Path) -> Path:
    assert cli.command(report.main)([str(results)]) == 0
    return results / "report"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study with tuning, failures and pictures, and its report."""
    out = tmp_path_factory.mktemp("study")
    extra = [synthetic.one("linear", 0, lr=lr, status=status) for lr, status in ((1e-3, "ok"), (1e-2, "nan"))]
    extra.append(synthetic.one("performer"))
    radii = [
        synthetic.one("local2d", s, nats=1.75, settings={"model": {"options": {"radius": r}}})
        for r in (1, 2)
        for s in range(3)
    ]
    extra += [
        synthetic.one("dense1d", s, steps=100) for s in range(3)
    ]  # a third length: two points tell no correlation
    records = [*synthetic.study(), *extra, *radii, synthetic.one("dense2d", 9, status="oom")]
    synthetic.write(out, records)
    for done in records[:6]:
        folder = out / "artifacts" / done["id"]
        folder.mkdir(parents=True)
        (folder / "samples.png").write_bytes(PNG)
    return made(out).parent


def test_the_report_of_a_study(study: Path) -> None:
    folder = study / "report"
    page = page_of(folder)
    assert {"C1", "C2", "C3", "C4", "C5", "S1", "S2"} <= set(page.ids)
    assert (folder / "index.html").stat().st_size < 5_000_000
    assert page.tags["svg"] > 10
    assert page.tags["img"] >= 6
    assert "Every variant, one row" in page.text
    found = verdicts_of(folder)
    assert found["C4"]["verdict"] == "supported"
    assert found["C1b"]["verdict"] == "misstated"
    assert "4·dim² parameters whatever n is" in page.text


def test_every_verdict_says_effect_interval_n_and_rule(study: Path) -> None:
    text = page_of(study / "report").text
    found = verdicts_of(study / "report")["C4"]
    for name in ("effect", "low", "high"):
        assert f"{float(found[name]):+.3f}".replace("-", "−") in text
    assert "n = 5 seeds × 40 test images" in text
    assert "expected below 0.01 at 95%" in text
    assert "python -m attnbench.run --variant local2d" in text
    assert "0123456789ab" in text


def test_every_run_is_listed_the_unlucky_too(study: Path) -> None:
    text = (study / "report" / "index.html").read_text(encoding="utf-8")
    records, _ = record.read_all(study)
    assert all(done["id"] in text for done in records)
    assert "it ended in oom" in text
    with (study / "report" / "tuning.csv").open(encoding="utf-8", newline="") as file:
        tried = list(csv.DictReader(file))
    assert {float(row["lr"]) for row in tried} == {5e-3, 1e-3, 1e-2}
    assert sum(row["chosen"] == "yes" for row in tried) == 1


def test_tables_and_figures_stand_beside_the_page(study: Path) -> None:
    folder = study / "report"
    for name in ("front", "ladder", "exponents", "windows", "decoding", "correlations", "peaks", "published", "rules"):
        assert (folder / f"{name}.csv").stat().st_size > 50, name
        assert (folder / f"{name}.md").read_text(encoding="utf-8").startswith("|"), name
    for name in ("cost", "time", "memory", "state", "reach", "representation", "depth"):
        assert (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg"), name
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "| C4 · " in markdown
    linked = re.findall(r"\]\(([\w/]+\.\w+)\)", markdown)
    assert {"figures/cost.svg", "runs.csv", "rules.md"} <= set(linked)
    assert [name for name in linked if not (folder / name).exists()] == []


def test_the_markdown_report_shows_the_first_rows_of_a_long_table_and_says_where_the_rest_is(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [synthetic.one("dense1d", steps=steps) for steps in range(1, 44)])
    folder = made(tmp_path)
    whole = (folder / "summary.md").read_text(encoding="utf-8").strip().splitlines()[2:]
    assert len(whole) == 43
    _, told = (folder / "report.md").read_text(encoding="utf-8").split("## Every setting in every context")
    told, *_ = told.split("## ")
    assert sum(line.startswith("| dense1d") for line in told.splitlines()) == 40
    assert "3 further rows are in [summary.md](summary.md)." in told


def test_a_figures_caption_is_read_under_it(study: Path) -> None:
    """What is drawn, on what, what the band is; in Markdown too, which shows no alternative text."""
    markdown, page = ((study / "report" / name).read_text(encoding="utf-8") for name in ("report.md", "index.html"))
    under = dict(re.findall(r"\(figures/(\w+)\.svg\)\n\n\*[^*\n]+\.\* (.+)\n", markdown))
    assert set(under) == {path.stem for path in (study / "report" / "figures").glob("*.svg")}
    assert (
        "digits 8×8, 4 layers of 32" in under["depth"] and "the bar: from the least to the greatest" in under["depth"]
    )
    assert under["depth"] in page and page.count("dense1d is best at layer") == 1


def test_a_table_that_nothing_had_to_fill_says_none(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [synthetic.one("dense1d")])
    folder = made(tmp_path)
    assert "## Runs that did not end well\n\nNone.\n" in (folder / "report.md").read_text(encoding="utf-8")
    text = page_of(folder).text
    assert "Runs that did not end well None." in text and "Not run. It needs runs with --position." in text


def test_front_table_marks_the_pareto_optimal_and_ranks_what_separates(study: Path) -> None:
    with (study / "report" / "front.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    assert rows["local2d"]["pareto"] == "yes" and rows["dense-none"]["pareto"] != "yes"
    best, worst = ({name: int(row["rank"].split("–")[end]) for name, row in rows.items()} for end in (0, -1))
    assert best["local2d"] == 1
    assert worst["local2d"] < best["dense1d"] <= worst["dense1d"] < best["dense-none"]
    assert worst["dense-none"] < max(worst["local2d radius=1"], worst["local2d radius=2"])
    assert rows["performer"]["rank"] == "1–9", "one seed separates from nothing"
    assert rows["linear"]["seeds"] == "5", "a rate that one seed tried is not the one that five ran at"
    assert rows["dense1d"]["against_baseline"] == "the baseline"
    assert rows["local2d"]["against_baseline"].startswith("-0.0")


def test_a_markdown_table_is_narrow_and_keeps_what_is_in_its_cells() -> None:
    head, rule, row = report._markdown(pd.DataFrame({"a long heading": ["--flag ------ end"]})).split("\n")
    assert (head, row) == ("| a long heading |", "| --flag ------ end |") and re.fullmatch(r"\|:?-{3}:?\|", rule)


def test_published_figures_are_marked_as_another_protocol(study: Path) -> None:
    text = page_of(study / "report").text
    assert "Sparse Transformer (strided)" in text
    assert text.count("another") >= 20


def test_runs_at_a_published_shape_are_ranked_with_its_figure() -> None:
    """The public replica reached 0.7103 in 24,476 steps; what has another batch, or other tokens, is not its like."""
    like = {"data": {"tokens": "palette", "colours": 16}, "model": {"dim": 16, "depth": 8, "heads": 2}}

    def one(variant: str, nats: float, batch: int = 64, **more: Any) -> dict[str, Any]:
        told = like | {"train": {"batch": batch}} | more
        return synthetic.one(variant, side=28, steps=2400, data="fashion-mnist", nats=nats, settings=told)

    records = [one("dense1d", 0.80), one("local2d", 0.65), one("axial", 0.60, batch=32)]
    records += [one("linear", 0.60, data={"tokens": "palette", "colours": 8})]
    table = published.replicas(frame.frame(records))
    assert [name.partition(":")[0] for name in table["setting"]] == ["published", "local2d", "dense1d"]
    assert table["share_of_steps"].tolist() == pytest.approx([1, 2400 / 24476, 2400 / 24476])
    assert table["validation"][0] == 0.7103
    assert table["against_published"][1] == pytest.approx(table["validation"][1] - 0.7103)
    assert table["differs"].tolist()[1:] == ["yes", "yes"]
    assert published.replicas(frame.frame([one("dense1d", 0.711)]))["differs"].tolist()[1:] == ["no"]
    assert published.replicas(frame.frame(records[2:])).empty


def test_the_same_records_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    first = (study / "report" / "index.html").read_bytes()
    report.write(study, tmp_path)
    assert (tmp_path / "index.html").read_bytes() == first


def test_refresh_is_the_same_report_with_fewer_figures(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [synthetic.one("dense1d", s) for s in range(2)])
    assert report.refresh(tmp_path) == tmp_path / "report" / "index.html"
    page = page_of(tmp_path / "report")
    assert "figure-cost" in page.ids and "figure-depth" not in page.ids


@pytest.mark.parametrize("within", ["results", "results/runs"])
def test_an_empty_folder_gives_a_page_that_says_so(tmp_path: Path, within: str) -> None:
    results = tmp_path / "results"
    (tmp_path / within).mkdir(parents=True)
    folder = made(results)
    assert "No run is recorded here yet" in page_of(folder).text
    found = verdicts_of(folder)
    assert {found[claim]["verdict"] for claim in ("C1", "C2", "C3", "C4", "C5", "S1", "S2")} == {"undecided"}
    assert "No run is recorded here yet" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_single_record(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [synthetic.one("dense1d")])
    page = page_of(made(tmp_path))
    assert "1 recorded run" in page.text


def test_a_folder_of_failures_only(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [synthetic.one("dense1d", s, status=t) for s, t in enumerate(("oom", "nan", "crash"))])
    page = page_of(made(tmp_path))
    assert "3 of 3 runs did not end well" in page.text
    assert "it ended in crash" in page.text


def test_damaged_records_are_named_and_left_out(tmp_path: Path) -> None:
    synthetic.write(tmp_path, [synthetic.one("dense1d", s) for s in range(3)])
    first, second, _ = sorted((tmp_path / "runs").glob("*.json"))
    first.write_bytes(first.read_bytes()[:500])
    second.write_bytes(second.read_bytes().replace(b'"steps"', b'"stepz"', 1))
    (tmp_path / "runs" / "list.json").write_text("[]")
    page = page_of(made(tmp_path))
    assert "3 damaged records left out" in page.text
    assert first.name in page.text and second.name in page.text


STRANGE: list[dict[str, Any]] = [
        {"metrics": None}, {"metrics": {"nats_per_token": "low"}}, {"config": None}, {"config": {"model": 3}},
        {"data": None}, {"data": {"height": "8", "width": None}}, {"environment": None}, {"curves": None},
        {"nll_map": [[1], [1, 2]]}, {"nll_map": "x"}, {"per_image_nats": ["a"]}, {"per_image_nats": [None, 1.0]},
        {"curves": {"validation_steps": [1, 2], "validation": [None, "x"]}}, {"variant": None, "family": None},
        {"metrics": {"probe_accuracy": ["a", None]}}, {"seed": None}, {"seed": "x"}, {"status": "unheard-of"},
        {"per_image_nats": [1.0]}, {"metrics": {"train_images_per_second": 0, "nats_per_token": 0}},
        {"config": {"train": {"lr": [1]}}}, {"reason": ["a"], "status": "nan"},
]  # fmt: skip
"""As another version, or another program, may have written them: sound by their checksum, strange inside."""


def strange(out: Path, change: dict[str, Any], records: list[dict[str, Any]]) -> None:
    for done in records:
        done.update(change)
        content = record.plain(done)
        path = out / "runs" / f"{done['id']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record._serialise(content | {"sha256": record._checksum(content)}))


@pytest.mark.parametrize("change", STRANGE)
def test_records_of_any_shape_never_end_in_a_traceback(tmp_path: Path, change: dict[str, Any]) -> None:
    records = [synthetic.one(v, s) for v in ("dense1d", "local2d") for s in range(2)]
    synthetic.write(tmp_path, records[:1])
    strange(tmp_path, change, records[1:])
    report.refresh(tmp_path)
    page_of(tmp_path / "report")


def test_records_of_every_shape_together_draw_every_figure_that_is_left(tmp_path: Path) -> None:
    synthetic.write(tmp_path, synthetic.study(2))
    for number, change in enumerate(STRANGE):
        strange(tmp_path, change, [synthetic.one(v, 10 + number, cost=True) for v in ("dense1d", "local2d")])
    page = page_of(made(tmp_path))
    assert {"figure-cost", "figure-depth", "figure-time"} <= set(page.ids)


HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'`|[x](javascript:alert(3))"


def test_every_string_of_a_record_is_escaped(tmp_path: Path) -> None:
    records = [synthetic.one(v, s) for v in ("dense1d", "local2d") for s in range(2)]
    for done in records:
        done.update(variant=HOSTILE, family=HOSTILE, backend=HOSTILE)
        done["data"]["name"] = HOSTILE
        done["environment"] |= {"command": HOSTILE, "commit": HOSTILE, "cpu": HOSTILE}
        done["config"]["model"]["options"] = {HOSTILE: HOSTILE}
    records.append(synthetic.one("linear", status="crash") | {"reason": HOSTILE, "variant": HOSTILE})
    synthetic.write(tmp_path, records)
    folder = made(tmp_path)
    page = page_of(folder)
    assert page.tags["script"] == 1, "the page's own"
    assert page.tags["img"] == len(re.findall("data:image/png", (folder / "index.html").read_text(encoding="utf-8")))
    assert "alert(1)" in page.text, "shown as text"
    for path in [*(folder / "figures").glob("*.svg")]:
        assert "<script" not in path.read_text(encoding="utf-8")
    assert "<script" not in (folder / "report.md").read_text(encoding="utf-8")


def test_pictures_that_are_none_and_links_out_of_the_folder_are_left_out(tmp_path: Path) -> None:
    done = synthetic.one("dense1d")
    synthetic.write(tmp_path / "r", [done])
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    folder = tmp_path / "r" / "artifacts" / done["id"]
    folder.mkdir(parents=True)
    os.symlink(secret, folder / "samples.png")
    (folder / "completions.png").write_bytes(b"<svg onload=alert(1)>")
    page = page_of(made(tmp_path / "r"))
    assert page.tags["img"] == 1, "the error map alone"


def test_pictures_never_make_the_page_too_large(tmp_path: Path) -> None:
    records = [synthetic.one("dense1d", settings={"model": {"options": {"n": n}}}) for n in range(30)]
    synthetic.write(tmp_path, records)
    for done in records:
        folder = tmp_path / "artifacts" / done["id"]
        folder.mkdir(parents=True)
        (folder / "samples.png").write_bytes(PNG + bytes(300_000))
    assert (made(tmp_path) / "index.html").stat().st_size < 5_000_000


def test_the_rules_that_were_declared_before_the_sweep_are_the_ones_applied(tmp_path: Path) -> None:
    whole = suite.load("quick")
    stricter = tuple(r.model_copy(update={"threshold": -0.5}) if r.claim == "C4" else r for r in whole.rules)
    synthetic.write(tmp_path, synthetic.study())
    sweep.declare(whole.model_copy(update={"rules": stricter}), tmp_path)
    folder = made(tmp_path)
    assert verdicts_of(folder)["C4"]["verdict"] == "refuted"
    assert re.search(
        r"Suite quick: 0 of the \d+ rules .*; but C1 since \d{4}-\S+, (\d+) of its \1 runs older;", page_of(folder).text
    )


def test_a_rule_that_was_changed_after_its_runs_is_told_of_and_one_that_was_reworded_is_not(tmp_path: Path) -> None:
    """Declared in 2020, run in 2021, and in 2022 one rule was given another threshold, and another other words."""
    whole = suite.load("quick")
    changes: dict[str, dict[str, Any]] = {"C4": {"threshold": -0.5}, "C3": {"says": "In other words"}}
    changed = tuple(r.model_copy(update=changes.get(r.claim, {})) for r in whole.rules)
    for year, one in ((2020, whole), (2022, whole.model_copy(update={"rules": changed}))):
        path = sweep.declare(one, tmp_path)
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"declared": f"{year}-01-01T00:00:00+00:00"}))
    records = synthetic.study()
    for done in records:
        done["environment"]["time"] = "2021-01-01T00:00:00+00:00"
    synthetic.write(tmp_path, records)
    text = page_of(made(tmp_path)).text
    (line,) = re.findall(
        r"Suite quick: (\d+) of the (\d+) rules .* but C4 since 2022-\S+, (\d+) of its (\d+) runs older", text
    )
    assert int(line[0]) == int(line[1]) - 1 and line[2] == line[3]
    assert not re.search(r"C3 since", text)


def test_a_suite_whose_rules_judge_nothing_says_so_and_a_broken_one_is_named(tmp_path: Path) -> None:
    sweep.declare(suite.load("quick"), tmp_path)
    (tmp_path / "suites" / "broken.json").write_text("{")
    text = page_of(made(tmp_path)).text
    assert "Suite quick: its rules judge no run yet." in text
    assert "broken.json is no suite" in text


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.command(report.main)([str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unwritable_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.command(report.main)([str(tmp_path), "--out", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def many(out: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cheap records in numbers: one in fifty failed, three seeds a setting."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for number in range(count):
        steps, seed = 100 + number // 18, number // 6 % 3
        variant = list(synthetic.EFFECTS)[number % 6]
        status = "oom" if number % 50 == 49 else "ok"
        record.write(out, synthetic.one(variant, seed, steps=steps, status=status))


def test_five_hundred_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(tmp_path, 500, monkeypatch)
    began = time.process_time()
    folder = made(tmp_path)
    assert time.process_time() - began < 20
    assert "500 recorded runs" in page_of(folder).text


@pytest.mark.soak
def test_five_thousand_records_within_thirty_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(tmp_path, 5000, monkeypatch)
    began = time.process_time()
    folder = made(tmp_path)
    assert time.process_time() - began < 30
    assert (folder / "index.html").stat().st_size < 5_000_000
    assert "5000 recorded runs" in page_of(folder).text


def test_a_records_json_is_plain(study: Path) -> None:
    """The fixture writes what runs write: nothing that only Python reads."""
    path = next((study / "runs").glob("*.json"))
    assert record.read(path) == json.loads(path.read_text(encoding="utf-8"))


def test_a_setting_is_one_however_it_was_told(tmp_path: Path) -> None:
    def told(seed: int, **settings: Any) -> dict[str, Any]:
        return synthetic.one("local2d", seed, settings=settings)

    twins = [told(0), told(0, model={"options": {"radius": 3}}), told(1, position="learned1d"), told(2, measure=True)]
    other = [told(0, model={"options": {"radius": 2}}), told(0, position="rope2d")]
    runs = frame.frame([*twins, *other])
    assert runs["setting"].tolist() == [*["local2d"] * 4, "local2d radius=2", "local2d + rope2d"]
    assert runs["chosen"].tolist() == [True, False, True, True, True, True]
    assert len(frame.select(runs, {"variant": "local2d", "model.options.radius": 3})) == 3
    assert len(frame.select(runs, {"variant": "local2d", "model.options.radius": 3, "train.lr": 5e-3})) == 3
    assert len(frame.select(runs, {"variant": "local2d", "position": "rope2d"})) == 1
    assert len(frame.select(runs, {"variant": "local2d", "train.lr": 1e-3})) == 0


def test_a_record_that_never_knew_a_setting_compares_with_those_that_do() -> None:
    old, new = synthetic.one("local2d", 0), synthetic.one("local2d", 0)
    del old["config"]["data"]["revision"]
    assert frame.context_key(old) == frame.context_key(new)
    assert frame.frame([old, new])["chosen"].tolist() == [True, False]
    new["config"]["data"]["revision"] = "0123"
    assert frame.context_key(old) != frame.context_key(new)


def test_the_command_of_a_sweeps_cell_makes_that_very_run() -> None:
    told: dict[str, Any] = {
        "variant": "local2d", "position": "rope2d", "scan": "snake", "seed": 3, "measure": False,
        "data": {"name": "source:above", "levels": 4, "side": 6}, "probe": {"enabled": False},
        "model": {"dim": 16, "options": {"radius": 2}}, "train": {"steps": 7, "lr": 1e-2, "compile": True},
    }  # fmt: skip
    config = experiment.resolve(RunConfig.model_validate(told))
    done = {"config": config.identity(), "environment": {"command": "python -m attnbench.cell"}}
    found = page.command(done)
    program = "python -m attnbench.run "
    assert found.startswith(program)
    again = cli.parse(RunConfig, shlex.split(found.removeprefix(program)), prog="attnbench.run")
    assert record.identify(experiment.resolve(again)) == record.identify(config)
    mine = {"environment": {"command": "python -m attnbench.run --variant linear"}}
    assert page.command(mine) == "python -m attnbench.run --variant linear"
