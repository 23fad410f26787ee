# make train [FRAMEWORK=pytorch|tensorflow|mxnet|xgboost] [ARGS="--epochs 20"]
# make test
# make soak

FRAMEWORK ?= pytorch
ARGS ?=

.PHONY: train test soak

train: .venv/installed
	.venv/bin/python $(FRAMEWORK)/train.py $(ARGS)

test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

soak: .venv/installed
	.venv/bin/python tests/soak.py

# The newest supported Python that works and can make virtual environments, on the PATH or of pyenv; else any python3.
.venv/installed: requirements.txt
	@for python in $(foreach v,3.12 3.11 3.10,python$(v) $(HOME)/.pyenv/versions/$(v).*/bin/python) python3; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	        echo "Setting up .venv with $$python: takes some minutes, once"; \
	        $$python -m venv .venv && .venv/bin/python -m pip install --quiet --requirement requirements.txt && touch $@; \
	        exit; \
	    fi; \
	done; \
	echo "error: no Python 3.10, 3.11 or 3.12 with venv here: install one, such as python3.12 and python3.12-venv"; exit 1
