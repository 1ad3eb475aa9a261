# Two commands are enough on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    ?= demo-out
MINUTES ?= 30

.DEFAULT_GOAL := help
.PHONY: help install demo test test-long chaos chaos-mutants soak fuzz test-deploy check format protos bench results results-quick bundle bundle-cuda bundle-cuda-manifest clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## a coordinator and four agents over mutual TLS on this machine
	$(BIN)/fedctl demo --out $(OUT) -o json

test: $(STAMP)  ## the test suite (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-long: $(STAMP)  ## what takes longer: the units as started, the factory's README, all of the equality with gRPC
	$(BIN)/python -m pytest -m long

test-deploy: $(STAMP)  ## as root: the bundle on machines with systemd, firewalls and proxies, in name spaces
	$(BIN)/python -m pytest -m long tests/integration/test_deployment.py

chaos: $(STAMP)  ## every fault in every phase of a round, three times; writes chaos.json (SEED=N repeats a matrix)
	$(BIN)/python -m tests.faults.chaos --repeats 3 --out chaos.json $(if $(SEED),--seed $(SEED))

chaos-mutants: $(STAMP)  ## guards of the product broken one at a time: the chaos suite must see each; writes mutants.json
	$(BIN)/python -m tests.faults.chaos_mutants --out mutants.json

soak: $(STAMP)  ## half an hour of runs under random faults; soak.json and docs/results/soak.svg: nothing grows
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --out soak.json --plot docs/results

fuzz: $(STAMP)  ## the decoders under Hypothesis, then under atheris, MINUTES each; findings in fuzz-findings/
	FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/fuzz --timeout 0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz.guided --minutes $(MINUTES)

check: $(STAMP)  ## ruff, mypy --strict, import-linter, generated stubs up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python protos/generate.py --check

format: $(STAMP)  ## format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

protos: $(STAMP)  ## regenerate fedcore/v1 from protos/
	$(BIN)/python protos/generate.py

bench: $(STAMP)  ## the benchmarks, one JSON object each
	$(BIN)/python benchmarks/round.py --sites 4 --params 11700000 --rounds 5

results: $(STAMP)  ## every run behind docs/results.md that is still missing, then the page (hours; resumable)
	$(BIN)/python benchmarks/results.py tune main ablations full page

results-quick: $(STAMP)  ## a corner of docs/results.md again, held against what is stored (15 minutes)
	$(BIN)/python benchmarks/results.py quick

bundle: $(STAMP)  ## dist/fedimpres-VERSION-linux-x86_64-cpu.tar.gz, which installs without a network
	PYTHON=$(BIN)/python deploy/bundle.sh cpu

bundle-cuda: $(STAMP)  ## the same with CUDA, of the wheels that deploy/cuda-requirements.txt names (several GB)
	PYTHON=$(BIN)/python deploy/bundle.sh cuda

bundle-cuda-manifest: $(STAMP)  ## deploy/cuda-requirements.txt, from an index with CUDA builds
	PYTHON=$(BIN)/python deploy/bundle.sh cuda-manifest

clean:  ## remove what the targets above made
	rm -rf $(VENV) $(OUT) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
