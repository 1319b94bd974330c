# Each target works from a clean clone.
PY := .venv/bin/python

.PHONY: demo serve test test-gpu lint bench-train bench-lora bench-coserve bench-gpu simulate model setup clean

DATA ?=

demo: model  ## train an adapter while the server answers, then talk to it
	$(PY) -u -m examples.demo

serve: model  ## the same server, kept running
	@$(PY) -u -m examples.serve

test: model .venv/openai-0.28  ## the whole suite: unit tests, then tests with the real engine
	$(PY) -m pytest -m "not engine" -n auto --maxprocesses 8
	$(PY) -m pytest -m engine

test-gpu:  ## on a machine with a GPU, in an environment with vLLM for it: make test-gpu PY=python
	$(PY) -m pytest tests/triton/interpreted tests/engine/test_gradients.py

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench-train: model  ## finetuning alone against HF PEFT; DATA=chat.jsonl adds real data
	$(PY) -m benchmarks.train --model "$$($(PY) setup/demo_model.py)" $(if $(DATA),--data $(DATA))

bench-lora: model  ## LoRA inference against stock vLLM
	$(PY) -m benchmarks.lora_cpu --model "$$($(PY) setup/demo_model.py)"

bench-coserve: model  ## inference and finetuning at once, against the alternatives; DATA=chat.jsonl for real data
	$(PY) -m benchmarks.coserve --model "$$($(PY) setup/demo_model.py)" $(if $(DATA),--data $(DATA))

bench-gpu:  ## the backward's operations against torch's, on a GPU if there is one
	$(PY) -m benchmarks.kernels

simulate: setup  ## hours of traffic through the scheduler, without a model behind it
	$(PY) -m benchmarks.simulate

# The last client that knew /v1/fine_tunes, for a test of it.
.venv/openai-0.28: | setup
	@$(PY) -m venv $@.partial
	@$@.partial/bin/python -m pip install --quiet --disable-pip-version-check openai==0.28
	@mv $@.partial $@

model: setup
	@$(PY) setup/demo_model.py

setup:
	@setup/setup.sh

clean:
	rm -rf .venv .demo
