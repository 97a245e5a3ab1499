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

# torch_npu is kept out of .venv, where its mere presence would change torch, and stand-ins for the libraries that it needs
ASCEND := .ascend
TORCH_NPU := 2.13.0

# NVRTC is kept out of .venv, where kernels for compute capabilities 7.0 and 7.5 have none, as with torch's wheels for the CPU
VOLTA := .volta
NVRTC := 12.6.85

.PHONY: help setup setup-ascend setup-volta demo test test-ascend test-volta test-all test-coverage suite-table lint mutants refusals coverage-table bench gpu-check npu-check clean

help:
	@echo "make demo            compile BERT, Llama and T5, and show what was rewritten"
	@echo "make test            the test suite, without what is marked slow or gpu"
	@echo "make test-ascend     the kernels for Ascend NPUs, by torch_npu's schemas and what its documents say; fetches torch_npu (43 MB)"
	@echo "make test-volta      CUDA C++ kernels for compute capabilities 7.0 and 7.5, compiled by NVRTC; fetches it (24 MB)"
	@echo "make test-all        the whole suite, the slow part included; PART=2/4 runs the second of four parts of its files,"
	@echo "                     PYTEST_ARGS='-m slow' what make test leaves out"
	@echo "make test-coverage   make test, with the lines and branches that it ran"
	@echo "make suite-table     make test, with its time by file written to docs/suite.md"
	@echo "make lint            ruff and mypy"
	@echo "make mutants         the tests that must fail by each of 46 seeded defects, in 45 minutes at most"
	@echo "make refusals        write docs/refusals.md from attnfuse/reasons.py"
	@echo "make coverage-table  run all coverage cases and write docs/coverage.md"
	@echo "make bench           time attention, models, padding and packing beside Inductor, write docs/benchmarks.md"
	@echo "make npu-check       on an Ascend NPU: the calls that are made there against float64, and what documents leave open"
	@echo "make gpu-check       on a CUDA device, in eight minutes: tests, kernels beside their predictions, headline figures;"
	@echo "                     installs nothing. GPU_ARGS='--results FOLDER --minutes 12' keeps them elsewhere, and takes longer"

setup: $(STAMP)

# Python compiles the modules that are imported, when they are: a small part of what is installed
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "attnfuse needs Python 3.10 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt --no-build-isolation -e '.[test,models,draw,fbgemm,dev]'
	touch $(STAMP)

setup-ascend: $(ASCEND)/.ready-$(TORCH_NPU)

$(ASCEND)/.ready-$(TORCH_NPU): tests/ascend/stand_ins.py $(STAMP)
	rm -rf $(ASCEND)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(ASCEND)/site torch-npu==$(TORCH_NPU)
	$(BIN)/python tests/ascend/stand_ins.py $(ASCEND)/site $(ASCEND)/stand_ins
	touch $@

setup-volta: $(VOLTA)/.ready-$(NVRTC)

$(VOLTA)/.ready-$(NVRTC): $(STAMP)
	rm -rf $(VOLTA)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --target $(VOLTA)/site nvidia-cuda-nvrtc-cu12==$(NVRTC)
	touch $@

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

test-ascend: setup-ascend
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ascend -n 2 -m 'not slow' -q $(PYTEST_ARGS)

test-volta: setup-volta
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/volta -n 2 -m 'not slow' -q $(PYTEST_ARGS)

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
	$(BIN)/python -m benchmarks.padded_models
	$(BIN)/python -m benchmarks.paged
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.position_ids

# nothing is installed: the Python that PYTHON names, else that of .venv if there is one, runs the source tree
ifeq ($(origin PYTHON),file)
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
else
GPU_PYTHON = $(PYTHON)
endif
GPU_MARK ?= gpu and not slow

# the plain command does all of it where there is no make: python3 -m benchmarks.first_run
gpu-check:
	@$(GPU_PYTHON) -m benchmarks.first_run --mark '$(GPU_MARK)' $(GPU_ARGS) -- $(PYTEST_ARGS)

# on a machine with an Ascend NPU and torch_npu: nothing is installed
npu-check:
	@$(GPU_PYTHON) -m benchmarks.npu $(NPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
