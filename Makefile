# `make demo` and `make test` work on a fresh machine that has Python 3.10+ and make.
PYTHON ?= python3
VENV   ?= .venv
# Passed on to pytest, for example: make test PYTEST_ARGS="tests/moe -x"
PYTEST_ARGS ?=
# of `make oldest`: the oldest Python that pyproject.toml allows
OLDEST_PYTHON ?= python3.10
TIMM_SIZES   ?= tiny small base large
# of Sphinx: dummy reads all and follows all links as html does, but writes nothing, in half of the time
DOCS_BUILDER ?= html
# empty: all of the table of methods
TIMM_METHODS ?=
# of `make timm-scripts`: its scripts are on no package index
TIMM_REPOSITORY ?= https://github.com/huggingface/pytorch-image-models

# Threads that wait at a barrier sleep: spinning, as is the default, makes training several times
# slower as soon as anything else runs on the machine.
export OMP_WAIT_POLICY ?= PASSIVE

# Tests start many processes: none compiles what another has compiled. `make clean` removes it.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
TIMM_SRC := $(VENV)/timm-src
OLDEST := $(VENV)/oldest

# A process of the tests per core and one more, as some wait for what they have started, each with one
# thread; who is done takes what others have left. Threads of tests that want two sleep until there is
# work for them.
ALL_CORES := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
PROCESSES := $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 4)))
IN_PARALLEL := --numprocesses=$(PROCESSES) --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test long soak oldest lint format types timm-suite timm-scripts reference docs picture bench bench-ci gpu-check release clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.seg,analyze ## train vit_tiny_vqmoe to classify digits, then to segment scenes of them, and show what its experts do
	$(BIN)/python tools/demo.py

test: $(VENV)/.dev ## run all tests but the long ones and those of pages
	$(ALL_CORES) $(BIN)/python -m pytest $(IN_PARALLEL) --durations=10 $(PYTEST_ARGS)

long: $(VENV)/.dev,frameworks ## run the tests that take minutes each
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

soak: $(VENV)/.dev ## kill a hundred trainings, draw thousands of options, take thousands of steps (most of an hour)
	$(ALL_CORES) $(BIN)/python -W ignore tests/soak/kills.py --kills 100 --out work_dirs/soak/kills.json
	$(ALL_CORES) $(BIN)/python -m pytest -m long $(IN_PARALLEL) --timeout=1800 \
	    tests/models/test_options.py tests/models/test_memory.py

oldest: $(OLDEST)/.dev ## run all tests but the long ones with the oldest versions that are allowed
	NO_ALBUMENTATIONS_UPDATE=1 $(ALL_CORES) $(OLDEST)/bin/python -m pytest $(IN_PARALLEL) \
	    -W ignore::DeprecationWarning $(PYTEST_ARGS)

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## fix style and formatting where that can be automated
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## check the types of the package, its console script and the benchmark
	$(BIN)/mypy

# timm's tests are not in its wheel, so they come from the source distribution of the very version
# that is installed. Only tests/ and pyproject.toml are unpacked: the installed timm is tested, not
# the source tree. What TorchScript compiles is left out: torch deprecates it, and our layers refuse it.
timm-suite: $(VENV)/.dev ## run timm's own model tests, unmodified, on our models (not those of TorchScript)
	@set -e; version=$$($(BIN)/python -c 'import timm; print(timm.__version__)'); \
	src=$(TIMM_SRC)/timm-$$version; \
	if [ ! -f $$src/.complete ]; then \
	    mkdir -p $(TIMM_SRC); \
	    $(BIN)/pip download --quiet --no-deps --no-binary timm --dest $(TIMM_SRC) timm==$$version; \
	    tar -xzf $(TIMM_SRC)/timm-$$version.tar.gz -C $(TIMM_SRC) \
	        timm-$$version/tests timm-$$version/pyproject.toml; \
	    touch $$src/.complete; \
	fi; \
	python=$$(cd $(BIN) && pwd)/python; cd $$src; \
	methods="$(TIMM_METHODS)"; \
	: $${methods:=$$($$python -c 'from vqmoe_vision.moe import METHODS; print(*METHODS)')}; \
	for size in $(TIMM_SIZES); do \
	    models=$$(printf "vit_$${size}_%s or " $$methods); models=$${models% or }; \
	    echo "$$models"; \
	    $$python -c 'import sys, timm, vqmoe_vision; \
	unknown = [m for m in sys.argv[1].split(" or ") if not timm.is_model(m)]; \
	sys.exit(f"no such models: {unknown}" if unknown else 0)' "$$models"; \
	    TORCH_BACKEND=vqmoe_vision TIMEOUT=600 $$python -m pytest -q -W ignore tests/test_models.py \
	        -k "($$models) and not torchscript" $(PYTEST_ARGS); \
	done

