"""Data files -> prompts: files.py reads the records, layouts.py says what their keys mean.

A record that cannot be used is skipped with its reason and never replaced by another. A prompt id that occurs twice
gets `#2`, `#3`, ... in the order of the files.
"""

from __future__ import annotations

import gc
import json
import logging
import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.archives import is_archive
from veripo_fast.data.files import Source, json_object, parsed, read_sources
from veripo_fast.data.flat import read_flat
from veripo_fast.data.keys import KNOWN_KEYS, KeyPlan, plan_of
from veripo_fast.data.layouts import read_record
from veripo_fast.data.patterns import pattern_keys, with_patterns
from veripo_fast.data.places import MediaPlaces, missing
from veripo_fast.data.records import UNUSABLE, FlatRecord, Record, RecordError, reason_of
from veripo_fast.data.skipped import Skipped
from veripo_fast.data.wording import Wording, Wordings, last_text
from veripo_fast.errors import DataError, MediaError
from veripo_fast.recipes.view import Question
from veripo_fast.reward.graders import check_gold, infer_problem_type
from veripo_fast.types import Message, ProblemType, Prompt

_LOG = logging.getLogger(__name__)
LOOKED_UP = 4096
"""Media of so many prompts are looked up when they are read. A larger set would take minutes on a network mount: a file
that it lacks is named when it is loaded, and some files spread over the set are looked up."""
SAMPLED = 256


def load_prompts(files: Sequence[str], config: DataConfig) -> tuple[list[Prompt], list[Skipped]]:
    """Read data files in order.

    Returns:
        prompts with unique ids, and what was skipped. Media files of up to 4096 prompts exist; those of a larger set
        are looked up when they are loaded.

    Raises:
        DataError: a file is missing or unreadable as a whole, or no record can be used.
    """
    return load_by(Reading(config), files)


def load_by(reading: Reading, files: Sequence[str]) -> tuple[list[Prompt], list[Skipped]]:
    """`load_prompts`, by a reading that makes its prompts in its own way."""
    prompts, skipped = _read_by(reading, files)
    if not prompts:
        raise DataError(_no_prompts(files, skipped))
    if len(prompts) > LOOKED_UP:
        _check_some_media(prompts)
    return prompts, skipped


def read_prompts(files: Sequence[str], config: DataConfig) -> tuple[list[Prompt], list[Skipped]]:
    """As `load_prompts`, also where no record can be used."""
    return _read_by(Reading(config), files)


def _read_by(reading: Reading, files: Sequence[str]) -> tuple[list[Prompt], list[Skipped]]:
    with _without_collections():
        for file in files:
            reading.read(file)
    reading.look_up()
    prompts, skipped = reading.prompts, reading.skipped
    reading.unknown -= pattern_keys(reading.config.media_patterns)
    if reading.unknown:
        _LOG.warning("keys not used: %s", ", ".join(sorted(reading.unknown)))
    if skipped:
        _LOG.warning("%d of %d records of %s were skipped; the first, %s: %s", len(skipped),
                     len(prompts) + len(skipped), ", ".join(map(str, files)), skipped[0].record, skipped[0].reason)
    return prompts, skipped


