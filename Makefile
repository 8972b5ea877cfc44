# Every target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
PY := .venv/bin/python
RUN ?= runs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)

.PHONY: setup demo test lint
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: setup
	$(PY) train.py experiment=demo stage=1 hydra.run.dir=$(RUN)/stage1
	$(PY) train.py stage=2 ckpt=$(RUN)/stage1 hydra.run.dir=$(RUN)/stage2
	$(PY) evaluate.py ckpt=$(RUN)/stage2 target_saving=0.4 hydra.run.dir=$(RUN)/evaluate

test: setup
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
