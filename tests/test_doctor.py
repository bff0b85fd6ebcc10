"""The doctor: it answers for this machine, and gives every backend's reasons."""

from __future__ import annotations

import importlib.metadata
import re
import sys

import pytest

import models
from attnbench import doctor


def test_every_section_is_printed_and_all_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    for section in ("machine", "torch", "compilers", "packages", "backends"):
        assert f"\n{section}" in f"\n{shown}"
    assert importlib.metadata.version("torch").split("+")[0] in shown


def test_versions_are_those_installed_and_the_absent_are_told() -> None:
    rows = {row.name: row for row in doctor.packages()}
    assert rows["numpy"].found == importlib.metadata.version("numpy") and rows["numpy"].good
    assert all(row.good is not False for row in rows.values())


def test_a_missing_dependency_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "no-such-distribution", "always")
    assert doctor.main([]) == 1
    assert "pip install -c constraints.txt" in capsys.readouterr().out


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (row,) = doctor.torch_rows()
    assert row.good is False and "cannot be imported" in row.found


def test_every_variant_runs_and_every_refusal_has_its_reason() -> None:
    found = doctor.backends()
    named = [name for names in found.values() for name in names]
    assert sorted(named) == sorted(models.VARIANTS), "each once"
    assert all(answer.picked != "none" for answer in found)
    reasons = [reason for answer in found for _, reason in answer.refused]
    assert reasons and all(reasons)
    assert len(found) < len(models.VARIANTS) / 2, "those with the same answer share a row"


def test_what_it_says_of_a_backend_is_what_building_says() -> None:
    for answer, names in doctor.backends().items():
        for name in names:
            objective = models.VARIANTS[name].objectives[0]
            for backend, reasons in answer.refused:
                with pytest.raises(ValueError, match=re.escape(reasons.split("; ")[0])):
                    models.build(name, **doctor.SMALL, objective=objective, backend=backend)
            for backend in answer.others:
                models.build(name, **doctor.SMALL, objective=objective, backend=backend)


def test_the_reason_is_the_variants_own() -> None:
    def build(name: str, **settings: object) -> None:
        raise ValueError("it needs compute [8.0]")

    answer = doctor.ask(build, "any", "ar")
    assert answer == doctor.Answer("none", refused=(("auto", "it needs compute [8.0]"),))
    cells = doctor.backend_table({answer: ["any"]}).columns[3].cells
    assert list(cells) == [r"[bold]auto[/]: it needs compute \[8.0]"]


def test_one_variant_alone_and_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    first = next(iter(models.VARIANTS))
    assert list(doctor.backends(first).values()) == [[first]]
    assert doctor.main(["--variant", first[:-1] + "x"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_compiler_that_does_not_answer_is_no_failure() -> None:
    assert "does not answer" in doctor._first_line("/no/such/compiler")
