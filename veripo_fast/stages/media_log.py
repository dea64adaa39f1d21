"""Which content each medium of a run had, so that clips swapped under their names are noticed after a stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from veripo_fast.data.archives import locate
from veripo_fast.errors import DataError, MediaError
from veripo_fast.run.inputs import file_fingerprint
from veripo_fast.run.jsonlines import append_objects, read_objects
from veripo_fast.types import Prompt

SAMPLED_BYTES = 1 << 18
"""Media above this size are fingerprinted by blocks spread over them."""


class MediaLog:
    """Appends to media.jsonl what each medium was when it was first used.

    Args:
        allowed: whether media may differ from what they were.
        write: whether this process writes the file; else rows wait in `waiting` for whoever does.
    """

    def __init__(self, path: Path, allowed: bool, write: bool = True) -> None:
        self.path = path
        self.allowed = allowed
        self.write = write
        self.waiting: list[dict[str, object]] = []
        self._known = {row["path"]: row for row in read_objects(path)[0] if "path" in row}
        self._checked: set[str] = set()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Compare the media of prompts with what they were; note those that are new.

        Raises:
            DataError: one has another content, and that is not allowed.
        """
        new = []
        for path in dict.fromkeys(medium.path for prompt in prompts for medium in prompt.media):
            if path in self._checked:
                continue
            self._checked.add(path)
            row = self._row(path)
            before = self._known.get(path)
            if row is None or before == row:
                continue
            if before is not None and before["content"] != row["content"] and not self.allowed:
                raise DataError(f"{path} has another content than when this run first used it; put the old file back, "
                                "or resume with --allow-changes media")
            self._known[path] = row
            new.append(row)
        if new and self.write:
            append_objects(self.path, new)
        elif new:
            self.waiting += new

    def add(self, rows: Sequence[dict[str, object]]) -> None:
        """Write rows of other processes."""
        new = {str(row["path"]): row for row in rows if self._known.get(str(row["path"])) != row}
        self._known |= new
        if new:
            append_objects(self.path, list(new.values()))

    def _row(self, path: str) -> dict[str, object] | None:
        """None for a medium that cannot be read: whoever decodes it says so."""
        try:
            member = locate(path)
            if member is not None:
                return {"path": path, "content": f"{member.size}:{member.offset}", "mtime_ns": member.mtime_ns}
            status = Path(path).stat()
            before = self._known.get(path)
            if before is not None and before["mtime_ns"] == status.st_mtime_ns:
                return before
            return {"path": path, "content": file_fingerprint(Path(path), SAMPLED_BYTES),
                    "mtime_ns": status.st_mtime_ns}
        except (OSError, MediaError):
            return None
