# Everything a newcomer needs: `make demo` and `make test` set up the environment themselves. One
# thread: small networks gain nothing from more, and lose a lot where other work wants them too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-gpu test-wheel test-openmm-torch test-lowest lint format docs bench bench-gpu clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test,plot,docs]"
	touch $@

demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# Statistics over many seeds; then files, graphs and weights that are drawn at random anew.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow
	$(BIN)/python -m pytest -q --hypothesis-profile=nightly \
		tests/test_fuzz.py tests/topology/test_symmetry.py tests/ensemble/test_weighted.py \
		tests/ensemble/test_resampling.py tests/ensemble/test_diagnostics.py

# Everything that runs on a GPU against the CPU; skipped where there is none.
test-gpu: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 4 tests/test_cuda.py

# The wheel in an environment of its own, away from the sources.
test-wheel:
	rm -rf dist && $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/pip install --quiet --constraint constraints.txt torch
	dist/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && venv/bin/openmm-vtdis info lj13 && venv/bin/openmm-vtdis demo dw4 -n 200

# Forces through openmm-torch, whose wheel wants the torch that it was built for (7 GB, with CUDA).
TORCH_ENV := .venv-openmm-torch
test-openmm-torch:
	test -d $(TORCH_ENV) || $(PYTHON) -m venv $(TORCH_ENV)
	grep -v '^torch==' constraints.txt > $(TORCH_ENV)/constraints.txt
	$(TORCH_ENV)/bin/pip install --quiet --constraint $(TORCH_ENV)/constraints.txt \
		"torch==2.9.1" --editable ".[test,openmm-torch]"
	OMP_NUM_THREADS=1 $(TORCH_ENV)/bin/python -m pytest -q tests/interop/test_score_force.py

# The lowest versions that pyproject.toml allows.
LOWEST := .venv-lowest
test-lowest:
	test -d $(LOWEST) || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --constraint constraints-lowest.txt --editable ".[test,plot]"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

# One system at a time with `make bench SYSTEMS=dw4`.
SYSTEMS ?= gmm2-50 gmm2-100 dw4 lj13
bench: $(STAMP)
	$(BIN)/python -m benchmarks.run $(SYSTEMS)
	$(BIN)/python -m benchmarks.tables

# Everything that needs a GPU, in one command: docs/tables/*-cuda.md and figures.
GPU := --device cuda
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.profile $(GPU)
	$(BIN)/python -m benchmarks.baseline $(GPU) --batch-size 1024
	$(BIN)/python -m benchmarks.effective $(GPU)
	$(BIN)/python -m benchmarks.step_time $(GPU)
	$(BIN)/python -m benchmarks.precision $(GPU)
	$(BIN)/python -m benchmarks.compiled $(GPU) --batch-size 1024
	$(BIN)/python -m benchmarks.energies $(GPU) --frames 30000
	$(BIN)/python -m benchmarks.scaling $(GPU)

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build demo-output
