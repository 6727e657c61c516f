# Every target sets up what it needs: Python (3.10 or newer, with venv) and make are enough.
#   make test PYTHON=python3.12        another interpreter for .venv
#   make test WORKERS=4                more test processes
#   make bench BENCH=plan_time         another script of benchmarks/
#   make demo ARGS="--set training.steps=50"    arguments for the driver
# Paths are relative, so that a folder with spaces in its name works.

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=
BENCH   ?= step_time
VENV    := .venv
RUN     := $(VENV)/bin/python
# Python compiles what it imports when it does; compiling all of torch beforehand takes as long as the rest of the installation.
INSTALL := -m pip --disable-pip-version-check install -qq --no-compile
PIP     := $(RUN) $(INSTALL)
# Other people's frameworks, which are heavy and bring versions of their own, stand apart.
WIDE    := .venv-wide
LOWEST  := .venv-lowest
# One thread per process: two workers on two cores are faster than two that fight for both.
ONE     := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Images of containers often forbid Python to keep what it compiles: every process of the tests would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test test-wide lowest pythons wheel check lint types specs catalogue unit bench docs format install clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(VENV)/.demo ## fine-tune a small 3D diffusion model on brain volumes; results in runs/demo
	@$(RUN) examples/ddpm.py demo $(ARGS)

test: lint types specs unit ## what CI runs: lint, types, specs and the test suite

check: test ## the same as `make test`

lint: $(VENV)/.test ## ruff
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check --quiet .

types: $(VENV)/.test ## mypy --strict
	@$(RUN) -m mypy --no-error-summary

specs: $(VENV)/.test ## tnpeft check on every shipped spec and recipe
	@$(RUN) -m tnpeft check specs

catalogue: $(VENV)/.test ## pictures, the table in specs/README.md and the schemas for editors, from the specs and the code
	@$(RUN) -m tnpeft draw specs -o specs/pictures/
	@$(RUN) -m tnpeft list --markdown specs/README.md
	@$(RUN) -m tnpeft schema spec > specs/schema/spec.json
	@$(RUN) -m tnpeft schema recipe > specs/schema/recipe.json

# Work is stolen rather than dealt out: a file's tests stay with one worker and share their set-up, and no worker idles.
unit: $(VENV)/.test ## the test suite alone, without what takes seconds each (`test-wide` has it)
	@$(ONE) $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-wide: $(WIDE)/.wide ## tests beside heavy frameworks, whole runs of the driver and the suite's slow tests, in .venv-wide
	@$(ONE) $(WIDE)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal tests/wide tests/driver $(ARGS)
	@$(ONE) $(WIDE)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow $(ARGS)

lowest: $(LOWEST)/.lowest ## the test suite with the lowest versions that pyproject.toml promises (but torch's), in .venv-lowest
	@TNPEFT_LOWEST=1 $(ONE) $(LOWEST)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -o norecursedirs="wide .*" $(ARGS)

pythons: $(VENV)/.test ## the wheel on Python 3.10, 3.12 and 3.13 without torch, where they are installed
	@$(RUN) tests/pythons.py 3.10 3.12 3.13

wheel: $(VENV)/.torch ## the wheel, in dist
	@$(RUN) -m pip --disable-pip-version-check wheel -q --no-deps -w dist .

bench: $(VENV)/.bench ## step time against full fine-tuning and the other libraries; BENCH=numerics is another script
	@$(RUN) benchmarks/$(BENCH).py $(ARGS)

docs: $(VENV)/.docs ## the site, in build/site/html: texts, gallery, language, API
	@$(RUN) docs/build_site.py

format: $(VENV)/.test ## ruff, mending what it can
	@$(RUN) -m ruff check --quiet --fix .
	@$(RUN) -m ruff format --quiet .

install: $(VENV)/.demo ## the environment of `make demo`, nothing run

clean: ## remove the environment, caches and results
	rm -rf $(VENV) $(WIDE) $(LOWEST) build dist runs .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself: its pin decides what everything else may bring.
$(VENV)/.torch: constraints.txt
	@echo "Setting up $(VENV) (once, a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@$(PIP) -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@$(PIP) -c constraints.txt -e ".[demo,test,dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	@$(PIP) -c constraints.txt -e ".[demo,peers]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	@$(PIP) -c constraints.txt -e ".[docs]"
	@touch $@

$(WIDE)/.wide: constraints.txt pyproject.toml requirements-nodeps.txt
	@echo "Setting up $(WIDE) (once, a few minutes) ..."
	@$(PYTHON) -m venv $(WIDE)
	@$(WIDE)/bin/python $(INSTALL) -c constraints.txt torch
	@$(WIDE)/bin/python $(INSTALL) -c constraints.txt -e ".[demo,anatomies,encoder,test,wide,docs]"
	@$(WIDE)/bin/python $(INSTALL) --no-deps -r requirements-nodeps.txt
	@touch $@

# Each `name>=version` becomes `name==version`, so that every lower bound is a release that is tested.
$(LOWEST)/.lowest: constraints.txt pyproject.toml
	@echo "Setting up $(LOWEST) (once, a few minutes) ..."
	@$(PYTHON) -m venv $(LOWEST)
	@sed -nE 's/^  "([A-Za-z0-9_.-]+)>=([0-9.]+)".*/\1==\2/p' pyproject.toml | grep -v '^torch==' | sort -u > $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python $(INSTALL) -c constraints.txt torch
	@$(LOWEST)/bin/python $(INSTALL) -c constraints.txt -c $(LOWEST)/lowest.txt -e ".[demo,test]"
	@touch $@
