"""Metrics of a run: one JSON line per record, and the same numbers as scalars of TensorBoard and other trackers.

A record is a flat or nested mapping with `global_step`; wall times live under the key `seconds`, so that the rest can
be compared bitwise between a resumed run and an uninterrupted one. NaN and infinity become null: every line is JSON.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.jsonlines import append_objects, dump_objects, read_objects
from veripo_fast.run.trackers import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_log = logging.getLogger(__name__)
STEPS_WITHOUT_SIGNAL = 5
"""So many steps in a row without a signal are said, in training and at the top of the report."""


class MetricsLog:
    """Appends records to `path` and, with a folder, to TensorBoard (torch is imported with the first record).

    Args:
        trackers: get the same scalars; a record says how many records they have missed so far, if any.
    """

    def __init__(self, path: Path, tensorboard_dir: Path | None = None, trackers: Sequence[Tracker] = ()) -> None:
        self.path = path
        self.trackers = trackers
        self.tensorboard_dir = tensorboard_dir
        self._next_step: int | None = None
        self._writer: SummaryWriter | None = None

    def log(self, record: Mapping[str, object]) -> None:
        """Append one record; it has reached the operating system when this returns. Raises OSError."""
        plain = _plain(record)
        if missed := sum(tracker.missed for tracker in self.trackers):
            plain["tracker_misses"] = missed
        if append_objects(self.path, [plain]):
            _log.warning("%s ended in a torn line, which was cut", self.path)
        if self.tensorboard_dir is not None:
            self._log_scalars(plain, self.tensorboard_dir)
        for tracker in self.trackers:
            tracker.log(dict(_scalars(plain, "")), plain.get("global_step", 0))

    def truncate_after(self, global_step: int) -> int:
        """Forget records whose global_step is larger, as a resume at `global_step` must; returns how many."""
        self.close()
        self._next_step = global_step + 1
        records = read_records(self.path)
        kept = [record for record in records if record.get("global_step", 0) <= global_step]
        if self.path.exists():
            atomic_write_text(self.path, dump_objects(kept))
        return len(records) - len(kept)

    def close(self) -> None:
        """Flush and close the TensorBoard file and the trackers; a later record opens them again."""
        for tracker in self.trackers:
            tracker.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _log_scalars(self, record: dict[str, Any], folder: Path) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an earlier process logged past the step that this one resumes from
            self._writer = SummaryWriter(str(folder), purge_step=self._next_step)
        for name, value in _scalars(record, ""):
            self._writer.add_scalar(name, value, record.get("global_step"))
        self._writer.flush()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, [] when there is none. A line torn by a crash is left out and said in the log."""
    records, bad_lines = read_objects(path)
    for number in bad_lines:
        _log.warning("%s line %d is not a JSON object and is left out", path, number)
    return records


def _plain(value: Any) -> Any:
    """Plain Python values for JSON; scalars of numpy and torch (anything with `item`) included."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value) if isinstance(value, float) else value.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _scalars(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "global_step":
            yield f"{prefix}{key}", value
