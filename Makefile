# make train [FRAMEWORK=pytorch|tensorflow|mxnet|xgboost] [ARGS="--epochs 20"]
# make spot [FRAMEWORK=...] [SPOT="--interrupt-after 20s"] [ARGS="--epochs 20"]
# make check         (some minutes the first time, then two: ruff, and tests of a few seconds)
# make test          (all tests: 40 minutes on two cores)
# make integration   (random interruptions, faults, serving toolkits, more variants of the tests: more than an hour)
# make examples      (renews the examples from their templates, see examples/README.md)
# make bench [BENCH="checkpoint rounds --repetitions 5"]

FRAMEWORK ?= pytorch
ARGS ?=
BENCH ?=
SPOT ?= --interrupt-after 10s,upload --grace 5s --verify

.PHONY: train spot check test integration examples bench

train: .venv/installed
	.venv/bin/python $(FRAMEWORK)/train.py $(ARGS)

spot: .venv/spot-installed
	.venv/bin/python -m spot $(FRAMEWORK)/train.py $(SPOT) -- $(ARGS)

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -m quick

test: .venv/spot-installed .venv-sdk2/installed .venv-sdk3/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

integration: .venv/installed .venv-serving/installed
	.venv/bin/python -m pytest -m integration --numprocesses 0 --capture no

examples: .venv/installed
	.venv/bin/python examples/renew.py

bench: .venv/spot-installed
	.venv/bin/python -m benchmarks $(BENCH)

# The newest supported Python that works and can make virtual environments, on the PATH or of pyenv; else any python3.
.venv/installed: requirements.txt
	@for python in $(foreach v,3.12 3.11 3.13,python$(v) $(HOME)/.pyenv/versions/$(v).*/bin/python) python3; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Setting up .venv with $$python: takes some minutes, once"; \
	        $$python -m venv .venv && .venv/bin/python -m pip install --quiet --requirement requirements.txt && touch $@; \
	        exit; \
	    fi; \
	done; \
	echo "error: no Python 3.11, 3.12 or 3.13 with venv here: install one, such as python3.12 and python3.12-venv"; exit 1

# The simulator of Managed Spot Training.
.venv/spot-installed: spot/requirements.txt .venv/installed
	@echo "Setting up the simulator in .venv: takes a minute, once"
	@.venv/bin/python -m pip install --quiet --requirement requirements.txt --requirement $< && touch $@ || \
	    { command -v gcc >/dev/null || echo "error: SageMaker's toolkit is compiled here, which needs gcc: install it"; exit 1; }

# Versions 2 and 3 of SageMaker's Python SDK, which cannot share an environment, for the launchers.
.venv-sdk%/installed: launch/requirements-v%.txt | .venv/installed
	@echo "Setting up .venv-sdk$* for the launchers: takes some minutes, once"
	@.venv/bin/python -m venv .venv-sdk$* && .venv-sdk$*/bin/python -m pip install --quiet --requirement $< && touch $@

# SageMaker's serving toolkits, which find the frameworks in .venv.
.venv-serving/installed: tests/requirements-serving.txt tests/requirements-serving-pytorch.txt | .venv/spot-installed
	@echo "Setting up .venv-serving with SageMaker's serving toolkits: takes a minute, once"
	@.venv/bin/python -m venv .venv-serving
	@.venv-serving/bin/python -m pip install --quiet --no-deps --requirement $<
	@.venv-serving/bin/python -m pip install --quiet --no-deps --upgrade --target .venv-serving/pytorch \
	    --requirement tests/requirements-serving-pytorch.txt
	@packages='import site; print(site.getsitepackages()[0])'; \
	    .venv/bin/python -c "$$packages" > "$$(.venv-serving/bin/python -c "$$packages")/frameworks.pth" && touch $@
