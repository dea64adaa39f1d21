# Run `make` for the targets. PYTHON=python3.12 takes another interpreter; ARGS="--quick --seed 1" reaches `veripo demo`.

PYTHON ?= python3
PINS := pyproject.toml setup.py .ci/constraints-cpu.txt .ci/install.sh $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

.PHONY: help demo test lint clean

help:
	@echo "make demo    install into .venv, then the whole loop on rendered clips; ARGS=\"--quick --seed 1\" are its options"
	@echo "make test    install the test tools too, then ruff, mypy and pytest"
	@echo "make lint    ruff and mypy alone"
	@echo "make clean   remove what builds and tools leave behind, the compiled op too (not .venv, not runs)"

demo: .venv/.base
	.venv/bin/veripo demo $(ARGS)
	@echo "to use the command: source .venv/bin/activate, then veripo --help"

test: .venv/.dev .venv/.oracle
	@sh .ci/install.sh browser
	@$(MAKE) --no-print-directory lint
	.venv/bin/python -m pytest -n 2

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/mypy

.venv/.base: $(PINS)
	@sh .ci/install.sh base "$(PYTHON)"
	@touch $@

.venv/.dev: .venv/.base
	@sh .ci/install.sh dev
	@touch $@

.venv/.oracle: .venv/.base
	@sh .ci/install.sh oracle
	@touch $@

clean:
	rm -rf .venv/.base build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find veripo_fast kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kernels/veripo_kernels/*.so
