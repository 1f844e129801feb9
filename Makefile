# `make train` and `make test` need Python 3.11 or newer with venv, and nothing else.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/train-$(shell date +%Y%m%d-%H%M%S)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test test-slow torch tpu lint format docs docs-serve docs-links docs-check bench bench-step bench-traffic bench-memory bench-collectives bench-quality bench-finetune bench-spectra bench-variants integrations clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		"apollo-optax needs Python 3.11 or newer, %s is %d.%d: make PYTHON=python3.11" % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[examples]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.torch: $(VENV)/.test
	$(INSTALL) -e '.[test,torch]'
	@touch $@

$(VENV)/.bench-torch: $(VENV)/.torch
	$(INSTALL) -e '.[test,torch,bench-torch]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.tpu: $(VENV)/.test
	$(INSTALL) -e '.[test,tpu-aot]'
	@touch $@

# A step on a CPU allocates its temporaries anew. These let glibc keep the memory, which
# the kernel would otherwise clear page by page in each step.
train bench-quality bench-finetune bench-variants: export MALLOC_MMAP_THRESHOLD_ = 1073741824
train bench-quality bench-finetune bench-variants: export MALLOC_TRIM_THRESHOLD_ = 1073741824

train: $(VENV)/.examples  ## pre-train a small LLaMA on this machine: AdamW, APOLLO-Mini and APOLLO-Zero side by side
	$(BIN)/python -m examples.llama.compare --steps 350 --out $(OUT)

test: $(VENV)/.test  ## run all tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.test  ## run the tests that take minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

torch: $(VENV)/.torch  ## install PyTorch, Transformers and PEFT, which some tests and a benchmark compare with

tpu: $(VENV)/.tpu  ## install the TPU compiler, which needs no TPU; some tests and the memory planner use it

lint: $(VENV)/.test  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test  ## rewrite the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## build the documentation site in docs/_build/html; warnings are errors
	rm -rf docs/_build/html docs/api/generated  # Otherwise pages of removed names would stay. Notebooks' outputs are cached.
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet docs docs/_build/html

docs-serve: docs  ## serve the site at http://localhost:8000
	$(BIN)/python -m http.server --bind localhost --directory docs/_build/html 8000

docs-links: $(VENV)/.docs  ## check every link and anchor of the built site
	$(BIN)/python docs/check.py --links-only

docs-check: $(VENV)/.docs  ## check links, and each page in headless Chromium, which has to be installed
	$(BIN)/python docs/check.py

bench: $(VENV)/.torch  ## print the state of optimizers, the import time and the throughput of pre-training; takes minutes
	$(BIN)/python -m benchmarks.state_bytes
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.pretrain_throughput

bench-step: $(VENV)/.bench-torch  ## print the CPU tables of docs/performance.md: a step of each optimizer, and the authors' release
	$(BIN)/python -m benchmarks.optimizer_step --against-torch

bench-traffic: $(VENV)/.tpu  ## print the bytes that each optimizer's step moves on a TPU, for docs/performance.md; takes half an hour
	$(BIN)/python -m benchmarks.step_traffic

bench-memory: $(VENV)/.tpu  ## print the tables of docs/memory.md; takes an hour, and continues after an interruption
	$(BIN)/python -m benchmarks.memory

bench-collectives: $(VENV)/.tpu  ## print the tables of docs/distributed.md; takes an hour
	$(BIN)/python -m benchmarks.collectives

bench-quality: $(VENV)/.test  ## compare optimizers at their best rates; takes two days of one core, and continues after an interruption
	$(BIN)/python -m benchmarks.rate_search

bench-finetune: $(VENV)/.test  ## fine-tune with each optimizer, at five rates and with two seeds; takes two hours, and continues after an interruption
	$(BIN)/python -m benchmarks.finetune_quality

bench-spectra: $(VENV)/.test  ## compare the updates that optimizers make of the same gradients, for docs/how-it-works.md; takes minutes
	$(BIN)/python -m benchmarks.spectra

bench-variants: $(VENV)/.test  ## train variants of AdamW, APOLLO-Mini and APOLLO-Zero, for docs/how-it-works.md and docs/results.md; takes hours, and continues after an interruption
	$(BIN)/python -m benchmarks.variants

integrations: | $(BIN)/python  ## run the optimizer inside MaxText, Flax, Tunix, Equinox and Haliax; takes minutes each, see integrations/README.md
	$(BIN)/python -m integrations

clean:  ## remove virtual environments, runs and the built site
	rm -rf $(VENV) runs integrations/.envs docs/_build docs/api/generated
