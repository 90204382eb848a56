# Two commands, each does its own set-up and is quick when repeated:
#   make run     serve a model (OPTION_MODEL_ID, MODEL_DIR, HF_MODEL_ID or SERVING_LOAD_MODELS), or the demo when none is given
#   make test    formatter, linter, types, tests
# And: make soak (the long counts), make lint (part of test), make clean.

PYTHON ?= python3
STAMPS := .venv/stamps
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint .ci/constraints.txt
KERNELS := $(shell find kernels -type f)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: run test soak lint clean
.DELETE_ON_ERROR:

run: $(STAMPS)/kernels
	@if [ -n "$$OPTION_MODEL_ID$$MODEL_DIR$$HF_MODEL_ID$$SERVING_LOAD_MODELS" ]; then \
	  exec $(BIN)/lmi-dist serve; \
	else \
	  exec $(BIN)/lmi-dist demo; \
	fi

test: lint
	$(BIN)/python -m pytest $(PYTEST)

soak: $(STAMPS)/kernels $(STAMPS)/dev
	$(BIN)/python -m pytest -m soak $(PYTEST)

lint: $(STAMPS)/kernels $(STAMPS)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build .cache .mypy_cache .pytest_cache .ruff_cache

# The virtual environment, torch before anything that asks for it, and what builds the kernels.
$(STAMPS)/base: .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lmi-dist needs Python 3.10 or later; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) scikit-build-core cmake ninja
	@mkdir -p $(STAMPS) && touch $@

# Editable: Python sources are used where they are; this builds the kernels, too.
$(STAMPS)/run: $(STAMPS)/base pyproject.toml
	$(PIP) --no-build-isolation --editable .
	@touch $@ $(STAMPS)/kernels

$(STAMPS)/dev: $(STAMPS)/run
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(STAMPS)/kernels

$(STAMPS)/kernels: $(KERNELS) | $(STAMPS)/run
	@echo "building the kernels"
	$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@touch $@
