# `make demo` and `make test` set everything up by themselves, virtual environment included.
VENV := .venv
PYTHON := $(VENV)/bin/python

.PHONY: help install demo test lint benchmark clean

help:
	@echo "make demo       train on bundled digits for at most 4 minutes, draw new ones into demo/"
	@echo "make test       run the tests"
	@echo "make benchmark  time sampling against the forward pass"
	@echo "make lint       ruff"
	@echo "make clean      remove the virtual environment and what runs have written"

# The constraints pin torch to a build of PyPI and everything else to the tested versions. PIP_FLAGS may add more.
$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed

demo: install
	$(PYTHON) training/demo.py --output_dir demo

test: install
	$(PYTHON) -m pytest

benchmark: install
	$(PYTHON) training/benchmark.py

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:
	rm -rf $(VENV) demo runs .pytest_cache .ruff_cache *.egg-info
