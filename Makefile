.PHONY: audit federation test explore lint docs bench bench-compact

# One stamp file for what each purpose needs: installed again when the requirements change, and only then.
INSTALL = .venv/bin/python -m pip install -c constraints.txt

.venv/base: pyproject.toml constraints.txt
	@echo "Installing what an audit needs into .venv: 300 MB to download, 1.2 GB on disk, 1 to 2 minutes (ten times that with a CUDA torch)."
	python3 -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/test: .venv/base
	@echo "Installing what tests, documentation and benchmarks need: about 250 MB to download, 700 MB on disk, 2 minutes."
	$(INSTALL) -e '.[test]'
	touch $@

.venv/flower: .venv/base
	@echo "Installing Flower: about 60 MB to download, 180 MB on disk, half a minute."
	$(INSTALL) -e '.[flower]'
	touch $@

audit: .venv/base
	@echo "Auditing a small network on eight photographs: about half a minute."
	.venv/bin/rgap audit

# Three clients and a server in one process: what does the server see of each?
federation: .venv/flower
	FLWR_TELEMETRY_ENABLED=0 .venv/bin/python examples/federation/run.py

# The same examples every time. One thread for each of the two processes: processes that share cores and spin are many
# times slower.
test: .venv/test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal tests

# Other examples, until the time is over; then what failed and what to add as a test.
MINUTES = 10
explore: .venv/test
	.venv/bin/python tests/explore.py --minutes $(MINUTES)

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict src

# To site/index.html. Strict: a dead link is an error.
docs: .venv/test
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

# DATA holds cifar10/ and mnist/, one subfolder of pictures for each class.
bench: .venv/test
	.venv/bin/python benchmarks/closed_form.py --data "$(DATA)"
	.venv/bin/python benchmarks/throughput.py --data "$(DATA)" --out throughput.json --plots docs/plots

bench-compact: .venv/test
	.venv/bin/python benchmarks/throughput.py --data "$(DATA)" --compact
