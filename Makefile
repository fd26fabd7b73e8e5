# `make demo` and `make test` need Python >= 3.11 and nothing else.
PYTHON ?= python3
ENV := .venv
RUN := OMP_NUM_THREADS=1 $(ENV)/bin

.PHONY: demo test proofs sweep slow format clean

demo: $(ENV)/installed
	$(RUN)/equiv demo --html demo.html --json demo.json

test: $(ENV)/installed
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/pyright --pythonpath $(ENV)/bin/python
	$(RUN)/python -m pytest -n 2

# Coq proves what proofs/README.md lists; needs Python and Coq, not the environment.
proofs:
	bash proofs/install.sh
	$(PYTHON) proofs/check.py --coq

# The property tests with fifty times as many examples: about an hour.
sweep: $(ENV)/installed
	SWEEP=50 $(RUN)/python -m pytest -n 2 --hypothesis-show-statistics \
		tests/test_properties.py tests/test_fits.py tests/test_attention.py \
		tests/test_proofs*.py tests/test_symbolic*.py

# Every configuration of the kernels, compiled for GPUs that need not be there.
slow: $(ENV)/installed
	$(RUN)/python -m pytest -m slow

format: $(ENV)/installed
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

$(ENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENV)
	$(ENV)/bin/python -m pip install --quiet torch==2.13.0
	$(ENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(ENV) demo.html demo.json
