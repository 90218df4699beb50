# `make demo` and `make test` are all that a fresh machine needs: Linux, Python 3.11 to 3.13 with venv, make.
# PYTHON is another one than python3; its environment is VENV: make test PYTHON=python3.13 VENV=build/python3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 1

# Compiled modules are kept, whatever the caller's habit: the tests start gup some thousand times.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test fault long soak fuzz load simulation pictures bench dashboards lint types imports check lock audit deb coverage clean
.DELETE_ON_ERROR:

# Every package in the version, and with the content, that requirements/ names: pip refuses any other, and fetches
# nothing to build with. forbiddenfruit is published as source only; setuptools of build.txt builds it.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
$(VENV)/.installed: pyproject.toml hatch_build.py gup/__init__.py requirements/build.txt requirements/dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes --only-binary :all: --requirement requirements/build.txt
	$(PIP) install --require-hashes --only-binary :all: --no-binary forbiddenfruit --use-pep517 \
		--no-build-isolation --requirement requirements/dev.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

demo: $(VENV)/.installed
	$(BIN)/gup demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/lint-imports --no-cache

check: lint types imports

# A CI measures the coverage of the same run, and fails below the bars of tests/harness/coverage_bars.py. It costs
# time, so `make test` elsewhere does without. Not measured: services that a test kills.
# pytest compiles the tests beside mypy: once, and not once for each of the processes that run them.
COVERED ?= $(filter true,$(CI))
test: lint imports
	$(BIN)/python -m pytest --collect-only > /dev/null & $(BIN)/mypy; status=$$?; wait; exit $$status
	$(if $(COVERED),rm -rf build/coverage && mkdir -p build/coverage)
	$(BIN)/$(if $(COVERED),coverage run,python) -m pytest --numprocesses 6 --dist worksteal -m "not alone and not long"
	$(if $(COVERED),$(BIN)/python tests/harness/coverage_bars.py)

coverage:
	$(MAKE) test COVERED=true

# All faults, the long and the random ones too; another SEED makes other random ones.
fault: $(VENV)/.installed
	GUP_TEST_SEED=$(SEED) $(BIN)/python -m pytest --numprocesses 3 --dist worksteal -m "not alone" tests/fault
	GUP_TEST_SEED=$(SEED) $(BIN)/python -m pytest -m alone tests/fault

# What measures time, and the longer forms of what `make test` runs; faults aside.
long: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal --ignore tests/fault -m "long and not alone"
	$(BIN)/python -m pytest --ignore tests/fault -m alone

# Everything at once against a model of what is right.
MINUTES ?= 30
soak: $(VENV)/.installed
	cd tests && PYTHONPATH=. ../$(BIN)/python -m soak.run --minutes $(MINUTES) --seed $(SEED)

# A day of 100,000 clients on paper, with the real ownership code: the table of docs/cluster.md.
simulation: $(VENV)/.installed
	cd tests && PYTHONPATH=. ../$(BIN)/python -m simulation.run

# Many clients at once, by locust: the report is build/load/report.html (docs/load.md). LOAD is any of
# `PYTHONPATH=deploy/load .venv/bin/python -m gup_load --help`, as LOAD='--scenario Storm --clients 500'.
LOAD ?=
load: $(VENV)/.installed
	PYTHONPATH=deploy/load $(BIN)/python -m gup_load $(LOAD)

# MINUTES of each target (TARGETS: some of them), one process a core; what is found stays in build/fuzz.
# REPLAY=FILE runs one input again.
TARGETS ?=
REPLAY ?=
fuzz: $(VENV)/.installed
ifeq ($(REPLAY),)
	$(PIP) install --require-hashes --only-binary :all: --requirement requirements/fuzz.txt
	cd tests && PYTHONPATH=. ../$(BIN)/python -m fuzz.run --minutes $(MINUTES) --seed $(SEED) --targets $(TARGETS)
else
	cd tests && PYTHONPATH=. ../$(BIN)/python -m fuzz.run --replay '$(abspath $(REPLAY))'
endif

# Grafana's JSON from the code that describes it.
dashboards: $(VENV)/.installed
	PYTHONPATH=deploy/grafana $(BIN)/python -m gup_dashboards

# Side by side with nginx and Varnish; needs Debian's nginx, wrk and varnish, root for a fresh disk, and a machine
# that does nothing else. PART is all, warm, herd, scale, cold or several; CELLS are some of its cells: the
# beginnings of their names, with or without @connections, as CELLS='10 MB@8, ranges@64' or CELLS='100 KB'
# (PART=cold ROUNDS=1: the quickest look). Results stay in build/bench.
PART ?= all
ROUNDS ?= 5
CELLS ?=
bench: $(VENV)/.installed
	cd tests && PYTHONPATH=. ../$(BIN)/python -m bench.run --part $(PART) --rounds $(ROUNDS) --cells '$(CELLS)'

# The page's pictures in docs/images, from a real run: two minutes.
pictures: $(VENV)/.installed
	cd tests && PYTHONPATH=. ../$(BIN)/python -m pictures.run

# requirements/*.txt from pyproject.toml: the version and the hashes of each package that is installed, for every
# Python and platform at once. Versions stay as they are where they fit; UPGRADE=--upgrade takes the newest. At the
# end pip says whether each Python finds what it may install (a newest version may have no wheels for the oldest).
UPGRADE ?=
UV := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command 'make lock' $(UPGRADE)
BUILD := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], "setuptools", sep="\n")
lock:
	test -x $(BIN)/uv || $(MAKE) $(VENV)/.installed
	$(UV) pyproject.toml --extra cluster --output-file requirements/run.txt
	$(UV) pyproject.toml --extra dev --constraint requirements/run.txt --output-file requirements/dev.txt
	$(UV) pyproject.toml --extra cluster --extra fuzz --constraint requirements/dev.txt --output-file requirements/fuzz.txt
	$(BIN)/python -c '$(BUILD)' | $(UV) - --constraint requirements/dev.txt --output-file requirements/build.txt
	for python in 3.11 3.12 3.13; do for part in run dev fuzz build; do \
		$(PIP) install --dry-run --no-deps --ignore-installed --python-version $$python --require-hashes \
			--only-binary :all: --no-binary forbiddenfruit --no-build-isolation \
			--requirement requirements/$$part.txt || exit; done; done

# The Debian package, for the Debian that this runs on: build/gup_*.deb. Needs dpkg-dev and python3-venv.
deb:
	deploy/debian/build

audit: $(VENV)/.installed
	VENV=$(VENV) .ci/audit

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
