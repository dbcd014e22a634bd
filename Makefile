# Every target makes its own virtual environment; only Python 3.10+ with pip is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two worker processes with one thread each: two cores, no oversubscription.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu and not weights"
# make test TRIAL_MODEL=DIR also runs the tests that read a model directory.
TRIAL_MODEL ?=
# make test TESTS=tests/store runs one part.
TESTS ?= tests
# Another release of transformers than the pinned one; use a VENV of its own with it, as test-oldest does.
TRANSFORMERS ?=
# What touches transformers' own code.
TRANSFORMERS_TESTS := tests/test_attachment.py tests/backbone tests/capture tests/e2e tests/indexer/test_native.py \
    tests/indexer/test_rope.py tests/lookahead

.PHONY: help demo test test-oldest lint types docs bench format clean

help:
	@echo "make demo | test | test-oldest | lint | types | docs | bench | format | clean"

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed '$(if $(TRANSFORMERS),s/^transformers==.*/transformers==$(TRANSFORMERS)/)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/flashmem demo

test: $(STAMP)
	$(PYTEST) $(if $(TRIAL_MODEL),--trial-model $(TRIAL_MODEL)) $(TESTS)

# The oldest transformers that pyproject.toml allows.
test-oldest:
	$(MAKE) test VENV=.venv-oldest TRANSFORMERS='5.17.*' TESTS='$(TRANSFORMERS_TESTS)'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m typer flashmem.cli utils docs --name flashmem --title "Command line" --output docs/reference/cli.md
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python -m benchmarks.decode_cost --out results/decode_cost.json
	$(BIN)/python -m benchmarks.prefill --out results/prefill.json

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
