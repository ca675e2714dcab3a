# make quickstart: install into .venv, then the whole pipeline on the embedded base (CPU, minutes)
# make ui:         the app over the runs there are: chat, compare, rank, retrain
# make test:       install with the development tools, lint, type check, tests
# make lint:       ruff and mypy alone
# WORKERS=8 make test  runs the tests in so many processes (2)
# PYTHON=python3.12 make test chooses the interpreter of a new .venv.

PYTHON ?= python3
WORKERS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PINS := pyproject.toml constraints.txt

.PHONY: help quickstart ui test lint clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

# What was stopped goes on.
quickstart: $(VENV)/.installed
	@$(BIN)/lora-rlhf run quickstart $(if $(wildcard runs/quickstart/recipe.yaml),--resume)

ui: $(VENV)/.installed
	@$(BIN)/lora-rlhf ui --open

test: $(VENV)/.installed-dev lint
	@echo "pytest"
	@$(BIN)/python -m pytest -q --slow -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	@echo "ruff, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The stamps make a second call quick: they are renewed only when the requirements change.
$(VENV)/.installed: $(PINS) | $(BIN)/python
	@echo "Installing lora-rlhf and its pinned requirements into $(VENV) (several minutes the first time) ..."
	@$(PIP) -e .
	@touch $@
	@echo "Installed. In a shell of your own: source $(VENV)/bin/activate, then lora-rlhf --help"

$(VENV)/.installed-dev: $(PINS) | $(BIN)/python
	@echo "Installing lora-rlhf with the development tools into $(VENV) (several minutes the first time) ..."
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
	@echo "Installed."

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10. Choose another: make PYTHON=python3.12" >&2; exit 2; }
	@echo "Making the virtual environment $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
