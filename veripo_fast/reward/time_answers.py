"""Reading times: spans (`3.5 to 7.2`, `[00:03, 00:07]`, `{"time": [3.5, 7.2]}`) and single times, graded against gold.

Every word of an answer must be one that may stand beside a time: "not from 3 to 7", "frames 3 to 7", "3 to 7 or 9" and
"-3 to 7" are no spans. A span that ends before it starts, or is empty, is none either.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any

from veripo_fast.reward.answers import LONGEST_ANSWER, clean, plain

Span = tuple[float, float]
"""Start and end in seconds, start < end."""
MOST_SPANS = 64
SECONDS_OF_A_POINT = 2.0
LAST_SECONDS = 10.0
_SCALES = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(
    r"(?<![.:_\d-])(?:(?<![a-z])|(?<=\d[hms]))(?:(?:(?P<hours>\d{1,3}):(?P<minutes>[0-5]?\d)|(?P<only>\d{1,3})):"
    r"(?P<seconds>[0-5]\d(?:\.\d*)?)(?![\d:])"
    r"|(?P<number>\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})(?![\d:])\s*"
    r"(?P<unit>(?:ms|msecs?|milliseconds?|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h)(?![a-z]))?)")
_COMPOUND = re.compile(r"(?:\s|,|and)*")
_DASH = re.compile(r"(?<=[\dsmh])\s*(?:[-‐-―−~〜～]|-{1,2}>|→|=>)\s*(?=[\d.])")
_WORDS = frozenset((
    "", "the", "a", "an", "answer", "is", "it", "event", "action", "video", "clip", "moment", "segment", "span", "in",
    "interval", "time", "times", "timestamp", "timestamps", "period", "of", "this", "that", "from", "to", "and", "at",
    "between", "until", "till", "through", "starts", "start", "starting", "begins", "begin", "ends", "end", "ending",
    "happens", "occurs", "happening", "occurring", "takes", "place", "during", "so", "therefore", "final", "about",
    "approximately", "around", "roughly", "located", "range", "second", "seconds"))
_FINISH = re.compile(r"\b(?:ends?|ending|until|till|through|to)\b")
_BEGIN = re.compile(r"\b(?:starts?|starting|begins?|from)\b")
_REST = re.compile(r"[\s\[\](){},.;:\"'|<>*_=]+")
_PAIRS = (("start", "end"), ("start_time", "end_time"), ("begin", "end"), ("from", "to"))
_HOLDERS = ("time", "times", "timestamp", "timestamps", "span", "spans", "segment", "segments", "interval", "answer",
            "glue")
_TAGS = re.compile(r"</?(?:time|times|timestamp|timestep|span|glue)>", re.IGNORECASE)
_CHINESE = {"秒": " s ", "分钟": " m ", "分": " m ", "到": " to ", "至": " to ", "从": " from ", "第": " "}
_FENCE = re.compile(r"\A\s*```(?:json)?\s*(.*?)\s*```\s*\Z", re.DOTALL)


def time_span_accuracy(answer: str, gold: str) -> float:
    """Temporal IoU in [0, 1] of the answer's span and the gold's, in seconds (VideoChat-R1, Time-R1, OneThinker).

    A gold of several spans is their union, and so is an answer to it; of one span, an answer must be one span too.
    """
    wanted, given = read_spans(gold), read_spans(answer)
    if not wanted or not given or (len(wanted) == 1 and len(given) != 1):
        return 0.0
    return spans_iou(given, wanted)


def spans_iou(one: list[Span], other: list[Span]) -> float:
    """Length of the intersection over that of the union of two unions of spans."""
    one, other = _merged(one), _merged(other)
    common = sum(max(0.0, min(end, stop) - max(start, begin)) for start, end in one for begin, stop in other)
    union = sum(end - start for start, end in (*one, *other)) - common
    return min(1.0, max(0.0, common / union)) if union > 0 and math.isfinite(union) else 0.0


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def timestamp_accuracy(answer: str, gold: str) -> float:
    """exp(-|difference| / 2 s) of two times, 0 beyond 10 s: OneThinker's term for the key frame of a video.

    Differences of 0, 0.5, 1, 2 and 5 s give 1, 0.78, 0.61, 0.37 and 0.08.
    """
    wanted, given = read_time(gold), read_time(answer)
    if wanted is None or given is None or abs(given - wanted) > LAST_SECONDS:
        return 0.0
    return math.exp(-abs(given - wanted) / SECONDS_OF_A_POINT)


def read_time(text: str) -> float | None:
    """Seconds of the one time that a text states, None for none or several: `83`, `1:23`, `1 min 23 s`, `at 1m23s`."""
    times = _times(text)
    return times[0] if times is not None and len(times) == 1 else None


def read_spans(text: str) -> list[Span]:
    """The spans of a text in seconds; none when any of it cannot be read, or a span is reversed or empty."""
    held = _held(text)
    if held is not None:
        return _of_json(held) or []
    times = _times(text)
    if times is None or not times or len(times) % 2 or len(times) > 2 * MOST_SPANS:
        return []
    return _checked(list(zip(times[::2], times[1::2], strict=True)))


def _checked(spans: list[Span]) -> list[Span]:
    return spans if all(0 <= start < end < math.inf for start, end in spans) else []


def _held(text: str) -> Any:
    """What a text holds as JSON with keys, or None: lists and plain times are read as text."""
    text = (_FENCE.sub(r"\1", text) if "```" in text else text).strip()
    if len(text) > LONGEST_ANSWER or not text.startswith(("{", "[{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_json(value: Any) -> list[Span] | None:
    """Spans of `{"time": [3, 7]}`, `{"start": 3, "end": 7}` or a list of such; None for anything else."""
    if isinstance(value, list):
        parts = [_of_json(part) for part in value[:MOST_SPANS + 1]]
        if not parts or len(parts) > MOST_SPANS or not all(parts):
            return None
        return [span for part in parts if part for span in part]
    if not isinstance(value, dict):
        return None
    for first, last in _PAIRS:
        if first in value and last in value:
            return _checked_pair(value[first], value[last])
    holders = [key for key in _HOLDERS if key in value]
    if len(holders) != 1:
        return None
    held = value[holders[0]]
    if isinstance(held, list) and len(held) == 2 and not any(isinstance(part, list | dict) for part in held):
        return _checked_pair(*held)
    return read_spans(json.dumps(held)) if isinstance(held, list) else read_spans(str(held))


def _checked_pair(first: Any, last: Any) -> list[Span] | None:
    ends = [None if isinstance(part, bool | list | dict) else read_time(str(part)) for part in (first, last)]
    return _checked([(ends[0], ends[1])]) if ends[0] is not None and ends[1] is not None else None


def _times(text: str) -> list[float] | None:
    """The times of a text, in order; None when something else stands in it."""
    if len(text) > LONGEST_ANSWER:
        return None
    text = _TAGS.sub(" ", text.replace("```json", "").replace("```", ""))
    text = unicodedata.normalize("NFKC", plain(clean(text))).lower()
    if not text.isascii():
        for sign, ours in _CHINESE.items():
            text = text.replace(sign, ours)
    text = _DASH.sub(" to ", text)
    found = list(_TIME.finditer(text))
    rest = _TIME.sub(" ", text)
    if not found or not all(word in _WORDS for word in _REST.split(rest)):
        return None
    finish, begin = _FINISH.search(rest), _BEGIN.search(rest)
    if finish and begin and finish.start() < begin.start():
        return None
    parts = _joined(found, text)
    last = next((scale for _, scale in reversed(parts) if scale is not None), 1.0)
    times = [value * (last if scale is None else scale) for value, scale in parts]
    return times if all(map(math.isfinite, times)) else None


def _joined(found: list[re.Match[str]], text: str) -> list[tuple[float, float | None]]:
    """(value, seconds of its unit) of each time; `1 min 30 s` is one, and a unit of the last holds for bare numbers."""
    parts: list[tuple[float, float | None]] = []
    previous: tuple[int, float] | None = None
    for match in found:
        value, scale = _value(match)
        joins = (previous is not None and scale is not None and match["unit"] and scale < previous[1]
                 and _COMPOUND.fullmatch(text, previous[0], match.start()))
        if joins and parts[-1][1] is not None:
            parts[-1] = (parts[-1][0] * parts[-1][1] + value * (scale or 1.0), 1.0)
        else:
            parts.append((value, scale))
        previous = (match.end(), scale) if match["unit"] and scale is not None else None
    return parts


def _value(match: re.Match[str]) -> tuple[float, float | None]:
    if match["seconds"]:
        minutes = int(match["minutes"]) + 60 * int(match["hours"]) if match["hours"] else int(match["only"])
        return 60.0 * minutes + float(match["seconds"]), 1.0
    unit = match["unit"]
    if unit is None:
        return float(match["number"]), None
    return float(match["number"]), _SCALES["ms" if unit.startswith(("ms", "milli")) else unit[0]]
