# `make demo` and `make test` work on a fresh clone: both set up .venv first.
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from.
.DELETE_ON_ERROR:
.PHONY: demo test coverage lint setup sanitize libraries site clean

VENV := .venv
STAMP := $(VENV)/.installed
LIBRARIES := .venv-libraries
SITE := .venv-site
LIBRARIES_PYTHON := python3.11
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3.13 python3.14 python3 python)
# What an interpreter must be able to do; a version manager's shim may exist and still fail.
PROBE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))

demo: $(STAMP)
	$(VENV)/bin/fisherkern demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest

# Which lines the tests run, folder by folder; twice as slow as the tests.
coverage: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --cov=fisherkern --cov-report=json:build/coverage.json
	$(VENV)/bin/python -m benchmarks.coverage_by_folder build/coverage.json

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The C++ loops under ASan and UBSan.
sanitize: $(STAMP)
	$(VENV)/bin/python -m tests.sanitized_extension

setup: $(STAMP)

# A .venv without a working pip is what an interrupted first attempt leaves: made anew.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	@if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
	  for python in $(CANDIDATES); do \
	    if "$$python" -c '$(PROBE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'fisherkern needs Python 3.11 to 3.14 with venv and ensurepip: none of $(CANDIDATES) runs; name one with make PYTHON=/path/to/python' >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found -c 'import sys; print(sys.executable)')"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(VENV)/bin/python -c 'from fisherkern.ops import build; print(build.status())'
	@touch $@

# RecBole, RecTools, RePlay, transformers and peft, for their tests and examples. An environment
# of its own: they need older releases of NumPy and pandas, and RecBole's ray needs Python 3.11.
libraries: $(LIBRARIES)/.installed

$(LIBRARIES)/.installed: benchmarks/libraries/requirements.txt pyproject.toml
	@$(LIBRARIES_PYTHON) -c 'import venv, ensurepip' || { \
	  echo 'make libraries needs $(LIBRARIES_PYTHON) with venv; name one with LIBRARIES_PYTHON=' >&2; exit 1; }
	$(LIBRARIES_PYTHON) -m venv --clear $(LIBRARIES)
	@# All at once: the releases named there go before what a library would take, torch among them.
	$(LIBRARIES)/bin/python -m pip install --quiet --editable . --requirement $< || { \
	  echo 'make libraries: $< could not be installed; pip says why above' >&2; exit 1; }
	@touch $@

# The documentation as a site, build/site/index.html; a warning is an error. Without torch.
site: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

$(SITE)/.installed: docs/requirements.txt
	python3 -m venv --clear $(SITE)
	$(SITE)/bin/python -m pip install --quiet --requirement $<
	@touch $@

clean:
	rm -rf $(VENV) $(LIBRARIES) $(SITE) build dist *.egg-info fisherkern/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
