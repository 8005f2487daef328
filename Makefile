# Every target makes its own environment: a fresh clone needs Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
USABLE := $(VENV)/.usable
CODE   := graphsurgery tests examples benchmarks
# One thread per test process: the processes share the cores, and results do not depend on the thread count.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format types examples bench measure sweep architectures fuzz mutations mutants wheel clean

help: ## Show this help
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

$(USABLE): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and what the examples need into $(VENV): some minutes"
	$(BIN)/python -m pip install -qq --editable '.[examples]'
	touch $@

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and what tests and benchmarks need into $(VENV): some minutes"
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	touch $(USABLE) $@

install: $(STAMP) ## Make .venv and install graphsurgery with what tests, benchmarks and lint need (editable)

demo: $(USABLE) ## Optimise the trained digits network, export it and compare accuracies
	$(BIN)/python examples/digits/demo.py

test: $(STAMP) ## Run the tests (sweeps excluded)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not sweep" $(ARGS)

lint: $(STAMP) ## Check format and lint
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

format: $(STAMP) ## Format the code and fix what can be fixed
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

types: $(STAMP) ## mypy --strict on the package
	$(BIN)/mypy

examples: $(STAMP) ## Run every example
	set -e; for demo in examples/*/demo.py; do echo "== $$demo"; $(BIN)/python $$demo; done

# Goes on where it was stopped; results lie in out/bench/results.jsonl. ARGS="--only resnet50", "--again", ...
bench: $(STAMP) ## Compare with other tools on whole networks; write docs/benchmark.md and the README's table
	$(ONE_THREAD) $(BIN)/python -W ignore benchmarks/side_by_side.py $(ARGS)
	$(ONE_THREAD) $(BIN)/python -W ignore benchmarks/side_by_side.py --latency $(ARGS)

NOT_MEASURED := architectures fold_blocks fold_cases onnx_count peer_tools side_by_side
measure: $(STAMP) ## Run the other benchmarks (ratios; nothing is asserted)
	set -e; for bench in $(filter-out $(NOT_MEASURED:%=benchmarks/%.py), $(wildcard benchmarks/*.py)); do \
	echo "== $$bench"; $(BIN)/python $$bench; done

sweep: $(STAMP) ## Run the long searches over random networks (over public ones: make architectures)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m sweep $(ARGS)

# Goes on where it was stopped; results lie in out/architectures.jsonl. ARGS="--only timm/", "--latency", ...
architectures: $(STAMP) ## Run the networks of torchvision, timm, transformers and peft; write docs/architectures.md
	$(ONE_THREAD) $(BIN)/python benchmarks/architectures.py $(ARGS)

N ?= 2000
SEED ?= 0
fuzz: $(STAMP) ## Run N random networks from SEED on through everything; failing ones go to out/fuzz
	$(ONE_THREAD) $(BIN)/python -W ignore -m tests.fuzz --n $(N) --seed $(SEED) --jobs $(JOBS)

mutations: $(STAMP) ## Print which comparison sees what of changes that were made wrong
	$(ONE_THREAD) $(BIN)/python -W ignore -m tests.fuzz.mutations $(ARGS)

# ARGS="graphsurgery/verify/*.py --tests tests/verify": the files to change, and where their tests are.
mutants: $(STAMP) ## Change one place of the code at a time; print which changes no test notices
	$(ONE_THREAD) $(BIN)/python -W ignore -m tests.mutants $(ARGS)

wheel: $(STAMP) ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove caches and builds (keeps .venv)
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -type d -prune -exec rm -rf {} +
