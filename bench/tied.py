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

_PR_SET_PDEATHSIG = 1
"""<sys/prctl.h>"""


def tied(*command: str | Path) -> list[str]:
    """The command line under which a command ends with the thread that starts it. Costs 50 ms."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *map(str, command)]


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before this process asked
        sys.exit(f"the process {parent} that wanted {command[0]} has ended")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
