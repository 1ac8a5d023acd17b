# Two commands set everything up on a fresh Debian or Ubuntu machine with Python 3.11 and a C++ compiler:
#   make bench    the kernel benchmark table of the hot paths on this machine
#   make test     the test suite
#   make build    the extension again after an edit of csrc/: compiles what changed
#   make test-full   every case of the sweeps that make test samples
#   make sanitize    the C++ kernels under AddressSanitizer and UBSan
#   make docs    the site with the API reference, in build/site; a warning is an error
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# The CPU build of torch, unless a CUDA build is asked for with TORCH=... TORCH_INDEX=
TRITON ?= triton==3.7.1
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process a core: most of a test's time is Python. They share the cores, so nobody may spin while it waits.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

OPS := w2s_fast/_build.json

.PHONY: env install build bench bench-full test test-full sanitize lint docs aot demo cuda-check gpu-pack readme clean
install: env build

# the environment: made again where what is installed into it changes
env: $(STAMP)
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH) $(TRITON) numpy "setuptools>=77" wheel ninja packaging "pybind11>=2.12"
	W2S_FAST_BUILD=skip $(BIN)/pip install --quiet --no-build-isolation -e ".[dev]"
	# peers that tests and benchmarks compare with where there are any; what they say they require is years old or large
	-$(BIN)/pip install --quiet --no-deps --no-build-isolation auto_LiRPA==0.3 appdirs sortedcontainers
	-$(BIN)/pip install --quiet --no-deps cut-cross-entropy==25.1.1
	-$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1 foolbox==3.3.4 eagerpy==0.30.0 GitPython gitdb smmap
	-$(BIN)/pip install --quiet --no-deps --target $(VENV)/ctrain ctrain==0.6.1
	# the oldest Triton that is supported, and a checker of compiled kernels (it runs here whatever it declares), beside ours
	-$(BIN)/pip install --quiet --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	-$(BIN)/pip install --quiet --no-deps --ignore-requires-python --target $(VENV)/ttsem ttsem==0.1.0
	touch $@

# the extension in place, what changed of it: objects stay in build/cpp. W2S_FAST_TARGETS=native is for this machine only.
build: $(OPS)
$(OPS): $(STAMP) setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py build_ext --inplace
	touch $@

bench: $(OPS)
	$(BIN)/w2s-fast bench

bench-full: $(OPS)
	$(BIN)/w2s-fast bench --full

test: $(OPS)
	$(PYTEST)

test-full: $(OPS)
	W2S_FAST_TEST_FULL=1 $(PYTEST)

sanitize: $(STAMP)
	$(BIN)/python .ci/sanitize.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: $(OPS)
	$(BIN)/w2s-fast demo

# needs no network
docs: $(OPS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -f .ci/docs/mkdocs.yml

readme: $(OPS)
	$(BIN)/w2s-fast bench --readme

# what a GPU would compile in its first minutes, in build/gpu-pack (half an hour of two cores; needs nvcc for the extension).
# A pack serves one wheel of Triton: make gpu-pack PACK_TRITON=.venv/triton-3.6 WHEEL=triton-3.6.0-cp312-....whl
gpu-pack: $(STAMP)
	bash .ci/cuda_check.sh .venv-cuda
	PYTHONPATH=$(PACK_TRITON) $(BIN)/python -m w2s_fast.bench.gpu.pack build/gpu-pack --cuda .venv-cuda \
	  $(if $(WHEEL),--wheel $(WHEEL))

cuda-check:
	bash .ci/cuda_check.sh .venv-cuda

clean:
	rm -rf $(VENV) .venv-cuda build *.egg-info w2s_fast/*.so w2s_fast/_build.json
