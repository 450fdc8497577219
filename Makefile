PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint bench results clean

demo: .venv/built
	$(BIN)/python examples/train_digits.py $(ARGS)

# The kernels are interpreted in the first run and compiled in the second. Tests use one thread each.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: .venv/built lint
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=0 $(PYTEST) -m "not slow" tests/compiled

test-all: .venv/built
	$(PYTEST) -m slow --durations=12
	TRITON_INTERPRET=0 $(PYTEST) -m slow tests/compiled
	RDP_EXAMPLES=4 $(PYTEST) tests/kernels tests/test_exactness.py -k "against_float64 or equals_the_textbook"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/built
	$(BIN)/python -m benchmarks all --quick $(ARGS)

# What README.md and docs/ show: about fifty minutes on two cores with nothing else running.
results: .venv/built
	$(BIN)/python -m benchmarks all --out report/benchmarks
	cp report/benchmarks/*.csv benchmarks/results
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --out report/results/vit-block
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --mode sample --out report/results/vit-sample
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --model resnet --out report/results/resnet-block
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --model mlp --out report/results/mlp-block
	awk 'FNR > 1 || NR == 1' report/results/*/results.csv > benchmarks/results/digits-cpu.csv
	$(BIN)/python -m benchmarks pages

.venv/ready: constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt timm torchvision # theirs would bring another torch
	RDP_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

# RDP_BUILD says what is compiled (setup.py). Where that ended without a library, the next `make` tries again.
.venv/built: .venv/ready setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	test ! -e rdp_kernels/_C.abi3.so || touch $@

clean:
	rm -rf .venv build dist *.egg-info rdp_kernels/_C.abi3.so
