# make decide | gates | test | smoke | verify | mutate | clean.  Extra arguments: make test ARGS="-k house -x"
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
ARGS ?=
SEEDS ?= 0 1 2
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# A stamp is newer than pyproject.toml and constraints.txt while the environment is up to date.
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: decide gates test smoke verify mutate clean

decide: $(CORE)  ## train and compare the arms on the micro world
	$(BIN)/vgrout decide --preset micro --out runs/micro $(ARGS)

gates: $(CORE)  ## what routeV's gate tells apart on three seeds, against random directions and other gate policies
	$(BIN)/vgrout decide --preset micro --out runs/gates --seeds $(SEEDS) --arms routeV --trace-every 1
	$(BIN)/vgrout lab gates $(SEEDS:%=runs/gates/routeV-s%) $(ARGS)

smoke: $(DEV)  ## the real pipeline on tiny sizes, then every gate
	$(BIN)/vgrout smoke $(ARGS)

verify: $(CORE)  ## every gate with its evidence
	$(BIN)/vgrout verify $(ARGS)

test: $(DEV)  ## lint and tests
	$(BIN)/ruff check src tests examples
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

mutate: $(DEV)  ## break the code on purpose and see that the tests notice
	$(BIN)/python -m vgrout.verify.mutate $(ARGS)

clean:  ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	@touch $(CORE) $@
