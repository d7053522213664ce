# `make demo` and `make test` are all there is to it: each sets up .venv first, from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format
demo: .venv/installed
	$(BIN)/python demo.py $(DEMO_FLAGS)

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

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
