# Everything runs in .venv, made from constraints.txt; the stamp is renewed when what it depends on changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# NumPy computes in Triton's interpreter: one thread for each process
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest tests/interpreted
# a file's tests stay together, as what they share is made once for each worker, until the other worker has nothing left
WORKERS := -n 2 --dist worksteal
ALL := $(if $(PART),--part $(PART)) -q
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.PHONY: help setup demo test test-all test-coverage suite-table lint mutants refusals coverage-table bench gpu-check clean

help:
	@echo "make demo            compile BERT, Llama and T5, and show what was rewritten"
	@echo "make test            the test suite, without what is marked slow or gpu"
	@echo "make test-all        the whole suite, the slow part included; PART=2/4 runs the second of four parts of its files,"
	@echo "                     PYTEST_ARGS='-m slow' what make test leaves out"
	@echo "make test-coverage   make test, with the lines and branches that it ran"
	@echo "make suite-table     make test, with its time by file written to docs/suite.md"
	@echo "make lint            ruff and mypy"
	@echo "make mutants         the tests that must fail by each of 42 seeded defects, in 45 minutes at most"
	@echo "make refusals        write docs/refusals.md from attnfuse/reasons.py"
	@echo "make coverage-table  run all coverage cases and write docs/coverage.md"
	@echo "make bench           time attention, models, padding and packing beside Inductor, write docs/benchmarks.md"
	@echo "make gpu-check       tests and headline figures on a CUDA device, in eight minutes; installs nothing"
	@echo "                     GPU_ARGS='--results FOLDER' keeps the figures elsewhere"

setup: $(STAMP)

# Python compiles the modules that are imported, when they are: a small part of what is installed
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "attnfuse needs Python 3.10 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e '.[test,models,draw,fbgemm,dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m attnfuse.demo

# The interpreter has a worker beside the two of the other tests, which it leaves to fill the cores as it ends first. What it
# says comes last. Either fails the target.
test: $(STAMP)
	@said=$$(mktemp); status=0; \
	$(INTERPRETED) -n 1 -m 'not slow' -q $(PYTEST_ARGS) $(INTERPRETED_ARGS) >$$said 2>&1 & beside=$$!; \
	trap 'kill $$beside; rm -f $$said; exit 130' INT TERM; \
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow and not gpu' -q $(PYTEST_ARGS) $(MAIN_ARGS) || status=$$?; \
	wait $$beside || status=$$?; \
	echo "tests/interpreted:"; cat $$said; rm -f $$said; exit $$status

test-all: $(STAMP)
	$(BIN)/python -m pytest $(ALL) $(PYTEST_ARGS)
	$(INTERPRETED) $(ALL) $(PYTEST_ARGS)

suite-table: $(STAMP)
	mkdir -p build
	$(MAKE) test MAIN_ARGS='--junitxml=build/main.xml -o junit_duration_report=total' \
		INTERPRETED_ARGS='--junitxml=build/interpreted.xml -o junit_duration_report=total'
	$(BIN)/python tests/durations.py 'The suite=build/main.xml' "Triton's interpreter=build/interpreted.xml"

test-coverage: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow and not gpu' --cov --cov-report=term -q $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(MUTANTS_ARGS)

refusals: $(STAMP)
	$(BIN)/python -m attnfuse.reasons > docs/refusals.md

coverage-table: $(STAMP)
	$(BIN)/python -m benchmarks.coverage run
	$(BIN)/python -m benchmarks.coverage table

bench: $(STAMP)
	$(BIN)/python -m benchmarks.attention --full
	$(BIN)/python -m benchmarks.masks
	$(BIN)/python -m benchmarks.jagged --full
	$(BIN)/python -m benchmarks.padding
	$(BIN)/python -m benchmarks.paged
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.packing

# nothing is installed: the Python that PYTHON names, else that of .venv if there is one, runs the source tree
ifeq ($(origin PYTHON),file)
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
else
GPU_PYTHON = $(PYTHON)
endif
# compiling takes most of the time, on one core a test
GPU_WORKERS = $(shell $(GPU_PYTHON) -c 'import os, xdist; print("-n", min(os.cpu_count(), 16))' 2>/dev/null)
# a kernel that hangs ends with its worker, which pytest-xdist replaces; a signal would wait for the kernel
GPU_LIMITS = $(shell $(GPU_PYTHON) -c 'import pytest_timeout, xdist; print("--timeout=150 --timeout-method=thread")' 2>/dev/null)
GPU_MARK ?= gpu and not slow

gpu-check: export PYTHONPATH := .
gpu-check:
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu-check needs a CUDA device; this torch sees none")'
	@$(if $(GPU_WORKERS),,echo "pytest-xdist is not installed: tests compile one after the other, which takes longer than eight minutes")
	@$(if $(GPU_LIMITS),,echo "without pytest-timeout and pytest-xdist a kernel that hangs is not stopped")
	@start=$$(date +%s); status=0; \
	TORCHINDUCTOR_COMPILE_THREADS=1 $(GPU_PYTHON) -m pytest tests/gpu -q -m '$(GPU_MARK)' $(GPU_WORKERS) $(GPU_LIMITS) $(PYTEST_ARGS) || status=$$?; \
	$(GPU_PYTHON) -m benchmarks.gpu --started $$start $(GPU_ARGS) || status=$$?; \
	exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info
