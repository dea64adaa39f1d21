"""What bench/, kernels/ and tests start ends with who started it: the parent is killed by -9, the child is watched.

Each parent runs in a process of its own and starts a child that writes its number to a file and sleeps for an hour.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tied import tied
from tests.support.children import run, start, wait_until
from tests.support.paths import PYTHONPATH, REPOSITORY

CHILD = """
import os, sys, time
from pathlib import Path
def work(*_, **__):
    file = Path({file!r})
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").rename(file)
    time.sleep(3600)
"""
PARENTS = {
    "video_worker": """
from bench.video.worker import Worker
with Worker("{child}", set(os.sched_getaffinity(0))) as worker:
    worker.call("work")
""",
    "kernel_child": """
from bench.kernels import child
child.__file__ = "{child}"
child.call("work")
""",
    "gpu_check": """
from bench import gpu_check
gpu_check.__file__ = "{child}"
list(gpu_check.run_part("work", "cpu", 3600))
""",
    "gpu_check_tests": """
from bench import gpu_check
gpu_check.REPOSITORY = Path("{folder}")
gpu_check.run_tests("{child}", 3600)
""",
    "kernels_sm90": """
from veripo_kernels.testing import sm90
sm90.check_case = __import__("child").work
sys.argv = ["sm90", "veripo_kernels.jit.gather"]
sm90.main()
""",
    "tests_run": """
from tests.support.children import run
run(sys.executable, "{child}")
""",
    "tests_start": """
from tests.support.children import start
start(sys.executable, "{child}").wait()
""",
    "tests_forks": """
import veripo_fast.cli
from tests.support import forks
veripo_fast.cli.main = __import__("child").work
forks.serve()
""",
}
"""What a parent runs, by the way that it starts its child."""


def alive(process: int) -> bool:
    """A zombie, whose new parent has not looked at it yet, is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def scripts(folder: Path) -> None:
    """child.py does its work when it is run, served, collected by pytest or imported."""
    code = CHILD.format(file=str(folder / "pid"))
    served = """
if "BENCH_CORES" in os.environ:
    from bench.video.worker import serve
    serve({"work": work}, ())
elif __name__ == "__main__" or "PYTEST_VERSION" in os.environ:
    work()
"""
    (folder / "child.py").write_text(code + served)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent has ended")
@pytest.mark.parametrize("way", PARENTS)
def test_a_child_ends_with_its_killed_parent(tmp_path: Path, way: str) -> None:
    scripts(tmp_path)
    code = "import os, sys\nfrom pathlib import Path\n" + PARENTS[way].format(child=tmp_path / "child.py",
                                                                               folder=tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    parent = start(sys.executable, "-c", code, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                   env={**environment, "PYTHONPATH": os.pathsep.join([str(tmp_path), PYTHONPATH])})
    if way == "tests_forks":
        parent.stdin.write('[{"arguments": [], "output": "output"}]\n')
        parent.stdin.flush()
    wait_until(lambda: (tmp_path / "pid").exists() or parent.poll() is not None, "the child")
    assert parent.poll() is None, parent.stderr.read()
    child = int((tmp_path / "pid").read_text())
    assert alive(child) and child != parent.pid
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not alive(child), "the end of the child")
    parent.communicate()


def test_a_child_whose_parent_has_ended_already_does_nothing(tmp_path: Path) -> None:
    *launcher, _ = tied("")
    launcher[-1] = "1"  # not this process
    done = run(*launcher, "touch", tmp_path / "done")
    assert done.returncode == 1 and "the process 1 that started this one has ended" in done.stderr
    assert not (tmp_path / "done").exists()


def test_a_command_does_not_know_that_it_is_tied(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['SEEN']); sys.exit(7)"
    done = run(sys.executable, "-c", code, "a b", tmp_path, env={**os.environ, "SEEN": "yes"})
    assert (done.returncode, done.stdout) == (7, f"{['a b', str(tmp_path)]} yes\n")


def test_every_process_of_a_bench_is_tied() -> None:
    """`git describe` ends by itself."""
    loose = set()
    for path in (REPOSITORY / "bench").rglob("*.py"):
        text = path.read_text()
        starts = {"subprocess.run", "subprocess.Popen", "subprocess.check_output", "os.fork"}
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) in starts for node in ast.walk(ast.parse(text))):
            loose |= {path.name} if "tied(" not in text else set()
    assert loose == {"recipe.py"}
