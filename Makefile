# Two commands do everything on a machine with Python 3.11 or 3.12, make and git:
#   make quickstart   environment, installation, then train, evaluate and sample
#   make test         environment, installation, then lint, format, types and tests (test-quick: without the slow ones)
# Both are safe to repeat; packages are installed again only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Processes for the tests; the tests of a file stay in one, because they share what is slow to make.
TEST_WORKERS ?= 2
MINUTES ?= 30
SEED ?=

ROOMS := platform models tuning jobs
BIN := $(VENV)/bin
TESTS = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILD_TOOLS := pip setuptools hatchling editables

.DELETE_ON_ERROR:
.PHONY: quickstart test test-quick soak lint install install-dev constraints clean

quickstart: install
	$(BIN)/nestling train jobs/quickstart.yaml
	$(BIN)/nestling evaluate latest
	$(BIN)/nestling generate latest --prompt "The " --max-tokens 300

# With PYTEST_ARGS, one call of pytest with these and nothing else.
test: lint
ifeq ($(strip $(PYTEST_ARGS)),)
	$(TESTS) -m "not slow"
	$(TESTS) -m slow --no-loadscope-reorder
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

test-quick: lint
	$(TESTS) -m "not slow"

# A stream that is disturbed at random and must lose nothing; MINUTES is the time until the last fault, SEED repeats one.
soak: install-dev
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(ROOMS)

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
		echo "Nestling needs Python 3.11 or 3.12, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
			"Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One source distribution (deepspeed) and Nestling itself are built here; with the pinned tools in the environment and
# no build isolation, nothing unpinned is fetched for that.
$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing Nestling into $(VENV): a few minutes the first time."
	$(INSTALL) --constraint constraints.txt $(BUILD_TOOLS)
	$(INSTALL) --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# Pins the newest versions that pyproject.toml allows. Local versions (+cpu) and the packages that only a GPU build of
# torch brings along are left out, so that one file serves every machine.
constraints:
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; pip="$$fresh/bin/python -m pip"; \
	$(PYTHON) -m venv "$$fresh"; \
	$$pip install --quiet --upgrade $(BUILD_TOOLS); \
	$$pip install --quiet --no-build-isolation --editable '.[dev]'; \
	{ grep '^#' constraints.txt; $$pip freeze --all --exclude-editable | grep -vE '^(nvidia-[cn]|cuda-|triton)' \
		| sed 's/+.*//'; } > "$$fresh/pinned"; \
	cp "$$fresh/pinned" constraints.txt

clean:
	@if [ -e $(VENV)/pyvenv.cfg ]; then echo "$(RM) -r $(VENV)"; $(RM) -r $(VENV); fi
	$(RM) -r .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
	find $(ROOMS) tests -name __pycache__ -type d -prune -exec $(RM) -r {} +
