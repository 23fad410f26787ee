# make train [FRAMEWORK=pytorch|tensorflow|mxnet|xgboost] [ARGS="--epochs 20"]
# make spot [FRAMEWORK=...] [SPOT="--interrupt-after 20s"] [ARGS="--epochs 20"]
# make check         (some minutes the first time, then two: ruff, codespell, mypy, and tests of a few seconds)
# make test          (all tests: 40 minutes on two cores)
# make integration   (random interruptions, faults, serving toolkits, more variants of the tests: more than an hour)
# make examples      (renews the examples from their templates, see examples/README.md)
# make bench [BENCH="checkpoint rounds --repetitions 5"]
# make update        (installs the newest dependencies in .venv-update, and runs `make check` there)

FRAMEWORK ?= pytorch
ARGS ?=
BENCH ?=
SPOT ?= --interrupt-after 3epochs,3epochs --forward-sigterm --verify
PYTHON ?=
VENV ?= .venv

# The packages for one framework, or for all frameworks if `make check` or `make test` has installed them.
FRAMEWORK_INSTALLED = $(or $(wildcard $(VENV)/installed),$(VENV)/$(FRAMEWORK)-installed)
INSTALL = $(VENV)/bin/python -m pip install --no-compile --requirement
# By all cores; some packages contain files for other versions of Python. Without it, each of the tests' many
# processes would compile what it imports, if PYTHONDONTWRITEBYTECODE is set.
COMPILE = $(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true

.DEFAULT_GOAL := help
$(if $(filter $(FRAMEWORK),pytorch tensorflow mxnet xgboost),,$(error FRAMEWORK=$(FRAMEWORK): expected pytorch, tensorflow, mxnet or xgboost))

.PHONY: help train spot lint check test integration examples bench update

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

train: $(FRAMEWORK_INSTALLED)
	$(VENV)/bin/python $(FRAMEWORK)/train.py $(ARGS)

# Enough epochs for two interruptions on any machine; an epoch of XGBoost takes milliseconds.
spot: ARGS = --epochs $(if $(filter xgboost,$(FRAMEWORK)),500,12)
spot: $(FRAMEWORK_INSTALLED) $(VENV)/spot-installed
	$(VENV)/bin/python -m spot $(FRAMEWORK)/train.py $(SPOT) -- $(ARGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/mypy

check: lint
	$(VENV)/bin/python -m pytest -m quick

test: lint $(VENV)/spot-installed .venv-sdk2/installed .venv-sdk3/installed
	$(VENV)/bin/python -m pytest

integration: $(VENV)/installed .venv-sdk2/installed .venv-sdk3/installed
integration: .venv-serving/installed .venv-mlflow/installed
	$(VENV)/bin/python -m pytest -m integration --numprocesses 0 --capture no

examples: $(VENV)/installed
	$(VENV)/bin/python examples/renew.py

bench: $(VENV)/installed $(VENV)/spot-installed
	$(VENV)/bin/python -m benchmarks $(BENCH)

# Prints the changes of requirements/versions.txt.
update:
	rm -rf .venv-update
	$(MAKE) VENV=.venv-update .venv-update/bin/pip
	sed 's/[=>]=[^ ]*//' requirements/versions.txt > .venv-update/names.txt
	.venv-update/bin/python -m pip install --no-compile --requirement .venv-update/names.txt
	touch .venv-update/installed
	.venv-update/bin/python -m pip freeze --requirement .venv-update/names.txt | sed '/^## /,$$d' | \
	    diff --ignore-blank-lines requirements/versions.txt - || true
	$(MAKE) VENV=.venv-update check

# PYTHON, or a supported version on the PATH or from pyenv that can create virtual environments.
$(VENV)/bin/pip:
	@for python in $(PYTHON) $(foreach v,3.12 3.11 3.13,python$(v) $(HOME)/.pyenv/versions/$(v).*/bin/python) python3; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Setting up $(VENV) with $$python, once"; \
	        $$python -m venv --upgrade-deps $(VENV); \
	        exit; \
	    fi; \
	done; \
	echo "error: no Python 3.11, 3.12 or 3.13 with venv: install one, such as python3.12 and python3.12-venv"; exit 1

$(VENV)/installed: requirements.txt $(wildcard requirements/*.txt) | $(VENV)/bin/pip
	$(INSTALL) $<
	$(COMPILE)
	@touch $@

$(VENV)/spot-installed: requirements/spot.txt requirements/versions.txt | $(VENV)/bin/pip
	@echo "$(INSTALL) $<" && $(INSTALL) $< || { \
	    command -v gcc >/dev/null || echo "error: compiling SageMaker's toolkit needs gcc: install it"; exit 1; }
	$(COMPILE)
	@touch $@

$(VENV)/%-installed: requirements/%.txt requirements/versions.txt | $(VENV)/bin/pip
	$(INSTALL) $<
	@touch $@

# Versions 2 and 3 of SageMaker's Python SDK, which cannot share an environment, for the launchers.
.venv-sdk%/installed: launch/requirements-v%.txt | .venv/bin/pip
	@echo "Setting up .venv-sdk$* for the launchers: takes some minutes, once"
	@.venv/bin/python -m venv .venv-sdk$* && .venv-sdk$*/bin/python -m pip install --quiet --requirement $< && touch $@

# An MLflow server, and its client with the frameworks of .venv.
.venv-mlflow/installed: tests/requirements-mlflow.txt | .venv/spot-installed
	@echo "Setting up .venv-mlflow: takes some minutes, once"
	@.venv/bin/python -m venv .venv-mlflow && .venv-mlflow/bin/python -m pip install --quiet --requirement $<
	@packages='import site; print(site.getsitepackages()[0])'; \
	    .venv/bin/python -c "$$packages" > "$$(.venv-mlflow/bin/python -c "$$packages")/frameworks.pth" && touch $@

# SageMaker's serving toolkits, which find the frameworks in .venv.
.venv-serving/installed: tests/requirements-serving.txt tests/requirements-serving-pytorch.txt | .venv/installed .venv/spot-installed
	@echo "Setting up .venv-serving with SageMaker's serving toolkits: takes a minute, once"
	@.venv/bin/python -m venv .venv-serving
	@.venv-serving/bin/python -m pip install --quiet --no-deps --requirement $<
	@.venv-serving/bin/python -m pip install --quiet --no-deps --upgrade --target .venv-serving/pytorch \
	    --requirement tests/requirements-serving-pytorch.txt
	@packages='import site; print(site.getsitepackages()[0])'; \
	    .venv/bin/python -c "$$packages" > "$$(.venv-serving/bin/python -c "$$packages")/frameworks.pth" && touch $@
