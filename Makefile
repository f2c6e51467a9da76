# `make demo` runs the main job, `make test` the tests. Both set up everything they need: a virtual
# environment in .venv, its packages, the release build. Nothing is done twice.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
# Another absolute path here lets several working trees share one environment (not one build).
VENV ?= $(CURDIR)/.venv
BIN := $(VENV)/bin
RUST_SOURCES := Cargo.toml Cargo.lock build.rs pyproject.toml .cargo/config.toml \
	$(shell find src csrc -type f)
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# cargo's build scripts ask the active environment for torch.
export VIRTUAL_ENV := $(VENV)
export PATH := $(BIN):$(PATH)
# As maturin sets them: pyo3, and with it torch-sys, is built anew for other values.
export PYO3_PYTHON := $(BIN)/python
PYO3_SIGNATURE = $$($(BIN)/python -c 'import sys; print("cpython-%d.%d-64bit" % sys.version_info[:2])')
# This tree's package, whichever tree the environment was made in.
export PYTHONPATH := $(CURDIR)/python
# Programs of cargo (tests, examples) find libtorch there. No path is written into any binary.
WITH_TORCH = LD_LIBRARY_PATH="$$($(BIN)/python -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))')$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}"
# The extension and the plain library are builds with different features: each keeps its own folder,
# so that neither makes the other stale.
PYTHON_TARGET := target/python
BUILT := $(PYTHON_TARGET)/.built
# Sanitizers want the target by name: build scripts and macros are then built without them. They are
# behind rustc's bootstrap switch, in the stable tool chain too.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: requirements-dev.txt
	@echo "== virtual environment in $(VENV) (torch is a download of some 2 GB)"
	test -x $(BIN)/python || env -u VIRTUAL_ENV $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements-dev.txt | grep -v 'already satisfied' || true
	$(BIN)/python -c 'import torch, maturin'
	@touch $@

$(BUILT): $(VENV)/.installed $(RUST_SOURCES)
	@echo "== release build of the extension (the first takes some 4 minutes: torch's C++ API)"
	$(BIN)/maturin develop --release --locked --skip-install --target-dir $(PYTHON_TARGET)
	@echo '$(CURDIR)/python' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/rimet.pth"
	@touch $@

.PHONY: build
build: $(BUILT) ## environment and extension

.PHONY: library
library: $(VENV)/.installed ## librimet.so and the crate, without Python
	cargo build --release --locked

.PHONY: demo
demo: build ## the main job on real data, end to end
	@echo "== release build of the Rust program (the first builds torch's C++ API without Python)"
	cargo build --release --locked --example load_torchscript
	$(BIN)/python examples/quickstart.py

.PHONY: test
test: test-rust test-python ## all tests

.PHONY: test-rust
test-rust: $(VENV)/.installed ## the engine's tests, without Python
	@echo "== cargo test (the first time builds torch's C++ API once more, without Python: some 2 minutes)"
	cargo build --release --locked --lib --examples
	$(WITH_TORCH) cargo test --release --locked --quiet

.PHONY: sanitize
sanitize: $(VENV)/.installed ## AddressSanitizer over the tests of kernels and encodings
	@echo "== cargo test with AddressSanitizer (the first time builds torch's C++ API once more)"
	$(WITH_TORCH) RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 PROPTEST_CASES=16 \
		cargo test --release --locked --quiet --lib --target $(HOST) --target-dir target/sanitize -- kernels encoding row_combinations matrix_products --skip nvrtc

# OpenMP's threads wait for work by spinning: on a machine that others use, too, tests of small tensors then
# take twenty times as long.
.PHONY: test-python
test-python: export GOMP_SPINCOUNT := 0
test-python: build library ## the package's tests
	$(BIN)/python -m pytest -q

.PHONY: test-cuda
test-cuda: build ## the tests that need a CUDA device
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-cuda: no CUDA device on this machine")'
	$(BIN)/python -m pytest -q -m cuda  # fails if there is no such test

# Racecheck and memcheck over every kernel; compute-sanitizer comes with the CUDA toolkit.
.PHONY: sanitize-cuda
sanitize-cuda: build ## compute-sanitizer over the CUDA kernels
	@command -v compute-sanitizer > /dev/null || { echo "sanitize-cuda: no compute-sanitizer (it comes with the CUDA toolkit)"; exit 1; }
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("sanitize-cuda: no CUDA device on this machine")'
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --kernel-regex kns=_ --error-exitcode 1 --target-processes all \
			$(BIN)/python -m pytest -q -m cuda -p no:cacheprovider \
			tests/python/ops/test_registry.py -k "reference or closed_form or min_max"; \
	done

.PHONY: bench-cuda
bench-cuda: build ## benchmarks on a CUDA device, against a copy of the same bytes
	$(BIN)/python -m benchmarks.cuda

.PHONY: lint
lint: build ## formatters, clippy, ruff, mypy, stubtest
	cargo fmt --check
	PYO3_ENVIRONMENT_SIGNATURE=$(PYO3_SIGNATURE) cargo clippy --release --locked --features python \
		--target-dir $(PYTHON_TARGET) -- -D warnings
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/ruff check python tests benchmarks examples build_backend
	$(BIN)/ruff format --check python tests benchmarks examples build_backend
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest rimet._core --allowlist tests/stubtest-allowlist.txt

.PHONY: format
format: $(VENV)/.installed ## apply the formatters
	cargo fmt
	$(BIN)/clang-format -i $(CSRC)
	$(BIN)/ruff check --fix python tests benchmarks examples build_backend
	$(BIN)/ruff format python tests benchmarks examples build_backend

.PHONY: bench
bench: build ## benchmarks, one table with ratios
	$(BIN)/python -m benchmarks

.PHONY: peers
peers: .venv-peers/.installed ## the environment of the packages we measure against
.venv-peers/.installed: benchmarks/requirements-peers.txt
	env -u VIRTUAL_ENV $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check --progress-bar off -r benchmarks/requirements-peers.txt
	@touch $@

.PHONY: clean
clean: ## remove builds, keep the environments
	cargo clean
	rm -f $(BUILT) python/rimet/_core*.so
