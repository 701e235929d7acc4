# The two commands of the README, and what they need: Python 3.11 or later; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: tune test test-vllm check docs clean

tune: $(VENV)/.installed
	mkdir -p .draftpick # where it exists, it is the store of this checkout's commands
	$(BIN)/python tune.py run

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

test-vllm: $(VENV)/.installed
	$(BIN)/python -m tests.lanes.vllm_env
	$(BIN)/python -m pytest -m vllm --durations=10

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not vllm"

docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict --quiet --site-dir $(VENV)/site

$(VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
