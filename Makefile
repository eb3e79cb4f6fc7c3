# Everything a new machine needs is Python 3.10-3.12, make and git.
#   make demo   a trained policy, served in one process, drives LIBERO from another
#   make test   lint, types, package boundaries and the fast tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install system demo test check test-slow test-browser fuzz soak bench clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[all,dev]'
	touch $@

# Libraries that MuJoCo needs to render without a screen; prints the line to run when not root.
system:
	@bash scripts/install_rendering_libraries.sh

demo: system install
	$(BIN)/reflexarc demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: system install check
	$(BIN)/pytest -m 'not slow'

test-slow: system install
	$(BIN)/pytest -m slow

# Looks at the report and status pages in Chromium: a download and, as root, system libraries.
test-browser: system install
	$(BIN)/pip install --quiet playwright
	$(BIN)/playwright install --with-deps chromium
	$(BIN)/pytest -m slow tests/eval/test_report_in_browser.py tests/server/test_page_in_browser.py

fuzz: install
	$(BIN)/python -m tests.contract.fuzz_codec --frames 1000000
	FUZZ_EXAMPLES=5000 $(BIN)/pytest tests/server/test_fuzz_routes.py

soak: system install
	$(BIN)/python benchmarks/soak.py

bench: system install
	$(BIN)/python benchmarks/simulator_steps.py
	$(BIN)/python benchmarks/round_trip.py
	$(BIN)/python benchmarks/batching.py
	$(BIN)/python benchmarks/deadlines.py
	$(BIN)/python benchmarks/demo_checkpoint_clients.py
	$(BIN)/python benchmarks/mamba_scan.py
	$(BIN)/python benchmarks/replicas.py --demo
	$(BIN)/python benchmarks/loading.py --no-lerobot  # its environment takes 8 GB
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/trainer_memory.py --minutes 10

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
