"""Data files -> records: JSONL, JSON arrays and Parquet through the `datasets` library, WebDataset tars in place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veripo_fast.data.archives import is_archive, locate
from veripo_fast.data.layouts import RecordError, names_media
from veripo_fast.data.webdataset import samples
from veripo_fast.errors import DataError, MediaError

_BATCH = 4096


def read_rows(file: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """(`file:line`, record) of every record; a RecordError in place of one that cannot be parsed."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"data file {file} does not exist")
    if path.suffix == ".parquet":
        for number, row in enumerate(_stream("parquet", path), start=1):
            yield f"{file}:row {number}", row
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        yield from _array(path) if _starts_array(path) else _lines(path)
    elif is_archive(file):
        yield from _members(file)
    else:
        raise DataError(f"data file {file} must end in .jsonl, .json or .parquet, or be a .tar of samples")


def _stream(builder: str, path: Path, **options: str) -> Iterator[dict[str, Any]]:
    """Rows through `datasets`, in batches and without a copy in its cache; values stay as they are stored."""
    import datasets
    import pyarrow

    try:
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
        for table in rows.with_format("arrow").iter(batch_size=_BATCH):
            yield from table.to_pylist()
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"data file {path} cannot be read as {builder}: {str(error).splitlines()[0]}") from error


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """Lines are read as text and parsed here: the JSON reader of `datasets` gives up the file for one bad line, and
    Arrow refuses a key that holds a text in one record and a list in another."""
    lines = _stream("text", path, encoding="utf-8-sig", encoding_errors="replace")
    for number, row in enumerate(lines, start=1):
        if row["text"].strip():
            yield f"{path}:{number}", json_object(row["text"])


def json_object(line: str) -> dict[str, Any] | RecordError:
    if "\ufffd" in line:
        return RecordError("is not valid UTF-8")
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return RecordError(f"is not valid JSON: {error.msg} at column {error.colno}")
    return value if isinstance(value, dict) else RecordError(f"must be a JSON object, got {line!r:.80}")


def _starts_array(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} is not valid JSON: {error}") from error
    for number, value in enumerate(values, start=1):
        is_object = isinstance(value, dict)
        yield f"{path}:item {number}", value if is_object else RecordError(f"must be a JSON object, got {value!r:.80}")


def _members(file: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """(`file:key`, record) of every sample of a WebDataset archive, with the sample's media where it names none."""
    try:
        found, problem = samples(file)
    except MediaError as error:
        raise DataError(f"data file {error}") from error
    for sample in found:
        where = f"{file}:{sample.key}"
        member = locate(f"{file}/{sample.record}") if sample.record else None
        if member is None:
            yield where, RecordError("its sample has no .json")
            continue
        row = json_object(member.read().decode("utf-8-sig", errors="replace"))
        try:
            if isinstance(row, dict) and not names_media(row):
                row |= {"videos": sample.videos} if sample.videos else {"images": sample.images}
            yield where, row
        except RecordError as error:
            yield where, error
    if problem:
        yield file, RecordError(problem)
