# The Makefile's environment is .venv; nothing is installed anywhere else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One more than there are cores: a third of the time the tests wait for processes.
PYTEST_WORKERS ?= $(shell $(PYTHON) -c "import os; print((os.cpu_count() or 1) + 1)")
# Bytecode is kept whatever the shell says: else every process of the tests compiles them all, for 5 s of a processor.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-contained quick simpletuner check chaos mutants fuzz fuzz-api format release clean
help:
	@echo "make demo    install, start the service, and train, save and ask a model for real"
	@echo "make test    install what the tests need and run them all"
	@echo "make quick   rules, registry and API on SQLite: a minute"
	@echo "make simpletuner  build SimpleTuner's environment (9 GB) and train with it for real"
	@echo "make fuzz    random input for everything that reads users' files: EXAMPLES=n of each, minutes"
	@echo "make fuzz-api  random requests to a running service by every role: API_EXAMPLES=n a route, half an hour"
	@echo "make check   format, lint, types, imports"
	@echo "make chaos   random faults: SEED=n FAULTS=n DATABASE=sqlite|postgres, WARM=1 for long runs"
	@echo "make release wheel and image of the present commit's tag, into dist/"
	@echo "make mutants safeguards taken out one by one: the tests must notice each"

$(VENV)/.service: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the service into $(VENV): about 30 MB to download ..."
	@$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.service
	@echo "Installing what the tests need into $(VENV): a minute or more ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.service
	@$(BIN)/deepe demo

test: $(VENV)/.dev
	@$(BIN)/python -m tests.training_environment
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --durations=20

quick: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -n auto -m "not postgres" tests/domain tests/registry tests/access tests/api

# SimpleTuner is AGPL-3.0 and large: nothing else of the project needs it or builds its environment.
simpletuner: $(VENV)/.dev
	@$(BIN)/python -m tests.training_environment trl simpletuner
	@$(BIN)/python -m pytest -n 0 -s -m simpletuner tests/presets/test_sd_demo.py

SEED ?= 1
FAULTS ?= 200
DATABASE ?= sqlite
chaos: $(VENV)/.dev
	@$(BIN)/python -m tests.chaos --seed $(SEED) --faults $(FAULTS) --database $(DATABASE) $(if $(WARM),--warm)

EXAMPLES ?= 3000
fuzz: $(VENV)/.dev
	@FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --timeout 1800 tests/fuzz tests/argspec/test_hostile.py

test-contained: $(VENV)/.dev
	@DEEPE_TEST_CONTAINMENT=bubblewrap $(BIN)/python -m pytest -n $(PYTEST_WORKERS) tests/worker

API_EXAMPLES ?= 2
fuzz-api: $(VENV)/.dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	@$(BIN)/python -m tests.fuzz.api --examples $(API_EXAMPLES)

mutants: $(VENV)/.dev
	@$(BIN)/python -m tests.chaos.mutants

check: $(VENV)/.dev
	@$(BIN)/ruff format --check app migrations tests benchmarks scripts
	@$(BIN)/ruff check app migrations tests benchmarks scripts
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.dev
	@$(BIN)/ruff format app migrations tests benchmarks scripts
	@$(BIN)/ruff check --fix app migrations tests benchmarks scripts

# TAG: by default the tag of the present commit
release: $(VENV)/.dev
	@$(BIN)/python -m scripts.check_wheels
	@scripts/release.sh $(TAG)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
