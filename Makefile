# Everything runs in .venv, and what needs other packages in .venv-*; nothing outside this folder is touched.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

# Threads that wait for work sleep instead of spinning, which starves everything else where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test test-engines peers check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## environment in .venv (needs python3 >= 3.11; does nothing when it is up to date)

# torch comes first and alone, so that no later step can choose another build of it.
$(STAMP): constraints.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'qconv needs Python 3.11 or newer; choose one: make setup PYTHON=python3.12' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --requirement constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: setup  ## train a small adapter, merge, re-quantize, validate (minutes, CPU)
	$(BIN)/qconv demo

test: $(VENV)/.test check  ## setup, then all checks

# Large, and only some of the tests need it.
$(VENV)/.test: $(STAMP) constraints-test.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement constraints-test.txt
	@touch $@

test-engines: $(VENV)/.test .venv-vllm/.complete .venv-gptqmodel/.complete .venv-llama-cpp/.complete .venv-openvino/.complete  ## other engines read our artifacts (an hour, 6 GB); writes docs/targets.md
	$(BIN)/python -m scripts.engines.check

peers: $(STAMP) .venv-llm-compressor/.complete .venv-gptqmodel/.complete .venv-auto-round/.complete  ## environments for benchmarks/quality.py --peers (6 GB)

# Each pins its own torch, transformers and compressed-tensors, so each has an environment of its own.
.venv-%/.complete: constraints-%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint $< $(TORCH)
	.venv-$*/bin/python -m pip install --quiet --no-deps --requirement $<
	@touch $@

# Without torch; --no-binary, since llama.cpp is compiled for the machine that it runs on.
.venv-llama-cpp/.complete .venv-openvino/.complete: .venv-%/.complete: constraints-%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-deps --no-binary llama-cpp-python --requirement $<
	@touch $@

check:  ## format, lint, types, import layers, tests
	scripts/check

format:  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environments and everything that was built
	rm -rf $(VENV) .venv-* build dist demo-out qconv.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
