# Every target builds the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: lab verify test bench lint clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

lab: $(STAMP)  ## the whole catalog on the embedded default; writes reports/
	$(BIN)/python -m pytest experiments -n auto --gpulab-gate=reports/records/sim-t4.json --html=reports/index.html --self-contained-html

verify: $(STAMP)  ## the quick path
	$(BIN)/python -m pytest experiments -m verify

test: $(STAMP)
	$(BIN)/python -m pytest tests -n auto

bench: $(STAMP)  ## timing claims live here, not in tests
	$(BIN)/python tests/bench.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info
