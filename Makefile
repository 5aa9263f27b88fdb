# Each target makes .venv and installs on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data/train
WORKERS ?= 2

.PHONY: demo app test test-app fuzz soak screenshots quality style bundled-pair cards space clean

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
	$(BIN)/python -m pytest -q -m "not browser" -n $(WORKERS) --dist loadfile

# Drives the web demo in the Chromium that is found on the path, or that CHROMIUM names.
test-app: $(VENV)/installed
	$(BIN)/python -m pytest -q -m browser

# Ten times as many calls as `make test` draws; PARD_FUZZ_SEED=n draws others.
fuzz: $(VENV)/installed
	PARD_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -q tests/test_fuzz.py

soak: $(VENV)/installed
	$(BIN)/python benchmarks/soak.py --output benchmarks/results/soak.json

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
