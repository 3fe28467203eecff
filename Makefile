# Every target sets up .venv by itself when it is missing or older than what it was made from.
PYTHON ?= python3
TORCH_INDEX :=

BIN := .venv/bin
READY := .venv/.ready
BENCHMARKS := $(wildcard tests/benchmarks/*.py) kernels/bench/run.py

# Idle threads of torch's pool spin for some microseconds and then sleep, where they would otherwise take the cores from a
# browser or another run. Measured on two cores, a step of toy_v3 by spin count 0 / 1000 / the default: 550 / 400 / 390 ms
# on a quiet machine, 760 / 950 / 1430 ms beside a busy process. No result depends on it.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 1000

.PHONY: help setup lab tour test check bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make setup   create .venv; TORCH_INDEX=<url> chooses another build of torch, PYTHON=<path> another Python'
	@echo 'make lab     open JupyterLab at the tour'
	@echo 'make tour    the tour without a screen; prints the path of its report'
	@echo 'make test    run the tests'
	@echo 'make check   lint, types, notebooks'
	@echo 'make bench   run the benchmarks'
	@echo 'make clean   remove caches and build products; runs and .venv stay'

setup: $(READY)

# `--no-build-isolation`: the build backend too is the pinned one.
$(READY): pyproject.toml constraints.txt $(if $(TORCH_INDEX),always)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo 'Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install -c constraints.txt --index-url '$(TORCH_INDEX)' --force-reinstall --no-deps torch)
	$(BIN)/pip install -q -c constraints.txt hatchling editables
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[test,dev]'
	@touch $@

.PHONY: always
always:

lab: setup
	$(BIN)/workbench lab

tour: setup
	@$(BIN)/workbench tour

# Whole files go to the workers, as some share what is costly among their tests.
test: setup
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/workbench normalize --check notebooks

bench: setup
	@set -e; for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(BIN)/python $$benchmark; done

clean:
	rm -rf dist .pytest_cache .ruff_cache .hypothesis
	find workbench kernels notebooks tests -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
