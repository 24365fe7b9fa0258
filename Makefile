.PHONY: audit federation test lint docs bench bench-compact

# One stamp file: the environment is made again when the requirements change, and only then.
.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch .venv/ready

audit: .venv/ready
	.venv/bin/rgap audit

# Three clients and a server in one process: what does the server see of each?
federation: .venv/ready
	FLWR_TELEMETRY_ENABLED=0 .venv/bin/python examples/federation/run.py

# One thread for each of the two processes: processes that share cores and spin are many times slower.
test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 tests

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict src

# To site/index.html. Strict: a dead link is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

# DATA holds cifar10/ and mnist/, one subfolder of pictures for each class.
bench: .venv/ready
	.venv/bin/python benchmarks/closed_form.py --data "$(DATA)"
	.venv/bin/python benchmarks/throughput.py --data "$(DATA)" --out throughput.json --plots docs/plots

bench-compact: .venv/ready
	.venv/bin/python benchmarks/throughput.py --data "$(DATA)" --compact
