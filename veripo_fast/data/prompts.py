"""Data files -> prompts, the order in which they are used, and the list of what was left out.

JSONL, JSON arrays and Parquet are read through the `datasets` library, WebDataset tars by shards.py; data_layouts.py
says which keys. A record that cannot be used is skipped with its reason and never replaced by another. A prompt id that
occurs twice gets `#2`, `#3`, ... in the order of the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from veripo_fast.config.schema import DataConfig
from veripo_fast.data.archives import find_member, is_archive, locate, samples
from veripo_fast.data.layouts import KNOWN_KEYS, Record, RecordError, names_media, read_record
from veripo_fast.errors import DataError, MediaError
from veripo_fast.reward.score import check_gold, infer_problem_type
from veripo_fast.types import Message, ProblemType, Prompt

_LOG = logging.getLogger(__name__)
_BATCH = 4096
_ANOTHER_SCHEME = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)

INSTRUCTIONS: dict[ProblemType, str] = {
    "choice": "Think in <think></think>, then give the letter in <answer></answer>.",
    "number": "Think in <think></think>, then give the number in <answer></answer>.",
    "estimate": "Think in <think></think>, then give the number in <answer></answer>.",
    "math": "Think in <think></think>, then give the result in <answer></answer>.",
    "text": "Think in <think></think>, then give the answer in <answer></answer>.",
}
"""What the template `think_answer` adds to a question; chosen by problem type, never by the gold answer."""


@dataclass(frozen=True)
class Skipped:
    """A record or medium that was left out."""

    record: str
    """`file:line` of the record, and its id when it has one."""
    path: str
    """The file at fault: the medium, or the data file."""
    reason: str
    """One sentence."""


def load_prompts(files: Sequence[str], config: DataConfig) -> tuple[list[Prompt], list[Skipped]]:
    """Read data files in order.

    Returns:
        prompts with unique ids and existing media files, and what was skipped.

    Raises:
        DataError: a file is missing or unreadable as a whole, or no record can be used.
    """
    prompts, skipped = read_prompts(files, config)
    if not prompts:
        raise DataError(_no_prompts(files, skipped))
    return prompts, skipped


def read_prompts(files: Sequence[str], config: DataConfig) -> tuple[list[Prompt], list[Skipped]]:
    """As `load_prompts`, also where no record can be used."""
    prompts: list[Prompt] = []
    skipped: list[Skipped] = []
    unknown: set[str] = set()
    seen: dict[str, int] = {}
    for file in files:
        base = Path(config.media_root) if config.media_root else Path(file).parent
        find = partial(_locate, base=base, archive=file if is_archive(file) else "")
        for where, row in _rows(file):
            try:
                if isinstance(row, RecordError):
                    raise row
                unknown |= {key for key, value in row.items() if value is not None} - KNOWN_KEYS
                prompts.append(_prompt(read_record(row, find), where, config, seen))
            except (RecordError, DataError) as error:
                name = f" ({row['problem_id']})" if isinstance(row, dict) and row.get("problem_id") is not None else ""
                skipped.append(Skipped(where + name, getattr(error, "path", "") or file, str(error)))
    if unknown:
        _LOG.warning("keys not used: %s", ", ".join(sorted(unknown)))
    if skipped:
        _LOG.warning("%d of %d records of %s were skipped; the first, %s: %s", len(skipped),
                     len(prompts) + len(skipped), ", ".join(map(str, files)), skipped[0].record, skipped[0].reason)
    return prompts, skipped


def question_text(text: str, options: Sequence[str], problem_type: ProblemType, template: str = "think_answer") -> str:
    """The question as the policy reads it: its options by letter unless it names them already, then the instruction
    unless it asks for <answer> by itself or the template is `none`."""
    return "\n".join([text, *_added_lines(text, options, problem_type, template)])


def _added_lines(text: str, options: Sequence[str], problem_type: ProblemType, template: str) -> list[str]:
    lines = []
    if not _holds_options(text, options):
        lines = [f"{chr(65 + number)}. {option}" for number, option in enumerate(options)]
    if template == "think_answer" and "<answer>" not in text:
        lines.append(INSTRUCTIONS[problem_type])
    return lines


def _prompt(record: Record, where: str, config: DataConfig, seen: dict[str, int]) -> Prompt:
    problem_type = infer_problem_type(record.declared_type, record.gold, record.options)
    name = Path(where).name if record.prompt_id is None else record.prompt_id
    prompt = Prompt(name, record.messages, problem_type, record.gold, record.options, record.data_source)
    check_gold(prompt)
    added = _added_lines(prompt.text, record.options, problem_type, config.template)
    return replace(prompt, prompt_id=_unique(name, seen), messages=_with_lines(record.messages, added))


def _with_lines(messages: tuple[Message, ...], lines: list[str]) -> tuple[Message, ...]:
    """The lines put at the end of the last turn."""
    *parts, last = messages[-1].parts
    parts += ["\n".join([last, *lines])] if isinstance(last, str) else [last, *(["\n".join(lines)] if lines else [])]
    return (*messages[:-1], Message("user", tuple(parts)))


def _unique(name: str, seen: dict[str, int]) -> str:
    """The name, or name#2, name#3, ... when it was given before."""
    unique = name
    while unique in seen:
        seen[name] += 1
        unique = f"{name}#{seen[name]}"
    seen[unique] = 1
    return unique


