SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export TZ := UTC
export PYTHONSAFEPATH := 1

SLOW := slow-bench slow-runs slow-flows slow-model slow-data
RUNS := $(addprefix tests/e2e/test_, kills.py demo.py full_data.py backfill.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo stop ui test test-slow test-most test-all $(SLOW) lint lock schema bench clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/.ready  ## virtual environment with the locked dependencies

.venv/.ready: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the locked dependencies"
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@./deploy/install_torch.sh $(BIN)/python
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --no-deps -r requirements.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

demo: setup  ## real flights, from raw Parquet to an answer over HTTP
	@$(BIN)/python -m flows.demo

stop:  ## ends the endpoint and everything else that was left running
	@test ! -x $(BIN)/millrace || $(BIN)/millrace down

ui: setup  ## the Prefect UI on what was run, and a worker for the schedules
	@$(BIN)/millrace up

test: setup  ## the everyday tests
	@$(BIN)/python -m pytest -m "not slow" --durations=25

test-slow: $(SLOW)  ## kills, scheduler, full data

slow-bench: OF := tests/e2e/test_bench.py
slow-runs: OF := $(RUNS)
slow-flows: OF := tests/e2e $(addprefix --ignore ,tests/e2e/test_bench.py $(RUNS))
slow-model: OF := tests/model
slow-data: OF := tests/data
$(SLOW): setup
	@$(BIN)/python -m pytest -m slow --durations=12 $(OF)

test-most: slow-bench slow-runs slow-flows test slow-model  ## every test but slow-data (with -j 2 two parts at once: the long ones first)
test-all: test-most slow-data  ## every test

lint: setup  ## ruff, mypy and the import contracts
	@$(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

lock: setup  ## resolves requirements.lock anew (MLflow wants an older importlib-metadata than it needs)
	@$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --no-annotate --no-header -q \
	  -c <(printf 'torch==2.13.0\npyarrow<26\n') --override <(echo 'importlib-metadata>=8') \
	  | grep -vE '^(torch==|triton|cuda-|nvidia-(cu|nccl|nv[jts]))' > requirements.lock

schema: setup  ## pipelines/schema.json, for editors
	@$(BIN)/millrace schema

bench: setup  ## times of the demo, as JSON under bench/results
	@$(BIN)/python -m bench.demo

clean: stop  ## removes the home: data, runs, releases
	@rm -rf .millrace
