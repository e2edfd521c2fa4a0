PYTHON ?= python3

.PHONY: laptop test lint

laptop: .venv/ready  ## train a small GPT: minutes on two CPU cores, no download
	.venv/bin/python train_gpt2.py laptop

test: .venv/ready  ## prove everything: under six minutes on two CPU cores
	.venv/bin/python -m pytest

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch .venv/ready
