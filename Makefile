PYTHON ?= python3

.PHONY: laptop test gate lint

laptop: .venv/ready  ## train a small GPT: minutes on two CPU cores, no download
	.venv/bin/python train_gpt2.py laptop

test: .venv/ready  ## prove everything: under six minutes on two CPU cores
	.venv/bin/python -m pytest -n 2 --dist loadfile

gate: .venv/ready  ## hold every kernel's machine code and traffic to its limits, for the A100 and the H100
	.venv/bin/python -m kernels.report --arch sm_80 sm_90 --check

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch .venv/ready
