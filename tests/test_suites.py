"""The suites that come with attnbench load, name what exists, and say what they are; bad ones are refused in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import models
from attnbench import experiment, frame, record, suite, verdicts
from attnbench.config import RunConfig
from attnbench.errors import Refusal

KNOWN = {name: variant.family for name, variant in models.VARIANTS.items()}
ASKED_FOR = {"quick", "c1", "c2", "c3", "c4", "c5", "findings", "replica", "replica-tenth", "reference"}
BASE = RunConfig(device="cpu")


def test_the_suites_that_were_promised_are_there() -> None:
    assert set(suite.names()) >= ASKED_FOR


@pytest.mark.parametrize("name", suite.names())
def test_a_suite_names_what_exists(name: str) -> None:
    cells = suite.cells(suite.load(name), KNOWN, BASE)
    assert len(cells) > 5
    for cell in cells:
        known = models.options(cell.config.variant)
        assert set(cell.config.model.options) <= set(known), f"{cell.key} has options that the variant lacks"


@pytest.mark.parametrize("name", suite.names())
def test_a_suites_head_says_what_it_answers_takes_and_expects(name: str) -> None:
    head = (suite.FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\nquestion:")[0]
    for word in ("# Answers:", "# Takes: on 2 cores:", "on one GPU:", "# Expect:"):
        assert word in head
    assert all(line.startswith("#") for line in head.splitlines())


def test_every_claim_has_a_rule_in_quick_and_in_reference() -> None:
    for name in ("quick", "reference"):
        assert {rule.claim for rule in suite.load(name).rules} >= set(verdicts.CLAIMS)


@pytest.mark.parametrize("name", suite.names())
def test_the_rules_of_a_suite_can_be_met_by_its_own_cells(name: str) -> None:
    """Every side of every pair selects cells of the suite, of which those of two sides differ in nothing but what the
    rule names: one that nothing can satisfy decides nothing."""
    whole = suite.load(name)
    configs = [experiment.resolve(cell.config) for cell in suite.cells(whole, KNOWN, BASE)]
    records = [
        {"config": config.identity(), "variant": config.variant, "backend": None, "family": KNOWN[config.variant],
         "seed": config.seed, "data": {"name": config.data.name, "height": config.data.side or 8}}
        for config in configs
    ]  # fmt: skip
    for rule in whole.rules:
        judged = [record for record in records if frame.matches(record, rule.where)]
        for pair in rule.pairs:
            sides = [side for side in (pair.these, pair.those) if side is not None]
            free = verdicts.free(rule, pair)
            found = [
                {(frame.context_key(record, free), record["seed"]) for record in judged if frame.matches(record, side)}
                for side in sides
            ]
            shared = set.intersection(*found)
            told = f"{rule.claim}: {' against '.join(suite.shown(side) for side in sides)}"
            assert shared, told
            assert len({seed for _, seed in shared}) > 1, f"{told} has one seed"


def test_corrections_that_rules_name_exist() -> None:
    known = verdicts.texts()["corrections"]
    named = {rule.correction for one in suite.packaged() for rule in one.rules if rule.correction}
    assert named and named <= set(known)


def test_cells_of_a_block_are_all_points_for_all_seeds(tmp_path: Path) -> None:
    blocks = [{"name": "a", "variants": ["dense1d", "local2d"], "seeds": 2, "settings": {"train": {"steps": 7}},
               "grid": {"data.side": [4, 8], "model.dim": [16, 32]}}]  # fmt: skip
    cells = suite.cells(written(tmp_path, blocks=blocks), KNOWN, BASE)
    assert len(cells) == 2 * 2 * 4
    assert len({record.identify(cell.config) for cell in cells}) == 16
    assert len({cell.key for cell in cells}) == 8
    assert {cell.config.train.steps for cell in cells} == {7}
    assert [cell.config.seed for cell in cells] == [0] * 8 + [1] * 8


def test_a_tuned_block_tries_every_rate(tmp_path: Path) -> None:
    blocks = [{"name": "a", "variants": ["dense1d"], "seeds": 2, "tune": {"lr": [1e-3, 1e-2, 0.1]}}]
    cells = suite.cells(written(tmp_path, blocks=blocks), KNOWN, BASE)
    assert [(cell.config.seed, cell.config.train.lr) for cell in cells] == [
        (s, lr) for s in (0, 1) for lr in (1e-3, 1e-2, 0.1)
    ]


def test_all_and_family_stand_for_variants(tmp_path: Path) -> None:
    blocks: list[dict[str, Any]] = [
        {"name": "a", "variants": "all", "seeds": 1},
        {"name": "b", "variants": ["family:local", "dense1d", "mine.py:Own"], "seeds": [7]},
    ]
    cells = suite.cells(written(tmp_path, blocks=blocks), KNOWN, BASE)
    assert {cell.config.variant for cell in cells if cell.block == "a"} == set(KNOWN)
    family = {name for name, own in KNOWN.items() if own == "local"}
    assert {cell.config.variant for cell in cells if cell.block == "b"} == family | {"dense1d", "mine.py:Own"}


def test_blocks_do_not_leak_into_one_another(tmp_path: Path) -> None:
    """YAML anchors share one dictionary: what a grid sets must not reach the next cell."""
    settings = {"model": {"dim": 32}}
    blocks = [{"name": n, "variants": ["local2d"], "seeds": 1, "settings": settings, "grid": g}
              for n, g in (("a", {"model.options.radius": [1, 2]}), ("b", {}))]  # fmt: skip
    cells = suite.cells(written(tmp_path, blocks=blocks), KNOWN, BASE)
    assert [cell.config.model.options for cell in cells] == [{"radius": 1}, {"radius": 2}, {}]


def written(folder: Path, **told: Any) -> suite.Suite:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"question": "?"} | told), encoding="utf-8")
    return suite.load(str(path))


BLOCK = {"name": "a", "variants": ["dense1d"], "seeds": 1}
RULE = {"claim": "C4", "says": "x", "pairs": [{"these": {"variant": "linear"}, "those": {"variant": "dense1d"}}],
        "expects": "below", "threshold": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"blocks": [BLOCK | {"variants": ["dense-rop2d"]}]}, "did you mean 'dense-rope2d'"),
        ({"blocks": [BLOCK | {"variants": ["family:locl"]}]}, "did you mean 'local'"),
        ({"blocks": [BLOCK | {"settings": {"train": {"stepz": 3}}}]}, "train.stepz"),
        ({"blocks": [BLOCK | {"settings": {"train": {"steps": -3}}}]}, "train.steps"),
        ({"blocks": [BLOCK | {"settings": {"model": {"dim": 30, "heads": 4}}}]}, "does not divide"),
        ({"blocks": [BLOCK | {"grid": {"train.stepz": [3]}}]}, "train.stepz"),
        ({"blocks": [BLOCK | {"colour": "red"}]}, "colour"),
        ({"blocks": [BLOCK | {"variants": []}]}, "variants"),
        ({"blocks": [BLOCK | {"tune": {"lr": [1e-3]}}]}, "lr"),
        ({"blocks": [BLOCK | {"budget": {"flops": 1.0, "seconds": 1.0}}]}, "one of flops"),
        ({"blocks": [BLOCK, BLOCK | {"seeds": 2}]}, "two blocks called a; give each"),
        ({"rules": [RULE | {"claim": "C9x2"}]}, "claim"),
        ({"rules": [RULE | {"expects": "around"}]}, "expects"),
        ({"rules": [RULE | {"pairs": [{"these": {"variant": "linear"}}]}]}, "needs both"),
        ({"rules": [RULE | {"threshold": float("nan")}]}, "threshold"),
        ({"includes": ["quik"]}, "did you mean 'quick'"),
        ({"blocks": [BLOCK | {"settings": {"seed": 4}}]}, "seed is no setting of its cells; name seeds"),
        ({"blocks": [BLOCK | {"grid": {"train.lr": []}}]}, "train.lr has no value"),
        ({"rules": [RULE | {"claim": "C9"}]}, "claim"),
        ({"rules": [RULE | {"where": {"train.stesp": 10}}]}, "did you mean 'train.steps'"),
        ({"rules": [RULE | {"pairs": [{"these": {"variant": "linaer"}, "those": {}}]}]}, "did you mean 'linear'"),
        ({"rules": [RULE | {"metric": "nats_per_tokn"}]}, "did you mean 'nats_per_token'"),
        ({"rules": [RULE | {"correction": "typo"}]}, "rule C4: unknown correction 'typo'"),
    ],
)
def test_a_bad_suite_is_refused_in_one_line(tmp_path: Path, told: dict[str, Any], said: str) -> None:
    with pytest.raises(Refusal, match=said) as refusal:
        whole = written(tmp_path, **told)
        suite.cells(whole, KNOWN, BASE)
        verdicts.check(whole, KNOWN)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [one.name for one in suite.packaged()])
def test_rules_of_the_packaged_suites_name_what_there_is(name: str) -> None:
    verdicts.check(suite.load(name), KNOWN)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "question: !!python/object/apply:os.system [ls]\n", ""])
def test_a_file_that_is_no_suite_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Refusal) as refusal:
        suite.load(str(path))
    assert "\n" not in str(refusal.value)


def test_an_unknown_suite_and_a_missing_file_are_refused() -> None:
    with pytest.raises(Refusal, match="did you mean 'quick'"):
        suite.load("quik")
    with pytest.raises(Refusal, match="No such file"):
        suite.load("nowhere.yaml")


def test_a_suite_that_includes_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"question: x\nincludes: ['{path}']\n", encoding="utf-8")
    with pytest.raises(Refusal, match="includes itself"):
        suite.load(str(path))
