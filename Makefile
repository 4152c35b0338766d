# Every target sets up what it needs in .venv with pip. With PYTHON=python3 (any interpreter that has torch, pytest, ...)
# nothing is installed: the package is used from the checkout, and the CUDA extension is built in place.

ifdef PYTHON
PY := $(PYTHON)
else
PY := .venv/bin/python
READY := .venv/.ready
endif

TRITON := 3.6.0# in .venv, where torch brings none (its CPU builds)
TRITONS := 3.6.0 3.7.1# what the tests run with; torch 2.13 brings 3.7.1
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n > 8 ? 8 : n)))
SOURCES := $(wildcard csrc/*)
SCRIPTS = $(shell $(PY) -c "import sysconfig; print(sysconfig.get_path('scripts'))")
# Strict where nvcc is found: a lack of anything else is an error then.
export P3D_BUILD_CUDA ?= $(if $(shell command -v nvcc),1)

.DEFAULT_GOAL := help
.PHONY: help demo test test-tritons kernels bench lint format build extension package gpu clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22
	@echo "PYTHON=python3 takes that interpreter and installs nothing; ARGS='...' goes to the demo, pytest or the benchmarks."

.venv/.ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	P3D_BUILD_CUDA=0 $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check triton==$(TRITON)
	touch $@

demo: extension ## a real video through P3D ResNet: plain PyTorch beside these kernels (ARGS='--video PATH')
	$(PY) -m p3d_kernels demo $(ARGS)

build: extension ## the CUDA extension, in place, where nvcc is found; fails on spills and on operands set too late
	$(PY) scripts/check_spills.py
	$(PY) scripts/check_operands.py

extension: $(READY)
	$(PY) setup.py -q build_ext --inplace

test: build ## all tests that this machine can run, the GPU's too, and `make kernels`
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(ARGS)
	$(MAKE) kernels
ifndef PYTHON
	$(MAKE) test-tritons
endif

kernels: $(READY) ## the Triton kernels of P3D-63, compiled without a GPU; fails on lost products and on spills
	$(PY) scripts/check_triton.py

# Triton's interpreter changes between releases, so the kernels are run in each one's (on the CPU, also beside a GPU).
test-tritons: build
	@for version in $(TRITONS); do \
	  test $$version = "$$($(PY) -c 'import triton; print(triton.__version__)')" && continue; \
	  test -d build/triton-$$version || { \
	    $(PY) -m pip install -q --disable-pip-version-check --no-deps --target build/part-triton triton==$$version && \
	    mv build/part-triton build/triton-$$version; } || exit 1; \
	  echo "== Triton $$version"; \
	  CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONPATH=build/triton-$$version $(PY) -m pytest -n $(JOBS) -k "triton and test_values" $(ARGS) || exit 1; \
	done

bench: extension ## the benchmarks, each answer checked before it is timed; toy sizes without a GPU
	$(PY) -m pytest benchmarks $$($(PY) -c 'import torch; print("" if torch.cuda.is_available() else "--toy")') $(ARGS)

lint: $(READY) ## ruff and clang-format, as pinned in pyproject.toml
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	"$(SCRIPTS)"/clang-format --dry-run -Werror $(SOURCES)

format: $(READY) ## rewrite the sources as `make lint` wants them
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	"$(SCRIPTS)"/clang-format -i $(SOURCES)

package: $(READY) ## an sdist and wheels, built without torch, installed and imported in a fresh environment
	scripts/check_package.sh $(PY)

gpu: $(READY) ## on a GPU machine: build, test and time in under ten minutes; logs in build/gpu
	PYTHON=$(PY) scripts/gpu.sh

clean: ## remove what was built and measured here, not .venv
	rm -rf build dist p3d_kernels/_C.*.so p3d_kernels/_build.json .benchmarks .pytest_cache .ruff_cache .hypothesis
	rm -f demo.json demo.png
	find p3d_kernels tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +
