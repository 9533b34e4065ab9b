# `make demo` and `make test` set everything up by themselves, virtual environment included.
VENV := .venv
PYTHON := $(VENV)/bin/python
OLDEST := .venv-oldest
# As many processes as cores, at most 4.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4

.PHONY: help install demo test test-quick test-oldest lint benchmark cards golden docs clean

help:
	@echo "make demo       draw digits with a published model, then train one for at most 4 minutes; pictures in demo/"
	@echo "make test       run the tests"
	@echo "make test-quick run those that neither train, compile nor start processes"
	@echo "make test-oldest  run those that depend on versions, with the oldest dependencies that are supported"
	@echo "make cards      bring cards and configurations in model_cards/ up to date with the code"
	@echo "make golden     write the numbers anew that likelihoods and samples are held to"
	@echo "make docs       the reference of the package, as pages in docs/"
	@echo "make benchmark  time sampling against the forward pass"
	@echo "make lint       ruff and pyright"
	@echo "make clean      remove the virtual environment and what runs have written"

# The constraints pin torch to a build of PyPI and everything else to the tested versions. PIP_FLAGS may add more.
$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	@echo "Set-up: a virtual environment in $(VENV) with some 115 packages, 1.9 GB with the build of torch for CPUs. On Linux"
	@echo "PyPI's build of torch, which is the default, adds gigabytes of CUDA libraries; without them:"
	@echo "    make install PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'"
	@echo "pip tells below what it downloads."
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "Set-up is done: $(VENV)"

install: $(VENV)/.installed

demo: install
	$(PYTHON) training/demo.py --output_dir demo

test: install
	$(PYTHON) $(PYTEST) --durations 15

test-quick: install
	$(PYTHON) $(PYTEST) -m "not slow"

# A second environment that sees the packages of the first one, torch above all, except those it has itself.
$(OLDEST)/.installed: $(VENV)/.installed constraints-oldest.txt
	rm -rf $(OLDEST)
	python3 -m venv $(OLDEST)
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r constraints-oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps -e .
	@touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST) -m versions --durations 15

cards: install
	set -e; for config in model_cards/*/config.json; do \
		$(PYTHON) training/publish.py --model $$(dirname $$config) --output_dir $$(dirname $$config); done

golden: install
	$(PYTHON) tests/write_golden.py

docs: install
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[docs]"
	$(PYTHON) -m pdoc --docformat google -o docs hf_pixelcnn hf_pixelcnn.training

benchmark: install
	$(PYTHON) training/benchmark.py

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

clean:
	rm -rf $(VENV) $(OLDEST) build demo docs runs .pytest_cache .ruff_cache *.egg-info
