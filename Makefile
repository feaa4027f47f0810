# Needs make and Python 3.11 or newer with its venv module. `make` lists the targets.
# Two environments, both pinned by constraints.txt: .venv serves, .venv-test is for everything else.
# A third one, .venv-docs, builds the site of the documents; .ci/requirements-docs.txt pins it.

# The interpreter to build environments with; empty: the newest one found.
PYTHON ?=
# Passed on: make serve ARGS="--port 9000", make test ARGS="tests/serve -x".
ARGS ?=

# What .venv holds; a variable, because a comma would end the argument of $(call).
SERVE := .[cpu,client]
TEST_PYTHON := .venv-test/bin/python

# Pins also hold for the environments in which pip builds packages: old versions of pip read the
# first variable there, new ones the second.
PINS := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
PIP_FLAGS := --disable-pip-version-check --no-input
# The version that the tests run on; the packages accept newer ones.
TORCH := 2.13.0

# Prints the first suitable interpreter, or what is missing. Each match on the PATH is run, because
# it may be a pyenv shim that does not work, ahead of a python that does.
define find_python
venv=; for python in $$(which -a $(or $(PYTHON),python3.13 python3.12 python3.11 python3)); do \
    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
    "$$python" -c 'import ensurepip, venv' 2>/dev/null && echo "$$python" && exit; \
    lacking=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
    venv=$${venv:-$$lacking}; \
done; \
if [ "$$venv" ]; then echo "missing: $$venv is missing: apt-get install $$venv"; \
elif [ "$(PYTHON)" ]; then echo "missing: PYTHON=$(PYTHON) is not Python 3.11 or newer"; \
elif which python3 >/dev/null; then \
    echo "missing: Python 3.11 or newer is missing: apt-get install python3.11-venv"; \
else echo "missing: python3 is missing: apt-get install python3-venv"; fi
endef

# $(call environment,FOLDER): create an empty virtual environment, or fail with one line.
define environment
$(eval found := $(shell $(find_python)))
$(if $(filter missing:,$(firstword $(found))),$(error $(wordlist 2,99,$(found))))
"$(found)" -m venv --clear $(1)
endef

# $(call install,FOLDER,REQUIREMENT): install this clone into an environment, then write a stamp.
# Without the stamp the environment is rebuilt: after an interrupted pip, packages can look installed.
define install
$(if $(wildcard $@),,$(call environment,$(1)))
@rm -f $@
$(PINS) $(1)/bin/python -m pip install $(PIP_FLAGS) --editable '$(2)'
@touch $@
endef

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: serve
serve: .venv/installed  ## install the server for CPUs into .venv, then serve on 127.0.0.1:8000
	@exec .venv/bin/pcae-serve $(ARGS)

.PHONY: test
test: .venv-test/installed  ## run the fast tests, in a few minutes
	$(TEST_PYTHON) -m pytest --numprocesses 3 --dist worksteal -m "not slow and not gpu" $(ARGS)

.PHONY: test-all
test-all: .venv-test/ray  ## run all tests that need no GPU, and measure coverage
	$(TEST_PYTHON) -m pytest -m "not gpu" --cov --cov-report=term $(ARGS)

.PHONY: test-browser
test-browser: .venv-test/browser  ## test the playground in Debian's chromium; pictures in browser-screenshots/
	$(TEST_PYTHON) -m pytest tests/browser $(ARGS)

.PHONY: lint
lint: .venv-test/installed  ## check rules, format, types, the direction of imports, spelling and language
	$(TEST_PYTHON) -m ruff check
	$(TEST_PYTHON) -m ruff format --check
	$(TEST_PYTHON) -m mypy
	.venv-test/bin/lint-imports
	.venv-test/bin/codespell
	$(TEST_PYTHON) .ci/language.py

.PHONY: format
format: .venv-test/installed  ## rewrite the code in ruff's format, and generated documents
	$(TEST_PYTHON) -m ruff check --fix-only
	$(TEST_PYTHON) -m ruff format
	$(TEST_PYTHON) .ci/documents.py

.PHONY: dist
dist: .venv-test/installed  ## build wheel and sdist into dist/, and check their metadata
	rm -rf dist
	$(TEST_PYTHON) -m build --no-isolation
	$(TEST_PYTHON) -m twine check --strict dist/*

.PHONY: docs
docs: .venv-docs/installed  ## build the site of the documents into build/site; no dead link passes
	.venv-docs/bin/python .ci/site.py

.PHONY: docs-serve
docs-serve: docs  ## build the site, then serve it on 127.0.0.1:8001; the search needs a server
	.venv-docs/bin/python -m http.server --bind 127.0.0.1 --directory build/site 8001

.PHONY: bench
bench: .venv-test/installed  ## measure images per second of every tier on this machine
	$(TEST_PYTHON) benchmarks/tiers.py $(ARGS)

.PHONY: image
image:  ## build and test the cpu image without a Docker engine (as root; buildah, debootstrap)
	@docker/try.sh $(ARGS)

.PHONY: constraints
# On the oldest supported Python: newer ones have the versions that it resolves to.
constraints: PYTHON = python3.11
constraints:  ## resolve all requirements and rewrite constraints.txt
	$(call environment,.venv-constraints)
	.venv-constraints/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev,ray,browser]' torch==$(TORCH)
	sed -n '/^#/p' constraints.txt > .venv-constraints/new
	.venv-constraints/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' >> .venv-constraints/new
	mv .venv-constraints/new constraints.txt
	rm -rf .venv-constraints

.PHONY: clean
clean:  ## remove the environments, all caches, build/ and dist/
	rm -rf .venv .venv-test .venv-docs .venv-constraints .cache .*_cache .coverage* build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt
	$(call install,.venv,$(SERVE))

.venv-test/installed: pyproject.toml constraints.txt
	$(call install,.venv-test,.[dev])

.venv-docs/installed: .ci/requirements-docs.txt
	$(if $(wildcard $@),,$(call environment,.venv-docs))
	@rm -f $@
	.venv-docs/bin/python -m pip install $(PIP_FLAGS) --no-deps --only-binary :all: --requirement $<
	@touch $@

# Added to the same environment; `make test` needs neither.
.venv-test/browser: .venv-test/installed
	$(PINS) $(TEST_PYTHON) -m pip install $(PIP_FLAGS) --editable '.[browser]'
	@touch $@

.venv-test/ray: .venv-test/installed
	$(PINS) $(TEST_PYTHON) -m pip install $(PIP_FLAGS) --editable '.[dev,ray,browser]'
	@touch $@
