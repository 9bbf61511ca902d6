# imager: `make` shows the targets. A bare Debian 12 with make and Python 3.11 is enough.

PYTHON_IN_VENV := .venv/bin/python
# Loop devices and mounts need root; without it only the plain tests can run.
ROOT := $(filter 0,$(shell id -u))
MARKS := $(if $(ROOT),not vm,not vm and not loop)
# For example: make test PYTEST_ARGS="-k restore"
PYTEST_ARGS ?=
export PREFIX ?= /opt/imager

.DEFAULT_GOAL := help
.PHONY: help demo test test-vm lint bench install uninstall clean need-root

help: ## show this list
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: need-root ## image a Debian server, change it, restore it to an empty disk, boot that
	@scripts/setup.sh demo
	@scripts/demo.sh

test: ## linters, and the tests that need no virtual machine (root: also with loop devices)
	@scripts/setup.sh test
	@$(if $(ROOT),,echo "NOT ROOT: the tests with loop devices and mounts are left out; use sudo make test")
	@$(MAKE) --no-print-directory lint
	$(PYTHON_IN_VENV) -m pytest -n 2 -m "$(MARKS)" $(PYTEST_ARGS)

test-vm: need-root ## the tests that boot virtual machines (some minutes)
	@scripts/setup.sh test
	$(PYTHON_IN_VENV) -m pytest -m vm $(PYTEST_ARGS) tests/vm

lint: ## ruff and mypy
	@scripts/setup.sh test
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy imager bootmedia

bench: need-root ## measure against other imaging tools (half an hour)
	@scripts/setup.sh bench
	$(PYTHON_IN_VENV) -m bench

install: need-root ## install for use: /opt/imager (or PREFIX=...), /usr/local/bin/imager, /var/lib/imager/images
	@scripts/install.sh install

uninstall: need-root ## remove what install put there; images stay
	@scripts/install.sh uninstall

clean: ## remove the virtual environment, caches and build leftovers; images stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

need-root:
	@$(if $(ROOT),,echo "this needs root (loop devices, mounts, system folders): use sudo make" >&2; exit 1)
