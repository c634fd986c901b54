# Everything from nothing but Python >= 3.11; each target does its own set-up and is quick when repeated.
#   make demo    the demo, on STREAMTOOLS_URL or the embedded default
#   make test    brokers, lint, docs and the whole suite       (ARGS="-k name" reaches pytest)
#   make dist    what is released, in dist/: sdist, wheel, SBOM and hashes; the same bytes for the same commit
#   make measure sizes of the package, and the calls for one message; ARGS="--root DIR" for another checkout's
#   make lint | docs | bench | format | clean
# PYTHON=/path/to/python3 chooses the interpreter.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
export VENV

#: The demo needs the client library of the broker it is pointed at, and no other.
DEMO_BROKER := $(if $(findstring amqp,$(STREAMTOOLS_URL)),rabbitmq,$(if $(findstring kafka,$(STREAMTOOLS_URL)),kafka))
DEMO_EXTRAS := cli$(DEMO_BROKER:%=,%)
DEMO := $(VENV)/.installed-demo$(DEMO_BROKER:%=-%)
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

.PHONY: help demo test lint format docs dist bench measure brokers-up brokers-down clean

help:
	@sed -n '1,/^$$/{/^#/p}' Makefile

demo: $(DEMO)
	@$(BIN)/python -m streamtools demo $(ARGS)

test: $(DEV)
	@scripts/check $(ARGS)

lint: $(DEV)
	@scripts/lint

format: $(DEV)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(DEV)
	@scripts/docs

dist: $(DEV)
	@scripts/dist

bench: $(DEV) $(BENCH)
	@scripts/bench $(ARGS)

measure: $(DEV)
	@$(BIN)/python scripts/measure $(ARGS)

brokers-up brokers-down: brokers-%:
	@scripts/brokers $*

clean:
	@test ! -x scripts/brokers || scripts/brokers down
	rm -rf $(VENV) .tox site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is as new as the pyproject.toml that it was installed from.
$(DEMO): pyproject.toml scripts/venv
	@scripts/venv -e '.[$(DEMO_EXTRAS)]' && touch $@

$(DEV): pyproject.toml scripts/venv
	@scripts/venv -e '.[all]' --group dev && touch $@

$(BENCH): pyproject.toml scripts/venv
	@scripts/venv -e '.[all]' --group bench && touch $@
