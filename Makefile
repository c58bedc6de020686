# make repro | quick | test | verify | push | claims | bench | ui | experiments | docs | lock. Needs Python 3.11 to 3.13, git, make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(VENV)/bin/python -m pip
# lock/ has the version of every package and the hashes of its files; pip refuses all other files. Two packages are
# published without wheels, and the pinned setuptools builds them; no other runs anything while it is installed.
# Another version: edit constraints.txt, then `make lock`, which asks the package index.
INSTALL := $(PIP) install --quiet --require-hashes --no-deps --no-build-isolation --use-pep517

DROP := rouge(?!\d.(diff|tuned))|lines|words|stopped|out|pipeline|stages|reports|constraints

.PHONY: repro quick test verify push claims bench ui experiments docs lock
.DEFAULT_GOAL := repro

repro: $(VENV)/installed ## run what has changed of the experiment, then say the verdict
	@lora-repro mend
	@lora-repro check
	@lora-repro viewer
	@dvc repro
	@lora-repro show

quick: $(VENV)/installed-dev ## lint, types and the tests that need no model, store or other program: about a minute
	@ruff check .
	@ruff format --check .
	@mypy
	@pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile --durations 10 -rs

test: $(VENV)/installed-dev ## lint, types and tests
	@ruff check .
	@ruff format --check .
	@mypy
	@pytest --numprocesses auto --maxprocesses 4 --dist loadfile --durations 10 -rs

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
	@store="$$(lora-repro store)" && view="$$(lora-repro store --view)" && case "$$store" in \
	http://* | https://*) echo "runs with their scores: $$view" ;; \
	databricks*) echo "runs with their scores: the pages of your workspace" ;; \
	*) echo "runs with their scores: http://127.0.0.1:5000/$$view" && \
	  MLFLOW_BACKEND_STORE_URI="$$store" mlflow ui --host 127.0.0.1 ;; esac

experiments: $(VENV)/installed ## dvc exp show, as wide as a terminal: what differs, and the scores that decide
	@dvc exp show --only-changed --drop '$(DROP)'

# With --quiet, mkdocs would count no warning, and --strict would fail at none.
docs: $(VENV)/installed-docs ## the pages of docs/ as a site that needs no network: site/index.html
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "site/index.html"

lock: | $(VENV)/bin/python ## lock/*.txt anew, after a change of constraints.txt or pyproject.toml (needs the package index)
	@$(PIP) install --quiet --require-hashes -r lock/lock.txt
	@$(VENV)/bin/python -m lock.renew

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"error: Python 3.11 to 3.13 is needed, and $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

# pip chooses torch's build: the index's, or a CPU build where pip's settings lead to one (--require-hashes alone would
# prefer the index's). lock/torch.txt must allow it. The index's build for Linux needs CUDA's libraries.
$(VENV)/installed: pyproject.toml constraints.txt $(addprefix lock/,build.txt torch.txt cuda.txt run.txt) | $(VENV)/bin/python
	@$(VENV)/bin/python -m lock.check
	@echo "installing into $(VENV) (about two minutes, once)"
	@$(INSTALL) -r lock/build.txt
	@$(PIP) download --quiet --no-deps --only-binary :all: -c constraints.txt --dest $(VENV)/torch torch
	@$(INSTALL) --no-index --find-links $(VENV)/torch -r lock/torch.txt
	@rm -r $(VENV)/torch
	@$(INSTALL) -r lock/run.txt
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@if $(PIP) check | grep -q '^torch .* not installed'; then \
	  echo "installing CUDA's libraries for this build of torch (several GB)"; $(INSTALL) -r lock/cuda.txt; fi
	@$(PIP) check
	@touch $@

# The extras of pyproject.toml: installed-dev, installed-search, ...
$(VENV)/installed-%: lock/%.txt $(VENV)/installed
	@$(INSTALL) -r $<
	@$(PIP) check
	@touch $@
