"""What was left out and why: skipped.jsonl."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from veripo_fast.run.jsonlines import append_objects, read_objects
from veripo_fast.types import Prompt


@dataclass(frozen=True)
class Skipped:
    """A record or medium that was left out."""

    record: str
    """`file:line` of the record, and its id when it has one."""
    path: str
    """The file at fault: the medium, or the data file."""
    reason: str
    """One sentence."""

    @classmethod
    def of_prompt(cls, prompt: Prompt, reason: str) -> Skipped:
        """A prompt whose media cannot be read."""
        return cls(prompt.prompt_id, ", ".join(medium.path for medium in prompt.media), reason)


class SkippedLog:
    """Appends to skipped.jsonl, every (record, path) once, also over a resumed run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        rows, _ = read_objects(self.path)  # a kill may have cut the last line short
        self._known = {(row.get("record", ""), row.get("path", "")) for row in rows}

    def add(self, *items: Skipped) -> int:
        """Write those not yet listed; returns how many."""
        with self._lock:
            new = {(item.record, item.path): item for item in items if (item.record, item.path) not in self._known}
            self._known |= new.keys()
            if new:
                append_objects(self.path, map(asdict, new.values()))
        return len(new)
