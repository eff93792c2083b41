SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export TZ := UTC
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo stop ui test test-slow test-slow-flows test-slow-parts test-all lint lock schema bench clean

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

test-slow: test-slow-flows test-slow-parts  ## kills, scheduler, full data

test-slow-flows: setup
	@$(BIN)/python -m pytest -m slow --durations=12 tests/e2e --ignore tests/e2e/test_bench.py

test-slow-parts: setup
	@$(BIN)/python -m pytest -m slow --durations=12 tests/data tests/model tests/e2e/test_bench.py

test-all: test-slow-flows test test-slow-parts  ## every test (with -j 2 two of the three parts at once)

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
