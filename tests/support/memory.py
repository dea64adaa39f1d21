"""Memory that a process holds, for tests that repeat something and want it flat."""

from __future__ import annotations

import gc

from veripo_fast.run.memory import return_freed_memory, status_bytes


def held_bytes() -> int:
    """Resident memory of this process, without what it could give back at once.

    Freed blocks that glibc keeps move the plain figure by 10 MB from one repetition to the next; this one stands still
    to 0.2 MB in runs that keep nothing.
    """
    gc.collect()
    return_freed_memory()
    return status_bytes("VmRSS")
