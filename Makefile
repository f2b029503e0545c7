# Installs by uv where there is one, else by pip: the same versions. With uv, UV_TORCH_BACKEND=auto takes a torch without
# CUDA where there is no GPU.
# make demo    set up what the package itself needs, then train, sketch, index, query and report on real digits (into demo/)
# make live    serve the demo's page, to be asked about parts of pictures and uploads
# make test    set up, then run the tests
# make test-all   those too that take long
# make test-any-cpu   those of compiled code, as a CPU without AVX runs it
# make test-plain   the same with plain references in place of compiled passes
# make check   set up, then formatting, lint and types
# make docs    set up, then build the documentation (into site/)
# make bench   set up, then run a short selection of the benchmarks, printing each command
# make notebooks   run the notebooks anew and keep what they print
# make house   set up, then print which room imports from which, and what is too long
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
RUNS = $(VENV)/.runs
UV := $(shell command -v uv 2>/dev/null)
PIP = $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(BIN)/pip install -q --no-compile --disable-pip-version-check)
INSTALL = $(PIP) -c constraints.txt
COMPILED = tests/native tests/gradients tests/projections tests/index/test_scan.py

# what is imported is compiled once, at its first import: neither all of it, nor again in every process
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo live test test-all test-any-cpu test-plain check docs bench notebooks house format clean

demo: $(RUNS)
	$(BIN)/retrac-scale demo

live: $(RUNS)
	$(INSTALL) -e '.[serve]'
	$(BIN)/retrac-scale serve demo/retracridge.zarr --queries demo/queries.zarr --images demo/images.npy \
		--query-images demo/generated.npy --model demo/model --checkpoint epoch-21=demo/model/unet

test: $(STAMP)
	$(BIN)/pytest -q -n 2 --dist worksteal --durations=5

test-all: $(STAMP)
	$(BIN)/pytest -q -n 2 --dist worksteal --durations=5 -m ""

test-any-cpu: $(STAMP)
	NUMBA_CPU_NAME=generic $(BIN)/pytest -q -n 2 $(COMPILED)

test-plain: $(STAMP)
	$(BIN)/pytest -q -n 2 --plain $(COMPILED)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python benchmarks/sketching.py --model u-small --batch 64 --rounds 3 --skip-peers --skip-memory
	$(BIN)/python -m benchmarks.building --rows 50000
	$(BIN)/python -m benchmarks.scanning --rows 50000 --threads 1 --quality
	$(BIN)/python -m benchmarks.serving --rows 50000 --clients 16 --seconds 10 --unbatched-seconds 5
	$(BIN)/python -m benchmarks.item_digests

notebooks: $(STAMP)
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

house: $(STAMP)
	$(BIN)/python -m tests.house

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing what the package itself needs: two minutes or so, once"
	$(INSTALL) -e .
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev,docs]'
	touch $@ $(RUNS)

clean:
	rm -rf $(VENV) demo build site *.egg-info
