# `make demo` and `make test` set everything up by themselves, virtual environment included.
VENV := .venv
PYTHON := $(VENV)/bin/python
OLDEST := .venv-oldest
APP := .venv-app
# As many processes as cores, at most 4; what the tests of a file share is made once.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
# PIP_FLAGS may add options.
PIP_INSTALL := -m pip install --disable-pip-version-check $(PIP_FLAGS)

.PHONY: help install demo app test test-quick test-oldest test-app attack screenshots lint benchmark cards golden docs clean

help:
	@echo "make demo       draw digits with a published model, then train one for at most 4 minutes; pictures in demo/"
	@echo "make app        open a page in the browser: draw, complete, score, look inside"
	@echo "make test       run the tests"
	@echo "make test-quick run those that take least, in under a minute"
	@echo "make test-oldest  run those that depend on versions, with the oldest dependencies that are supported"
	@echo "make test-app   run those of the page, in a headless Chromium if there is one; with the times that people wait"
	@echo "make attack     ten minutes of hostile input: damaged streams, data, models, arguments; random settings"
	@echo "make cards      bring cards and configurations in model_cards/ up to date with the code"
	@echo "make golden     write the numbers anew that likelihoods and samples are held to"
	@echo "make screenshots  write the pictures of the page anew that the README shows"
	@echo "make docs       the reference of the package, as pages in docs/"
	@echo "make benchmark  time sampling against the forward pass"
	@echo "make lint       ruff and pyright"
	@echo "make clean      remove the virtual environment and what runs have written"

# The constraints pin torch to a build of PyPI and everything else to the tested versions.
$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt
	@echo "Set-up: a virtual environment in $(VENV) with some 115 packages, 1.6 GB with the build of torch for CPUs. On Linux"
	@echo "PyPI's build of torch, which is the default, adds gigabytes of CUDA libraries; without them:"
	@echo "    make install PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'"
	@echo "pip tells below what it downloads."
	python3 -m venv $(VENV)
	$(PYTHON) $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "Set-up is done: $(VENV)"

install: $(VENV)/.installed

demo: install
	$(PYTHON) training/demo.py --output_dir demo

test: install
	$(PYTHON) $(PYTEST) --durations 15

test-quick: install
	$(PYTHON) $(PYTEST) -m "not slow"

# Other environments see the packages of the first one, torch above all, except those they have themselves.
define beside-the-first
	rm -rf $(1)
	python3 -m venv $(1)
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(1)/bin/python $(PIP_INSTALL) --quiet -r $(2)
	$(1)/bin/python $(PIP_INSTALL) --quiet --no-deps -e .
	@touch $(1)/.installed
endef

$(OLDEST)/.installed: $(VENV)/.installed constraints-oldest.txt
	$(call beside-the-first,$(OLDEST),constraints-oldest.txt)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python $(PYTEST) -m versions --durations 15

# Gradio takes another Pillow than the tests of images were run with.
$(APP)/.installed: $(VENV)/.installed constraints-app.txt
	$(call beside-the-first,$(APP),constraints-app.txt)

app: $(APP)/.installed
	$(APP)/bin/python training/app.py --open

test-app: $(APP)/.installed
	$(APP)/bin/python -m pytest tests/test_app.py tests/test_app_in_a_browser.py --durations 15

screenshots: $(APP)/.installed
	SCREENSHOTS=model_cards/space/screenshots $(APP)/bin/python -m pytest tests/test_app_in_a_browser.py

attack: install
	$(PYTHON) tests/attacks.py --seconds 600

cards: install
	set -e; for config in model_cards/*/config.json; do \
		$(PYTHON) training/publish.py --model $$(dirname $$config) --output_dir $$(dirname $$config); done

golden: install
	$(PYTHON) tests/write_golden.py

docs: install
	$(PYTHON) $(PIP_INSTALL) --quiet -c constraints.txt -e ".[docs]"
	$(PYTHON) -m pdoc --docformat google -o docs hf_pixelcnn hf_pixelcnn.training

benchmark: install
	$(PYTHON) training/benchmark.py

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

clean:
	rm -rf $(VENV) $(OLDEST) $(APP) build demo docs runs .pytest_cache .ruff_cache *.egg-info