@contextmanager
def _without_collections() -> Iterator[None]:
    """No cycles are made here, and looking for them in millions of new objects takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Reading:
    """Records of several files on their way to prompts; `prompt_of` makes one of each."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.wordings = Wordings(config)
        self.prompts: list[Prompt] = []
        self.skipped: list[Skipped] = []
        self.unknown: set[str] = set()
        self._order: list[tuple[int, str, str]] = []
        """Of the first prompts: how many records were skipped before each, where it stands, and its file."""
        self._seen: dict[str, int] = {}

    def read(self, file: str) -> None:
        """Every record of a file. What one record may raise is caught here, and nowhere else.

        Raises:
            DataError: the file is missing or unreadable as a whole.
        """
        sources = read_sources(file)
        places: MediaPlaces | None = None
        source_name = "" if is_archive(file) else Path(file).stem  # the shards of a set have a name each
        for where, source in sources:
            row: dict[str, Any] | None = None
            try:
                places = places or MediaPlaces(file, self.config)
                row = self._row(source)
                row["data_source"] = row.get("data_source") or source_name
                side = self._side(row)
                row = self._without_side(row)
                plan = plan_of(row)
                if plan.unknown:
                    self.unknown.update(plan.unknown)
                prompt = self.prompt_of(row, plan, places, where, side)
            except (*UNUSABLE, DataError, MediaError) as error:
                name = "" if row is None else _id_of(row)
                self.skipped.append(Skipped(where + name, getattr(error, "path", "") or file, reason_of(error)))
                continue
            if len(self._order) <= LOOKED_UP:
                self._order.append((len(self.skipped), where + _id_of(row), file))
            self.prompts.append(prompt)

    def _row(self, source: Source) -> dict[str, Any]:
        row = json_object(source) if type(source) is bytes else parsed(source)
        if self.config.ignore_keys:
            row = without(row, frozenset(self.config.ignore_keys))
        return with_patterns(row, self.config.media_patterns) if self.config.media_patterns else row

    def prompt_of(self, row: dict[str, Any], plan: KeyPlan, places: MediaPlaces, where: str, side: str) -> Prompt:
        """The prompt of a record; raises what `UNUSABLE` names, DataError or MediaError.

        Args:
            side: JSON of the values that travel with it.
        """
        record = (read_flat(row, plan.flat, places, self.config) if plan.flat else None
                  ) or read_record(row, plan, places, self.config)
        problem_type = type_of(record)
        name = name_of(record, where)
        wording = self.wordings.of(record.data_source)
        prompt = Prompt(name, self._messages(record, problem_type, wording, side), problem_type, record.gold,
                        record.options, sys.intern(record.data_source), wording.form, side)
        _check_gold(prompt)
        unique = self.unique(name)
        return prompt if unique is name else Prompt(unique, prompt.messages, problem_type, record.gold, record.options,
                                                    prompt.data_source, wording.form, side)

    def _messages(self, record: Record | FlatRecord, problem_type: ProblemType, wording: Wording, side: str
                  ) -> tuple[Message, ...]:
        if type(record) is FlatRecord and wording.adds_lines:
            added = wording.lines(record.question, record.options, problem_type)
            return (Message("user", (record.medium, "\n".join([record.question, *added]))),)
        if type(record) is FlatRecord:
            messages: tuple[Message, ...] = (Message("user", (record.medium, record.question)),)
        else:
            assert type(record) is Record
            messages = record.messages
        return wording.put(messages, Question(last_text(messages), record.options, problem_type, record.data_source,
                                              json.loads(side) if side else {}))

    def _without_side(self, row: dict[str, Any]) -> dict[str, Any]:
        """The record without the keys that are kept and mean nothing else: nobody misses that they are read."""
        if not self.config.keep_keys:
            return row
        options = plan_of(row).option_keys
        return {key: value for key, value in row.items()
                if key not in self.config.keep_keys or key in KNOWN_KEYS or key in options}

    def _side(self, row: dict[str, Any]) -> str:
        """JSON of the values that travel with the prompt."""
        kept = {key: row[key] for key in self.config.keep_keys if row.get(key) is not None}
        try:
            return json.dumps(kept, ensure_ascii=False) if kept else ""
        except TypeError as error:
            raise RecordError(f"holds a value under a key of data.keep_keys that JSON cannot: {error}") from error

    def unique(self, name: str) -> str:
        """The name, or name#2, name#3, ... when it was given before."""
        unique = name
        while unique in self._seen:
            self._seen[name] += 1
            unique = f"{name}#{self._seen[name]}"
        self._seen[unique] = 1
        return unique

    def look_up(self) -> None:
        """Skip the prompts of a small set whose media are not there."""
        if len(self.prompts) > LOOKED_UP:
            return
        kept: list[Prompt] = []
        skipped: list[Skipped] = []
        done = 0
        for prompt, (before, where, file) in zip(self.prompts, self._order, strict=True):
            skipped += self.skipped[done:before]
            done = before
            gone = next((gone for medium in prompt.media if (gone := missing(medium))), None)
            if gone is None:
                kept.append(prompt)
            else:
                skipped.append(Skipped(where, gone[0] or file, gone[1]))
        self.prompts, self.skipped = kept, [*skipped, *self.skipped[done:]]


