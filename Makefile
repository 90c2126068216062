# Two commands to know: `make quickstart` and `make test`. Both create .venv and install what they need first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Two workers with a thread each: tests that start processes of their own do not fight over the cores.
# Files are handed out in the order of tests/conftest.py, the long ones first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
          --durations 30

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-quick test-all check format docs bench clean

quickstart: $(STAMP)
	$(BIN)/flowrl train configs/quickstart.yaml

test: $(STAMP) check
	$(PYTEST) -m "not exhaustive"

test-quick: $(STAMP)
	$(PYTEST) -m "not slow and not exhaustive"

# Every cell of the large matrices of methods, families and configs too.
test-all: $(STAMP) check
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv takes a minute where pip takes four. It does not read pip's settings, so pip has its turn where uv finds no index.
WHAT := -c constraints.txt -e ".[dev]"
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode $(WHAT) || $(BIN)/python -m pip install --quiet $(WHAT)
	touch $@

bench: $(STAMP)
	$(BIN)/python -m benchmarks.learning run
	$(BIN)/python -m benchmarks.learning report
	$(BIN)/python -m benchmarks.cost

docs: $(STAMP)
	$(BIN)/python docs/make_configuration.py

clean:
	rm -rf $(VENV) build dist *.egg-info
