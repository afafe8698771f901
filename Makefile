PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all gpu lint typecheck format docs clean

# One thread, as for the README's numbers: networks this small are faster so. Another CPU can give others.
demo: $(VENV)/.examples
	OMP_NUM_THREADS=1 $(BIN)/python examples/colored_gray_digits.py

# Two at a time: each test takes one thread, and a few start processes of their own.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "slow or not slow" --cov --cov-report=term

# For whoever has a CUDA device: its tests, times and memory, in benchmarks/CUDA.md. At most ten minutes.
gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -E -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The stamp files say which extras the environment holds.
$(VENV)/.examples: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[examples]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[examples,video,test,integrations,benchmarks,dev]"
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/_pictures results .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage
