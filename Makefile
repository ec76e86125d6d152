PYTHON ?= python3
VENV := .venv

.PHONY: demo test coverage types clean

demo: $(VENV)/installed  ## train, sample and score on real digits
	$(VENV)/bin/python -m varzoo.demo

test: $(VENV)/installed  ## the tests
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2

coverage: $(VENV)/installed  ## the tests, and which lines they run (processes that tests start are not seen)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --cov=varzoo --cov-report=term-missing:skip-covered

types: $(VENV)/installed  ## the type checker
	$(VENV)/bin/python -m mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
