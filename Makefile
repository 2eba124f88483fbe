# Every target makes the virtual environment that it needs; installs happen once, and again when a
# requirements file changes. Python 3.11 to 3.13: `make demo PYTHON=python3.12`.

PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
WORKERS ?= 2
# `make device` takes an interpreter as it is, and installs nothing: on a machine with an accelerator
# JAX is there already. `make device PYTHON=python3` does, too.
ifeq ($(origin PYTHON),command line)
DEVICE_PYTHON ?= $(PYTHON)
endif
DEVICE_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
DEVICE_OUT ?= build/device
DEVICE_FLAGS ?=

RUN_FILES := requirements.txt $(wildcard requirements/*.txt)
RUN := $(VENV)/.installed-run
DEV := $(VENV)/.installed-dev
PARITY := $(PARITY_VENV)/.installed-parity
# What XLA needs to compile for NVIDIA GPUs that are not here, apart from the virtual environment:
# where the plugin finds no driver it complains in every program.
COMPILER := .gpu-compiler
GPU := $(COMPILER)/.installed

PY := $(VENV)/bin/python
PIP := -m pip --disable-pip-version-check --quiet
# Modules that are imported compile themselves; all others need not be. Where an environment forbids
# that, every process would compile JAX again: several seconds each.
INSTALL := $(PIP) install --no-compile
# A file's tests go to one worker: they share what is set up once, and what is traced and compiled.
BY_FILE := --dist loadfile
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow slurm-test docs-tables parity lint format bench device \
  device-wheels clean

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

demo: $(RUN) ## train, quantize and report on the digits; about a minute on two cores
	$(PY) run.py --config=configs/digits.py --workdir=runs/digits
	@echo "report: runs/digits/report.md"

test: $(DEV) $(GPU) ## the tests that a commit has to pass; minutes
	JAX_PLATFORMS=cpu $(PY) -m pytest -n $(WORKERS) $(BY_FILE) --durations=40 -m "not slow and not parity"

test-slow: $(DEV) $(GPU) ## the tests that take minutes each; with FLEXIQ_DATA, on real weights and images
	JAX_PLATFORMS=cpu $(PY) -m pytest -m "slow and not parity"

slurm-test: $(DEV) ## a sweep on a SLURM of its own on this machine; needs Debian's slurm-wlm and munge
	@$(PY) -c 'from tests.runs.sweeps import cluster_for_test as c; import sys; sys.exit(c.missing() or 0)'
	@mkdir -p build
	JAX_PLATFORMS=cpu $(PY) -m pytest -s tests/runs/sweeps/test_slurm.py > build/slurm.log 2>&1 \
	  || { tail -n 60 build/slurm.log; exit 1; }
	@tail -n 1 build/slurm.log; echo "log: build/slurm.log"

docs-tables: $(DEV) ## write the tables of docs/ from docs/tables/
	$(PY) -m experiments.sweeps.documents

parity: $(PARITY) ## compare the models with the torch implementations
	JAX_PLATFORMS=cpu $(PARITY_VENV)/bin/python -m pytest -m parity

lint: $(DEV) ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check

format: $(DEV) ## rewrite the files in house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(DEV) ## every script in benchmarks/; results in build/NAME.json; long with FLEXIQ_DATA
	@mkdir -p build
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do \
	  echo "$$script"; \
	  PYTHONPATH=. $(PY) $$script --json build/$$(basename $$script .py).json; \
	done

device: ## measure the present accelerator in at most eight minutes; small on a CPU; build/device/
	$(DEVICE_PYTHON) -m benchmarks.device --out $(DEVICE_OUT) $(DEVICE_FLAGS)

device-wheels: ## fetch what a machine without network may lack for `make device`; build/wheels/
	@mkdir -p build/wheels
	$(PYTHON) $(PIP) download --no-deps --only-binary=:all: --dest build/wheels ml-collections absl-py

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf $(VENV) $(PARITY_VENV) $(COMPILER) build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(call make_venv,$(VENV))

$(PARITY_VENV)/bin/python:
	$(call make_venv,$(PARITY_VENV))

$(RUN): $(RUN_FILES) | $(VENV)/bin/python
	$(PY) $(INSTALL) -r requirements.txt
	@touch $@

$(DEV): $(RUN_FILES) requirements-dev.txt | $(VENV)/bin/python
	$(PY) $(INSTALL) -r requirements-dev.txt
	@touch $@ $(RUN)

$(GPU): $(DEV)
	rm -rf $(COMPILER) && mkdir $(COMPILER)
	@set -e; if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  version=$$($(PY) -c 'import jax; print(jax.__version__)'); \
	  $(PY) $(PIP) install --no-deps --target $(COMPILER) "jax-cuda12-plugin==$$version" \
	    "jax-cuda12-pjrt==$$version" "nvidia-cuda-nvcc-cu12>=12.9,<13"; \
	fi
	@touch $@

$(PARITY): $(RUN_FILES) requirements-dev.txt requirements-parity.txt | $(PARITY_VENV)/bin/python
	$(PARITY_VENV)/bin/python $(PIP) install -r requirements-parity.txt
	@touch $@

define make_venv
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
  "PYTHON=$(PYTHON) is Python %d.%d: name one from 3.11 to 3.13, as PYTHON=python3.12" % v)'
$(PYTHON) -m venv $(1)
endef