def name_of(record: Record | FlatRecord, where: str) -> str:
    """The id that a record gives itself, or where it stands in its file."""
    return where.rpartition("/")[2] if record.prompt_id is None else record.prompt_id


def type_of(record: Record | FlatRecord) -> ProblemType:
    """What kind of answer a record asks for, as it says or as its gold shows."""
    if record.options:
        letter = record.declared_type in (None, "choice") and _is_letter(record.gold, record.options)
        return "choice" if letter else infer_problem_type(record.declared_type, record.gold, record.options)
    return _type_without_options(record.declared_type, record.gold)


_type_without_options = lru_cache(maxsize=1 << 14)(lambda declared, gold: infer_problem_type(declared, gold, ()))
"""Most golds of a set occur often, and reading one takes 20 us."""


def _check_gold(prompt: Prompt) -> None:
    if prompt.options:
        if not (prompt.problem_type == "choice" and _is_letter(prompt.gold, prompt.options)):
            check_gold(prompt)
    elif not _is_readable(prompt.problem_type, prompt.gold):
        check_gold(prompt)  # says why, and of which prompt


@lru_cache(maxsize=1 << 14)
def _is_readable(problem_type: ProblemType, gold: str) -> bool:
    try:
        check_gold(Prompt("", (), problem_type, gold))
    except DataError:
        return False
    return True


def _is_letter(gold: str, options: Sequence[str]) -> bool:
    return len(gold) == 1 and gold in string.ascii_uppercase[:len(options)]


def without(row: Any, keys: frozenset[str]) -> Any:
    """A record without some keys, wherever they stand in it."""
    if isinstance(row, dict):
        return {key: without(value, keys) for key, value in row.items() if key not in keys}
    return [without(value, keys) for value in row] if isinstance(row, list) else row


def _id_of(row: dict[str, Any]) -> str:
    return f" ({_short_id(row['problem_id'])})" if row.get("problem_id") is not None else ""


def _short_id(value: Any) -> str:
    try:
        return str(value)[:200]
    except (ValueError, RecursionError):
        return "?"


def _no_prompts(files: Sequence[str], skipped: list[Skipped]) -> str:
    names = ", ".join(map(str, files)) or "no data file"
    if not skipped:
        return f"no prompts: {names} given, without a single record"
    return f"all {len(skipped)} records of {names} were skipped; the first, {skipped[0].record}: {skipped[0].reason}"


def _check_some_media(prompts: Sequence[Prompt]) -> None:
    """Look up some media of a large set. DataError when all of them are missing: their folder is another."""
    with_media = islice((prompt for prompt in prompts[::max(len(prompts) // SAMPLED, 1)] if prompt.media), SAMPLED)
    looked = [(prompt, missing(prompt.media[0])) for prompt in with_media]
    gone = [(prompt, reason) for prompt, reason in looked if reason]
    if gone and len(gone) == len(looked):
        raise DataError(f"none of the {len(looked)} media that were looked up is there; the first, of prompt "
                        f"{gone[0][0].prompt_id}: {gone[0][1][1]}; set data.media_root to the folder of the media")
    if gone:
        _LOG.warning("%d of %d media that were looked up are missing; each is skipped when it is loaded; the first, of "
                     "prompt %s: %s", len(gone), len(looked), gone[0][0].prompt_id, gone[0][1][1])
