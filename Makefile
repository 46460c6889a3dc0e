# Two commands for users: `make demo` and `make test`. Each builds .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/src/*) weights_cache/reader/reader.cpp

.DEFAULT_GOAL := help
.PHONY: help demo test check fmt proto clean

help:
	@echo "make demo    install, serve the built-in model once, print its boot and an answer"
	@echo "make test    install with the test tools, run all tests"
	@echo "make check   format, lint, types, imports, generated stubs"
	@echo "make fmt     format the code"
	@echo "make proto   generate the gRPC stubs again"
	@echo "make clean   remove what was built"

demo: $(VENV)/.runtime
	@$(BIN)/python -m pilotlight demo

test: $(VENV)/.dev
	@echo "pilotlight: running the tests"
	@$(BIN)/python -m pytest -q

check: $(VENV)/.dev
	@echo "pilotlight: format and lint"
	@$(BIN)/ruff format --check --quiet . || (echo "run 'make fmt'"; exit 1)
	@$(BIN)/ruff check --quiet .
	@echo "pilotlight: types"
	@$(BIN)/mypy
	@echo "pilotlight: imports"
	@$(BIN)/lint-imports --no-logo
	@echo "pilotlight: generated stubs"
	@$(BIN)/python -m pilotlight.proto.generate --check

fmt: $(VENV)/.dev
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

proto: $(VENV)/.dev
	@$(BIN)/python -m pilotlight.proto.generate

# The native library is part of the install: its sources are what the stamps depend on.
$(VENV)/.runtime: $(SOURCES)
	@$(MAKE) --no-print-directory install WHAT=. STAMP=$@

$(VENV)/.dev: $(SOURCES)
	@$(MAKE) --no-print-directory install WHAT='.[dev]' STAMP=$@
	@touch $(VENV)/.runtime  # it is in there: `make demo` need not install again

.PHONY: install
install:
	@test -x $(BIN)/python || (echo "pilotlight: making $(VENV)"; $(PYTHON) -m venv $(VENV))
	@echo "pilotlight: installing (torch is about 200 MB; the native kernels are compiled)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(WHAT)' \
		> $(VENV)/install.log 2>&1 || (cat $(VENV)/install.log; exit 1)
	@$(BIN)/python -c 'import pilotlight, torch'
	@$(BIN)/python -m compileall -q -x '$(VENV)|build/' .
	@mkdir -p $(VENV)/source && ln -sfn ../.. $(VENV)/source/pilotlight
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info kernels/cpu/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
