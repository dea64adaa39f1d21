"""Data files -> records: JSONL, JSON arrays, Parquet, and WebDataset tars in place.

Lines and items are handed on unread (`Source`), so that what one of them may raise is caught in one place
(prompts.py) and ends nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from veripo_fast.data.archives import Member, is_archive, locate
from veripo_fast.data.layouts import names_media
from veripo_fast.data.records import UNUSABLE, RecordError, reason_of, short
from veripo_fast.data.remote import is_remote, local_path
from veripo_fast.data.webdataset import Sample, samples
from veripo_fast.errors import DataError, MediaError

LONGEST_LINE = 256 << 20
"""Bytes of a line or of the record of a sample; media that are embedded in one count."""
MOST_METADATA = 64 << 20
"""Bytes of the footer of a Parquet file: 100 times what a million rows need."""
_BATCH_ROWS, _BATCH_BYTES = 1024, 32 << 20
_SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # typeshed does not know it
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class _Sampled:
    """The record of a WebDataset sample, and the media that it is about where it names none."""

    archive: str
    sample: Sample


Source: TypeAlias = bytes | dict[str, Any] | RecordError | _Sampled
"""A record before it is read: a line, a row, why it cannot be one, or a sample of an archive."""


def read_sources(file: str) -> Iterator[tuple[str, Source]]:
    """(`file:line`, source) of every record of a file.

    Raises:
        DataError: the file is missing or unreadable as a whole.
    """
    if is_remote(file):
        try:
            copy = local_path(file)
        except MediaError as error:
            raise DataError(f"data file {error}") from error
        for where, source in read_sources(copy):
            yield file + where.removeprefix(copy), source
        return
    path = Path(file)
    try:
        if not path.is_file():
            raise DataError(f"data file {file} does not exist")
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix in (".jsonl", ".ndjson", ".json"):
            yield from _array(path) if _starts_array(path) else _lines(path)
        elif is_archive(file):
            yield from _members(file)
        else:
            raise DataError(f"data file {file} must end in .jsonl, .json or .parquet, or be a .tar of samples")
    except OSError as error:
        raise DataError(f"data file {file} cannot be read: {error.strerror or error}") from error


def parsed(source: Source) -> dict[str, Any]:
    """The record of a source.

    Raises:
        RecordError: it is none; and what else UNUSABLE names.
    """
    if isinstance(source, bytes):
        return json_object(source)
    if isinstance(source, RecordError):
        raise source
    return _record_of(source) if isinstance(source, _Sampled) else source


def json_object(line: bytes) -> dict[str, Any]:
    """The object that a line of JSON holds."""
    try:
        if line[:1] == b"{":  # json.loads looks for white space and encodings first, which takes as long again
            text = line.decode()
            value, end = _SCAN(text, 0)
            if text[end:] in ("", "\n", "\r\n"):
                return value
    except (ValueError, RecursionError, StopIteration):
        pass  # the plain way says what is wrong
    try:
        value = json.loads(line.removeprefix(_BOM).decode())
    except UnicodeDecodeError:
        raise RecordError("is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"is not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise RecordError(f"must be a JSON object, got {line.decode().strip()!r:.80}")
    return value


# -- JSON -------------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[str, Source]]:
    name = str(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE and line[-1:] != b"\n":
                _skip_line(file)
                yield f"{name}:{number}", RecordError(f"is longer than {LONGEST_LINE >> 20} MiB")
            elif not line.isspace() and line != _BOM:
                yield f"{name}:{number}", line


def _skip_line(file: BinaryIO) -> None:
    while (rest := file.readline(1 << 20)) and rest[-1:] != b"\n":
        pass


def _starts_array(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(256).removeprefix(_BOM).lstrip()[:1] == b"["


_BARE = re.compile(r"[^,\]}\s]*")
_SPACE = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _array(path: Path) -> Iterator[tuple[str, Source]]:
    """Items are read one by one, so that one that cannot be read is left out alone."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not valid JSON: {error}") from error
    decoder = json.JSONDecoder()
    place, number = _space(text, _space(text, 0) + 1), 0
    while text[place:place + 1] != "]":
        number += 1
        source: Source
        try:
            value, end = decoder.raw_decode(text, place)
            source = value if isinstance(value, dict) else RecordError(f"must be a JSON object, got {short(value)}")
        except json.JSONDecodeError as error:
            raise DataError(f"data file {path} is not valid JSON: {error}") from error
        except UNUSABLE as error:
            source, end = RecordError(reason_of(error)), _end_of_value(text, place)
        yield f"{path}:item {number}", source
        place = _space(text, end)
        if text[place:place + 1] == ",":
            place = _space(text, place + 1)
        elif text[place:place + 1] != "]":
            cause = json.JSONDecodeError("Expecting ',' delimiter", text, place)
            raise DataError(f"data file {path} is not valid JSON: {cause}")


