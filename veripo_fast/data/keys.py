"""The keys of a record: which are read, which are known to hold nothing that training needs, and which are suspicious.

A key that is not known is named once in the log. It is refused where leaving it out would change the question: when it
looks like a misspelt key of media or options, or when what it holds is a medium.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from veripo_fast.data.archives import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from veripo_fast.data.records import RecordError, short
from veripo_fast.types import Media

Kind = Literal["video", "image"]
QUESTION_KEYS = ("messages", "message", "conversations", "prompt", "problem", "question", "query")
GOLD_KEYS = ("answer", "solution", "ground_truth", "golden_choice_idx", "correct_choice")
INDEX_KEYS = {"correct_choice": 0}
"""What an index counts from, where its key is published with one meaning: LongVideoBench."""
MEDIA_KEYS: dict[str, Kind | None] = {
    "path": None, "videos": "video", "video": "video", "video_path": "video", "video_paths": "video",
    "images": "image", "image": "image", "image_path": "image", "image_paths": "image", "frames": "video"}
"""What each key holds; None: `data_type` or the suffix says."""
OPTION_KEYS = ("options", "choices", "candidates", "option", "answer_choices")
ID_KEYS = ("problem_id", "id", "question_id")
START_KEYS = ("video_start", "start_time")
END_KEYS = ("video_end", "end_time")
SAMPLING_KEYS = ("fps", "nframes", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels")
"""What a record may ask for one medium, in the entry of that medium."""
REFUSED_SAMPLING = ("total_pixels", "resized_height", "resized_width", "raw_fps")
"""Keys of qwen-vl-utils that the sampling contract cannot express."""
KNOWN_KEYS = frozenset({
    *QUESTION_KEYS, *GOLD_KEYS, *MEDIA_KEYS, *OPTION_KEYS, *START_KEYS, *END_KEYS, *SAMPLING_KEYS, *REFUSED_SAMPLING,
    "sample_fps", "response", "system", "history", "problem_type", *ID_KEYS, "data_type", "data_source",
    "reward_model", "extra_info", "process", "ability", "question_type", "negative_answers"})
"""Keys that are read, or known to carry nothing that training needs (`process`: CoT-165k's traces; `ability`: verl)."""
_TARGETS = sorted({*MEDIA_KEYS, *OPTION_KEYS, *START_KEYS, *END_KEYS, *SAMPLING_KEYS, "problem_type", "data_type"})
_BESIDE = (*START_KEYS, *END_KEYS, *SAMPLING_KEYS, *REFUSED_SAMPLING)
_PLAIN_QUESTIONS = {"prompt", "problem", "question"}
"""Keys whose text is the question and nothing else; `query` may have a `response`."""
_BESIDE_FLAT = {"problem_type", *ID_KEYS, "data_type", "data_source", "process", "ability"}
_LIKE = 0.85
_NAMES_A_THING = re.compile(r"(?:ids?|idx|index|name|title|source|info|size|width|height|length|duration)$")
_MEDIA_WORD = re.compile(r"vid(?:eo|$|_|s$)|image|img|clip|frame|movie|film|media|scene|picture|photo|audio|sound",
                         re.IGNORECASE)
_MEDIA_SUFFIXES = tuple(VIDEO_SUFFIXES | IMAGE_SUFFIXES)
_NUMBERED = (re.compile(r"(a)(\d{1,2})"),
             re.compile(r"((?:option|choice|candidate)[_ ]?)(\d{1,2}|[a-z])", re.IGNORECASE),
             re.compile(r"()([A-Z])"))
"""Options in a key each: a0, a1, ...; option_a or `option 1`; A, B, ..."""


class FlatKeys(NamedTuple):
    """What each key of a flat record holds."""

    question: str
    media: str
    gold: str
    options: str
    """Empty where there are none."""


@dataclass(frozen=True)
class KeyPlan:
    """What the names of a record's keys say, whatever their values are; records of a file share few of them."""

    unknown: tuple[str, ...]
    """Neither read nor known."""
    misspelt: tuple[tuple[str, str], ...]
    """(key, the known key that it resembles)."""
    media_words: tuple[str, ...]
    """Unknown keys whose name speaks of media."""
    option_keys: tuple[str, ...]
    """Keys that hold an option each, in order; empty where there are fewer than two."""
    media_keys: tuple[str, ...]
    """Keys that name media, in the order in which they are read."""
    beside: tuple[str, ...]
    """Keys of one medium that stand beside its entry."""
    option_base: int | None
    """Number of the first of them: 0 or 1; None for letters."""
    flat: FlatKeys | None
    """Where one key of each kind and nothing else that is read has a value."""


@lru_cache(maxsize=4096)
def key_plan(keys: tuple[str, ...]) -> KeyPlan:
    """Plan for the keys of a record that have a value."""
    unknown = [key for key in keys if key not in KNOWN_KEYS]
    option_keys, base = _numbered(unknown)
    unknown = [key for key in unknown if key not in option_keys]
    misspelt = [(key, target) for key in unknown if (target := _resembled(key))]
    words = [key for key in unknown if _MEDIA_WORD.search(key)]
    beside = tuple(key for key in keys if key in _BESIDE)
    media_keys = tuple(key for key in MEDIA_KEYS if key in keys)
    return KeyPlan(tuple(unknown), tuple(misspelt), tuple(words), option_keys, media_keys, beside, base, _flat(keys))


def _flat(keys: tuple[str, ...]) -> FlatKeys | None:
    questions, media, golds, options = groups = [
        [key for key in keys if key in known] for known in (QUESTION_KEYS, MEDIA_KEYS, GOLD_KEYS, OPTION_KEYS)]
    if (len(questions), len(media), len(golds)) != (1, 1, 1) or len(options) > 1:
        return None
    rest = set(keys).difference(*groups)
    if questions[0] not in _PLAIN_QUESTIONS or media[0] == "frames" or not rest <= _BESIDE_FLAT:
        return None
    return FlatKeys(questions[0], media[0], golds[0], options[0] if options else "")


def plan_of(row: dict[str, Any]) -> KeyPlan:
    """The plan of a record; a key without a value does not count, as Parquet gives every record all keys."""
    if None in row.values():
        return key_plan(tuple([key for key, value in row.items() if value is not None]))
    return key_plan(tuple(row))


def _resembled(key: str) -> str | None:
    """The known key that this one is a misspelling of: letters swapped, or nearly the same."""
    name = key.lower()
    if _NAMES_A_THING.search(name):
        return None
    swapped = next((target for target in _TARGETS if sorted(name) == sorted(target)), None)
    return swapped or next(iter(difflib.get_close_matches(name, _TARGETS, 1, _LIKE)), None)


def _numbered(keys: list[str]) -> tuple[tuple[str, ...], int | None]:
    """Keys that count options, in order, and the number of the first (None: letters)."""
    for pattern in _NUMBERED:
        matches = [match for key in keys if (match := pattern.fullmatch(key))]
        labels = {match[2].upper(): match[0] for match in matches}
        if len(matches) < 2 or len({match[1] for match in matches}) > 1:
            continue
        numbers = sorted(int(label) if label.isdecimal() else ord(label) for label in labels)
        base = numbers[0] if all(label.isdecimal() for label in labels) else None
        if base not in (None, 0, 1) or (base is None and numbers[0] != ord("A")):
            continue
        return tuple(labels[chr(number) if base is None else str(number)] for number in numbers), base
    return (), None


# -- refusals ---------------------------------------------------------------------------------------------------------


def check_misspelt(row: dict[str, Any], plan: KeyPlan) -> None:
    """RecordError for a key that is a known one misspelt."""
    for key, target in plan.misspelt:
        if target not in OPTION_KEYS or not any(row.get(known) for known in OPTION_KEYS):
            raise RecordError(f"holds the key {key!r}, which is not read: write {target}, or list {key} in "
                              "data.ignore_keys")


def check_unread_media(row: dict[str, Any], plan: KeyPlan, media: Iterable[Media]) -> None:
    """RecordError for an unknown key that holds a medium which no known key names."""
    names = {medium.path.rpartition("/")[2] for medium in media}
    for key in plan.unknown:
        if (value := _medium_inside(row[key])) is not None and value.rpartition("/")[2] not in names:
            raise RecordError(f"holds a medium under the key {key!r}, which is not read ({short(value)}): name it "
                              f"under videos or images, or list {key} in data.ignore_keys")


def check_text_only(row: dict[str, Any], plan: KeyPlan, *, allowed: bool) -> None:
    """RecordError for a record without media that did not ask for that, or that seems to speak of one."""
    words = list(plan.media_words)
    extra = row.get("extra_info")
    if isinstance(extra, dict):
        words += [f"extra_info.{key}" for key, value in extra.items()
                  if value and (key in MEDIA_KEYS or _medium_inside(value) is not None)]
    hint = (f"; the key {words[0]!r} is not read: name the file under video, videos or path, or say in "
            "data.media_patterns where it lies") if words else ""
    if not allowed:
        raise RecordError(f"names no video or image under a known key{hint}; for questions without media set "
                          "data.text_only: true, or data_type: text in the record")
    if words:
        raise RecordError(f"is to be text only, and holds the key {words[0]!r}, which is not read: name the file under "
                          f"video, videos or path, or list {words[0]} in data.ignore_keys")


def _medium_inside(value: Any) -> str | None:
    """The path or address of a medium that an unknown key holds, or None."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        value = next((value[key] for key in ("video", "image", "path", "url", "bytes") if value.get(key)), None)
    if isinstance(value, bytes):
        return "bytes"
    if not isinstance(value, str) or len(value) > 4096 or "\n" in value:
        return None
    return value if value.lower().endswith(_MEDIA_SUFFIXES) else None
