# Each target first creates .venv with the versions of requirements.lock.
#
#   make demo        the whole pipeline on Fashion-MNIST, on a CPU
#   make test        lint, then the tests without the markers slow and faults
#   make test-faults the tests with the marker faults
#   make test-all    make test, then the tests with these markers
#   make format      format the code and fix what ruff can fix
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-faults test-all lint format
demo: .venv/installed
	$(BIN)/python demo.py $(DEMO_FLAGS)

test: .venv/installed lint
	$(PYTEST) -m "not slow and not faults"

test-faults: .venv/installed
	$(PYTEST) -m faults

test-all: test
	$(PYTEST) -m "slow or faults"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@
