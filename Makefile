# Each target except test-versions first creates .venv with the versions of requirements.lock.
#
#   make demo        the whole pipeline on Fashion-MNIST, on a CPU
#   make test        lint, then the tests without the markers slow and faults
#   make test-faults the tests with the marker faults and without slow: one of each kind of fault
#   make test-all    make test, then all tests with these markers
#   make test-versions  the tests of make test in .venv-lowest, with the lowest versions that requirements*.txt state, and
#                    in .venv-newest, with the newest versions; PYTHON_LOWEST and PYTHON_NEWEST choose the Python
#   make format      format the code and fix what ruff can fix
PYTHON ?= python3
PYTHON_LOWEST ?= $(PYTHON)
PYTHON_NEWEST ?= $(PYTHON)
REQUIREMENTS := requirements.txt requirements-dev.txt
BIN := .venv/bin
TESTS := -m pytest -n 2 --dist worksteal
PYTEST := $(BIN)/python $(TESTS)
FAST := -m "not slow and not faults"
# Containers often set it. The tests start many processes, and each would compile the modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-faults test-all test-versions test-lowest test-newest lint format
demo: .venv/installed
	$(BIN)/python demo.py $(DEMO_FLAGS)

test: .venv/installed lint
	$(PYTEST) $(FAST)

test-faults: .venv/installed
	$(PYTEST) -m "faults and not slow"

test-all: test
	$(PYTEST) -m "slow or faults"

test-versions: test-lowest test-newest

test-lowest test-newest: test-%: .venv-%/installed
	.venv-$*/bin/python $(TESTS) $(FAST)

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

# "torch>=2.9" becomes "torch==2.9", which is 2.9.0.
.venv-lowest/installed: $(REQUIREMENTS)
	$(PYTHON_LOWEST) -m venv .venv-lowest
	sed -e '/^-r/d' -e 's/>=/==/' $(REQUIREMENTS) > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lowest/requirements.txt
	touch $@

.venv-newest/installed: $(REQUIREMENTS)
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		-r requirements-dev.txt
	touch $@