def _space(text: str, place: int) -> int:
    """The first place from here on that holds no white space."""
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _end_of_value(text: str, place: int) -> int:
    """Where the value that begins here ends, by its brackets alone."""
    if text[place] not in '"[{':  # a bare number or word
        end = _BARE.match(text, place)
        return end.end() if end else len(text)
    depth = 0
    for token in _TOKEN.finditer(text, place):
        if token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
        if depth == 0:
            return token.end()
    return len(text)


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[tuple[str, Source]]:
    """Rows with their values as they are stored; a batch is small where rows hold media."""
    import pyarrow
    import pyarrow.parquet

    _check_footer(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                row_bytes = max(facts.total_byte_size // max(facts.num_rows, 1), 1)
                size = min(max(_BATCH_BYTES // row_bytes, 1), _BATCH_ROWS)
                for batch in file.iter_batches(size, row_groups=[group]):
                    for source in _rows(batch):
                        number += 1
                        yield f"{path}:row {number}", source
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data file {path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _rows(batch: Any) -> Iterator[Source]:
    """Each row of a batch; of one that holds a value which Python cannot, row by row."""
    try:
        yield from batch.to_pylist()
        return
    except UNUSABLE:
        pass
    for row in range(batch.num_rows):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UNUSABLE as error:
            yield RecordError(f"holds a value that cannot be read: {reason_of(error)}")


def _check_footer(path: Path) -> None:
    """DataError for a file that is no Parquet, or whose metadata would fill the memory before a row is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - 8, 0))
        tail = file.read(8)
    if tail[4:] != b"PAR1":
        raise DataError(f"data file {path} cannot be read as parquet: it does not end in PAR1, so it is another format "
                        "or was cut off")
    metadata = int.from_bytes(tail[:4], "little")
    if metadata > MOST_METADATA:
        raise DataError(f"data file {path} has {metadata >> 20} MiB of Parquet metadata, more than "
                        f"{MOST_METADATA >> 20} MiB: write it with fewer row groups or without its key-value metadata")


# -- WebDataset -------------------------------------------------------------------------------------------------------


def _members(file: str) -> Iterator[tuple[str, Source]]:
    """(`file:key`, source) of every sample of a WebDataset archive."""
    try:
        found, problem = samples(file)
    except MediaError as error:
        raise DataError(f"data file {error}") from error
    for sample in found:
        yield f"{file}:{sample.key}", _Sampled(file, sample)
    if problem:
        yield file, RecordError(problem)


def _record_of(source: _Sampled) -> dict[str, Any]:
    sample = source.sample
    member: Member | None = locate(f"{source.archive}/{sample.record}") if sample.record else None
    if member is None:
        raise RecordError("its sample has no .json")
    if member.size > LONGEST_LINE:
        raise RecordError(f"is longer than {LONGEST_LINE >> 20} MiB")
    row = json_object(member.read())
    if not names_media(row):
        row |= {"videos": sample.videos} if sample.videos else {"images": sample.images}
    return row
