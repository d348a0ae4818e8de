PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed  ## render a data set, train on it, evaluate beside two baselines, draw the report
	$(BIN)/python engine/train.py --config_file configs/synthetic/tiny.yml
	$(BIN)/python engine/evaluate.py --config_file configs/synthetic/tiny.yml --baselines

test: .venv/installed  ## some eight minutes on two cores without a GPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
