# One command each. Everything runs in .venv, which the first command makes: PYTHON=python3.12 make test picks the interpreter.
# PYTEST_ARGS go to pytest: make test PYTEST_ARGS="-k reroll -x". WORKERS: how many processes share the tests; 0 shows them as they run.
PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= auto
# The libraries whose models are compiled and compared with, and what their imports need; without their own dependencies, among
# which are torchvision and a driver for neuromorphic chips.
PEERS := spikingjelly==2.0.0 snntorch==1.0.0 norse==1.1.0 sinabs==3.1.3 tracetorch==0.19.2 nir nirtorch pbr h5py loguru

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo test check lint types accept bench bench-gpu bench-check wheel clean

# Inductor does not quote -L<folder of torch>/lib in its link command (torch 2.13), so in a path with a space Python is
# started through a link to this folder whose own path has none.
TOP := .
ifneq ($(words $(CURDIR)),1)
TOP := $(shell links="$${XDG_CACHE_HOME:-$$HOME/.cache}/snn_compile"; link="$$links/tree-$$(pwd -P | cksum | cut -d ' ' -f 1)"; \
	mkdir -p "$$links" && ln -sfn "$$(pwd -P)" "$$link" && echo "$$link")
endif
PY := "$(TOP)/.venv/bin/python"

help:
	@echo "make demo    train the digits classifier with backend=\"snn\" (examples/train_digits.py)"
	@echo "make test    lint, types and every test"
	@echo "make check   lint, types and the tests that are not slow"
	@echo "make lint    ruff                      make types   mypy"
	@echo "make accept  rewrite the golden texts  make bench   the benchmarks (a quarter of an hour)"
	@echo "make bench-gpu    those of a GPU       make bench-check  a few rows, against what is committed"
	@echo "make wheel   dist/*.whl and *.tar.gz   make clean   remove .venv, builds and caches"

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("snn_compile needs Python 3.10 or newer; PYTHON=... picks one")'
	@echo "setting up .venv (the first time this downloads torch)"
	@"$(PYTHON)" -m venv .venv
	@$(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt --no-deps $(PEERS) \
		|| echo "the libraries compared with are not here: tests/ecosystem will be skipped"
	@touch $@

demo: setup
	@$(PY) examples/train_digits.py

# (a group stays in one process: tests/packaging builds its wheel once)
PYTEST := $(PY) -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadgroup

test: setup lint types
	@$(PYTEST) $(PYTEST_ARGS)

check: setup lint types
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

lint: setup
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet . || { echo "run: ruff format ."; exit 1; }

types: setup
	@$(PY) -m mypy

accept: setup # (in one process: two must not rewrite one file)
	@EXPECTTEST_ACCEPT=1 $(PY) -m pytest $(PYTEST_ARGS)

# PARTS picks some of them, ALL=1 adds the training curves and the longest first calls: make bench-gpu PARTS="neurons networks"
PARTS ?=
ALL ?=
RUN := $(PY) benchmarks/run.py $(if $(ALL),--all)

bench: setup
	@$(RUN) $(PARTS)

bench-gpu: setup
	@$(RUN) --device cuda $(PARTS)

bench-check: setup
	@$(PY) benchmarks/neurons.py --check

wheel: setup
	@rm -rf build dist
	@$(PY) -m build --no-isolation

clean:
	@rm -rf .venv build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
