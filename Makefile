# `make demo` and `make test` need Python 3.11+ and nothing else: both create .venv and install into it once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out/demo
# Sizes of the expert-parallel group in the GPU benchmarks, e.g. "1 2 4" on a machine with four GPUs.
GPU_RANKS ?= 1

# One thread per rank: several ranks share the cores, and more threads than cores slow all of them down.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint gpu clean

help:
	@echo "make demo   digits on 2 expert-parallel ranks, uncached and cached side by side (into $(OUT))"
	@echo "make test   lint, type checks, layer contract and the test suite"
	@echo "make lint   the static checks alone"
	@echo "make gpu    GPU tests and benchmarks (needs a CUDA device; results in benchmarks/results/)"
	@echo "make clean  remove .venv, caches and out/"

install: $(STAMP)

# The stamp is written last, so an interrupted installation is resumed by the next make.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), one to three minutes"
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/torchrun --standalone --nproc_per_node=2 launch/generate.py --config configs/demo.yaml --out $(OUT) --overwrite --compare-uncached

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# On a machine that brings its own torch and cannot install: make gpu GPU_PYTHON=python3
gpu: $(if $(GPU_PYTHON),,$(STAMP))
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.layer.layer --device cuda --ranks 1
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.layer.kernels --device cuda
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.layer.gpu_e2e --device cuda

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
