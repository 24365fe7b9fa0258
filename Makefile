# Every target does its own set-up: a virtual environment in .venv with the tested versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: audit test lint bench

audit: .venv/ready
	$(BIN)/rgap audit

# One thread a process: threads of two processes that share two cores wait for each other.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src

# The figures that README.md quotes, on a folder with cifar10 and mnist pictures: make bench DATA=folder
bench: .venv/ready
	$(BIN)/python benchmarks/closed_form.py --data $(DATA)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@
