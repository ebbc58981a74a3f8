# Everything runs in .venv, made on first use. All paths are relative: the checkout may lie anywhere, spaces included.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -q

.PHONY: help env train test test-fast test-rest test-all lint types format clean

help:            ## this list
	@sed -n 's/^\([a-z-]*\): .*## \(.*\)/  make \1\t\2/p' Makefile

env: .venv/ready ## create the environment

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch>=2.8"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch .venv/ready

train: env       ## train the main recipe with two workers: summary, runs/<name>/done.json, wandb run
	$(BIN)/launcher recipe=resnet launch.workers=$(WORKERS)

test: env        ## every unit test and one real job of each kind; ten minutes on two cores
	$(PYTEST) -m "not slow" -n 2
	$(PYTEST) -m "core" -n 2 --dist loadscope --durations=10

test-fast: env   ## the tests that start neither jobs nor other slow processes; under a minute
	$(PYTEST) -m "not slow and not process" -n 2

test-rest: env   ## the tests that `make test` leaves out: Slurm, timings and the long jobs
	$(PYTEST) -m "slow and not core and not alone" -n 2 --dist loadscope --no-loadscope-reorder --durations=15
	$(PYTEST) -m "slow and alone" --durations=15

test-all: test test-rest ## every test

lint: env        ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env       ## mypy
	$(BIN)/mypy

format: env      ## let ruff write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the environment and caches, never runs/
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
