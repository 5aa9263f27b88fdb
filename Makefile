# Each target makes .venv and installs on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data/train
WORKERS ?= 2

.PHONY: demo app test test-app compatibility test-families screenshots quality style bundled-pair cards space clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[app,bench,browser,dev,train]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/pard demo

app: $(VENV)/installed
	$(BIN)/python app.py

# Tests use one thread each: as many files at a time as WORKERS says.
test: $(VENV)/installed
	$(BIN)/python -m pytest -q -m "not browser and not families" -n $(WORKERS) --dist loadfile

# Every family of transformers, and what docs/compatibility.md says of it.
test-families: $(VENV)/installed
	$(BIN)/python -m pytest -q -m families

compatibility: $(VENV)/installed
	$(BIN)/python tests/every_family.py --write docs/compatibility.md

# Drives the web demo in the Chromium that is found on the path, or that CHROMIUM names.
test-app: $(VENV)/installed
	$(BIN)/python -m pytest -q -m browser

screenshots: $(VENV)/installed
	$(BIN)/python -m pytest -q -m browser -k pictures --screenshots docs/images

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bundled-pair: $(VENV)/installed
	$(BIN)/python recipes/bundled_pair.py --data $(DATA)

cards: $(VENV)/installed
	$(BIN)/pard card --all --results benchmarks/results --output model_cards

# What a Hugging Face Space of the web demo holds; `hf upload ORG/SPACE build/space --repo-type space` publishes it.
space: $(VENV)/installed
	$(BIN)/python spaces/build.py build/space

clean:
	rm -rf $(VENV) build *.egg-info
