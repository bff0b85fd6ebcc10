"""What holds for every test: which files are collected, what is skipped where there is no GPU, how hypothesis draws;
and `--reliability=FILE`, the table of the promises that were tried."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests import reliability

# No deadline: the first example of a test pays for torch's start. CI draws the same examples every time.
settings.register_profile("attnbench", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("attnbench")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="write the table of what was tried to break each promise")


def pytest_configure(config: pytest.Config) -> None:
    reliability.register(config)


@pytest.fixture
def injected(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Told how many faults a test of a promise injected, or comparisons it made; one that does not say made one."""
    return lambda count: request.node.user_properties.append(("injected", count))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """bench_*.py with --benchmark-only and nothing else; test_*.py otherwise."""
    unwanted = "test_" if config.getoption("benchmark_only", default=False) else "bench_"
    return True if collection_path.name.startswith(unwanted) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, saying so, where torch finds no CUDA device; those of a promise say of which."""
    for item in items:
        reliability.mark(item)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
