"""What tests leave in the temporary folder is gone when their session ends, with and without workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import temporary
from tests.support.children import run
from tests.support.paths import PYTHONPATH

SESSION = """
import os, subprocess, sys, tempfile
from pathlib import Path
from tests.support import temporary
temporary.claim()
folder = Path(tempfile.mkdtemp())
child = subprocess.run([sys.executable, "-c", "from tests.support import temporary; temporary.claim(); import tempfile;"
                        "print(tempfile.mkdtemp())"], capture_output=True, text=True, check=True).stdout.strip()
if os.fork() == 0:
    sys.exit()
os.wait()
assert folder.is_dir() and Path(child).is_dir(), "a child or a fork has removed the folder of its session"
print(folder.parent, Path(child).parent, os.environ["PYTEST_DEBUG_TEMPROOT"], flush=True)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a session whose usual temporary folder is a new one."""
    kept = {name: value for name, value in os.environ.items()
            if name not in (temporary.MARK, "PYTEST_DEBUG_TEMPROOT", "TORCHINDUCTOR_CACHE_DIR")}
    return kept | {"TMPDIR": str(tmp_path), "PYTHONPATH": PYTHONPATH}


def test_this_session_has_one() -> None:
    folder = Path(os.environ[temporary.MARK])
    assert os.environ["TMPDIR"] == str(folder) and folder.name.startswith("veripo-tests-")


def test_children_share_it_and_it_is_removed(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(sys.executable, "-c", SESSION, env=environment)
    assert done.returncode == 0, done.stderr
    own, of_child, usual = done.stdout.split()
    assert own == of_child and Path(own).parent == tmp_path == Path(usual)
    assert list(tmp_path.iterdir()) == []


def test_that_of_a_killed_session_is_removed_by_the_next(environment: dict[str, str], tmp_path: Path) -> None:
    code = SESSION + "os.kill(os.getpid(), 9)"
    assert run(sys.executable, "-c", code, env=environment).returncode != 0
    [left] = tmp_path.iterdir()
    alive = subprocess.Popen([sys.executable, "-c", SESSION + "input()"], env=environment, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert alive.stdout is not None and alive.stdin is not None
    own = alive.stdout.readline().split()[0]
    assert not left.exists()
    assert run(sys.executable, "-c", SESSION, env=environment).returncode == 0
    assert [str(path) for path in tmp_path.iterdir()] == [own], "the folder of a session that lives was removed"
    alive.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_pytest_with_workers(environment: dict[str, str], tmp_path: Path) -> None:
    """Checkpoints that tests make are gone; pytest's folders and what torch compiled are not."""
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2",
               "tests/test_drop_in.py::test_files_that_say_it_all_are_copied", env=environment)
    assert done.returncode == 0, done.stdout
    names = [path.name for path in tmp_path.iterdir()]
    assert any(name.startswith("pytest-of-") for name in names)
    assert [name for name in names if not name.startswith(("pytest-of-", "torchinductor"))] == []
