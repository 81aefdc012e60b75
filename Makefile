# Targets that need the package make `.venv` first; once it is there, nothing here needs the network.
#   make demo | test | lint | bench | bench-net | docs | dask-suite | clean          PYTHON=python3.12 picks the interpreter
#   make test ARGS="tests/cli -k status"                    ARGS goes to pytest (and to bench)
#   make test PROCESSES=1                                   one test after the other

VENV := .venv
BIN := $(VENV)/bin
# What of the extras in pyproject.toml is installed: dev,ucx has the tests of UCX run too (68 MB more).
EXTRAS ?= dev
# Named by the content of pyproject.toml: a checkout that only touches the file installs nothing again. One for more extras
# will do as well.
INSTALLED := $(VENV)/.installed-$(shell cksum pyproject.toml | cut -d ' ' -f 1)-$(EXTRAS)
STAMP := $(or $(firstword $(wildcard $(INSTALLED)*)),$(INSTALLED))
OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c '$(OLD_ENOUGH)' && { echo $$p; break; }; done)
ARGS ?=
# More than there may be processors: many tests wait most of the time, for a frozen peer or a heartbeat.
PROCESSES ?= 3

.PHONY: demo test lint bench bench-net docs dask-suite clean compiled
.DEFAULT_GOAL := demo

demo: compiled
	@$(BIN)/python -m zmqtasks demo $(ARGS)

# A process of pytest that crashes is not replaced: pytest-xdist 3.8 may wait forever for one that was.
test: compiled
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadscope --max-worker-restart 0 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: compiled
	$(BIN)/python -m bench.tasks $(ARGS)

bench-net: compiled
	$(BIN)/python -m zmqtasks bench net $(ARGS)

# dask's own tests on a client of this; ARGS="bag delayed" for some of them. Takes minutes, and is not part of `test`.
dask-suite: compiled
	$(BIN)/python -m tests.dask_suite $(ARGS)

docs: $(STAMP)
	$(BIN)/python -m docs.generate

# Where Python is told to write no bytecode, as in many containers, each process of each cluster would compile all sources anew.
compiled: $(STAMP)
	@$(BIN)/python -m compileall -qq zmqtasks bench || true

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "zmqtasks needs Python 3.11 or newer and found none: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c '$(OLD_ENOUGH)' || { echo "zmqtasks needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "no virtual environment could be made with $(PYTHON) (on Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing zmqtasks and its tools into $(VENV) (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
