# Commands on a fresh clone: `make demo`, `make demo-llm` and `make test`. Everything they install goes into .venv.

PYTHON ?= python3
# Another pip index for torch alone, such as https://download.pytorch.org/whl/cpu: its default build on Linux is for CUDA.
TORCH_INDEX ?=
# Processes that the tests run in; those that start whole runs, and kill them, come afterwards and have the machine to themselves.
WORKERS ?= 2
# Passed on: `make demo ARGS="--seed 3"`, `make test ARGS="-k config"`.
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BASE := $(VENV)/.installed
LLM := $(VENV)/.installed-llm
TESTS := $(VENV)/.installed-tests

.PHONY: help demo demo-llm install lint test test-all constraints clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         train SAC on Pendulum-v1 until it is solved, and write its report"
	@echo "make demo-llm     train a small language model on countdown by verified answers, and write its report"
	@echo "make test         ruff, mypy and the tests"
	@echo "make test-all     the same with the slow tests"
	@echo "make install      install Millrace into .venv, which demo and test do by themselves"
	@echo "make constraints  pin the versions that are in .venv in constraints.txt"
	@echo "make clean        remove .venv and caches; runs/ stays"
	@echo
	@echo "PYTHON=python3.12        the Python that .venv is made with, 3.11 or newer"
	@echo "TORCH_INDEX=https://…    a pip index for torch alone, such as https://download.pytorch.org/whl/cpu"
	@echo "WORKERS=2                processes that the tests run in; 0 is this one, for debuggers"
	@echo "ARGS=\"--seed 3\"          passed on to millrace train (demo) or pytest (test, test-all)"

demo: $(BASE)
	@$(BIN)/millrace train configs/pendulum_sac.yaml $(ARGS)

demo-llm: $(LLM)
	@$(BIN)/millrace train configs/countdown.yaml $(ARGS)

install: $(BASE)

lint: $(TESTS)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

# Exit code 5: ARGS leave none of the tests of a part.
PYTEST := $(BIN)/python -m pytest -q
test: lint
	@$(PYTEST) -n $(WORKERS) --dist loadgroup -m "not slow and not whole_run" $(ARGS) || test $$? -eq 5
	@$(PYTEST) -m "not slow and whole_run" $(ARGS) || test $$? -eq 5

test-all: lint
	@$(PYTEST) -n $(WORKERS) --dist loadgroup -m "not whole_run" $(ARGS) || test $$? -eq 5
	@$(PYTEST) -m "whole_run" $(ARGS) || test $$? -eq 5

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Millrace needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	       "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

# Torch comes first and without its dependencies, because an index for torch alone has other versions of those.
$(BASE): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Millrace into $(VENV); the first time this takes some minutes."
	@test -z "$(TORCH_INDEX)" || $(PIP) install --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch
	@$(PIP) install -c constraints.txt -e .
	@echo "Compiling the loops of the replay service."
	@$(BIN)/python -m replay.warmup
	@touch $@

$(LLM): $(BASE)
	@echo "Installing what language models need into $(VENV)."
	@$(PIP) install -c constraints.txt -e '.[llm]'
	@touch $@

$(TESTS): $(BASE)
	@echo "Installing what the tests need into $(VENV)."
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

# To move to newer versions: upgrade them in .venv with pip, `make test`, then this. Build suffixes (+cpu) and the CUDA
# libraries, which torch itself pins, are left out, so that the pins fit every machine.
constraints: $(TESTS)
	@{ echo "# Every version that was tested, with $$($(BIN)/python -V). Made by: make constraints"; \
	   $(PIP) freeze --all --exclude pip --exclude millrace | sed -E 's/\+[A-Za-z0-9.]+$$//; /^(nvidia-|cuda-|triton==)/d' \
	   | LC_ALL=C sort -f; } > $(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt

clean:
	@rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
