# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets.

PYTHON ?= python3.11
VENV ?= .venv
# Index of PyTorch's CPU wheels, where the default index has none with +cpu.
TORCH_INDEX ?=
PIP_OPTIONS = $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
BIN = $(VENV)/bin
# Environment of the real msProbe, for tests/interop only.
INTEROP = .interop
MODEL = .demo/tiny-qwen2
# So that the numbers of a run do not depend on how many cores there are.
export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
# What a failing command has half made is not taken for made by the next run.
.DELETE_ON_ERROR:
.PHONY: help env demo test interop lint types format bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.ready: requirements/engine.lock requirements/dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(PIP_OPTIONS) -r requirements/engine.lock -r requirements/dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --editable .
	touch $@

env: $(VENV)/.ready ## build .venv from the lock files: vLLM on the CPU and all tools

$(MODEL)/model.safetensors: $(VENV)/.ready examples/tiny_qwen2.py
	$(BIN)/python examples/tiny_qwen2.py $(MODEL)

demo: $(VENV)/.ready $(MODEL)/model.safetensors ## the gate on a real vLLM engine: passes, then fails with a planted fault
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready $(MODEL)/model.safetensors lint types ## the whole test suite
	$(BIN)/python -m pytest

$(INTEROP)/.ready: requirements/interop.lock
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(PIP_OPTIONS) -r requirements/interop.lock
	touch $@

interop: $(VENV)/.ready $(INTEROP)/.ready ## our dumps against those of the real msProbe
	$(BIN)/python -m pytest tests/interop

lint: $(VENV)/.ready ## formatting, lint, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.ready ## static types
	$(BIN)/mypy

format: $(VENV)/.ready ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready $(MODEL)/model.safetensors ## overhead table
	$(BIN)/python benchmarks/overhead.py

clean: ## remove everything that is made
	rm -rf $(VENV) $(INTEROP) .demo .msprobe build dist *.egg-info
