# make demo, make test and the others install into .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test check format format-check lint types contracts mnist oracle bench trainings experiment soak clean

install: $(INSTALLED)

# What is wrong with a Python, nothing where it will do. A recipe is expanded before its first line is run.
wrong_with = $(shell $(1) -c "import sys; sys.version_info < (3, 11) and sys.stdout.write('Python ' + sys.version.split()[0])" \
  2>/dev/null || echo no Python that runs)
refuse = $(error $(1) is $(2), trajkit needs Python 3.11 or newer; give one: $(3) PYTHON=python3.12)
require = $(if $(call wrong_with,$(1)),$(call refuse,$(1),$(call wrong_with,$(1)),$(2)))
runs = $(filter-out no Python that runs,$(or $(call wrong_with,$(1)),yes))

$(INSTALLED): pyproject.toml constraints.txt
	$(if $(call runs,$(BIN)/python),$(call require,$(BIN)/python,make clean install),$(call require,$(PYTHON),make))
	@# What is there may be half made: a folder without a Python that runs, or a Python without pip.
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --default-pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)  ## the whole path on handwritten digits, under a minute
	$(BIN)/trajkit demo

test: $(INSTALLED)  ## all tests, one process a core
	$(BIN)/python -m pytest -n logical

check: format-check lint types contracts test  ## everything that a change has to pass
	@:

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(INSTALLED)
	$(BIN)/ruff format --check .

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

contracts: $(INSTALLED)
	$(BIN)/lint-imports

mnist: $(INSTALLED)  ## record an MLP of 1.33 M weights on MNIST into .cache/mnist (about 4 minutes, once)
	cd benchmarks && ../$(BIN)/python mnist_mlp.py ../.cache/mnist

oracle: mnist  ## compare a fit of it with a float64 oracle
	$(BIN)/python benchmarks/oracle.py .cache/mnist

bench: mnist  ## time and memory against the alternatives; writes benchmarks/RESULTS.md (20 minutes, 25 GB of disk)
	cd benchmarks && ../$(BIN)/python bench.py ../.cache

SEEDS ?= 3

trainings: $(INSTALLED)  ## record the trainings that CMD is compared on, one process a core (hours; goes on where it was)
	cd benchmarks && for core in $$(seq $$(nproc)); do ../$(BIN)/python trainings.py ../.cache --seeds $(SEEDS) & done; wait

experiment: trainings  ## test accuracies of CMD, EMA and SWA on them; writes benchmarks/RESULTS.md
	cd benchmarks && ../$(BIN)/python bench.py ../.cache modelling references automatic

KILLS ?= 10000

soak: $(INSTALLED)  ## kill recordings and fits 10,500 times, and fuzz ten times as long as the tests (half an hour)
	$(BIN)/python benchmarks/soak.py --kills $(KILLS)
	TRAJKIT_FUZZ_EXAMPLES=10 $(BIN)/python -m pytest tests/test_fuzz.py tests/test_any_order.py
	TRAJKIT_STRICT_TIME=1 $(BIN)/python -m pytest tests/test_strangers.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
