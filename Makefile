# make quickstart   install, collect demonstrations, train, evaluate: runs/quickstart/report.html
# make test         install, lint, run the whole suite
# make lock         resolve the current releases again (then run make test)

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

.PHONY: quickstart test lint lock clean
.DEFAULT_GOAL := quickstart

# uv only resolves and unpacks; it honours the same index settings that are given to it, and pip is the fallback.
.venv/ready: requirements.lock pyproject.toml setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"error: Python 3.11, 3.12 or 3.13 is needed, found {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock \
	  || $(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

quickstart: .venv/ready
	$(BIN)/python scripts/collect.py --config configs/quickstart.py
	$(BIN)/python scripts/train.py --config configs/quickstart.py
	$(BIN)/python scripts/evaluate.py --run $(RUN)

test: .venv/ready lint
	$(BIN)/python -m pytest tests/simulator
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock: .venv/ready
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --upgrade \
	  --extra train --extra sim --extra convert --extra docs --extra dev \
	  --output-file requirements.lock

clean:
	rm -rf .venv runs