timm-scripts: $(VENV)/.dev ## put timm's train.py and its other scripts where the long tests look for them
	@set -e; version=$$($(BIN)/python -c 'import timm; print(timm.__version__)'); \
	clone=$$(mktemp -d); trap 'rm -rf "$$clone"' EXIT; \
	git -c advice.detachedHead=false clone --quiet --depth 1 --branch v$$version $(TIMM_REPOSITORY) $$clone; \
	mkdir -p $(TIMM_SRC); cp $$clone/*.py $(TIMM_SRC)

reference: $(VENV)/.docs ## write the pages of docs/reference that are made from code
	$(BIN)/python docs/generate.py

docs: $(VENV)/.docs $(VENV)/.dev ## build docs/ into docs/_build and hold its pages to code and results; a broken link fails
	$(BIN)/sphinx-build --builder $(DOCS_BUILDER) --quiet --fresh-env --fail-on-warning --keep-going \
	    docs docs/_build
	$(BIN)/python -m pytest -m pages $(PYTEST_ARGS)
	@echo "Open docs/_build/index.html"

picture: ## draw the picture of the architecture from its text; needs Graphviz
	@command -v dot >/dev/null || { echo "make picture needs Graphviz: sudo apt-get install graphviz"; exit 1; }
	dot -Tsvg docs/images/architecture.dot -o docs/images/architecture.svg

# Nothing else should run here, so threads may spin: OMP_WAIT_POLICY is what it is by default.
bench: $(VENV)/.bench ## measure layers and models beside dense and other libraries (an idle machine, most of an hour)
	@status=0; for run in "moe table" "model table" "moe compiled" "model compiled" "moe peers"; do set -- $$run; \
	    env -u OMP_WAIT_POLICY $(BIN)/python tools/benchmark.py $$1 --preset $$2 --gate \
	        --out work_dirs/benchmark/$$1-$$2.json || status=1; \
	done; exit $$status

bench-ci: $(VENV)/.dev ## hold the speed of a layer against limits, under two minutes
	$(BIN)/python tools/benchmark.py moe --preset ci

gpu-check: $(VENV)/.dev ## on a machine with a CUDA card: is it right, does it wait, how fast is it (one line first)
	env -u OMP_WAIT_POLICY $(BIN)/python tools/benchmark.py gpu --out work_dirs/gpu-check.json

# Uploads nothing.
release: $(VENV)/.release ## build and check the distributions, and use the wheel where there is nothing else
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	PYTHON=$(PYTHON) .ci/try-wheel dist/*.whl

clean: ## remove the environment, caches and the demo's output
	rm -rf $(VENV) dist work_dirs/demo docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Stamp files: an environment is set up once, and again when pyproject.toml changes.
$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "vqmoe_vision needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	    echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot create virtual environments."; \
	    echo "On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.seg,analyze $(VENV)/.dev $(VENV)/.dev,frameworks $(VENV)/.docs $(VENV)/.bench $(VENV)/.release: $(VENV)/.%: $(VENV)/.venv pyproject.toml
	@echo "Installing into $(VENV); the first time this downloads PyTorch and takes minutes."
	$(BIN)/pip install --disable-pip-version-check --editable '.[$*]'
	@touch $@

# uv takes the lower bound of everything that pyproject.toml names, and the newest of what that asks
# for. opencv-python, which onedl-mmcv and others ask for, would put another version over the files
# of the headless one.
$(OLDEST)/.dev: pyproject.toml
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' || { \
	    echo "make oldest needs Python 3.10: make oldest OLDEST_PYTHON=/path/to/python3.10"; exit 1; }
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check --quiet uv
	echo "opencv-python; python_version < '3'" > $(OLDEST)/overrides.txt
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct \
	    --overrides $(OLDEST)/overrides.txt --editable '.[dev]'
	@touch $@
