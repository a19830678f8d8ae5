# Every target makes what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WANTS  := pyproject.toml setup.py constraints.txt linfusion/_version.py

# Two tests at a time, one thread each: the tensors are tiny, and two threads only wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-gpu checkstyle parallel bench aot ptx docs clean
help:
	@echo "make demo        pictures by the softmax teacher and the linear student, in demo/"
	@echo "make test        checkstyle, then the tests"
	@echo "make test-gpu    kernels, processors and a pipeline each on a GPU; skipped where there is none"
	@echo "make checkstyle  ruff and mypy"
	@echo "make parallel    every test on several ranks, on every number of them"
	@echo "make bench       benchmarks; one of them with ONLY=<name>"
	@echo "make aot         compile every Triton kernel for nine GPUs, without a GPU"
	@echo "make ptx         execute what was compiled on the CPU, against the reference; ARCH=90 for sm_90"
	@echo "make docs        build the site into site/"
	@echo "make clean       remove .venv and what was built"

$(VENV)/.base: $(WANTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev,train]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e '.[docs]'
	@touch $@

demo: $(VENV)/.base
	$(BIN)/python examples/demo.py

checkstyle: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: checkstyle
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

test-gpu: $(VENV)/.dev
	LINFUSION_TEST_DEVICE=cuda HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs tests/gpu tests/kernels tests/attention

parallel: $(VENV)/.dev
	$(TEST_ENV) LINFUSION_ALL_RANKS=1 $(BIN)/python -m pytest tests/parallel

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ONLY)

aot: $(VENV)/.dev
	$(BIN)/python -m benchmarks.aot

ptx: $(VENV)/.dev
	$(BIN)/python -m benchmarks.ptx $(if $(ARCH),--arch $(ARCH))

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
