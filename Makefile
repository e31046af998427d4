# make demo     install, start a server, ask it for samples, write demo.png
# make serve    the same, and go on serving at port 8000 until Ctrl-C
# make test     install everything, then lint, types and tests
# make proofs   the full load, abort, reload and fuzzing tests, into docs/results/proofs.json; a quarter of an hour
# make gpu      on a machine with a GPU: its tests and benchmarks, into docs/results/gpu.json; not run on a GPU yet
#
# All of it happens in the folder .venv, gpu in .venv-gpu. PYTHON=python3.12 chooses another interpreter, ARGS="--port 9000" adds to
# the command of serve, and ARGS="-k kernels" to that of the tests.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

INSTALL = $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo serve test proofs gpu lint clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.serving
	@$(VENV)/bin/fewstep demo --output demo.png

serve: $(VENV)/.serving
	@$(VENV)/bin/fewstep demo --output demo.png --port 8000 --stay $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

proofs: $(VENV)/.everything
	PROOF_SCALE=1 PROOF_RESULTS=docs/results/proofs.json $(VENV)/bin/python -m pytest tests/test_proofs.py $(ARGS)

gpu:
	@$(MAKE) --no-print-directory VENV=.venv-gpu .venv-gpu/.gpu
	.venv-gpu/bin/python benchmarks/gpu.py --json docs/results/gpu.json $(ARGS)

lint: $(VENV)/.everything
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean:
	rm -rf build dist src/*.egg-info demo.png .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The environment. A stamp says what is installed in it, and is older than what it was made from when that changed.

$(VENV)/.serving: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing what serving needs into $(VENV)"
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.everything: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing what the tests need into $(VENV); torch is among it, so the first time takes minutes"
	@$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.serving

$(VENV)/.gpu: $(VENV)/.everything
	@echo "Installing what a GPU needs into $(VENV)"
	@$(INSTALL) --editable '.[gpu]'
	@$(VENV)/bin/python -m pip uninstall -qq --yes onnxruntime onnxruntime-gpu  # they hold the same files: both, or half is left
	@$(INSTALL) 'onnxruntime-gpu[cuda,cudnn]'
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "fewstep needs Python 3.11 or newer, and there is no $(PYTHON)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fewstep needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) -m venv failed; see above"; exit 1; }
