PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint typecheck format clean

demo: $(VENV)/.examples
	$(BIN)/python examples/colored_gray_digits.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow" --cov --cov-report=term

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

typecheck: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stamp files say which extras the environment holds.
$(VENV)/.examples: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[examples]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[examples,video,test,integrations,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist results .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage
