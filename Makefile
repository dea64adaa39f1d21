# Run `make` for the targets. PYTHON=python3.12 takes another interpreter; ARGS="--quick --seed 1" reaches `veripo demo`.

PYTHON ?= python3
WHEELHOUSE ?= wheelhouse
TORCH ?= 2.13.0
CUDA ?= cpu
EXTRAS ?=
PINS := pyproject.toml setup.py .ci/constraints-cpu.txt .ci/install.sh $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

# Tests of interpreted kernels that run on the Triton of both environments
INTERPRETED := tests/kernels/test_interpreter.py tests/bench/test_sweep.py

.PHONY: help demo test engines test-engines lint clean wheelhouse install-wheelhouse

help:
	@echo "make demo    install into .venv, then the whole loop on rendered clips; ARGS=\"--quick --seed 1\" are its options"
	@echo "make test    install the test tools too, then ruff, mypy and pytest"
	@echo "make engines       an environment beside it with vLLM, in .venv-engines (3.9 GB without a GPU)"
	@echo "make test-engines  the tests on the real engine, in that environment, and the kernels in its Triton's interpreter"
	@echo "make lint    ruff and mypy alone"
	@echo "make wheelhouse PYTHON=python3.12 CUDA=cu130 TORCH=2.13.0 EXTRAS=liger  all wheels for a node without a network,"
	@echo "             in parts of at most 60 MiB, in WHEELHOUSE=wheelhouse"
	@echo "make install-wheelhouse PYTHON=python3.12  check, join and install them there, into .venv, without an index"
	@echo "make clean   remove what builds and tools leave behind, the compiled op too (not the environments, not runs)"

demo: .venv/.base
	.venv/bin/veripo demo $(ARGS)
	@echo "to use the command: source .venv/bin/activate, then veripo --help"

test: .venv/.dev .venv/.oracle
	@sh .ci/install.sh browser
	@$(MAKE) --no-print-directory lint
	.venv/bin/python -m pytest -n 2

engines: .venv-engines/.installed
	@echo "to use it: source .venv-engines/bin/activate, then veripo train --config FILE --rollout.engine vllm"

test-engines: .venv-engines/.installed
	.venv-engines/bin/python -m pytest tests/engines
	TRITON_INTERPRET=1 .venv-engines/bin/python -m pytest $(INTERPRETED)

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/mypy

.venv/.base: $(PINS)
	@sh .ci/install.sh base "$(PYTHON)"
	@touch $@

.venv/.dev: .venv/.base
	@sh .ci/install.sh dev
	@touch $@

.venv-engines/.installed: $(PINS) .ci/engines-cpu.txt
	@sh .ci/install.sh engines "$(PYTHON)"
	@touch $@

.venv/.oracle: .venv/.base
	@sh .ci/install.sh oracle
	@touch $@

wheelhouse:
	$(PYTHON) .ci/wheelhouse.py write $(WHEELHOUSE) --torch "$(TORCH)" --cuda "$(CUDA)" --extras "$(EXTRAS)"

install-wheelhouse:
	$(PYTHON) .ci/wheelhouse.py install $(WHEELHOUSE) --venv .venv

clean:
	rm -rf .venv/.base .venv-engines/.installed build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find veripo_fast kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kernels/veripo_kernels/*.so
