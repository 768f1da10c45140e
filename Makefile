# Each target that needs the environment creates .venv with pip, and updates it when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
# name of this machine's results file; the default belongs to the machine of docs/results.md
BENCH ?= cpu-epyc-avx512-2cores
BENCH_ARGS ?= --shapes published --batch-sizes 32 --dtypes fp32 bf16 --directions forward both
BENCH_CSV := benchmarks/results/$(BENCH).csv

# torch versions of `make compat`; newest: the version in constraints.txt
TORCH ?= 2.10.0 2.11.0 newest
# Python of an environment with a CUDA build of torch, for `make gpu`; nothing is installed into it
GPU_PYTHON ?= python3
GPU_ARGS ?=

# for `make mutate`: a module of featkd/ops or kernels, and the number of mutants
MODULE ?= kernels/two_layer_norms.py
MUTANTS ?= 20

.PHONY: env demo test compat gpu mutate report bench docs lint types format clean

env: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt tools/ptx_emulator/pyproject.toml $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "featkd needs Python >= 3.10; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing featkd and its dependencies into $(VENV) (a few minutes the first time)"
	@# torch first: csrc/ is compiled with its headers, and the isolated build must not download a second torch
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --editable tools/ptx_emulator
	@touch $@

demo: $(STAMP)
	$(BIN)/featkd demo

test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

compat:
	@echo "tests/ops, tests/kernels and tests/models with torch $(TORCH)"
	@failed=; for version in $(TORCH); do \
		PYTHON="$(PYTHON)" .ci/compat $$version $(PYTEST_ARGS) || failed="$$failed $$version"; done; \
		test -z "$$failed" || { echo "failed with torch$$failed" >&2; exit 1; }

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

mutate: $(STAMP)
	OMP_NUM_THREADS=1 .ci/mutate $(MODULE) $(MUTANTS)

bench: $(STAMP)
	$(BIN)/featkd bench run $(BENCH_ARGS) --out $(BENCH_CSV)
	$(BIN)/featkd bench plot $(BENCH_CSV) --out docs/bench-$(BENCH).svg
	@if grep -qF '<!-- bench $(BENCH) -->' docs/results.md; \
		then $(BIN)/featkd bench table $(BENCH_CSV) --out docs/results.md; fi

report: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.report

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: $(STAMP)
	git ls-files 'csrc/*' 'tests/csrc/*.cpp' 'tools/*.h' 'tools/*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	git ls-files 'csrc/*' 'tests/csrc/*.cpp' 'tools/*.h' 'tools/*.cpp' | xargs $(BIN)/clang-format -i
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-compat-* build site featkd/_csrc.so *.egg-info tools/*/*.egg-info .pytest_cache .mypy_cache .ruff_cache
