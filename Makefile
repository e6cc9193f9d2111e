# Needed at the start: a clone, Python 3.11 to 3.13 and pip. `make demo PYTHON=python3.12` chooses another Python.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# every GPU there is (for the launcher, those in /dev); without one, two processes on the CPU
DEVICES := $(if $(wildcard /dev/nvidia[0-9]*),,--nproc 2)

.PHONY: venv demo test check slurm-test slurm-campaign bench

venv: $(READY)

# torch comes first and by its exact version, so that pip takes the build meant for this machine
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + ": make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: venv
	$(BIN)/launcher run $(DEVICES) recipes/gpt.py --run.save-every 200
	@echo "its checkpoints:" && $(BIN)/launcher ckpt ls "$$(ls -td runs/gpt-* | head -1)"

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# processes to test in; the tests of a file stay together, as they share what they start
JOBS ?= 2
test: check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu and not slurm"

# on a SLURM cluster of its own, which it starts on this machine: needs root and Linux namespaces
slurm-test: venv
	$(BIN)/python -m pytest -m "slurm and not slow" tests/slurm

# every kind of failure, many times, under four settings of a site: hours
slurm-campaign: venv
	$(BIN)/python -m tests.slurm.campaign

# on an idle machine, some minutes each; peers that are not installed (pip install lightning transformers) are left out
BENCHMARKS := overhead ddp loader checkpoint startup warmstart scale
bench: venv
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit; done
	$(BIN)/python benchmarks/page.py
