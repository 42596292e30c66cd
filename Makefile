# Each target needs nothing before it: the virtual environment is made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOORS := .venv-floors
CORE_TESTS := test_api.py test_metrics.py test_worker.py test_fuzz.py
# Once `make lock` has pinned every package by its hash, nothing else is installed.
PINNED := $(wildcard requirements.lock)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install run check route test floors fuzz lint lock bench drill cluster clean

help:  ## show this list
	@$(PYTHON) -c 'import re; print("\n".join("make %-9s %s" % row for row in re.findall(r"(?m)^([a-z-]+):.*## (.*)", open("Makefile").read())))'

install: $(VENV)/.installed  ## make the virtual environment with what the service needs

run: $(VENV)/.installed  ## serve on 127.0.0.1:3456; without a key it answers with demo texts
	@$(BIN)/python router.py serve --or-demo

check: $(VENV)/.installed  ## say what is wrong with routes.json and the settings (LIVE=1: ask the upstreams, too)
	@$(BIN)/python router.py check $(if $(LIVE),--live)

# In the environment, not on the line: a text may hold any character.
route: export ROUTE_TEXT = $(value TEXT)
route: $(VENV)/.installed  ## say where a text would go and why: make route TEXT="..."
	@test -n "$$ROUTE_TEXT" || { echo 'write: make route TEXT="what a person would say"'; exit 2; }
	@$(BIN)/python router.py route -- "$$ROUTE_TEXT"

# Each process would compile everything anew without bytecode on the disk, and pytest would rewrite
# all that belongs to a plugin it finds.
test floors fuzz: export PYTHONDONTWRITEBYTECODE :=
test: export PYTEST_DISABLE_PLUGIN_AUTOLOAD := 1
test: $(VENV)/.installed-tests  ## run all tests, with real servers on this machine only; 3 to 4 min
	@$(BIN)/python -m pytest -p xdist -n 4 --dist worksteal

floors: $(VENV)/.installed-tests  ## run the core tests with the oldest versions that are allowed
	@test -x $(FLOORS)/bin/pytest || { $(PYTHON) -m venv $(FLOORS) && sed 's/>=/==/; s/,.*//' requirements.txt | \
	  $(FLOORS)/bin/pip install --quiet -r /dev/stdin openai hypothesis trustme h11; }
	@$(FLOORS)/bin/python -m pytest $(addprefix tests/,$(CORE_TESTS))

fuzz: $(VENV)/.installed-tests  ## bytes made by chance, read as gunicorn and h11 read them; 2 min (FUZZ_SECONDS for each of the two)
	@FUZZ_SECONDS=$${FUZZ_SECONDS:-60} $(BIN)/python -m pytest -s tests/test_fuzz*.py

lint: $(VENV)/.installed-tests  ## ruff, mypy and bandit
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/bandit --quiet -r -c pyproject.toml *.py parts

lock: $(VENV)/.installed-tests  ## pin all packages by hash in requirements.lock; install obeys it
	@$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-annotate --no-header \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links -o requirements.lock requirements.txt
	@echo "requirements.lock is written; from now on make install takes nothing else"

bench: $(VENV)/.installed  ## speed and size beside nginx and others (bench/speed.py --help); 6 min
	@$(BIN)/python bench/speed.py

drill: $(VENV)/.installed  ## 16 provider faults against the real router, one by one
	@$(BIN)/python bench/drill.py

cluster: $(VENV)/.installed-tests  ## two instances, Redis and nginx on this machine: what is shared
	@PATH="$$PATH:/usr/sbin" $(BIN)/python bench/cluster.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(FLOORS) .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ */__pycache__

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llm-router needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv is missing. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt $(PINNED) | $(VENV)/bin/python
	@echo "installing what the service needs into $(VENV)"
	@$(BIN)/pip install --quiet $(if $(PINNED),--require-hashes -r $(PINNED),-r requirements.txt)
	@: > $@

$(VENV)/.installed-tests: tests/requirements.txt $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	@$(BIN)/pip install --quiet -r tests/requirements.txt
	@: > $@
