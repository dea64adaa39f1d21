"""One record of a data file, in any accepted layout, as question, media and gold answer.

A record is read key by key, so that layouts may be mixed; the first key that has a value decides:

    question   messages | message | prompt | problem | question   (text, a list of chat turns, or that list as JSON)
    media      parts inside chat turns; path (+ data_type); videos | video; images | image
    gold       whichever of solution, answer holds <answer>...</answer>; else answer, solution, ground_truth,
               reward_model.ground_truth, extra_info.answer; else a closing assistant turn
    the rest   options, problem_type, problem_id | id | extra_info.index, data_source

These are the keys of Video-R1-260k and CoT-165k, of EasyR1 and verl, and of chat data. `<video>` and `<image>` in a
text are replaced by the media in turn; without them, media stand before the first question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from veripo_fast.data.archives import IMAGE_SUFFIXES
from veripo_fast.types import Image, Media, Message, Video

QUESTION_KEYS = ("messages", "message", "prompt", "problem", "question")
GOLD_KEYS = ("answer", "solution", "ground_truth")
MEDIA_KEYS = ("path", "videos", "video", "images", "image")
KNOWN_KEYS = frozenset({*QUESTION_KEYS, *GOLD_KEYS, *MEDIA_KEYS, "options", "problem_type", "problem_id", "id",
                        "data_type", "data_source", "reward_model", "extra_info", "process", "ability"})
"""Keys that are read, or known to carry nothing that training needs (`process`: CoT-165k's traces; `ability`: verl)."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MARKER = re.compile(r"(<video>|<image>)")
_MEDIA_PARTS = ("video", "image", "video_url", "image_url")
Kind = Literal["video", "image"]
Locate = Callable[[str | bytes], str]
"""Turns what a record says of a medium (a path, or the bytes themselves) into the path of a file."""


class RecordError(Exception):
    """Why a record cannot be used; the reader adds where it stands."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.path = path
        """The media file at fault, or empty."""


@dataclass(frozen=True)
class Record:
    """What a record says, before the gold is checked and an instruction is added."""

    messages: tuple[Message, ...]
    gold: str
    options: tuple[str, ...]
    declared_type: str | None
    prompt_id: str | None
    data_source: str


def read_record(row: dict[str, Any], locate: Locate) -> Record:
    """Read one record.

    Raises:
        RecordError: a needed key is missing or a value cannot be understood.
    """
    turns = _turns(row)
    closing = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise RecordError("the last turn before the answer is not the user's")
    messages = _with_media(turns, _listed_media(row, locate), locate)
    if not messages[-1].parts:
        raise RecordError("the question is empty")
    gold = _gold(row, _plain_text(closing["content"]) if closing else "")
    identity = _first(row, ("problem_id", "id"), _nested(row, "extra_info", "index"))
    declared = row.get("problem_type")
    return Record(messages, gold, _options(row.get("options")), str(declared) if declared else None,
                  None if identity is None else str(identity), str(row.get("data_source") or ""))


def names_media(row: dict[str, Any]) -> bool:
    """Whether a record says which media it is about, beside the question or in a part of a chat turn.

    Raises:
        RecordError: as `read_record`, of its question.
    """
    parts = [part for turn in _turns(row) if isinstance(turn["content"], list) for part in turn["content"]]
    return any(row.get(key) for key in MEDIA_KEYS) or any(
        isinstance(part, dict) and part.get("type") in _MEDIA_PARTS and _named(part) for part in parts)


# -- question ---------------------------------------------------------------------------------------------------------


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    key = next((key for key in QUESTION_KEYS if row.get(key)), None)
    if key is None:
        raise RecordError(f"has no question: none of {', '.join(QUESTION_KEYS)} has a value")
    value = row[key]
    if isinstance(value, str) and (key in ("messages", "message") or value.lstrip().startswith("[{")):
        value = _parsed(key, value)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise RecordError(f"{key} must be a text or a list of chat turns, got {type(value).__name__}")
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise RecordError(f"{key} holds a turn whose role is not system, user or assistant: {turn!r:.80}")
        if not isinstance(turn.get("content"), str | list):
            raise RecordError(f"{key} holds a turn without content")
    return list(value)


def _parsed(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{key} is not valid JSON: {error}") from error


def _plain_text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)


# -- media ------------------------------------------------------------------------------------------------------------


def _listed_media(row: dict[str, Any], locate: Locate) -> dict[Kind, list[Media]]:
    """Media named beside the question, by kind, in order."""
    media: dict[Kind, list[Media]] = {"video": [], "image": []}
    if row.get("path"):
        kind = _kind_of_path(row)
        media[kind].append(_medium(kind, row["path"], locate))
    kinds: tuple[Kind, ...] = ("video", "image")
    for kind in kinds:
        for key in (f"{kind}s", kind):
            values = row.get(key)
            if values is not None and not isinstance(values, list):
                values = [values]
            media[kind] += [_medium(kind, value, locate) for value in values or ()]
    return media


def _kind_of_path(row: dict[str, Any]) -> Kind:
    declared = row.get("data_type")
    if declared in ("video", "image"):
        return "video" if declared == "video" else "image"
    if declared:
        raise RecordError(f"data_type must be video or image for a record with a path, got {declared!r}")
    return "image" if str(row["path"]).lower().endswith(tuple(IMAGE_SUFFIXES)) else "video"


def _medium(kind: Kind, value: Any, locate: Locate) -> Media:
    """From a path, or from a dict as in chat parts, qwen-vl-utils (video_start, video_end) and `datasets` images."""
    start = end = None
    if isinstance(value, dict):
        start, end = value.get("video_start"), value.get("video_end")
        source = next((value[key] for key in ("bytes", kind, f"{kind}_url", "path", "url") if value.get(key)), None)
        source = source.get("url") if isinstance(source, dict) else source
    else:
        source = value
    if not isinstance(source, str | bytes):
        raise RecordError(f"a {kind} must be the path of a file, got {value!r:.80}")
    path = locate(source)
    if kind == "image":
        return Image(path)
    return Video(path, _seconds(start), _seconds(end))


def _seconds(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise RecordError(f"video_start and video_end must be seconds, got {value!r:.80}")
    return None if value is None else float(value)


def _with_media(turns: list[dict[str, Any]], listed: dict[Kind, list[Media]], locate: Locate) -> tuple[Message, ...]:
    """Chat turns with media in the place of markers, or before the first question where there are no markers."""
    waiting = {kind: list(media) for kind, media in listed.items()}
    marked: set[Kind] = set()

    def take(kind: Kind) -> Media:
        marked.add(kind)
        if not waiting[kind]:
            raise RecordError(f"has more <{kind}> markers than {kind}s ({len(listed[kind])})")
        return waiting[kind].pop(0)

    messages = [Message(turn["role"], tuple(_parts(turn["content"], take, locate))) for turn in turns]
    ahead: list[Media] = []
    for kind, media in waiting.items():
        if media and kind in marked:
            raise RecordError(f"has fewer <{kind}> markers than {kind}s ({len(listed[kind])})")
        ahead += media
    first = next(number for number, message in enumerate(messages) if message.role == "user")
    messages[first] = Message("user", (*ahead, *messages[first].parts))
    return tuple(messages)


def _parts(content: str | list[Any], take: Callable[[Kind], Media], locate: Locate) -> list[str | Media]:
    parts: list[str | Media] = []
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, dict) and part.get("type") in _MEDIA_PARTS:
            kind: Kind = "video" if part["type"].startswith("video") else "image"
            parts.append(_medium(kind, part, locate) if _named(part) else take(kind))
            continue
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise RecordError(f"has a chat part that is neither text, image nor video: {part!r:.80}")
        for piece in _MARKER.split(text):
            if piece in ("<video>", "<image>"):
                parts.append(take("video" if piece == "<video>" else "image"))
            elif piece.strip():
                parts.append(piece.strip("\n"))
    return parts


def _named(part: dict[str, Any]) -> bool:
    """Whether a media part of a chat turn says which file it shows."""
    kind = part["type"].removesuffix("_url")
    return any(part.get(key) for key in (kind, f"{kind}_url", "path", "url"))


# -- gold and options -------------------------------------------------------------------------------------------------


def _gold(row: dict[str, Any], closing: str) -> str:
    values = [row.get(key) for key in GOLD_KEYS]
    values += [_nested(row, "reward_model", "ground_truth"), _nested(row, "extra_info", "answer"), closing]
    for value in values:
        if isinstance(value, str) and (tagged := _TAGGED.search(value)):
            return tagged[1].strip()
    gold = next((_gold_text(value) for value in values if value not in (None, "")), "")
    if not gold:
        raise RecordError(f"has no gold answer: none of {', '.join(GOLD_KEYS)}, reward_model.ground_truth has a value")
    return gold


def _gold_text(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():  # Arrow turns whole numbers into floats beside missing ones
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordError(f"the gold answer must be a text or a number, got {value!r:.80}")
    return str(value).strip()


def _options(value: Any) -> tuple[str, ...]:
    """Texts without their letters, when every one carries its own."""
    if isinstance(value, dict):  # Arrow keeps every letter that any record has, as None where this one has it not
        value = [text for _, text in sorted(value.items()) if text is not None]
    if value is not None and not isinstance(value, list):
        raise RecordError(f"options must be a list, got {value!r:.80}")
    options = tuple(str(option).strip() for option in value or ())
    matches = [re.match(rf"\(?{chr(65 + i)}[.):]\s*(.+)", option, re.DOTALL) for i, option in enumerate(options)]
    return tuple(match[1].strip() for match in matches if match) if all(matches) else options


def _first(row: dict[str, Any], keys: tuple[str, ...], otherwise: Any) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), otherwise)


def _nested(row: dict[str, Any], outer: str, inner: str) -> Any:
    value = row.get(outer)
    return value.get(inner) if isinstance(value, dict) else None
