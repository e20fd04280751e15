# Every target does its own set-up in .venv; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
PINS := requirements-ci.txt
SOURCES := pyproject.toml setup.py CMakeLists.txt ttt_kernels/__init__.py $(shell find csrc -type f | LC_ALL=C sort)
hash = $(shell cat $(1) | sha256sum | cut -c1-16)
# A stamp is named after the contents it stands for: nothing is installed twice.
DEPENDENCIES := $(VENV)/dependencies-$(call hash,$(PINS) pyproject.toml)
INSTALLED := $(VENV)/installed-$(call hash,$(PINS) $(SOURCES))
TESTS := python_tests $(wildcard benchmarks)

.PHONY: help setup demo test lint bench gpu-check info docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \t\2/p' $(MAKEFILE_LIST) | expand -t 19

setup: $(INSTALLED)  ## create .venv with everything installed

demo: $(INSTALLED)  ## a real pretrained Llama on real text; ARGS="--help" lists the options
	$(PY) -m ttt_kernels demo $(ARGS)

test: $(INSTALLED)  ## every test; ARGS="-k scan" selects
	OMP_NUM_THREADS=1 $(PY) -m pytest $(TESTS) --benchmark-disable $(ARGS)

lint: $(INSTALLED)  ## ruff
	$(PY) -m ruff check .

bench: $(INSTALLED)  ## time the ops; ARGS="--help" lists the options
	$(PY) -m ttt_kernels bench $(ARGS)

# A GPU machine has the torch that fits it: its own Python, where that has one, and nothing is installed.
gpu-check:  ## verify what this machine can, GPU or not; ARGS="--help" lists the options
	@if $(PYTHON) -c 'import torch, pytest' 2>/dev/null; then $(PYTHON) -m ttt_kernels verify $(ARGS); \
	  else $(MAKE) --no-print-directory setup && $(PY) -m ttt_kernels verify $(ARGS); fi

docs: $(INSTALLED)  ## the documentation as a site, in build/site
	$(PY) -m mkdocs build

info: $(INSTALLED)  ## what is built, and what runs here
	$(PY) -m ttt_kernels info

clean:  ## remove the environment and every build product
	rm -rf $(VENV) build dist *.egg-info ttt_kernels/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: Python >= 3.10 is needed, and $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) cannot make environments: install its venv package (python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The pins need Python 3.11; on 3.10 pip chooses within the ranges of pyproject.toml.
$(DEPENDENCIES): | $(PY)
	@echo "make: installing into $(VENV) (some minutes, once)"
	@if $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	  then $(PIP) install -r $(PINS); \
	  else $(PIP) install "setuptools>=77" wheel pybind11 ninja cmake && $(PIP) install --no-build-isolation -e '.[dev]'; fi
	@rm -f $(VENV)/dependencies-*; touch $@

$(INSTALLED): $(DEPENDENCIES)
	@$(PIP) install --no-build-isolation --no-deps -e .
	@$(PY) -c 'from ttt_kernels import _extension as e; print("make: ttt_kernels._C:", e.why_not() or "built")'
	@rm -f $(VENV)/installed-*; touch $@
