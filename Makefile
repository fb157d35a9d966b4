# Tessera: images -> tokenizer -> tokens -> prior -> samples -> report.  `make help` explains.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

CONFIG ?= digits
DATA   ?=
RUN    ?=
NUM    ?= 500
STEPS  ?=
FRESH  ?=
NPROC  ?=
LPIPS  ?=
OUT    ?= runs/gpu-day
PYTHON ?= python3

VENV := .venv
PY   := $(VENV)/bin/python

# What was given is text. make would expand `$(...)` in it, and the shell would read it again where it stands in a
# recipe: so make takes its characters alone, and recipes find it in the environment, quoted, as "$$run".
$(foreach name,CONFIG DATA RUN NUM STEPS FRESH NPROC LPIPS OUT PYTHON PY,$(eval override $(name) := $$(value $(name))))
# A folder of configs/ by its name, any other by its path, or one YAML of a folder of presets, as imagenet's.
override PRESET := $(if $(filter %.yaml,$(CONFIG)),$(firstword $(wildcard $(CONFIG) configs/$(CONFIG))))
override FOLDER := $(if $(PRESET),$(patsubst %/,%,$(dir $(PRESET))),$(if $(and $(findstring /,$(CONFIG)),$(wildcard $(CONFIG:/=)/*.yaml)),$(CONFIG:/=),configs/$(notdir $(CONFIG:/=))))
override NAME := $(notdir $(FOLDER))
override RUN  := $(or $(RUN),runs/$(if $(filter compare-quantizers,$(MAKECMDGOALS)),quantizers,$(if $(filter compare-published,$(MAKECMDGOALS)),published,$(NAME)$(if $(DATA),-$(notdir $(DATA:/=))))))
export config := $(CONFIG)
export folder := $(FOLDER)
export preset := $(PRESET)
# What the goals need beside the tokenizer: known before the first stage, not after days of it.
export needs  := $(if $(filter demo report samples prior,$(MAKECMDGOALS)),tokens prior,$(if $(filter tokens compare-priors,$(MAKECMDGOALS)),tokens))
export trains := $(filter tokenizer,$(MAKECMDGOALS))$(needs)
export data   := $(DATA)
export run    := $(RUN)
export num    := $(NUM)
export steps  := $(STEPS)
export fresh  := $(FRESH)
export nproc  := $(NPROC)
export lpips  := $(LPIPS)
export out    := $(OUT)
export python := $(PYTHON)
export py     := $(PY)

# Given in small letters, these would be expanded by make.
$(foreach name,config folder preset needs trains data run num steps fresh nproc lpips out python py,\
  $(if $(findstring command,$(origin $(name))),$(error $(name)=: write $(shell echo $(name) | tr a-z A-Z)=)))

# A stage on this process, or on NPROC of them. After `--` nothing is an option of torchrun's.
LAUNCH    := "$$py" -m $${nproc:+torch.distributed.run --standalone --nproc-per-node "$$nproc" -m --}
OVERRIDES := root="$$run" $${data:+data.source="$$data"}
# FRESH=1 concerns the stage that is named; of `make demo`, all of them.
FLAGS      = $(if $(filter $@ demo,$(MAKECMDGOALS)),$(ANEW))
ANEW      := $(if $(filter 1 yes true on,$(FRESH)),--fresh)
# Scores that need weights which are not the project's own.
SCORES := $${lpips:+--lpips-net squeeze --lpips-weights "$$lpips"}

.PHONY: help setup demo test test-gpu test-reliability lint encoder tokenizer tokens prior samples report compare-quantizers compare-published compare-priors bench gpu-day checked config-exists

help: ## what can be made, and with what
	@echo "usage: make TARGET [VARIABLE=value ...]"; echo
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/p' Makefile | column -t -s '|'
	@echo; echo "variables"
	@printf '  %-8s %s\n' \
	  CONFIG "folder under configs/, or a path of one, or of a YAML of presets ($$config)" \
	  DATA   "images: an embedded name, a folder, parquet, .tar shards, hub:owner/name (what CONFIG says)" \
	  RUN    "folder for everything that is made ($$run)" \
	  NUM    "number of samples ($$num)" \
	  STEPS  "training steps of compare-quantizers and compare-priors (what their configurations say)" \
	  FRESH  "1 starts the named stage over" \
	  NPROC  "processes per machine, through torchrun (one, without it)" \
	  OUT    "folder for what gpu-day finds ($$out)" \
	  LPIPS  "file of SqueezeNet 1.1's features, for LPIPS in the report" \
	  PYTHON "Python 3.11 or newer for the virtual environment ($$python)"

setup: $(VENV)/installed ## create .venv and install the project, once

$(VENV)/installed: pyproject.toml
	@"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$python is older than Python 3.11: name another one with PYTHON=" >&2; exit 2; }
	@echo "installing into $(VENV) (several GB, a few minutes)"
	@"$$python" -m venv $(VENV) || { echo "error: no virtual environment could be made: install python3-venv" >&2; exit 2; }
	@"$$py" -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: report ## everything, from embedded images to a report with pictures

test: setup ## the tests (CPU, no network), a process for each core
	@echo "the first results come when all tests are imported, after some 20 seconds"
	@"$$py" -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-gpu: setup ## the tests that need a GPU: one that CUDA and Triton know, compute capability 8.0 or newer
	@"$$py" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "error: there is no GPU here that torch can use; 'make test' needs none" >&2; exit 2; }
	@"$$py" -m pytest -m gpu

test-reliability: setup ## the heavy tests: kills, hostile files, mutated configurations, processes, leaks (up to 40 minutes)
	@"$$py" -m pytest -m slow -n auto --maxprocesses 8 --dist loadfile tests/test_reliability_*.py tests/test_ranks.py tests/training/test_sharded.py tests/tokenizer/test_image_fuzz.py

lint: setup ## ruff
	@"$$py" -m ruff check .
	@"$$py" -m ruff format --check .

# Every variable, before the first stage: what is wrong with the last one's must not be told after days of training.
checked:
	@refuse() { printf 'error: %s=%q: %s\n' "$$@" >&2; exit 2; }; \
	whole() { [[ $$2 =~ ^[1-9][0-9]{0,8}$$ ]] || refuse "$$1" "$$2" "give a whole number from 1"; }; \
	path() { [[ $$2 != -* ]] || refuse "$$1" "$$2" "commands would take it for an option: write ./$$2"; }; \
	whole NUM "$$num"; test -z "$$steps" || whole STEPS "$$steps"; test -z "$$nproc" || whole NPROC "$$nproc"; \
	[[ $$fresh =~ ^(|1|yes|true|on|0|no|false|off)$$ ]] || refuse FRESH "$$fresh" "give 1 or 0"; \
	path RUN "$$run"; path LPIPS "$$lpips"; \
	file=$$lpips; [[ $$file != "~/"* ]] || file=$$HOME/$${file#"~/"}; \
	[[ -z $$file || ( -f $$file && -r $$file ) ]] || refuse LPIPS "$$lpips" "there is no such file that can be read"

config-exists:
	@test -d "$$folder" || { echo "error: CONFIG=$$config: there is no folder $$folder; there are:" $$(ls configs) >&2; exit 2; }
	@test -n "$$preset" || test "$$folder" -ef "$$config" || test "$$folder" -ef "configs/$$config" || \
	  { echo "error: CONFIG=$$config: name a folder of configs/, or the path of another one" >&2; exit 2; }
	@set -- "$$folder"/tokenizer*.yaml; test -z "$$trains" || test -n "$$preset" || test -f "$$1" || \
	  { others=$$(find "$$folder" -maxdepth 1 -name '*.yaml' ! -name data.yaml ! -name base.yaml ! -name encoder.yaml \
	      ! -name tokens.yaml ! -name 'prior*.yaml' | sort | sed 's/^/CONFIG=/'); \
	    echo "error: CONFIG=$$config: there is no $$folder/tokenizer.yaml$${others:+: name one of its presets:}" $$others >&2; exit 2; }
	@for part in $$needs; do test -f "$$folder/$$part.yaml" || \
	  { echo "error: CONFIG=$$config: there is no $$folder/$$part.yaml, which comes after the tokenizer: write one" \
	      "(configs/digits/$$part.yaml is an example), or make tokenizer alone" >&2; exit 2; }; done

encoder: checked config-exists setup ## pretrain a small masked autoencoder on the images (where CONFIG has encoder.yaml)
	@test ! -f "$$folder/encoder.yaml" || $(LAUNCH) tokenizer.encoders.pretrain "$$folder/encoder.yaml" $(OVERRIDES) $(FLAGS)

# A tokenizer may take several runs, tokenizer-stage1, tokenizer-stage2, …: in the order of their names.
tokenizer: encoder ## train the tokenizer, stage by stage
	@set -e; set -- "$$folder"/tokenizer*.yaml; test -z "$$preset" || set -- "$$preset"; for stage in "$$@"; do \
	  $(LAUNCH) tokenizer.train "$$stage" $(OVERRIDES) $(FLAGS); done

tokens: tokenizer ## encode the images to a token cache
	@$(LAUNCH) tokenizer.encode "$$folder/tokens.yaml" root="$$run" $(FLAGS)

prior: tokens ## train the prior on the tokens
	@$(LAUNCH) priors.train "$$folder/prior.yaml" root="$$run" $(FLAGS)

samples: prior ## draw samples from the prior
	@$(LAUNCH) generate.sample "$$run" --num "$$num"

report: samples ## evaluate, and write report.html
	@$(LAUNCH) eval.run report "$$run" $(SCORES)

compare-quantizers: checked setup ## train every configs/cifar10/quantizers/*.yaml alike, and write one table with pictures
	@set -e; for file in configs/cifar10/quantizers/*.yaml; do \
	  $(LAUNCH) tokenizer.train "$$file" $(OVERRIDES) $${steps:+loop.steps="$$steps"} $(FLAGS); done
	@$(LAUNCH) eval.run quantizers "$$run" $(SCORES)

compare-published: setup ## one table, with pictures, of every published tokenizer that is at hand, on DATA (docs/published.md)
	@"$$py" -m tokenizer.published import-all "$$run" --data "$${data:?DATA: name the images}"
	@$(LAUNCH) eval.run quantizers "$$run" --num "$$num" $(SCORES)

compare-priors: tokens ## train every configs/priors/*.yaml alike on CONFIG's tokens, sample, and write one table
	@set -e; for file in configs/priors/*.yaml; do name=$$(basename "$$file" .yaml); \
	  $(LAUNCH) priors.train "$$file" root="$$run" $${steps:+loop.steps="$$steps"} $(FLAGS); \
	  $(LAUNCH) generate.sample "$$run/$$name" --num "$$num" --out "$$run/$$name/samples"; done
	@$(LAUNCH) eval.run priors "$$run"

bench: setup ## speed and memory beside peers and physical limits (on a GPU where there is one), into benchmarks/RESULTS.md
	@set -e; for name in codebook sampling evaluation estimate training; do "$$py" -W ignore -m benchmarks.$$name; done

gpu-day: setup ## what a GPU has to show, in 12 minutes at most, into OUT; the same command goes on
	@"$$py" -W ignore -m benchmarks.gpu_day -- "$$out"
