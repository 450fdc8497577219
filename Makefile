PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint bench results clean

demo: .venv/ready
	$(BIN)/python examples/train_digits.py $(ARGS)

test: .venv/ready lint
	$(BIN)/python -m pytest -m "not slow"
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m "not slow" tests/compiled

test-all: .venv/ready
	$(BIN)/python -m pytest -m slow
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m slow tests/compiled
	RDP_EXAMPLES=10 $(BIN)/python -m pytest tests/test_exactness.py -k equals_the_textbook

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m benchmarks step $(ARGS)

# What README.md shows: about half an hour on two cores with nothing else running.
results: .venv/ready
	$(BIN)/python -m benchmarks step --csv benchmarks/results/step-cpu.csv
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --out report/results/vit-block
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --mode sample --out report/results/vit-sample
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --model resnet --out report/results/resnet-block
	$(BIN)/python examples/train_digits.py --resume --seeds 5 --epochs 20 --model mlp --out report/results/mlp-block
	awk 'FNR > 1 || NR == 1' report/results/*/results.csv > benchmarks/results/digits-cpu.csv
	$(BIN)/python -m benchmarks readme

.venv/ready: constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
