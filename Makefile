# make demo | demo-digits | test | test-slurm | lint | clean. Each creates .venv and installs what it needs at the pinned
# versions, and again only after a change of pyproject.toml or constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
WORKERS ?= 2

# For two small cores: one thread per process that sleeps while it waits is several times faster than two that spin.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive

SLURM_PROGRAMS := munged slurmctld slurmd sbatch shellcheck
SLURM_PACKAGES := munge slurm-wlm shellcheck

.PHONY: demo demo-digits test test-fast test-slurm lint format docs clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Teacher, path, three generators (path, none, warm), their scores, and one page. A second `make demo` resumes the first.
demo: .venv/installed
	@$(BIN)/disback demo emoji

# The same on 8x8 digits, in five minutes. As one process: starting a second one would cost more than it gains.
demo-digits: .venv/installed
	@$(BIN)/disback demo digits --processes 1

# Two workers for two cores. The tests of a file run on one worker, because they share what is trained for them. Files start in
# the order of tests/conftest.py; xdist's own would leave those with few, long tests to the end.
test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow'

# The job scripts on a real two-node Slurm, which the tests start in a temporary folder and stop again.
test-slurm: .venv/installed
	@export PATH="$$PATH:/usr/sbin" DEBIAN_FRONTEND=noninteractive; \
	for program in $(SLURM_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	[ -z "$$missing" ] || { apt-get -qq update && apt-get -qq install --yes --no-install-recommends $(SLURM_PACKAGES) >/dev/null; } || \
	{ echo "test-slurm:$$missing not found, and $(SLURM_PACKAGES) cannot be installed by apt-get: install them by hand" >&2; exit 1; }
	$(BIN)/python -m pytest tests/slurm

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed
	$(BIN)/python -m trainer.config.reference > docs/configuration.md

clean:
	rm -rf .venv runs shards build *.egg-info
