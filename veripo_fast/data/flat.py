"""Most records of most sets are flat: a question, one medium, a gold answer and the options, in a key each.

They are read here in a third of the time that layouts.py takes. It defines what they mean, and reads every record that
is not as plain as it looks: `read_flat` gives None for those.
"""

from __future__ import annotations

from string import ascii_uppercase as LETTERS
from typing import Any

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.choices import MOST_OPTIONS, Options, chosen, options_of_question, without_letters
from veripo_fast.data.golds import TAGGED
from veripo_fast.data.keys import ID_KEYS, MEDIA_KEYS, FlatKeys, Kind
from veripo_fast.data.layouts import declared_type
from veripo_fast.data.media import KINDS, Locate, is_picture
from veripo_fast.data.records import FlatRecord
from veripo_fast.types import Image, Video


def read_flat(row: dict[str, Any], keys: FlatKeys, locate: Locate, config: DataConfig) -> FlatRecord | None:
    """What `read_record` gives, in parts; None for a record that it must read.

    Raises:
        RecordError: as `read_record`.
    """
    source = row[keys.media]
    if type(source) is list and len(source) == 1 and keys.media != "path":
        source = source[0]
    if type(source) is not str or not source:
        return None
    kind = _kind(row.get("data_type"), MEDIA_KEYS[keys.media], source)
    question = _question(row[keys.question], kind)
    texts = _option_texts(row[keys.options]) if keys.options else ()
    answer = row[keys.gold]
    is_number = type(answer) is int
    gold = str(answer) if is_number else _gold(answer)
    if kind is None or not question or texts is None or not gold:
        return None
    medium = Video(locate(source)) if kind == "video" else Image(locate(source))
    declared = declared_type(row, config)
    if not texts:
        texts = options_of_question(row, question, gold, declared).texts
    if texts and (declared is None or declared == "choice") and not (len(gold) == 1 and gold in LETTERS[:len(texts)]):
        gold = chosen(gold, is_number, Options(texts), declared, config.answer_index)
    identity = next((row[key] for key in ID_KEYS if row.get(key) is not None), None)
    return FlatRecord(medium, question, gold, texts, declared, None if identity is None else str(identity),
                      str(row.get("data_source") or ""))


def _kind(declared: Any, named: Kind | None, source: str) -> Kind | None:
    """What the medium is, where `data_type`, the key and the suffix do not contradict each other."""
    if not declared:
        return named or ("image" if is_picture(source) else "video")
    kind = KINDS.get(declared) if type(declared) is str else None
    return kind if named is None or named == kind else None


def _question(text: Any, kind: Kind | None) -> str:
    """The text behind a marker that begins it; empty where more than that is in it."""
    if type(text) is not str or text[:1] == "[" or text[:1].isspace():
        return ""
    if "<" in text:
        text = text.removeprefix(f"<{kind}>")
        if "<" in text or not text.strip():
            return ""
    return text.strip("\n")


def _option_texts(value: Any) -> tuple[str, ...] | None:
    if type(value) is not list or len(value) > MOST_OPTIONS:
        return None
    try:
        texts = tuple(map(str.strip, value))
    except TypeError:  # not all are texts
        return None
    return None if "" in texts else without_letters(texts)


def _gold(value: Any) -> str:
    if type(value) is not str:
        return ""
    if "<answer>" in value:
        tagged = TAGGED.search(value)
        return tagged[1].strip() if tagged else ""
    return value.strip()
