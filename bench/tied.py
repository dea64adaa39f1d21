"""Commands that end with the process that started them, however that one ends: `kill -9` is no exception.

    python bench/tied.py PID COMMAND...

Linux kills a process when the thread that started it is gone, if the process asks for it. It still does after exec, so
this script asks and becomes the command, which need not know. Elsewhere the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PATHS = [str(REPOSITORY / "kernels"), str(REPOSITORY)]
"""Where a process that is started here finds the packages of this checkout."""
_PR_SET_PDEATHSIG = 1
"""<sys/prctl.h>"""


def tied(*command: str | Path) -> list[str]:
    """The command line under which a command ends with the thread that starts it. Costs 50 ms."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *map(str, command)]


def end_with(parent: int) -> None:
    """Have this process killed when its parent is gone; end it here when that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(f"the process {parent} that started this one has ended")


def main() -> None:
    parent, *command = sys.argv[1:]
    end_with(int(parent))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
