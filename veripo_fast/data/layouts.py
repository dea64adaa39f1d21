"""One record of a data file, in any accepted layout, as question, media and gold answer.

A record is read key by key, so that layouts may be mixed; the first key that has a value decides:

    question   messages | message | conversations | prompt | problem | question | query
               (text, a list of chat turns of role/content or from/value, or that list as JSON); system, history
    media      parts inside chat turns; path (+ data_type); videos | video; images | image; frames   (data/media.py)
    gold       whichever of solution, answer holds <answer>...</answer>; else answer, solution, ground_truth,
               golden_choice_idx, correct_choice, reward_model.ground_truth, extra_info.answer; else a closing
               assistant turn; response beside query                                                   (data/golds.py)
    options    options | choices | candidates, or a key each: a0, option_b, C; else lines `A. ..` of the question; else
               answer and negative_answers                                                           (data/choices.py)
    the rest   problem_type, problem_id | id | question_id | extra_info.index, data_source

These are the keys of Video-R1-260k and CoT-165k, of EasyR1, verl, LLaVA, ShareGPT and ms-swift, of chat data, and of
suites: VSI-Bench, Video-MME, MMVU, LongVideoBench, EgoPlan.
`<video>` and `<image>` in a text are replaced by the media in turn; without them, media stand before the first
question. What other keys mean is in data/keys.py: a record without media is refused unless it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from veripo_fast.config.inputs import DataConfig
from veripo_fast.data.choices import chosen, options_of_question, read_options, shuffled_options
from veripo_fast.data.golds import letters_of, read_gold
from veripo_fast.data.keys import (
    ID_KEYS,
    MEDIA_KEYS,
    QUESTION_KEYS,
    KeyPlan,
    Kind,
    check_misspelt,
    check_text_only,
    check_unread_media,
)
from veripo_fast.data.media import (
    MEDIA_PARTS,
    Locate,
    declared_kind,
    listed_media,
    medium,
    merged,
    same_file,
    with_times,
)
from veripo_fast.data.records import Record, RecordError, short
from veripo_fast.reward.graders import DECLARED_TYPES, nearest_type, type_name
from veripo_fast.types import Media, Message, Video

_MARKER = re.compile(r"(<video>|<image>)")
ESTIMATED = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
"""Values of question_type that VSI-Bench scores by mean relative accuracy."""
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def read_record(row: dict[str, Any], plan: KeyPlan, locate: Locate, config: DataConfig) -> Record:
    """Read one record.

    Raises:
        RecordError: a needed key is missing, a value cannot be understood, or a key would be lost that matters.
    """
    if plan.misspelt:
        check_misspelt(row, plan)
    turns = turns_of(row)
    closing = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise RecordError("the last turn before the answer is not the user's")
    messages = _with_media(turns, listed_media(row, plan, locate), locate)
    if plan.beside:
        messages = with_times(row, plan.beside, messages)
    if not messages[-1].parts:
        raise RecordError("the question is empty")
    _check_media(row, plan, messages, config)
    options = read_options(row, plan)
    found = read_gold(row, plain_text(closing["content"]) if closing else "", declared_type(row, config),
                      bool(options.texts))
    gold, declared = found.text, found.declared
    if not options.texts:
        text = "\n".join([part for part in messages[-1].parts if type(part) is str])
        options = (shuffled_options if row.get("negative_answers") else options_of_question)(row, text, gold, declared)
    base = next((base for base in (found.base, options.base) if base is not None), config.answer_index)
    if found.listed:
        gold = letters_of(gold, options.texts, base)
    elif options.texts and declared in (None, "choice"):
        gold = chosen(gold, found.is_number, replace(options, base=base), declared, base)
    identity = _first(row, ID_KEYS, _nested(row, "extra_info", "index"))
    return Record(messages, gold, options.texts, declared, None if identity is None else str(identity),
                  str(row.get("data_source") or ""))


def _check_media(row: dict[str, Any], plan: KeyPlan, messages: tuple[Message, ...], config: DataConfig) -> None:
    """Refuse a record whose media would be lost, or that does not have the medium that it declares."""
    media = [part for message in messages for part in message.parts if type(part) is not str]
    declared = declared_kind(row)
    if plan.unknown:
        check_unread_media(row, plan, media)  # type: ignore[arg-type]
    if not media:
        if declared in ("video", "image"):
            raise RecordError(f"says data_type {declared} and names no {declared} under a known key"
                              + (f"; the key {plan.media_words[0]!r} is not read" if plan.media_words else ""))
        check_text_only(row, plan, allowed=config.text_only or declared == "text")
    elif declared == "text":
        raise RecordError(f"says data_type text and names {len(media)} media")
    elif declared and not any(isinstance(item, Video) == (declared == "video") for item in media):
        raise RecordError(f"says data_type {declared} and names no {declared}")


def declared_type(row: dict[str, Any], config: DataConfig) -> str | None:
    """What `problem_type` says, as `DECLARED_TYPES` names it. Raises RecordError for what is not known."""
    declared = row.get("problem_type")
    if declared is None or declared == "":
        return "estimate" if row.get("question_type") in ESTIMATED else None
    return _type_named(declared if isinstance(declared, str) else str(declared), config.problem_types)


@lru_cache(maxsize=256)
def _type_named(declared: str, renamed: tuple[str, ...]) -> str:
    name = type_name(declared)
    for entry in renamed:
        theirs, _, ours = entry.partition("=")
        name = type_name(ours) if type_name(theirs) == name else name
    if name not in DECLARED_TYPES:
        near = nearest_type(declared)
        raise RecordError(f"problem_type {short(declared)} is not known" + (f"; did you mean {near}?" if near else "")
                          + f" Write one of {', '.join(DECLARED_TYPES)}, or list problem_type in data.ignore_keys to "
                          "have it inferred")
    return "choice" if DECLARED_TYPES[name] == "choice" else name


def names_media(row: dict[str, Any]) -> bool:
    """Whether a record says which media it is about, beside the question or in a part of a chat turn.

    Raises:
        RecordError: as `read_record`, of its question.
    """
    if any(row.get(key) for key in MEDIA_KEYS):
        return True
    parts = [part for turn in turns_of(row) if isinstance(turn["content"], list) for part in turn["content"]]
    return any(isinstance(part, dict) and part.get("type") in MEDIA_PARTS and _named(part) for part in parts)


# -- question ---------------------------------------------------------------------------------------------------------


def turns_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The chat turns of a record, each with a role (system, user, assistant) and its content.

    Raises:
        RecordError: there is no question, or a turn cannot be understood.
    """
    key = next((key for key in QUESTION_KEYS if row.get(key)), None)
    if key is None:
        raise RecordError(f"has no question: none of {', '.join(QUESTION_KEYS)} has a value")
    value = row[key]
    if isinstance(value, str) and (key in ("messages", "message", "conversations") or value.lstrip()[:2] == "[{"):
        value = _parsed(key, value)
    if isinstance(value, str):
        turns = [{"role": "user", "content": value}]
    elif isinstance(value, list):
        turns = [_turn(key, turn) for turn in value]
    else:
        raise RecordError(f"{key} must be a text or a list of chat turns, got {type(value).__name__}")
    turns = _history(row) + turns if row.get("history") else turns
    if row.get("system") and not any(turn["role"] == "system" for turn in turns):
        if not isinstance(row["system"], str):
            raise RecordError(f"system must be a text, got {short(row['system'])}")
        turns.insert(0, {"role": "system", "content": row["system"]})
    return turns


