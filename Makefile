# SPDX-License-Identifier: Apache-2.0
# Everything runs from .venv, which each target makes or renews when it needs to.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
bin := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help venv demo test serve-test lm-eval-test lint format wheel clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## Create .venv with vLLM for CPU and all tools (PYTHON=python3.12)

$(VENV)/.installed: pyproject.toml $(wildcard deploy/cpu/*.lock) deploy/cpu/install.sh \
		deploy/cpu/vllm-shim/pyproject.toml
	@PYTHON=$(PYTHON) deploy/cpu/install.sh $(VENV)

demo: venv ## Prepare a small chat model, serve it, ask it, time larger shapes (minutes)
	@$(bin)/python deploy/demo.py

# `pytest` and not `python -m pytest`, which would put the repository root, and with it
# the source folder `kernels/`, on sys.path.
# With one thread each: two programs of two threads on two cores wait for one another's
# threads, and take ten times as long. tests/processes.py has what stays together.
test: venv ## Run all tests in two processes (PYTEST_ARGS="-k artifact" for some)
	@OMP_NUM_THREADS=1 $(bin)/pytest --numprocesses $(TEST_PROCESSES) \
		--dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

serve-test: venv ## Run only the tests that start `vllm serve`
	@$(bin)/pytest -m serve $(PYTEST_ARGS)

# Not in .venv: it is 600 MB and asks for another python-dateutil than the lock's.
.lm-eval/.installed: deploy/cpu/requirements-lm-eval.lock $(VENV)/.installed
	@rm -rf .lm-eval
	@$(bin)/python -m pip --disable-pip-version-check install -qq --no-deps \
		--no-build-isolation --target .lm-eval -r $<
	@touch $@

lm-eval-test: .lm-eval/.installed ## Install lm-eval into .lm-eval, run a local task through it
	@PYTHONPATH=$(CURDIR)/.lm-eval $(bin)/pytest tests/e2e/test_lm_eval.py $(PYTEST_ARGS)

lint: venv ## Check style (ruff), types (mypy) and layers (import-linter)
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports --no-logo

format: venv ## Rewrite the sources in the project's style
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

wheel: venv ## Build the wheel and the source distribution into dist/
	$(bin)/python -m build --no-isolation

clean: ## Remove what builds, tests, the demo and benchmarks wrote (keeps .venv and .lm-eval)
	rm -rf build dist deploy/cpu/vllm-shim/build .demo .bench .pytest_cache \
		.mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) \
		-type d -prune -exec rm -rf {} +
