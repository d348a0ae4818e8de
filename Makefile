PYTHON ?= python3
DATA ?= data
BIN := .venv/bin

.PHONY: demo test sanitize sweep market docs lint

.venv/installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0  # asks for Python 3.12, runs on 3.11
	touch $@

$(BIN)/fusionreid:  # without what tests and linters need
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .

demo: $(BIN)/fusionreid  ## render a data set, train on it, compare with two baselines, draw the report
	$(BIN)/python engine/train.py --config_file configs/synthetic/tiny.yml
	$(BIN)/python engine/evaluate.py --config_file configs/synthetic/tiny.yml --baselines

test: .venv/installed  ## all tests; `-m 'not slow'` is the quick part
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

sanitize: .venv/installed  ## every Triton kernel as compiled for sm_90, executed on the CPU in fp32, fp16 and bf16
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/sanitize -m sanitize --numprocesses 2

sweep: .venv/installed  ## thousands of random sequences and injected faults; up to an hour
	$(BIN)/python -m pytest -m sweep --promises --numprocesses 2 --dist worksteal

market: .venv/installed  ## train on 200 persons of Market-1501, in the folder DATA: a mAP below the floor fails; ten minutes
	$(BIN)/python bench/market.py --data '$(DATA)'

docs: .venv/installed  ## the manual, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
