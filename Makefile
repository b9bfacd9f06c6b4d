# make demo | test | test-all | docs | bench | readme | clean. The first one makes .venv; PYTHON=... picks another interpreter.
PYTHON ?= python3
PY := .venv/bin/python
jobs ?= 2
PYTEST = $(PY) -m pytest -n $(jobs) --dist worksteal

.PHONY: demo test test-all docs bench readme clean

demo: .venv/ready
	$(PY) -m feature_erosion.cli demo --out runs/demo

test: .venv/dev
	$(PYTEST) --quick

test-all: .venv/dev
	$(PYTEST)

docs: .venv/dev
	$(PY) nbs/_tools/docs.py

readme: .venv/dev
	$(PY) nbs/_tools/readme.py

bench: .venv/dev
	$(PY) -m pip install --quiet --editable '.[dev,bench]'
	$(PY) tests/bench/run.py $(if $(only),only=$(only)) $(if $(repeats),repeats=$(repeats))

clean:
	rm -rf .venv _docs _proc build dist *.egg-info .pytest_cache

# An install that did not finish leaves .venv/unfinished behind: the next one starts afresh. Otherwise only what changed is installed.
.venv/ready: settings.ini pyproject.toml setup.py
	@$(PYTHON) -c "$$check"
	@test ! -e .venv/unfinished || rm -rf .venv
	@mkdir -p .venv && rm -f $@ && touch .venv/unfinished
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable .
	@mv .venv/unfinished $@

# What tests and documentation need besides
.venv/dev: .venv/ready
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

define check
import configparser, sys
c = configparser.ConfigParser(); c.read("settings.ini")
need, have = c["DEFAULT"]["min_python"], sys.version.split()[0]
if sys.version_info < tuple(map(int, need.split("."))): sys.exit("feature_erosion needs Python %s or newer, this is %s: make PYTHON=python%s ..." % (need, have, need))
endef
export check
