# make repro | test | verify | push | claims | bench | ui | experiments. Needs Python 3.11 to 3.13, git, make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := $(VENV)/bin/python -m pip install --quiet -c constraints.txt

DROP := rouge(?!\d.(diff|tuned))|lines|words|stopped|out|pipeline|stages|reports|constraints

.PHONY: repro test verify push claims bench ui experiments
.DEFAULT_GOAL := repro

repro: $(VENV)/installed ## run what has changed of the experiment, then say the verdict
	@lora-repro mend
	@lora-repro check
	@lora-repro viewer
	@dvc repro
	@lora-repro show

test: $(VENV)/installed-dev ## lint, types and tests
	@ruff check .
	@ruff format --check .
	@mypy
	@pytest --numprocesses auto --maxprocesses 4 --dist loadfile

verify: $(VENV)/installed ## do cache, dvc.lock, outputs, reports, MLflow run and wheels say the same?
	@lora-repro verify

push: $(VENV)/installed ## dvc push, if everything agrees: DVC alone would push what has rotted in its cache
	@lora-repro verify
	@dvc push

# KIND=EXACT: those of one kind alone, without the report.
claims: $(VENV)/installed ## check what papers claim (claims/claims.yaml); reports/claims.md
	@dvc repro $(if $(KIND),$$(python -m claims.register $(KIND)),claims/dvc.yaml)

bench: $(VENV)/installed-bench ## speed and memory beside TRL, transformers.generate and llama.cpp (after make repro)
	@python -m bench.speed

ui: $(VENV)/installed ## every experiment's parameters, curves, tables and adapter in MLflow
	@store="$$(lora-repro store)" && \
	echo "runs with their scores: http://127.0.0.1:5000/$$(lora-repro store --view)" && \
	MLFLOW_BACKEND_STORE_URI="$$store" mlflow ui --host 127.0.0.1

experiments: $(VENV)/installed ## dvc exp show, as wide as a terminal: what differs, and the scores that decide
	@dvc exp show --only-changed --drop '$(DROP)'

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"error: Python 3.11 to 3.13 is needed, and $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.12")'
	@echo "installing into $(VENV) (about two minutes, once)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	@$(INSTALL) -e '.[bench]'
	@touch $@
