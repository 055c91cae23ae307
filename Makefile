# liushui: everything a newcomer types. Needs Python >= 3.11, a C compiler and the package index; makes .venv.
#
#   make demo     answer a file of prompts with continuous batching, then in static batches, and compare
#   make test     all tests               (ARGS="-k scheduler" to choose)
#   make lint     ruff, mypy, import-linter and the rules of the house
#   make sanitize the kernel tests under the address and undefined-behaviour sanitizers
#   make bench    the offline benchmark   (ARGS="--help" to see what it can do)
#   make soak     a server under everything at once, for an hour   (ARGS="--minutes 5")
#   make format   let ruff format the tree
#   make docs     the guide, strictly, into site/ (open site/index.html)
#
# Another Python: make test PYTHON=python3.12        Another environment: make test VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

# What the installed package is made from: when one of these changes, it is installed again.
INPUTS := pyproject.toml scripts/setup.py $(wildcard setup.py src/liushui/kernels/cpu/*.cpp src/liushui/kernels/cpu/*.h)
DEV := $(VENV)/.stamp-dev
DEMO := $(VENV)/.stamp-demo

.PHONY: help demo test lint sanitize bench soak format docs figures install clean
help:
	@sed -n '3,12s/^# *//p' Makefile

demo: $(DEMO)
	$(BIN)/liushui demo $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_source.py

sanitize: $(DEV)
	$(BIN)/python scripts/sanitize.py $(ARGS)

bench: $(DEV)
	$(BIN)/python benchmarks/offline.py $(ARGS)

soak: $(DEV)
	$(BIN)/python benchmarks/soak.py $(ARGS)

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Draws the guide's figures again from the engine's tensors and event log.
figures: $(DEV)
	$(BIN)/python scripts/figures.py $(ARGS)

install: $(DEV)

# The developer's environment can do all that the demo's can, so it counts as both.
$(DEV): $(INPUTS)
	$(PYTHON) scripts/setup.py --venv $(VENV) --extras dev --stamp $(DEV) --stamp $(DEMO)

$(DEMO): $(INPUTS)
	$(PYTHON) scripts/setup.py --venv $(VENV) --extras plot --stamp $(DEMO)

clean:
	rm -rf $(VENV) build dist site demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src -name '*.so' -o -name '*.dylib' -o -name '*.egg-info' | xargs rm -rf
