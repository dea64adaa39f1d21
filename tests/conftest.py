"""Environment of every test, set before anything is imported, and the fixtures that several files share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # xdist workers share the cores; torch reads it when imported
    os.environ.setdefault(_name, "1")

import importlib.util
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import temporary

temporary.claim()  # before anything asks where temporary files go
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell's background job ignores Ctrl-C, and so would the processes that tests start to interrupt them
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # the same under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _has_gpu() -> bool:
    """Whether torch can run kernels; torch is imported only where there is an NVIDIA driver at all."""
    if not Path("/dev/nvidiactl").exists():
        return False
    import torch

    return torch.cuda.is_available()


HAS_VLLM = importlib.util.find_spec("vllm") is not None
"""Then this is the environment of `make engines`: its Triton is not the one that the kernels are interpreted with."""
collect_ignore = [] if HAS_VLLM else ["engines"]

if not _has_gpu():  # accelerate imports DeepSpeed when a model is saved, which says on stdout that it finds no GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not HAS_VLLM and not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides when a kernel module is imported
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from veripo_kernels.testing import interpreter

    interpreter.install()

import pytest

from tests.support.browser import Browser
from tests.support.children import run
from tests.support.paths import PYTHONPATH


def run_python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this checkout first."""
    return run(sys.executable, *arguments, env={**os.environ, "PYTHONPATH": PYTHONPATH}, **options)


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a fresh interpreter: `python("-c", code)`."""
    return run_python


@pytest.fixture
def veripo() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a subprocess: `veripo("train", "--config", path)`."""
    return lambda *arguments, **options: run_python("-m", "veripo_fast.cli", *map(str, arguments), **options)


def pytest_report_header() -> str:
    """What is left out here, and where it runs."""
    return "" if HAS_VLLM else "tests/engines are left out: vLLM is not installed here; they run in `make test-engines`"


@pytest.fixture(autouse=True)
def log_level() -> None:
    """Commands run in this process set the level of the package's log; every test begins with Python's own."""
    logging.getLogger("veripo_fast").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def variables() -> Iterator[None]:
    """A command in this process sets defaults for its rank; those of one test are not those of the next."""
    names = ("TQDM_DISABLE", "TORCH_CPP_LOG_LEVEL")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("Chromium is not installed: as root, `apt-get install chromium chromium-driver` "
                    "(`make test` does it when it runs as root)")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
