# `make demo`, `make test`, `make bench`: each sets up what it needs by itself. Needs Python >= 3.11 with venv, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-distributed bench bench-serving lint wheel clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## Train, fine-tune, extract, verify: the main job on real weights, offline.
	$(BIN)/python examples/demo.py

test: lint $(READY)  ## What the CI runs: two processes, a thread each.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	$(MAKE) wheel

test-distributed: $(READY)  ## Two processes in every way, DeepSpeed included, which compiles an operator once.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[deepspeed]'
	$(BIN)/python -m pytest tests/test_distributed.py tests/test_sources_zero.py

bench: $(READY)  ## Side by side with the other extractors, the callback's cost, merges; writes benchmarks/*.md.
	$(BIN)/python examples/demo.py
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/callback.py
	$(BIN)/python benchmarks/merging.py

bench-serving: $(READY)  ## The paper's claims about serving, in PEFT and, where it is installed, in vLLM; 13 GB of disk.
	$(BIN)/python benchmarks/serving.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(READY)  ## Build the wheel and use it in a venv of its own.
	rm -rf dist build
	$(BIN)/python -m build --wheel -q
	$(BIN)/python tests/smoke_wheel.py dist/*.whl

clean:
	rm -rf $(VENV) .work build dist
