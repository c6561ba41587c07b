# medembed's verbs. `make` alone lists them. Variables go on the command line:
#   make extract MANIFEST=mura.csv IMAGE_ROOT=MURA-v1.1 ENCODER=google/medgemma-4b-pt CACHE=cache
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= medembed-demo
RECIPE ?= data_manifests/mura.toml
MANIFEST ?= manifest.csv
IMAGE_ROOT ?= images
ENCODER ?= google/medgemma-4b-pt
CACHE ?= cache
RUN ?= runs/sweep
REPORT ?= report
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup test soak lint demo manifest extract sweep compare report wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## build .venv from pinned constraints (TORCH=… takes another build of torch)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("medembed needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Use: make setup PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

test: $(READY) ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

soak: $(READY) ## the crash tests at length: thousands of kills, every operation of a failing disk
	MEDEMBED_SOAK=1 $(BIN)/python -m pytest tests/test_crashes.py tests/test_power_loss.py tests/test_compaction.py $(ARGS)

lint: $(READY) ## ruff and mypy, strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(READY) ## the whole path on synthetic radiographs, in a few minutes (DEMO=directory)
	$(BIN)/medembed demo $(DEMO) $(ARGS)

manifest: $(READY) ## RECIPE and IMAGE_ROOT become MANIFEST
	$(BIN)/medembed manifest build $(RECIPE) --image-root $(IMAGE_ROOT) -o $(MANIFEST) $(ARGS)

extract: $(READY) ## embed MANIFEST's images below IMAGE_ROOT with ENCODER into CACHE
	$(BIN)/medembed extract $(MANIFEST) --image-root $(IMAGE_ROOT) --encoder $(ENCODER) --cache $(CACHE) $(ARGS)

sweep: $(READY) ## train and compare heads on CACHE and MANIFEST, into RUN
	$(BIN)/medembed sweep $(CACHE) $(MANIFEST) --out $(RUN) $(ARGS)

compare: $(READY) ## the table of RUN
	$(BIN)/medembed compare $(RUN) $(ARGS)

report: $(READY) ## the page of RUN, into REPORT
	$(BIN)/medembed report $(RUN) -o $(REPORT) $(ARGS)

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

clean: ## remove what set-up and tests made; demo, caches and runs stay
	rm -rf .venv dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache
