PYTHON ?= python3
EMULATE ?= sm_80
ARGS ?= tests/test_emulator.py $(patsubst %,tests/test_%.py,attention cross_entropy gelu layernorm) -k "not (two_to_the_31 or registered_soundly or overlap_on_hopper)"

.PHONY: help laptop test torture gate machine lint

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

laptop: .venv/ready  ## train a small GPT: minutes on two CPU cores, no download
	.venv/bin/python train_gpt2.py laptop

test: .venv/ready  ## prove everything: under six minutes on two CPU cores
	.venv/bin/python -B -m pytest -n 2 --dist loadfile --durations=10

torture: .venv/ready  ## break it on purpose for an hour: kills, full disks, changed files, odd options
	.venv/bin/python -B tests/faults/torture.py --seconds 3600

gate: .venv/ready  ## hold every kernel's machine code and traffic to its limits, for six NVIDIA targets
	.venv/bin/python -B -m kernels.report --check

machine: .venv/ready  ## run the kernels' tests as compiled for the GPU in EMULATE, emulated; ARGS are pytest's
	EMULATE=$(EMULATE) .venv/bin/python -B -m pytest -n 2 $(ARGS)

lint: .venv/ready  ## check the style and the format of the code
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/ready: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON): make PYTHON=/path/to/python names another"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: $(PYTHON) is Python %d.%d, but 3.11 or newer is needed: make PYTHON=python3.12 names another" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch .venv/ready