def _holds_options(text: str, options: Sequence[str]) -> bool:
    """Whether the text names every option with its letter; true without options."""
    return all(re.search(rf"(?<!\w)\(?{chr(65 + number)}[.):]?\s*{re.escape(option)}", text)
               for number, option in enumerate(options))


def _no_prompts(files: Sequence[str], skipped: list[Skipped]) -> str:
    names = ", ".join(map(str, files)) or "no data file"
    if not skipped:
        return f"no prompts: {names} given, without a single record"
    return f"all {len(skipped)} records of {names} were skipped; the first, {skipped[0].record}: {skipped[0].reason}"


def _locate(source: str | bytes, base: Path, archive: str) -> str:
    """Path of an existing file or member of an archive, first that of the record; bytes that a Parquet file embeds are
    kept in the user's cache by content."""
    if isinstance(source, bytes):
        return _cached(source)
    if _ANOTHER_SCHEME.match(source):
        raise RecordError("media must be local files, not URLs", source[:200])
    source = source.removeprefix("file://")
    path = (find_member(archive, source) if archive else "") or str(base / source)
    try:
        if locate(path) is None and not Path(path).is_file():
            raise RecordError(f"media file {path} does not exist", path)
    except MediaError as error:
        raise RecordError(str(error), path) from error
    return path


def _cached(content: bytes) -> str:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veripo-fast" / "media"
    path = root / hashlib.blake2b(content, digest_size=16).hexdigest()
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return str(path)


# -- files ------------------------------------------------------------------------------------------------------------


def _rows(file: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
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
            yield f"{path}:{number}", _object(row["text"])


def _object(line: str) -> dict[str, Any] | RecordError:
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
        row = _object(member.read().decode("utf-8-sig", errors="replace"))
        try:
            if isinstance(row, dict) and not names_media(row):
                row |= {"videos": sample.videos} if sample.videos else {"images": sample.images}
            yield where, row
        except RecordError as error:
            yield where, error
    if problem:
        yield file, RecordError(problem)


# -- order ------------------------------------------------------------------------------------------------------------


class PromptOrder:
    """A shuffled order without end, shared by all ranks, in which an integer says how far one is.

    `position` counts the prompts that all ranks together have taken. Epoch e is a permutation that depends on (seed, e)
    alone, so every prompt comes once per epoch over all ranks, and a run may be resumed with another number of ranks.
    """

    def __init__(self, num_prompts: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.num_prompts, self.seed, self.rank, self.world_size = num_prompts, seed, rank, world_size

    def take(self, position: int, count: int) -> tuple[list[int], int]:
        """The next `count` prompt indices of this rank, and the position after all ranks have taken as many."""
        first = position + self.rank * count
        indices = []
        for slot in range(first, first + count):
            epoch, offset = divmod(slot, self.num_prompts)
            indices.append(_permutation(self.num_prompts, self.seed, epoch)[offset])
        return indices, position + self.world_size * count


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Sorted by a hash, so that it depends on no library's random generator."""
    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return tuple(sorted(range(count), key=key))


# -- what was left out ------------------------------------------------------------------------------------------------


class SkippedLog:
    """Appends to skipped.jsonl, every (record, path) once, also over a resumed run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._known: set[tuple[str, str]] = set()
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            row = _object(line)
            if isinstance(row, dict):  # a kill may have cut the last line short
                self._known.add((row.get("record", ""), row.get("path", "")))

    def add(self, *items: Skipped) -> int:
        """Write those not yet listed; returns how many."""
        with self._lock:
            new = {(item.record, item.path): item for item in items if (item.record, item.path) not in self._known}
            self._known |= new.keys()
            if new:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a+b") as file:
                    if file.tell():
                        file.seek(-1, os.SEEK_END)
                        if file.read(1) != b"\n":
                            file.write(b"\n")
                    file.writelines(json.dumps(asdict(item)).encode() + b"\n" for item in new.values())
        return len(new)
