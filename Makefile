# make quickstart   train and evaluate KS-Conditional-DETR on generated images
# make study        compare all methods at small scale: docs/study; ARGS="--list" goes to study.py
# make test         the whole test suite; ARGS="-k boxes" goes to pytest
# make lint         format, lint and types
# make sanitize     the operators' tests under address and undefined-behaviour sanitizers
# make env          only the environment that the others use
#
# VENV=path     use this environment; only what it lacks is installed      (.venv)
# TORCH=...     what pip shall install as torch, e.g. "torch==2.9.1"       (see tools/setup_env.py)
# PYTHON=...    makes a new environment, Python 3.10 or newer              (python3)

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= python3
TORCH ?=
ARGS ?=

RUN := $(VENV)/bin/python
CONFIG := projects/ks_detr/configs/ks_conditional_detr_quickstart.py
DATA := datasets/shapes
OUTPUT := output/quickstart

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export PYTHONUNBUFFERED := 1

.PHONY: env quickstart study test lint sanitize

env:
	@if [ -e "$(RUN)" ]; then python="$(RUN)"; else python="$(PYTHON)"; fi; \
	    "$$python" tools/setup_env.py "$(VENV)" --torch "$(TORCH)"

quickstart: export DETECTRON2_DATASETS := $(CURDIR)/datasets
# threads that wait sleep soon, which other programs need, but not at once, as waits are short
quickstart: export OMP_WAIT_POLICY := PASSIVE
quickstart: export GOMP_SPINCOUNT := 5000
quickstart: env
	"$(RUN)" tools/make_shapes.py --preset quickstart --output $(DATA)
	"$(RUN)" tools/train_net.py --config-file $(CONFIG) --resume
	"$(RUN)" tools/visualize_predictions.py --output-dir $(OUTPUT) --dataset shapes_val --threshold 0.3
	"$(RUN)" tools/plot_metrics.py --output-dir $(OUTPUT)
	@echo
	@echo "Everything is in $(OUTPUT)/:"
	@cd $(OUTPUT) && ls -d config.yaml metrics.json events.* model_*.pth *.png

study: env
	"$(RUN)" tools/study.py $(ARGS)

test: export OMP_NUM_THREADS := 1
test: env
	"$(RUN)" -m pytest -n auto --maxprocesses 8 $(ARGS)

lint: env
	"$(RUN)" -m ruff format --check .
	"$(RUN)" -m ruff check .
	"$(RUN)" -m mypy

# A second build of the operators. The sanitizers' runtimes must be there before Python is, and
# Python does not free all it holds at exit, so that leaks are not looked for.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
SANITIZED := build/sanitized
PRELOAD = $(shell $${CXX:-c++} -print-file-name=libasan.so):$(shell $${CXX:-c++} -print-file-name=libubsan.so)

sanitize: export OMP_NUM_THREADS := 2
sanitize: env
	rm -rf $(SANITIZED)/ops
	CFLAGS="$(SANITIZERS) -g" LDFLAGS="$(SANITIZERS)" \
	    "$(RUN)" setup.py build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	@ls $(SANITIZED)/ops/_C*.so > /dev/null  # what cannot be built would only be skipped
	DETR_METHODS_OPS="$(CURDIR)/$(SANITIZED)/ops/_C*.so" LD_PRELOAD="$(PRELOAD)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    "$(RUN)" -m pytest --capture no tests/ops --ignore tests/ops/triton_kernels $(ARGS)
