# The commands of the house. They need make, Python 3.11 or newer with venv, and pip; the rest installs itself into $(VENV).

VENV    ?= .venv
# The environment beside it that also holds PyTorch; the first place to look for its build without CUDA.
PARITY  ?= $(VENV)-parity
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS    ?=
# Test processes: one a core, at most 4 (each holds a JAX of its own), none beside pytest itself on one core.
CORES   := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
JOBS    ?= $(shell [ $(CORES) -gt 4 ] && echo 4 || echo $(CORES))
XDIST   := $(if $(filter-out 0 1,$(JOBS)),-n $(JOBS) --dist worksteal)
PY      := $(VENV)/bin/python
PYTEST  := $(PY) -m pytest $(XDIST)
# A stamp says that an install finished; it is older than these files when they changed, and the install runs again.
NEEDS   := pyproject.toml setup.py constraints.txt
PIP      = $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env quickstart quickstart-ssl test test-fast soak parity lint clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "Variables: PYTHON=python3.12 (which Python), VENV=$(VENV), JOBS=$(JOBS) (test processes), WORKDIR (of a quickstart), ARGS (more flags)."

quickstart: WORKDIR ?= runs/quickstart
quickstart: $(VENV)/.installed  ## Install, then train and evaluate a small register ViT on rendered scenes (minutes on a CPU)
	$(PY) -m regvit_jax.main --config=configs/quickstart.py --workdir=$(WORKDIR) $(ARGS)

quickstart-ssl: WORKDIR ?= runs/quickstart-ssl
quickstart-ssl: $(VENV)/.installed  ## Install, then the same without labels: DINOv2 on the same scenes (ten minutes on a CPU)
	$(PY) -m regvit_jax.main --config=configs/dinov2_scenes.py --workdir=$(WORKDIR) $(ARGS)

test: lint  ## Install, lint, then every test but the soak tests
	$(PYTEST) $(ARGS)

test-fast: lint  ## Install, lint, then the tests of daily work: all that start no other processes
	$(PYTEST) -m "not slow and not process and not soak" $(ARGS)

soak: $(VENV)/.installed-test  ## The long tests that look for leaks and rare races, one at a time
	$(PY) -m pytest -m soak $(ARGS)

parity: $(PARITY)/.installed-parity  ## Compare live with PyTorch's libraries, in an environment of its own (~2 GB)
	PYTHONDONTWRITEBYTECODE= $(PARITY)/bin/python -m pytest $(if $(XDIST),-n $(JOBS) --dist loadgroup) -m parity tests/parity $(ARGS)

lint: $(VENV)/.installed-test  ## ruff check
	$(PY) -m ruff check .

env: $(VENV)/.installed-test  ## Only create the environment, with what the tests need

clean:  ## Remove the environments and caches; runs/ stays
	rm -rf $(VENV) $(PARITY) .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.installed: $(NEEDS) | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV): about 1.2 GB, a minute on a fast network"
	$(PIP) --editable .
	@touch $@

# The test environment holds all that the plain one does, so that it answers for both.
$(VENV)/.installed-test: $(NEEDS) | $(VENV)/pyvenv.cfg
	@echo "Installing with test tools into $(VENV): about 1.2 GB, a minute on a fast network"
	$(PIP) --editable '.[test]'
	@touch $(VENV)/.installed $@

# torch first and alone: PyPI's brings gigabytes of CUDA on Linux, PyTorch's own index has one without. timm alone: it
# asks for torchvision, which must be built for the very same torch, and uses it for images only; tests/parity does
# without. Compiling all of it takes a minute, and what is imported is compiled and kept by whoever imports it first.
$(PARITY)/.installed-parity: PY := $(PARITY)/bin/python
$(PARITY)/.installed-parity: $(NEEDS) | $(PARITY)/pyvenv.cfg
	@echo "Installing with PyTorch into $(PARITY): about 2 GB, two minutes on a fast network"
	$(PIP) --no-compile --no-deps --retries 1 --index-url $(TORCH_INDEX) torch || $(PIP) --no-compile --no-deps torch
	$(PIP) --no-compile --editable '.[test]' torch transformers
	$(PIP) --no-compile --no-deps timm
	@touch $@

# A name on PATH may be a shim without a Python behind it, so each candidate is run, not only looked up.
$(VENV)/pyvenv.cfg $(PARITY)/pyvenv.cfg:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python); do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Creating $(@D) with $$($$python --version) ($$python)"; \
	    $$python -m venv $(@D) && exit 0; \
	    echo "$$python cannot create an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	  fi; \
	  found="$$found $$python ($$($$python --version 2>&1 | head -n 1 || true));"; \
	done; \
	echo "regvit_jax needs Python 3.11 or newer. Tried:$$found install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1
