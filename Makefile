# Tessera: images -> tokenizer -> tokens -> prior -> samples -> report.  `make help` explains.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

CONFIG ?= digits
DATA   ?=
RUN    ?= runs/$(if $(filter compare-quantizers,$(MAKECMDGOALS)),quantizers,$(notdir $(CONFIG:/=))$(if $(DATA),-$(notdir $(DATA:/=))))
NUM    ?= 500
STEPS  ?=
FRESH  ?=
NPROC  ?=
LPIPS  ?=
PYTHON ?= python3

VENV := .venv
PY   := $(VENV)/bin/python
CFG  := configs/$(notdir $(CONFIG:/=))
# A stage on this process, or on NPROC of them.
LAUNCH    := $(PY) -m $(if $(NPROC),torch.distributed.run --standalone --nproc-per-node $(NPROC) -m)
OVERRIDES := root="$(RUN)" $(if $(DATA),data.source="$(DATA)")
# FRESH=1 concerns the stage that is named; of `make demo`, all of them.
FLAGS      = $(if $(FRESH),$(if $(filter $@ demo,$(MAKECMDGOALS)),--fresh))
# A tokenizer may take several runs, tokenizer-stage1, tokenizer-stage2, …: in the order of their names.
TOKENIZERS := $(basename $(notdir $(sort $(wildcard $(CFG)/tokenizer*.yaml))))

# Scores that need weights which are not the project's own.
SCORES := $(if $(LPIPS),--lpips-net squeeze --lpips-weights "$(LPIPS)")

.PHONY: help setup demo test test-reliability lint encoder tokenizer tokens prior samples report compare-quantizers compare-priors bench bench-gpu config-exists

help: ## what can be made, and with what
	@echo "usage: make TARGET [VARIABLE=value ...]"; echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/p' Makefile | column -t -s '|'
	@echo; echo "variables"
	@printf '  %-8s %s\n' \
	  CONFIG "folder under configs/ ($(CONFIG))" \
	  DATA   "images: an embedded name, a folder, parquet, .tar shards, hub:owner/name (what CONFIG says)" \
	  RUN    "folder for everything that is made ($(RUN))" \
	  NUM    "number of samples ($(NUM))" \
	  STEPS  "training steps of compare-quantizers and compare-priors (what their configurations say)" \
	  FRESH  "1 starts the named stage over" \
	  NPROC  "processes per machine, through torchrun (one, without it)" \
	  LPIPS  "file of SqueezeNet 1.1's features, for LPIPS in the report" \
	  PYTHON "Python 3.11 or newer for the virtual environment ($(PYTHON))"

setup: $(VENV)/installed ## create .venv and install the project, once

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: name another one with PYTHON=" >&2; exit 2; }
	@echo "installing into $(VENV) (several GB, a few minutes)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: no virtual environment could be made: install python3-venv" >&2; exit 2; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: report ## everything, from embedded images to a report with pictures

test: setup ## the tests (CPU, no network)
	@$(PY) -m pytest

test-reliability: setup ## the heavy tests: kills, hostile files, mutated configurations, processes, leaks (up to 40 minutes)
	@$(PY) -m pytest -m slow tests/test_reliability_*.py tests/test_ranks.py tests/test_survival.py tests/test_sharded.py tests/test_image_fuzz.py

lint: setup ## ruff
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

config-exists:
	@test -d "$(CFG)" || { echo "error: CONFIG=$(CONFIG): there is no folder $(CFG); there are: $(notdir $(wildcard configs/*))" >&2; exit 2; }

encoder: setup config-exists ## pretrain a small masked autoencoder on the images (where CONFIG has encoder.yaml)
	@test ! -f "$(CFG)/encoder.yaml" || $(LAUNCH) tokenizer.encoders.pretrain "$(CFG)/encoder.yaml" $(OVERRIDES) $(FLAGS)

tokenizer: encoder ## train the tokenizer, stage by stage
	@set -e; for run in $(TOKENIZERS); do \
	  $(LAUNCH) tokenizer.train "$(CFG)/$$run.yaml" $(OVERRIDES) $(FLAGS); done

tokens: tokenizer ## encode the images to a token cache
	@$(LAUNCH) tokenizer.encode "$(CFG)/tokens.yaml" root="$(RUN)" $(FLAGS)

prior: tokens ## train the prior on the tokens
	@$(LAUNCH) priors.train "$(CFG)/prior.yaml" root="$(RUN)" $(FLAGS)

samples: prior ## draw samples from the prior
	@$(LAUNCH) generate.sample "$(RUN)" --num $(NUM)

report: samples ## evaluate, and write report.html
	@$(LAUNCH) eval.run report "$(RUN)" $(SCORES)

compare-quantizers: setup ## train every configs/cifar10/quantizers/*.yaml alike, and write one table with pictures
	@set -e; for config in configs/cifar10/quantizers/*.yaml; do \
	  $(LAUNCH) tokenizer.train "$$config" $(OVERRIDES) $(if $(STEPS),loop.steps=$(STEPS)) $(FLAGS); done
	@$(LAUNCH) eval.run quantizers "$(RUN)" $(SCORES)

compare-priors: tokens ## train every configs/priors/*.yaml alike on CONFIG's tokens, sample, and write one table
	@set -e; for config in configs/priors/*.yaml; do name=$$(basename "$$config" .yaml); \
	  $(LAUNCH) priors.train "$$config" root="$(RUN)" $(if $(STEPS),loop.steps=$(STEPS)) $(FLAGS); \
	  $(LAUNCH) generate.sample "$(RUN)/$$name" --num $(NUM) --out "$(RUN)/$$name/samples"; done
	@$(LAUNCH) eval.run priors "$(RUN)"

bench: setup ## speed and memory beside peers and physical limits, into benchmarks/RESULTS.md
	@set -e; for name in codebook sampling evaluation estimate training; do $(PY) -W ignore -m benchmarks.$$name; done

bench-gpu: setup ## the same on a GPU
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "error: there is no GPU here" >&2; exit 2; }
	@$(MAKE) --no-print-directory bench
