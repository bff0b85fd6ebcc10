# `make run` and `make test` want Python 3.11 or later and nothing else; both make .venv once and reuse it.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: run test bench lint format setup clean
.DEFAULT_GOAL := run

run: $(READY)
	$(BIN)/python -m attnbench.run --variant local2d $(ARGS)

# Tests that measure time or memory (marker serial) run first and alone; then the others share the cores, a thread each.
# Exit status 5 says that no test was selected.
test: $(READY)
	$(BIN)/python -m pytest -q -m "serial and not soak" $(ARGS) || [ $$? -eq 5 ]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=8 -m "not soak and not serial" $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest --benchmark-only $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

# Made again only when what is installed may have changed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or later is needed, this is {v.major}.{v.minor}; make PYTHON=/path/to/python3.11")'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
