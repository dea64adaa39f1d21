# make demo   install into .venv, then the whole loop on rendered clips; options: make demo ARGS="--quick --seed 1"
# make test   install the test tools too, then ruff, mypy and pytest
# make lint   ruff and mypy alone
# make clean  remove what builds and tools leave behind (not .venv, not runs); the compiled op too: `make` builds it again

PYTHON ?= python3
PINS := pyproject.toml setup.py .ci/constraints-cpu.txt .ci/install.sh $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

.PHONY: demo test lint clean

demo: .venv/.base
	.venv/bin/veripo demo $(ARGS)

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
