"""`veripo inspect DATA`: probe a corpus, then write media.parquet, skipped.jsonl and inspect.html together.

What is found is kept as it comes in unfinished.jsonl, so that a call that was stopped goes on.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError, Interrupted
from veripo_fast.inspect.corpus import (
    MAX_SHOWN,
    Finding,
    Identity,
    Plan,
    PolicySizes,
    Sampled,
    Target,
    find_media,
    inspect_medium,
    policy_sizes,
    skipped_media,
)
from veripo_fast.inspect.journal import Journal
from veripo_fast.inspect.page import render
from veripo_fast.report.frames import spread
from veripo_fast.run.atomic import atomic_write_bytes
from veripo_fast.video.ffmpeg import torchcodec_decoder
from veripo_fast.video.pool import MediaPool
from veripo_fast.video.probe import VideoFacts

log = logging.getLogger(__name__)
_BATCH = 1024
"""Rows that wait as Python objects before they go into Arrow's columns."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def inspect_command(data: Sequence[Path], config: Config, out: Path, workers: int | None, limit: int | None) -> None:
    """`veripo inspect`: inspect data files, folders of videos and single videos; print where the result is.

    Args:
        out: folder of the result; what an earlier inspection left there is replaced.
        workers: media at a time (None: one per core).
        limit: inspect only so many media, evenly spread (None: all).

    Raises:
        UserError: DATA holds no medium, an option cannot be used, or `out` cannot be written.
        Interrupted: Ctrl-C; what was inspected is kept.
    """
    for name, value in (("--workers", workers), ("--limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    _check_writable(out)
    corpus = find_media(data, config, limit)
    sizes = policy_sizes(config)
    workers = workers or len(os.sched_getaffinity(0))
    journal = Journal(out, config, sizes)
    if journal.known():
        log.info("%s holds %d media from a call that was stopped; those that have not changed are not inspected again",
                 journal.path, journal.known())
    table, thumbnails = _inspect_all(corpus.targets, config, sizes, workers, journal)
    page = render(table, thumbnails, corpus, config, sizes, workers, [str(path) for path in data])
    skipped = [*corpus.records, *skipped_media(table)]
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    atomic_write_bytes(out / "media.parquet", buffer.getvalue())
    atomic_write_bytes(out / "skipped.jsonl", b"".join(json.dumps(asdict(item)).encode() + b"\n" for item in skipped))
    atomic_write_bytes(out / "inspect.html", page.encode(errors="replace"))
    journal.remove()
    counts = Counter(table["status"].to_pylist())
    said = f", {len(corpus.records)} records skipped" if corpus.records else ""
    print(f"{len(table)} media: {counts['ok']} ok, {counts['skipped']} skipped{said}; "
          f"{out / 'inspect.html'}, {out / 'media.parquet'}, {out / 'skipped.jsonl'}")


def _check_writable(out: Path) -> None:
    """Before an hour of probing, not after it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is not a folder")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} cannot be written: {nearest} is not a folder that this user may write to")


def _inspect_all(targets: Sequence[Target], config: Config, sizes: PolicySizes, workers: int,
                 journal: Journal) -> tuple[pa.Table, dict[int, tuple[str, ...]]]:
    """The table of all rows, and the thumbnails of some by row number. Rows wait in Arrow's columns: 0.5 KB each."""
    torchcodec_decoder()  # its import takes seconds, which are no part of the first video's
    shown = set(spread(list(range(len(targets))), MAX_SHOWN))
    rows: list[dict[str, Any]] = []
    batches: list[pa.RecordBatch] = []
    thumbnails: dict[int, tuple[str, ...]] = {}
    skipped = 0

    def one(number: int) -> Finding:
        target, thumbnails = targets[number], number in shown
        key = journal.key(target, thumbnails)
        finding = journal.get(key)
        if finding is None:
            finding = inspect_medium(target, config, sizes, thumbnails=thumbnails)
            journal.add(key, finding)
        return finding

    with (_saying_how_to_go_on(journal, len(targets)), MediaPool(replace(config.video, workers=workers)) as pool,
          tqdm(total=len(targets), desc="inspect", unit="medium") as bar):
        for number, finding in enumerate(pool.map(one, range(len(targets)))):
            assert isinstance(finding, Finding)
            rows.append(finding.row)
            skipped += finding.row["status"] == "skipped"
            if finding.thumbnails:
                thumbnails[number] = finding.thumbnails
            if len(rows) == _BATCH:
                batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
                rows.clear()
            bar.set_postfix_str(f"{skipped} skipped", refresh=False)
            bar.update()
    batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
    return pa.Table.from_batches(batches, SCHEMA), thumbnails


@contextmanager
def _saying_how_to_go_on(journal: Journal, total: int) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        if not journal.known():
            raise
        raise Interrupted(f"interrupted; {journal.path} keeps {journal.known()} of {total} media", EXIT_INTERRUPTED,
                          "the same command goes on") from error


def _schema(*parts: type) -> pa.Schema:
    types: dict[type, Callable[[], pa.DataType]] = {str: pa.string, int: pa.int64, float: pa.float64, bool: pa.bool_}
    columns = []
    for part in parts:
        hints = get_type_hints(part)
        for field in fields(part):
            options = [kind for kind in get_args(hints[field.name]) or (hints[field.name],) if kind is not type(None)]
            columns.append(pa.field(field.name, types[options[0]]()))
    return pa.schema(columns)


SCHEMA = _schema(Identity, VideoFacts, Plan, Sampled)
"""Columns of media.parquet, documented at the fields of these classes."""
