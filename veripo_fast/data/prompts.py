"""Data files -> prompts: files.py reads the records, layouts.py says what their keys mean.

A record that cannot be used is skipped with its reason and never replaced by another. A prompt id that occurs twice
gets `#2`, `#3`, ... in the order of the files.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.archives import find_member, is_archive, locate
from veripo_fast.data.files import read_rows
from veripo_fast.data.layouts import KNOWN_KEYS, Record, RecordError, read_record
from veripo_fast.data.skipped import Skipped
from veripo_fast.errors import DataError, MediaError
from veripo_fast.reward.score import check_gold, infer_problem_type
from veripo_fast.run.atomic import atomic_write_bytes
from veripo_fast.types import Message, ProblemType, Prompt

_LOG = logging.getLogger(__name__)
_ANOTHER_SCHEME = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)

INSTRUCTIONS: dict[ProblemType, str] = {
    "choice": "Think in <think></think>, then give the letter in <answer></answer>.",
    "number": "Think in <think></think>, then give the number in <answer></answer>.",
    "estimate": "Think in <think></think>, then give the number in <answer></answer>.",
    "math": "Think in <think></think>, then give the result in <answer></answer>.",
    "text": "Think in <think></think>, then give the answer in <answer></answer>.",
}
"""What the template `think_answer` adds to a question; chosen by problem type, never by the gold answer."""


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
        find = partial(_locate, base=base, archive=file if is_archive(file) else "",
                       confine=config.confine)
        for where, row in read_rows(file):
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


def _locate(source: str | bytes, base: Path, archive: str, confine: bool) -> str:
    """Path of an existing file or member of an archive, first that of the record; bytes that a Parquet file embeds are
    kept in the user's cache by content. `confine`: only inside of `base`."""
    if isinstance(source, bytes):
        return _cached(source)
    if _ANOTHER_SCHEME.match(source):
        raise RecordError("media must be local files, not URLs", source[:200])
    source = source.removeprefix("file://")
    path = (find_member(archive, source) if archive else "") or str(base / source)
    if confine and not Path(os.path.realpath(path)).is_relative_to(base.resolve()):
        raise RecordError(f"media file {path} lies outside of {base}, and data.confine keeps media inside", path)
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
        atomic_write_bytes(path, content)
    return str(path)


# -- files ------------------------------------------------------------------------------------------------------------


# -- order ------------------------------------------------------------------------------------------------------------


# -- what was left out ------------------------------------------------------------------------------------------------
