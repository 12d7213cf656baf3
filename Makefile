# `make search` and `make test` work on a fresh machine with Python 3.11 to 3.13: both set up .venv first.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && $$p -c 'import sys; exit(not (3,11) <= sys.version_info[:2] < (3,14))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver a CPU build of torch is enough: the plain one brings gigabytes of CUDA libraries.
BUILD := $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Two files at a time on one thread each, in their order: by number of tests the longest files would come last, alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
RUNS := runs
# Hundreds of short processes below import the same modules: where an image forbids it, each would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

# What an import of hypernas finds, without an installation: a folder of links. `nas/` is the package, the others its own.
TREE := build/tree

.PHONY: tree install search test test-slow test-faults bench gpu-check lint dashboard screenshots study-ideas study-scale clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints-$(BUILD).txt
	@test -n "$(PYTHON)" || { echo "wanted Python 3.11, 3.12 or 3.13 on the PATH"; exit 1; }
	@echo "== creating $(VENV) with $(PYTHON)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "== installing hypernas and what it needs ($(BUILD) build of torch)"
	@# what is never imported need not be compiled: a third of the time
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints-$(BUILD).txt -e '.[dev]'
	@touch $@

tree:
	@rm -rf $(TREE)/hypernas && mkdir -p $(TREE)/hypernas
	@ln -s $(addprefix $(CURDIR)/,$(wildcard nas/*) kernels search_spaces dashboards) $(TREE)/hypernas/

search: install
	@echo "== searching: 20 trials on real text; results in $(RUNS)/nas.db"
	@mkdir -p $(RUNS)
	$(BIN)/nas search --study first --store $(RUNS)/nas.db --preset quick --trials 20 --resume
	$(BIN)/nas status --study first --store $(RUNS)/nas.db
	$(BIN)/nas report --study first --store $(RUNS)/nas.db --out $(RUNS)/report.html
	$(BIN)/nas export --study first --store $(RUNS)/nas.db --pick knee --out $(RUNS)/winner
	@echo "== report: $(RUNS)/report.html   exported model: $(RUNS)/winner   look around: make dashboard"

test: install
	@echo "== running the tests"
	$(PYTEST) -m 'not slow and not faults and not gpu' -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(PYTEST) -m slow --timeout=2400

# What has passed on this code is kept: interrupt it and start it again. FAULTS=FILE keeps it elsewhere.
FAULTS := $(RUNS)/faults.jsonl
test-faults: install
	@mkdir -p $(dir $(FAULTS))
	NAS_FAULTS=$(abspath $(FAULTS)) $(PYTEST) -m faults tests/faults

lint: install tree
	@! git grep -nE '^(<<<<<<<|>>>>>>>) ' || { echo "a merge left its markers"; exit 1; }
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy docs/studies

# Also without an installation, where Python 3 has torch and pytest: it runs from this tree and names what it skips.
gpu-check: tree
	@PYTHONPATH=$(CURDIR)/$(TREE):$(PYTHONPATH) $(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m hypernas.bench.gpu_check $(OUT)

bench: install
	$(BIN)/nas bench search --part overhead
	$(BIN)/nas bench search --part fleet --trials 600

study-ideas: install
	@echo "== what the four ideas are worth: 35 arms; resumes where it was stopped; results in docs/results"
	$(BIN)/python docs/studies/ideas.py --store $(RUNS)/ideas.db

study-scale: install
	@echo "== does the gain survive scale: 4 families, 5 sizes; resumes where it was stopped; results in docs/results"
	$(BIN)/python docs/studies/scale.py --store $(RUNS)/scale.db

dashboard: install
	$(BIN)/nas dashboard --store $(RUNS)/nas.db

screenshots: install
	$(BIN)/python -m hypernas.dashboards.screenshots

clean:
	rm -rf $(VENV) $(RUNS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
