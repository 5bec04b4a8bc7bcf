# Two commands from a fresh clone: `make demo` and `make test`.
# They need Python >= 3.11 and make; everything else goes into .venv, or into another
# environment for another Python: `make test PYTHON=python3.13 VENV=.venv-3.13`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# `lowest-direct` installs exactly the lower bounds of pyproject.toml.
RESOLUTION ?= highest
INSTALL_highest = -m pip install --quiet
INSTALL_lowest-direct = -m uv pip install --quiet --resolution lowest-direct --python $(BIN)/python

.PHONY: demo gallery test test-all test-versions lint format docs notebooks site-check clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip $(if $(filter lowest-direct,$(RESOLUTION)),uv)
	$(BIN)/python $(INSTALL_$(RESOLUTION)) --editable '.[all,test]'
	touch $@

# DATA=mnist.npz trains on that file instead of scikit-learn's digits.
demo: $(VENV)/.installed
	$(BIN)/python examples/compare_digits.py $(if $(DATA),--data $(DATA))

gallery: $(VENV)/.installed
	$(BIN)/python examples/gallery.py --out docs/gallery

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# What `test` leaves out as well: the same checks of methods that share an engine, two
# processes, a Transformer. Some 13 minutes on two cores.
test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m ''

# Before a release: some 15 minutes for each Python that is found.
test-versions:
	.ci/test-versions

lint:
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install --quiet '.[lint,all]'
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/pyright --pythonpath .venv-lint/bin/python

format: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet '.[lint]'
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Every tutorial, executed, as dist/notebooks/*.ipynb.
notebooks: $(VENV)/.docs
	$(BIN)/python docs/notebooks.py dist/notebooks

# The site in a real browser: Debian's package `chromium`.
site-check: docs
	$(BIN)/python -m pip install --quiet --editable '.[site]'
	$(BIN)/python -m pytest -q tests/site_check.py

clean:
	rm -rf .venv .venv-* docs/_build dist
