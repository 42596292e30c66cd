# Each target needs nothing before it: the virtual environment is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install run test lint drill clean

help:  ## show this list
	@$(PYTHON) -c 'import re; print("\n".join("make %-9s %s" % row for row in re.findall(r"(?m)^([a-z-]+):.*## (.*)", open("Makefile").read())))'

install: $(VENV)/.installed  ## make the virtual environment with what the service needs

run: $(VENV)/.installed  ## serve on 127.0.0.1:3456; without a key it answers with demo texts
	@$(BIN)/python router.py serve --or-demo

test: $(VENV)/.installed-tests  ## run all tests, with real servers on this machine only
	@$(BIN)/python -m pytest

lint: $(VENV)/.installed-tests  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

drill: $(VENV)/.installed  ## 16 provider faults against the real router, one by one
	@$(BIN)/python bench/drill.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ */__pycache__

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llm-router needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv is missing. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	@echo "installing what the service needs into $(VENV)"
	@$(BIN)/pip install --quiet -r requirements.txt
	@: > $@

$(VENV)/.installed-tests: tests/requirements.txt $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	@$(BIN)/pip install --quiet -r tests/requirements.txt
	@: > $@
