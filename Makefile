# Every target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
PY := .venv/bin/python
RUN ?= runs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)

INSTALL := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e

.PHONY: setup demo test test-fast lint docs
setup: .venv/ready

.venv/bin/python:
	$(PYTHON) -m venv .venv

# What the demo needs, which is a third of all packages.
.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[demo]'
	touch $@

.venv/ready: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) '.[demo,dev,docs]'
	touch .venv/demo $@

demo: .venv/demo
	$(PY) train.py experiment=demo stage=1 hydra.run.dir=$(RUN)/stage1
	$(PY) train.py stage=2 ckpt=$(RUN)/stage1 hydra.run.dir=$(RUN)/stage2
	$(PY) evaluate.py ckpt=$(RUN)/stage2 target_saving=0.4 hydra.run.dir=$(RUN)/evaluate

# Whole files to each process, the longest ones first (tests/conftest.py).
PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

# Without the tests that start processes or train for seconds.
test-fast: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo
	$(PY) .ci/retired_words.py

# The documentation as a site in site/. A link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build -q
