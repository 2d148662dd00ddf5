# make demo   the whole path on phantom data: train all phases, evaluate, convert back (LLM=stablelm)
# make test   the test suite            make lint   ruff            make types   pyright
# make docs   the documentation site, in build/docs/site
#
# The active Python is used if it has all packages; otherwise an environment is made in .venv.

PYTHON ?= python3
VENV ?= .venv
LLM ?= phi
SEED ?= 0
WORKERS ?= 2
WORKDIR ?= runs/demo_$(LLM)

PACKAGES := absl chex flax grain jax ml_collections numpy optax orbax.checkpoint PIL safetensors \
  tensorboardX tensorflow_datasets tqdm transformers torch peft pytest xdist ruff pyright nltk \
  sacrebleu sklearn scipy matplotlib nibabel pydicom pylibjpeg zensical mkdocstrings markdown_it \
  ipykernel jupytext nbclient pydantic starlette uvicorn
COMPLETE := $(shell $(PYTHON) -c 'import importlib.util as u, sys; \
  sys.exit(not all(u.find_spec(n) for n in "$(PACKAGES)".split()))' >/dev/null 2>&1 && echo yes)

ifeq ($(COMPLETE),yes)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.complete
endif

.PHONY: demo test lint types docs clean

demo: $(READY)
	$(RUN) -m medmoe_jax.demo --workdir $(WORKDIR) --llm $(LLM) --seed $(SEED)

test: $(READY)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)
	$(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"

docs: $(READY)
	$(RUN) docs/build.py

$(VENV)/.complete: pyproject.toml constraints.txt
	@echo "installing into $(VENV), some minutes on a slow connection"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf runs .pytest_cache .ruff_cache build *.egg-info
