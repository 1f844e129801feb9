# `make train` and `make test` need Python 3.11 or newer with venv, and nothing else.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/train-$(shell date +%Y%m%d-%H%M%S)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test test-slow torch tpu lint format docs docs-serve docs-links docs-check bench bench-step bench-traffic bench-memory bench-collectives bench-quality bench-finetune bench-spectra bench-variants integrations clean

help:  ## what there is to make
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

train: $(VENV)/.examples  ## pre-train a small LLaMA on this machine: AdamW, APOLLO-Mini and APOLLO-Zero side by side
	$(BIN)/python -m examples.llama.compare --steps 350 --out $(OUT)

test: $(VENV)/.test  ## all tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.test  ## the tests that take minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

torch: $(VENV)/.torch  ## PyTorch, Transformers and PEFT, which some tests and a benchmark compare with

tpu: $(VENV)/.tpu  ## the TPU compiler, which needs no TPU; some tests and the memory planner use it

lint: $(VENV)/.test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test  ## write the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## the documentation site in docs/_build/html; warnings are errors
	rm -rf docs/_build/html docs/api/generated  # Pages of names that are gone would stay. Notebooks' outputs are kept.
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet docs docs/_build/html

docs-serve: docs  ## the site at http://localhost:8000
	$(BIN)/python -m http.server --bind localhost --directory docs/_build/html 8000

docs-links: $(VENV)/.docs  ## every link and anchor of the built site
	$(BIN)/python docs/check.py --links-only

docs-check: $(VENV)/.docs  ## the same, and each page in headless Chromium, which has to be installed
	$(BIN)/python docs/check.py

bench: $(VENV)/.torch  ## the tables that README and docs quote
	$(BIN)/python -m benchmarks.state_bytes
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.pretrain_throughput

bench-step: $(VENV)/.bench-torch  ## the tables of docs/performance.md: a step of each optimizer, and the authors' release
	$(BIN)/python -m benchmarks.optimizer_step --against-torch

bench-traffic: $(VENV)/.tpu  ## what each optimizer's compiled step moves, for docs/performance.md; half an hour
	$(BIN)/python -m benchmarks.step_traffic

bench-memory: $(VENV)/.tpu  ## the tables of docs/memory.md; an hour, and goes on where it was cut off
	$(BIN)/python -m benchmarks.memory

bench-collectives: $(VENV)/.tpu  ## the table of docs/distributed.md; an hour
	$(BIN)/python -m benchmarks.collectives

bench-quality: $(VENV)/.test  ## each optimizer at its best rates, with three seeds; days, and goes on where it was cut off
	$(BIN)/python -m benchmarks.rate_search

bench-finetune: $(VENV)/.test  ## fine-tuning by each optimizer, at five rates and with two seeds; two hours, and goes on where it was cut off
	$(BIN)/python -m benchmarks.finetune_quality

bench-spectra: $(VENV)/.test  ## what optimizers make of the same gradients: the figure and a table of docs/how-it-works.md; minutes
	$(BIN)/python -m benchmarks.spectra

bench-variants: $(VENV)/.test  ## what Mini's limiter costs and a momentum brings, for docs/how-it-works.md; an hour, and goes on where it was cut off
	$(BIN)/python -m benchmarks.variants

integrations: | $(BIN)/python  ## the optimizer inside MaxText, Flax, Tunix, Equinox and Haliax; minutes each, see integrations/README.md
	$(BIN)/python -m integrations

clean:  ## remove the virtual environment and what runs wrote
	rm -rf $(VENV) runs integrations/.envs docs/_build docs/api/generated
