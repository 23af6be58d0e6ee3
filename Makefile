# make demo    real weights through our own captured, cached and compiled graph
# make test    the tests of the core and of every plugin
# make test-oldest   a sample of the tests with the oldest transformers that the packages ask for
# make zoo     every model type of the zoo, docs/support.md from what came of it, and the index (a quarter of an hour on two cores)
# make lint    style, types, and who may import whom
# make wheels  every distribution, into dist/
#
# Each installs what it needs into .venv first; the second run finds it there.

VENV     ?= .venv
PYTHON   ?= python3
WEIGHTS  ?= .weights
PYTEST   ?= -q
# Two processes, a file at a time; one thread each, so that they do not fight for the cores.
PARALLEL ?= -n 2 --dist loadfile
# The packages ask for torch>=2.11 and transformers>=5.17; these are the versions that are tested. Torch comes first, so that
# nothing else picks one, and triton without its dependencies, because it works with any torch.
TORCH    ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.24.0
TRITON   ?= triton==3.6.0

# The lower bound in pyproject.toml. Its environment sees all that the first one has and puts this in front of it.
OLDEST   ?= transformers==5.17.0
# What reads transformers' files: capture, every kind of attention, and each plugin's models.
SAMPLE   ?= tests/capture/test_capture.py tests/integration/test_tiny_models.py tests/zoo plugins/ad_mamba/tests/test_models.py \
            plugins/ad_deltanet/tests/test_models.py plugins/ad_linear/tests/test_models.py plugins/ad_rnn/tests/test_models.py \
            plugins/ad_moe/tests/test_models.py

BIN      := $(VENV)/bin
AGED     := $(VENV)-oldest
READY    := $(VENV)/.ready
MODEL    := $(WEIGHTS)/SmolLM2-135M-Instruct.Q4_1.gguf
PACKAGES := . plugins/ad_attention plugins/ad_conv plugins/ad_mamba plugins/ad_deltanet plugins/ad_linear plugins/ad_rnn plugins/ad_moe plugins/ad_quant plugins/ad_fusion

.PHONY: demo test test-oldest zoo lint wheels clean

demo: $(READY) $(MODEL)
	$(BIN)/python examples/demo.py $(MODEL)

test: $(READY) $(MODEL)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(PARALLEL) $(PYTEST)

test-oldest: $(AGED)/.ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(AGED)/bin/python -m pytest $(PARALLEL) $(PYTEST) $(SAMPLE)

zoo: $(READY)
	$(BIN)/python -m tests.zoo --page docs/support.md
	$(BIN)/python tools/gen_index.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheels: $(READY)
	rm -rf dist
	for package in $(PACKAGES); do $(BIN)/python -m build --outdir dist $$package || exit 1; done

$(READY): requirements-dev.txt pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	@echo "installing into $(VENV): minutes the first time, nothing the next"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(TRANSFORMERS)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps $(TRITON)
	touch $@

$(AGED)/.ready: $(READY)
	$(PYTHON) -m venv $(AGED)
	base=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	own=$$($(AGED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "import site; site.addsitedir('$$base')" > "$$own/base.pth"
	$(AGED)/bin/python -m pip install --quiet "$(OLDEST)"
	touch $@

$(MODEL): | $(READY)
	$(BIN)/python tools/fetch_weights.py $(WEIGHTS)

clean:
	rm -rf $(VENV) $(AGED) dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