def _turn(key: str, turn: Any) -> dict[str, Any]:
    """A turn as role/content (OpenAI) or from/value (ShareGPT, LLaVA)."""
    named = isinstance(turn, dict) and (turn.get("role") or turn.get("from"))
    if not isinstance(named, str) or named not in _ROLES:
        raise RecordError(f"{key} holds a turn whose role is not system, user or assistant: {short(turn)}")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if not isinstance(content, str | list):
        raise RecordError(f"{key} holds a turn without content")
    return {"role": _ROLES[named], "content": content}


def _history(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Earlier questions and answers, as ms-swift writes them."""
    turns = []
    for pair in row["history"] if isinstance(row["history"], list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError(f"history must be a list of [question, answer], got {short(row['history'])}")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _parsed(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{key} is not valid JSON: {error}") from error


def plain_text(content: str | list[Any]) -> str:
    """The text of a chat turn, its parts joined."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content
                   if isinstance(part, str | dict))


# -- media in their places --------------------------------------------------------------------------------------------


def _with_media(turns: list[dict[str, Any]], listed: dict[Kind, list[Media]], locate: Locate) -> tuple[Message, ...]:
    """Chat turns with media in the place of markers, or before the first question where there are no markers."""
    waiting = {kind: list(media) for kind, media in listed.items()}
    marked: set[Kind] = set()

    def take(kind: Kind) -> Media:
        if kind == "image" and not listed["image"] and waiting["video"]:
            kind = "video"  # LLaVA-Video writes <image> where its video stands
        marked.add(kind)
        if not waiting[kind]:
            raise RecordError(f"has more <{kind}> markers than {kind}s ({len(listed[kind])})")
        return waiting[kind].pop(0)

    def name(kind: Kind, part: dict[str, Any]) -> Media:
        item = medium(kind, part, locate)
        twins = [other for other in waiting[kind] if same_file(other, item)]
        for twin in twins:  # named in the turn and beside it: one medium
            waiting[kind].remove(twin)
            (item, *_) = merged([item], [twin])
        return item

    messages = [Message(turn["role"], tuple(_parts(turn["content"], take, name))) for turn in turns]
    ahead: list[Media] = []
    for kind, media in waiting.items():
        if media and kind in marked:
            raise RecordError(f"has fewer <{kind}> markers than {kind}s ({len(listed[kind])})")
        ahead += media
    if ahead:
        first = next(number for number, message in enumerate(messages) if message.role == "user")
        messages[first] = Message("user", (*ahead, *messages[first].parts))
    return tuple(messages)


def _parts(content: str | list[Any], take: Callable[[Kind], Media],
           name: Callable[[Kind, dict[str, Any]], Media]) -> list[str | Media]:
    parts: list[str | Media] = []
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, dict) and part.get("type") in MEDIA_PARTS:
            kind: Kind = "video" if part["type"].startswith("video") else "image"
            parts.append(name(kind, part) if _named(part) else take(kind))
            continue
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise RecordError(f"has a chat part that is neither text, image nor video: {short(part)}")
        for piece in _MARKER.split(text) if "<" in text else (text,):
            if piece in ("<video>", "<image>"):
                parts.append(take("video" if piece == "<video>" else "image"))
            elif piece.strip():
                parts.append(piece.strip("\n"))
    return parts


def _named(part: dict[str, Any]) -> bool:
    """Whether a media part of a chat turn says anything of the medium that it shows."""
    return any(value is not None and value != "" and key not in ("type", "text") for key, value in part.items())


def _first(row: dict[str, Any], keys: tuple[str, ...], otherwise: Any) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), otherwise)


def _nested(row: dict[str, Any], outer: str, inner: str) -> Any:
    value = row.get(outer)
    return value.get(inner) if isinstance(value, dict) else None
