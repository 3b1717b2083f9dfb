# The two commands are `make demo` and `make test`; `make help` lists the rest.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 7
KILLS ?= 200
SECONDS_LONG ?= 60

.PHONY: help setup native demo test test-v2 test-v2-short lint crash alternation bench train-demo docs fuzz clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.ready native ## Make .venv with everything the demo needs

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "cannot set up: no Python 3.11 or newer found (apt-get install python3.11-venv, or uv python install 3.12)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "cannot set up: $(PYTHON) is not Python 3.11 or newer; choose one with PYTHON="; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment: apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.ready: $(VENV)/.python pyproject.toml
	@echo "installing into $(VENV) (about half a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

native: ## Build the static cell init, when there is a C compiler
	@if ! command -v cc >/dev/null 2>&1; then why="no C compiler"; \
	elif ! echo 'int main(void) { return 0; }' | cc -static -x c -o /dev/null - 2>/dev/null; then why="no static C library"; \
	else exec $(MAKE) -s -C src/aether/spawner/native; fi; \
	echo "$$why: cells use the portable executor (slower); apt-get install gcc libc6-dev, or dnf install gcc glibc-static"

demo: setup ## The main job on real input: intruder, model, proof
	@$(BIN)/python -m examples.demo

test: setup $(VENV)/.dev ## Everything that CI runs, with its summary line last
	$(BIN)/python -m pytest

test-v2: setup $(VENV)/.dev ## The cell suite in a QEMU guest with all cgroups on v2 (ARGS= for pytest)
	$(BIN)/python -m tests.guest.boot $(ARGS)

test-v2-short: setup $(VENV)/.dev ## The same for the limits alone, in a few minutes
	$(BIN)/python -m tests.guest.boot --short $(ARGS)

lint: setup $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check src tests bench examples tools
	$(BIN)/ruff format --check src tests bench examples tools
	$(BIN)/mypy

crash: setup $(VENV)/.dev ## Kill roles at random points under load: make crash SEED=7 KILLS=200
	$(BIN)/python -m tests.simulation.crash --seed $(SEED) --kills $(KILLS)

alternation: setup $(VENV)/.dev ## A thousand jobs of two tenants in turn on warm cells, each looking for the other's traces
	ALTERNATIONS=1000 $(BIN)/python -m pytest --timeout=1800 tests/security/test_alternation.py

bench: setup $(VENV)/.dev ## Every benchmark; tables on the screen, JSON in bench/out/
	$(BIN)/python -m bench.run --seconds $(SECONDS_LONG)

train-demo: setup ## Train the pendulum package again (minutes; extra `train`)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train]'
	rm -rf build/pendulum
	$(BIN)/python -m aether.worldmodel.train --seed $(SEED) --out build/pendulum

docs: setup ## Write the generated pages again
	$(BIN)/python -m aether.api.docs

fuzz: setup $(VENV)/.dev ## Fuzz the init's parser: libFuzzer where clang is, else mutation, under sanitizers
	@rm -rf build/corpus && $(BIN)/python -m tests.support.nativebuild build/corpus
	@if command -v clang >/dev/null 2>&1; then $(MAKE) -s -C src/aether/spawner/native build/libfuzzer && \
	src/aether/spawner/native/build/libfuzzer -max_total_time=$(SECONDS_LONG) -max_len=8192 -seed=$(SEED) build/corpus; \
	else $(MAKE) -s -C src/aether/spawner/native build/fuzz && \
	src/aether/spawner/native/build/fuzz 1000000 $(SEED) build/corpus/*; fi

clean: ## Remove what setup, tests and builds made
	rm -rf $(VENV) build dist src/*.egg-info src/aether/spawner/native/aether-init src/aether/spawner/native/build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
