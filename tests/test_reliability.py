"""Every promise has a test that tries to break it, and docs/reliability.md is what a run of those tests found."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability import PROMISES, Reliability, Tally, page

TESTS = Path(__file__).resolve().parent
DOC = TESTS.parent / "docs" / "reliability.md"


def promised() -> Iterator[str]:
    """The promise of every marker in tests/, and those that parameters are given from a dictionary PROMISED."""
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.promise"):
                yield from (str(word.value) for word in node.args if isinstance(word, ast.Constant))
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROMISED":
                yield from ast.literal_eval(node.value).values()


def test_every_promise_is_tried() -> None:
    assert set(promised()) == set(PROMISES)


def test_the_document_has_a_line_for_every_promise_and_says_what_it_is_of() -> None:
    lines = DOC.read_text(encoding="utf-8").splitlines()
    for name, (promise, figure) in PROMISES.items():
        (line,) = [line for line in lines if line.startswith(f"| **{name}**: {promise} | {figure} |")]
        plain = int(line.split("|")[3].replace(",", ""))
        assert line.endswith(("| held |", ") |")) and plain > 0, line
    assert "not edited by hand" in lines[2] and "tests, of which" in lines[3]


def report(node: str, outcome: str, when: str = "call", **told: object) -> pytest.TestReport:
    properties = [("promise", "kill"), ("soak", False), *told.items()]
    return pytest.TestReport(
        node, ("", 0, ""), {}, outcome, None, when, user_properties=properties  # type: ignore[arg-type]
    )  # fmt: skip


def test_faults_are_added_up_and_a_failure_is_told(tmp_path: Path) -> None:
    counted = Reliability(tmp_path / "r.md", "python -m pytest")
    for told in (report("t.py::a[1]", "passed", injected=20), report("t.py::a[2]", "failed", injected=5),
                 report("t.py::b", "passed"), report("t.py::b", "passed", "teardown"),
                 report("t.py::c", "skipped", "setup")):  # fmt: skip
        counted.pytest_runtest_logreport(told)
    counted.pytest_sessionfinish()
    text = (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "| kill | `t.py::a` | 25 | 0 | **failed** (1 of 2) |" in text
    assert "| kill | `t.py::b` | 1 | 0 | held |" in text
    assert "| kill | `t.py::c` | 0 | 0 | skipped here |" in text
    assert "| 26 | 0 | **failed** (1) |" in text and "not tried in that run" in text


def test_a_soak_is_counted_apart() -> None:
    row = Tally("corruption", "t.py::a", plain=100, soak=1000, tests=2)
    assert "| corruption | `t.py::a` | 100 | 1,000 | held |" in page([row], "python -m pytest")
