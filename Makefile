# Every target sets up what it needs in .venv: a virtual environment with torch, the package (editable) and its
# development tools. On Debian: sudo apt install python3-venv python3-dev g++ make

PYTHON ?= python3
VENV ?= .venv
# The torch to build against. Another one, or a CPU-only build: make TORCH_SPEC='torch==2.13.0 --index-url ...'
TORCH_SPEC ?= torch==2.13.0
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_READY := $(VENV)/torch-ready
READY := $(VENV)/apex-fast-ready
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard build_backend/*.py cmake/*) $(shell find csrc -type f)
CPP_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test test-long test-slow lint bench cuda-check sanitize clean

help:
	@echo 'make demo        train and sample a one-step text-to-image generator (minutes), results in runs/demo'
	@echo 'make test        the tests; PYTEST_ARGS="-k name" selects'
	@echo 'make test-long   tests that train for many minutes'
	@echo 'make test-slow   tests that install the package into fresh environments'
	@echo 'make lint        ruff and clang-format'
	@echo 'make bench       benchmarks of ops, steps and sampling on this CPU (an hour); BENCH_ARGS="--suite step --quick"'
	@echo 'make cuda-check  compile the CUDA sources; needs nvcc, no GPU'
	@echo 'make sanitize    compute-sanitizer over the CUDA tests; needs a GPU and the CUDA toolkit'
	@echo 'make setup       only the set-up that all of these share'
	@echo 'make clean       remove what was built (not the virtual environment)'

setup: $(READY)

# Looks for what cannot be installed from here before anything large is fetched.
$(TORCH_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "apex_fast needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1); name one: make PYTHON=python3.11"; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; mend it with: sudo apt install python3-venv"; exit 1; }
	@PYTHONPATH=build_backend $(PYTHON) -c \
	  'import apex_toolchain as needs; needs.find_compiler(); needs.check_python_headers()'
	@echo 'Setting up $(VENV) with $(TORCH_SPEC); the first time this fetches torch, which takes minutes.'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --quiet $(TORCH_SPEC)
	@touch $@

$(READY): $(TORCH_READY) $(SOURCES)
	@echo 'Building apex_fast (two to four minutes from scratch).'
	@$(PIP) install --quiet --quiet --editable '.[dev]'
	@$(BIN)/python -m apex_fast.info --build
	@touch $@

demo: $(READY)
	$(BIN)/apex-fast demo --output-dir runs/demo

# One process of tests a core, up to eight: a test takes one core, and each process about a gigabyte.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-long: $(READY)
	$(BIN)/python -m pytest -q -m long $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --version
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

BENCH_ARGS ?=
bench: $(READY)
	$(BIN)/python benchmarks/run.py --suite all --device cpu --json runs/benchmarks/cpu.json $(BENCH_ARGS)

cuda-check: $(READY)
	@set -- $$($(BIN)/python -c 'import torch, pybind11; print(torch.__path__[0], torch.__version__, pybind11.get_cmake_dir())') && \
	  $(BIN)/cmake -S . -B build/cuda-check -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DAPEX_FAST_CUDA=check \
	    -DTORCH_ROOT=$$1 -DAPEX_TORCH_VERSION=$$2 -Dpybind11_DIR=$$3 -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	@$(BIN)/cmake --build build/cuda-check --target apex_cuda_kernels apex_cuda_glue

# Slow, so on a choice of the tests: every op, dtype and layout, without graphs, compilers and huge tensors. The caching
# allocator would hide an access beyond a tensor inside its own blocks. initcheck reports reads of what was never written.
SANITIZE ?= memcheck racecheck initcheck
sanitize: $(READY)
	@command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer comes with the CUDA toolkit: put its bin on PATH'; exit 1; }
	@$(BIN)/python -c 'import sys, torch; from apex_fast import _library as l; sys.exit(0 if torch.cuda.is_available() and l.build_module().facts()["cuda_ops"] else "no GPU, or a build without CUDA kernels: nothing would be checked")'
	set -e; for tool in $(SANITIZE); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	    $(BIN)/python -m pytest -q -m cuda tests/test_cuda_ops.py -k 'dtype or layouts or backward_op or misalignment or many_dim' \
	    $(PYTEST_ARGS); \
	done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache $(READY) apex_fast/*.so
	find apex_fast benchmarks build_backend tests -name __pycache__ -type d -prune -exec rm -rf {} +
