# Every target builds the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: lab verify test test-slow coverage bench lint clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# The whole catalog on the simulator; writes reports/ and holds it against the committed record.
lab: $(STAMP)
	$(BIN)/python -m pytest experiments -n auto --gpulab-gate=reports/records/sim-t4.json --html=reports/index.html --self-contained-html

# The quick path.
verify: $(STAMP)
	$(BIN)/python -m pytest experiments -m verify

# What every change must pass; `make test-slow` runs the rest.
test: $(STAMP)
	$(BIN)/python -m pytest tests -n auto -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest tests -n auto -m slow

coverage: $(STAMP)
	$(BIN)/coverage run -m pytest tests -m "not slow"
	$(BIN)/coverage report --skip-covered

# Timing claims live here, not in tests. The engine is timed as it is installed, its hot modules compiled.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/compiled .
	PYTHONPATH=build/compiled $(BIN)/python -P tests/bench.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info
