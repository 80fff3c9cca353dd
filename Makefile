# Everything happens in .venv/. `make demo` installs what the demo needs, `make test` also the tools of the tests.
# torch comes first and alone, so that a machine can choose its build: TORCH="torch==2.13.0+cpu", PIP_EXTRA_INDEX_URL=…
PYTHON ?= python3
TORCH ?= torch>=2.6,<2.14
PLUGINS := rtn awq gptq hf demo native onnxruntime openvino ptq qat
VENV := .venv
BIN := $(VENV)/bin
RUN := .demo/run
BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))
PROJECTS := pyproject.toml $(PLUGINS:%=plugins/%/pyproject.toml)
# What the native plugin is compiled from; an editable install does not look.
SOURCES := plugins/native/CMakeLists.txt $(wildcard plugins/native/csrc/* plugins/native/csrc/kernels/*)

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.hub
	$(BIN)/qhub recommend demo:llm --target host
	rm -rf $(RUN)
	@# 5 says that the run is done but missed its target; the report tells
	$(BIN)/qhub run demo:llm --plugin awq --target host --out $(RUN) > /dev/null || test $$? -eq 5
	$(BIN)/qhub report $(RUN)
	$(BIN)/python -m qhub_demo.generate $(RUN)

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.hub
	for script in $(BENCHMARKS); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .demo

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'error: `$(PYTHON)` is older than Python 3.10; try: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

# The plugins depend on qhub-core, which is only here: one command, so that pip finds it.
$(VENV)/.hub: $(VENV)/.torch $(PROJECTS) $(SOURCES)
	$(BIN)/pip install --quiet -e . $(PLUGINS:%=-e plugins/%)
	touch $@

$(VENV)/.tools: $(VENV)/.hub
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@
