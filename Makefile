# Two commands, each does its own set-up and is quick when repeated:
#   make run     serve a model (OPTION_MODEL_ID, MODEL_DIR, HF_MODEL_ID or SERVING_LOAD_MODELS), or the demo when none is given
#   make test    formatter, linter, types, tests
# And: make test-page (the page at / in a real Chromium), make soak (the long counts), make lint (part of test), make clean.

PYTHON ?= python3
STAMPS := .venv/stamps
BIN := .venv/bin
# --no-compile: all of torch and transformers would take minutes; what is used is compiled afterwards, in seconds
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile --constraint .ci/constraints.txt
KERNELS := $(shell find kernels -type f)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: run test test-page soak lint clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

run: $(STAMPS)/kernels
	@if [ -n "$$OPTION_MODEL_ID$$MODEL_DIR$$HF_MODEL_ID$$SERVING_LOAD_MODELS" ]; then \
	  exec $(BIN)/lmi-dist serve; \
	else \
	  exec $(BIN)/lmi-dist demo --cache .cache; \
	fi

# A process a CPU; the tests of a file stay together, for they share a server.
test: lint
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(PYTEST)

test-page: $(STAMPS)/dev $(STAMPS)/kernels
	$(BIN)/python -m pytest -m page $(PYTEST)

soak: $(STAMPS)/dev $(STAMPS)/kernels
	$(BIN)/python -m pytest -m soak $(PYTEST)
	$(BIN)/python tests/mutate_cuda.py

lint: $(STAMPS)/dev $(STAMPS)/kernels
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

# Editable: Python sources are used where they are; this builds the kernels, too. Once all is installed, a change of the kernels
# costs only their build.
# The CUDA column takes a minute to build: here only where there is a GPU (LMI_CUDA=ON: always; a wheel: wherever there is nvcc), and for
# sm_90a alone unless LMI_CUDA_ARCHITECTURES says otherwise, as CMake names them, or `release` for all.
LMI_CUDA ?= $(if $(wildcard /dev/nvidia0),ON,OFF)
INSTALL := $(PIP) --no-build-isolation --config-settings=cmake.define.LMI_CUDA=$(LMI_CUDA) \
  $(if $(LMI_CUDA_ARCHITECTURES),--config-settings=cmake.define.LMI_CUDA_ARCHITECTURES=$(LMI_CUDA_ARCHITECTURES)) --editable

$(STAMPS)/dev: $(STAMPS)/base pyproject.toml
	$(INSTALL) '.[dev]'
	$(BIN)/python .ci/compile_used.py
	@touch $@ $(STAMPS)/run $(STAMPS)/kernels

$(STAMPS)/kernels: $(KERNELS) $(STAMPS)/base pyproject.toml
	@if [ $(STAMPS)/run -nt pyproject.toml ] && [ $(STAMPS)/run -nt $(STAMPS)/base ]; then \
	  echo "building the kernels" && $(INSTALL) . --quiet --no-deps; \
	else \
	  $(INSTALL) . && $(BIN)/python .ci/compile_used.py && touch $(STAMPS)/run; \
	fi
	@touch $@
