# A newcomer needs make and Python 3.11 or newer with its venv module. `make` says what there is.
# Two environments, both pinned by constraints.txt: .venv serves, .venv-test does all the rest.

# The interpreter to build environments with; empty: the newest found.
PYTHON ?=
# Handed on: make serve ARGS="--port 9000", make test ARGS="tests/serve -x".
ARGS ?=

TEST_PYTHON := .venv-test/bin/python

# Pins hold for the environments that pip builds packages in, too: old pips read the first name
# there, new ones the second.
PINS := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
PIP_FLAGS := --disable-pip-version-check --no-input
# What tests run on; the packages themselves take newer ones.
TORCH := 2.13.0

# Prints the first interpreter that will do, or what is missing. Each match on the PATH is tried by
# running it: a pyenv shim may stand there and not run, before a python that does.
define find_python
venv=; for python in $$(which -a $(or $(PYTHON),python3.13 python3.12 python3.11 python3)); do \
    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
    "$$python" -c 'import ensurepip, venv' 2>/dev/null && echo "$$python" && exit; \
    lacking=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
    venv=$${venv:-$$lacking}; \
done; \
if [ "$$venv" ]; then echo "missing: $$venv is missing: apt-get install $$venv"; \
elif [ "$(PYTHON)" ]; then echo "missing: PYTHON=$(PYTHON) is no Python 3.11 or newer"; \
elif which python3 >/dev/null; then \
    echo "missing: Python 3.11 or newer is missing: apt-get install python3.11-venv"; \
else echo "missing: python3 is missing: apt-get install python3-venv"; fi
endef

# $(call environment,FOLDER): an empty virtual environment, or one line that says why not.
define environment
$(eval found := $(shell $(find_python)))
$(if $(filter missing:,$(firstword $(found))),$(error $(wordlist 2,99,$(found))))
"$(found)" -m venv --clear $(1)
endef

# $(call install,FOLDER,REQUIREMENT): this checkout in an environment, and a stamp that says that
# the install ran to its end. Without the stamp all is made anew: packages that pip was
# interrupted in can look installed.
define install
$(if $(wildcard $@),,$(call environment,$(1)))
@rm -f $@
$(PINS) $(1)/bin/python -m pip install $(PIP_FLAGS) --editable '$(2)'
@touch $@
endef

.PHONY: help
help:  ## what there is (this list)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: serve
serve: .venv/installed  ## install what serving on a CPU needs into .venv, then serve on 127.0.0.1:8000
	@exec .venv/bin/pcae-serve $(ARGS)

.PHONY: test
test: .venv-test/installed  ## the suite, in a few minutes
	$(TEST_PYTHON) -m pytest --numprocesses 2 --dist loadfile -m "not slow and not gpu" $(ARGS)

.PHONY: test-all
test-all: .venv-test/ray  ## all tests but those that need a GPU
	$(TEST_PYTHON) -m pytest -m "not gpu" $(ARGS)

.PHONY: lint
lint: .venv-test/installed  ## ruff's rules, its format, types, and the direction of imports
	$(TEST_PYTHON) -m ruff check
	$(TEST_PYTHON) -m ruff format --check
	$(TEST_PYTHON) -m mypy
	.venv-test/bin/lint-imports

.PHONY: format
format: .venv-test/installed  ## rewrite the code in ruff's format
	$(TEST_PYTHON) -m ruff check --fix-only
	$(TEST_PYTHON) -m ruff format

.PHONY: bench
bench: .venv-test/installed  ## images per second of every tier on this machine
	$(TEST_PYTHON) benchmarks/tiers.py $(ARGS)

.PHONY: image
image:  ## build the cpu image without a Docker engine and try it (as root: buildah, debootstrap)
	@docker/try.sh $(ARGS)

.PHONY: constraints
# On the oldest Python we take: what it resolves to, newer ones have too.
constraints: PYTHON = python3.11
constraints:  ## resolve everything anew into constraints.txt
	$(call environment,.venv-constraints)
	.venv-constraints/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev,ray]' torch==$(TORCH)
	sed -n '/^#/p' constraints.txt > .venv-constraints/new
	.venv-constraints/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' >> .venv-constraints/new
	mv .venv-constraints/new constraints.txt
	rm -rf .venv-constraints

.PHONY: clean
clean:  ## remove both environments and all caches
	rm -rf .venv .venv-test .venv-constraints .pytest_cache .mypy_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt
	$(call install,.venv,.[cpu])

.venv-test/installed: pyproject.toml constraints.txt
	$(call install,.venv-test,.[dev])

# beside the rest, in the same environment: `make test` does without it
.venv-test/ray: .venv-test/installed
	$(PINS) $(TEST_PYTHON) -m pip install $(PIP_FLAGS) --editable '.[dev,ray]'
	@touch $@
