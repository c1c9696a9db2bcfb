# make demo    install into .venv, compile the bundled model, print its passes, stream text
# make test    install the test tools too, then ruff, mypy --strict and all CPU tests
# make nightly random programs by the thousand, every family, the long proofs (hours)
# make mutants small mistakes in passes, emitters, scheduler, planner: do tests fail? (docs/mutation.md)
# make gpu     what needs a GPU: whole models in captured graphs against eager
# make replay generated sources of the model zoo, this tree against the commit AGAINST
# make docs    write docs/passes.md and docs/env.md anew
# make format  put the tree into ruff's format

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN)
MODEL ?= examples/shakespeare
PROMPT ?= ROMEO:
# Extra arguments of pip, e.g. where to find torch's CPU build (it saves gigabytes without a GPU).
PIP_FLAGS ?=

AGAINST ?= HEAD
# Counts of the fuzzer's parts (examples a pass), and scripts of what failed.
FUZZ_REPORT ?= out/fuzz

.PHONY: demo test nightly mutants gpu lint style format docs clean replay

demo: $(VENV)/.installed
	$(BIN)/aios report $(MODEL)
	$(BIN)/aios generate $(MODEL) "$(PROMPT)" --max-tokens 200

# What ruff finds ends it at once; mypy takes as long as a twentieth of the tests, so it runs beside.
test: $(VENV)/.installed-test style
	$(BIN)/python tests/run_groups.py --workers $(WORKERS) --types

# The slower suites, by hand.
nightly: $(VENV)/.installed-test
	NIGHTLY=1 FUZZ_EXAMPLES=5000 FUZZ_REPORT=$(FUZZ_REPORT) FOREIGN_FAMILIES=all FUZZ_TRITON=1000 \
		$(BIN)/python -m pytest -n $(WORKERS) --maxschedchunk=1 tests/fuzz tests/foreign \
		tests/nightly tests/interpreted tests/codegen tests/compiled tests/formats tests/passes \
		tests/capture tests/study tests/test_mutation.py; found=$$?; \
	$(BIN)/python -m aios_compile.study.fuzz.report $(FUZZ_REPORT) && exit $$found

# The map of the tests is made once (half an hour on one core); a mutant costs some seconds.
MUTANTS ?= --limit 40 --seed 1
mutants: $(VENV)/.installed-test
	test -d out/mutation/map || $(BIN)/python -m tests.mutation map
	$(BIN)/python -m tests.mutation run $(MUTANTS)

# From the checkout: machines with a GPU often allow no installing.
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -q tests/gpu

replay: $(VENV)/.installed-test
	$(BIN)/python tests/replay.py --against $(AGAINST)

style: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style
	$(BIN)/mypy --strict

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV)/.installed $(VENV)/.installed-test .mypy_cache .ruff_cache .pytest_cache

# A .venv that is there is used as it is; pip adds what is missing.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[test]'
	touch $(VENV)/.installed $@
