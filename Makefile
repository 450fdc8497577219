PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint docs bench results evidence gpu-library clean

demo: .venv/built
	$(BIN)/python examples/train_digits.py $(ARGS)

# The kernels are interpreted in the first run and compiled in the second. Tests use one thread each. Of the drawn tests
# `make test` runs a quarter, `make test-all` all.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: .venv/built lint
	RDP_EXAMPLES=0.25 $(PYTEST) -m "not slow"
	TRITON_INTERPRET=0 $(PYTEST) -m "not slow" tests/compiled

test-all: .venv/built docs
	$(PYTEST) -m slow --durations=12
	TRITON_INTERPRET=0 $(PYTEST) -m slow tests/compiled
	$(PYTEST) tests/kernels tests/test_exactness.py -k "against_float64 or equals_the_textbook"
	RDP_EXAMPLES=0.25 $(BIN)/python -m tests.versions 2.11.0 --triton 3.6.0 --minutes 6
	$(BIN)/python -m tests.versions 2.10.0 --smoke --minutes 3

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint rdp_kernels

# Builds docs/_build/html, executes the notebooks, and fails at the first warning or if a notebook has no output.
docs: .venv/built
	$(BIN)/python -m sphinx -W --keep-going --jobs auto --quiet docs docs/_build/html
	for page in drop-path digits fine-tuning; do grep -q cell_output docs/_build/html/tutorials/$$page.html || exit 1; done

bench: .venv/built
	$(BIN)/python -m benchmarks all --quick $(ARGS)

# Measures the numbers of README.md and docs/performance.md: about 40 minutes on two cores with nothing else running.
results: .venv/built
	$(BIN)/python -m benchmarks all --out report/benchmarks
	cp report/benchmarks/*.csv benchmarks/results
	$(BIN)/python -m benchmarks step --model vit-s --mode block sample --prob 0.4 --batch 10 --drop-path eager \
		--csv benchmarks/results/drop-path-cpu.csv
	$(BIN)/python -m benchmarks expected --csv benchmarks/results/expected-sm_90.csv
	$(BIN)/python -m benchmarks pages

# Measures the numbers of docs/evidence.md, which takes hours. An interrupted study continues where it stopped.
DIGITS := $(BIN)/python examples/train_digits.py --resume --seeds 10 --epochs 20
LANGUAGE := $(BIN)/python examples/bytes_lm.py --resume --seeds 3 --depth 8 --width 64 --heads 4 --context 64 --steps 800
evidence: .venv/built
	$(BIN)/python examples/spiral.py --study --resume --out report/evidence/spiral
	$(BIN)/python examples/spiral.py --study --only "equal updates" --first-seed 12 --seeds 24 --resume \
		--out report/evidence/spiral-fresh-seeds
	$(BIN)/python examples/skip_connections.py --out report/evidence/skips
	$(DIGITS) --model mlp --out report/evidence/digits/mlp-block
	$(DIGITS) --out report/evidence/digits/vit-block
	$(LANGUAGE) --method all --out report/evidence/language/1-steps
	$(LANGUAGE) --method drop-path ResidualDroppath --equal flops --out report/evidence/language/2-flops
	$(LANGUAGE) --method plain drop-path ResidualDroppath "random paths frozen" --train-bytes 20000 \
		--out report/evidence/language/3-small
	$(LANGUAGE) --method ResidualDroppath "random paths frozen" --equal flops --train-bytes 20000 \
		--out report/evidence/language/4-small-flops
	for study in spiral spiral-fresh-seeds skips; do cp report/evidence/$$study/results.csv benchmarks/results/$$study-cpu.csv; done
	awk 'FNR > 1 || NR == 1' report/evidence/digits/*/results.csv > benchmarks/results/digits-cpu.csv
	awk 'FNR > 1 || NR == 1' report/evidence/language/*/results.csv > benchmarks/results/language-cpu.csv
	awk 'FNR > 1 || NR == 1' report/evidence/language/*/curves.csv > benchmarks/results/language-curves-cpu.csv
	$(BIN)/python -m benchmarks pages

.venv/ready: constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt timm torchvision # their dependencies would bring another torch
	RDP_BUILD=none $(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[dev]'
	touch $@

# RDP_BUILD says what is compiled (setup.py). If there is no library afterwards, the next `make` tries again.
.venv/built: .venv/ready setup.py $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	test ! -e rdp_kernels/_C.abi3.so || touch $@

# Builds the library with CUDA kernels for a machine with GPUs but no compiler; copy the tree there. Needs nvcc, no GPU.
gpu-library: .venv/built
	RDP_BUILD=cuda TORCH_CUDA_ARCH_LIST="$(or $(TORCH_CUDA_ARCH_LIST),9.0)" $(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf .venv build dist *.egg-info rdp_kernels/_C.abi3.so
