# make demo, make test and the others install into .venv first, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test check format format-check lint types contracts mnist oracle bench trainings experiment soak clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
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
