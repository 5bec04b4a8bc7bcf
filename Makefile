# Two commands from a fresh clone: `make demo` and `make test`.
# They need Python >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo gallery test test-all lint format docs notebooks site-check clean

.venv/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,test]'
	touch $@

# DATA=mnist.npz trains on that file instead of scikit-learn's digits.
demo: .venv/.installed
	$(BIN)/python examples/compare_digits.py $(if $(DATA),--data $(DATA))

gallery: .venv/.installed
	$(BIN)/python examples/gallery.py --out docs/gallery

test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# What `test` leaves out as well: the same checks of methods that share an engine, two
# processes, a Transformer. Some 13 minutes on two cores.
test-all: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m ''

lint:
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install --quiet '.[lint,all]'
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/pyright --pythonpath .venv-lint/bin/python

format: .venv/.installed
	$(BIN)/python -m pip install --quiet '.[lint]'
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: .venv/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Every tutorial, executed, as dist/notebooks/*.ipynb.
notebooks: .venv/.docs
	$(BIN)/python docs/notebooks.py dist/notebooks

# The site in a real browser: Debian's package `chromium`.
site-check: docs
	$(BIN)/python -m pip install --quiet --editable '.[site]'
	$(BIN)/python -m pytest -q tests/site_check.py

clean:
	rm -rf .venv .venv-lint docs/_build dist
