"""What the README tells of the reference results is what their records say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

import models
from attnbench import budget, experiment, record, report, story, suite, sweep
from attnbench.config import RunConfig
from attnbench.errors import Refusal
from tests import synthetic_records as synthetic

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results" / "reference"


def test_the_readme_says_what_the_reference_records_say() -> None:
    """After new records: python -m attnbench.report results/reference && python -m attnbench.story."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert story.RUN.search(readme)
    assert story.refreshed(readme, REFERENCE, "reference", ROOT) == readme


def test_every_reference_record_is_sound_and_its_report_counts_them_all() -> None:
    records, problems = record.read_all(REFERENCE)
    assert problems == []
    first = (REFERENCE / "report" / "report.md").read_text().splitlines()[0]
    assert first.startswith(f"# attnbench: {len(records)} runs of `python -m attnbench.sweep ")
    assert first.endswith(" --out results/reference`")
    assert not [r["id"] for r in records if r["environment"]["dirty"]], "made by code that no commit holds"


def test_every_reference_run_is_a_cell_of_the_suite_that_makes_them_again() -> None:
    known = {variant.name: variant.family for variant in models.VARIANTS.values()}
    cells = suite.cells(suite.load("reference"), known, RunConfig(out=REFERENCE, device="cpu"))
    assert len(cells) > 1400
    wanted = [experiment.resolve(cell.config) for cell in cells]
    fitted = [
        budget.fit(config, cell.budget, REFERENCE) if cell.budget else config
        for config, cell in zip(wanted, cells, strict=True)
    ]
    ids = {record.identify(config) for config in fitted if isinstance(config, RunConfig)}
    assert {path.stem for path in (REFERENCE / "runs").glob("*.json")} - ids == set()


def test_no_rule_compares_reference_runs_that_differ_in_more_than_it_names() -> None:
    """Such a pair would wait for ever for runs that its suite does not have."""
    rules = pd.read_csv(REFERENCE / "report" / "rules.csv", dtype=str, keep_default_na=False)
    assert len(rules) > 40 and rules[rules["why"].str.contains("different settings")].empty


def test_the_reference_results_stay_small() -> None:
    kept = [path for path in REFERENCE.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert 0 < sum(path.stat().st_size for path in kept) < 20e6


@pytest.fixture
def results(tmp_path: Path) -> Path:
    synthetic.write(tmp_path / "results", synthetic.study(3))
    return tmp_path / "results"


def test_another_record_another_story(results: Path) -> None:
    before = story.text(results, "quick", results.parent)
    assert "**C3, “" in before and "| local2d | 1" in before
    for path in sorted((results / "runs").glob("local2d-*.json")):
        told = json.loads(path.read_text())
        if told["per_image_nats"]:
            told["per_image_nats"] = [nats + 1 for nats in told["per_image_nats"]]
            told["metrics"]["nats_per_token"] += 1
            record.write(results, told, replace=True)
    after = story.text(results, "quick", results.parent)
    assert "| local2d | 1" not in after and "| local2d | 6" in after


def test_completions_are_those_of_the_best_that_left_any(results: Path) -> None:
    known, _ = record.read_all(results)
    one = next(r["id"] for r in known if r["variant"] == "dense2d" and r["config"]["train"]["steps"] == 250)
    folder = results / "artifacts" / one
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "pictures" / "completions.png", folder / "completions.png")
    assert f"](results/artifacts/{one}/completions.png)" in story.text(results, "quick", results.parent)


def test_a_readme_without_marks_and_results_without_runs_are_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="put these two lines"):
        story.fill("# no marks", "story")
    with pytest.raises(Refusal, match="put that line below"):
        readme = f"<!-- run dense1d -->\n{story.BEGIN}\n{story.END}"
        story.refreshed(readme, results, "quick", results.parent)
    with pytest.raises(Refusal, match="no finished run"):
        story.text(tmp_path / "none", "quick", tmp_path)
    (tmp_path / "none").mkdir()
    assert report.write(tmp_path / "none", tmp_path / "report").exists()


def test_likelihood_by_side_is_paired_and_says_what_was_not_run(tmp_path: Path) -> None:
    """local2d is planted 0.06 below dense1d; linear was run at one side only, and dense2d at another once."""
    runs = [
        synthetic.one(name, seed, side=side) for name in ("dense1d", "local2d") for seed in range(3) for side in (8, 16)
    ]
    runs += [synthetic.one("linear", seed) for seed in range(3)]
    runs += [synthetic.one("dense2d", side=side) for side in (16, 32)]
    synthetic.write(tmp_path / "results", runs)
    told = story.text(tmp_path / "results", "quick", tmp_path)
    _, table = told.split("### What wins at which length")
    rows = {line.split(" | ")[0].strip("| "): line for line in table.split("\n\n")[2].splitlines()}
    assert rows["setting"] == "| setting | 8×8 | 16×16 | 32×32 |"
    assert len(re.findall(r"−0\.0[56]\d ± 0\.0\d\d nats, n = 3", rows["local2d"])) == 2
    assert rows["dense1d"].count("n = 3") == 2 and "nats" not in rows["dense1d"]
    assert rows["dense2d"].startswith("| dense2d | not run | ") and "linear" not in rows


def test_a_rule_that_came_after_its_runs_is_called_younger(results: Path) -> None:
    sweep.declare(suite.load("quick"), results)
    for number, done in enumerate(record.read_all(results)[0]):
        done["environment"]["time"] = ("2020-01-01T00:00:00+00:00", "2099-01-01T00:00:00+00:00", "")[number % 3]
        record.write(results, done, replace=True)
    told = story.text(results, "quick", results.parent)
    behind = re.search(r"\*\*C4, .*; the rule is younger than (\d+) of its (\d+) runs", told)
    assert behind and 0 < int(behind[1]) < int(behind[2]) / 2, "of one in three it is, of one in three nobody knows"


def test_growth_is_told_of_the_machine_and_threads_that_most_was_measured_with(results: Path) -> None:
    for side in (16, 32, 64):
        synthetic.cost_cell(results, "linear", side, 1e-6 * side**2, threads=2, phase="backward")
        synthetic.cost_cell(results, "dense1d", side, 1e-9 * side**3, threads=2, phase="backward", against=False)
        synthetic.cost_cell(results, "linear", side, 1e-3 * side, threads=1, phase="backward")
    told = story.text(results, "quick", results.parent)
    assert "(A, threads: 2)" in told and "| linear | 16–64 | 1.00" in told and "| 0.50" not in told
