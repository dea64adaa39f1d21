"""Reading which answer a reasoning text arrives at, by rules: no model, and never the gold answer.

A conclusion is what follows a marker ("so", "therefore", "the answer is") up to the end of its sentence, when it names
exactly one answer: an option's letter, an option's text, a number, or one of the answers that the group gave. Precision
before recall: without a marker, or with several answers after it, there is no conclusion, and neither where the text
takes its last one into doubt ("Wait, ...") and draws no other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

from veripo_fast.reward.answers import normalise_text, plain
from veripo_fast.reward.choice_answers import letters
from veripo_fast.reward.number_answers import Number, find_numbers, read_number
from veripo_fast.reward.units import measure
from veripo_fast.types import Prompt

_WEAK = (r"(?<!\bif )(?<!\bor )(?<!\bnot )\bso\b(?!\s+(?:far|that|many|much|long|as|on)\b)"
         r"|\b(?:therefore|thus|hence|consequently|accordingly|overall|altogether"
         r"|in (?:conclusion|summary|total|short)|it follows|(?:i|we)(?: can)? conclude"
         r"|(?:this|which|that|it) (?:means|implies|suggests|shows|indicates))\b")
_STRONG = (r"\b(?:answer|choice|option|solution)\b(?:\s+(?:here|then))?\s*"
           r"(?::|=|(?:is|would be|should be|must be|has to be)\b(?!\s+(?:not|wrong|incorrect|correct)\b))"
           r"|\bi(?:'ll| will|'d| would)? (?:choose|pick|select|go with)\b")
_MARKER = re.compile(rf"(?P<strong>{_STRONG})|(?P<weak>{_WEAK})", re.IGNORECASE)
_LETTER_IS_RIGHT = re.compile(
    r"(?:\b(?i:option|choice|answer)\s+)?\(?\b([A-Z])\)?\s+(?:is|must be|should be)\s+(?:the\s+)?"
    r"(?:(?:correct|right|best)(?:\s+(?:answer|option|choice|one))?|answer)\b")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n")
_BEGIN = re.compile(r"\S")
_LONGEST_SENTENCE = 500
"""Characters after a marker that are read, so that no text takes long."""
_MOST_MARKERS = 1000
"""Markers that are read at each end of a text: the first and the last conclusion are what matters. A completion of
100,000 characters can hold 33,000, and nobody reasons so."""
_NEAR = 12
"""Characters after a strong marker within which an answer is the one meant, whatever else the sentence mentions."""


@dataclass(frozen=True)
class Conclusion:
    """One place where the text draws a conclusion."""

    answer: str | None
    """Letter, number or text; None when the sentence names several answers."""
    start: int
    """Where the marker stands, in the text without LaTeX wrappers."""
    end: int = 0
    """Where its sentence ends, or the part of it before a doubt ("so B, wait, no")."""


@dataclass(frozen=True)
class _Mention:
    answer: str
    start: int
    end: int


def conclusions(think: str, prompt: Prompt, given: Sequence[str] = ()) -> list[Conclusion]:
    """Every conclusion of a reasoning text in order; `given` are the answers that open questions may end in."""
    return _conclusions(plain(think), prompt, given)


def _conclusions(think: str, prompt: Prompt, given: Sequence[str]) -> list[Conclusion]:
    """`think` without LaTeX wrappers, in which `start` and `end` count."""
    found = [Conclusion(match.group(1), match.start(), match.end()) for match in _LETTER_IS_RIGHT.finditer(think)
             if prompt.problem_type == "choice" and match.group(1) in letters(prompt.options)]
    read = _Reader(prompt, tuple(given))
    markers = list(_MARKER.finditer(think))
    both = list(zip_longest(markers, markers[1:]))
    for marker, following in both if len(both) <= 2 * _MOST_MARKERS else both[:_MOST_MARKERS] + both[-_MOST_MARKERS:]:
        end = min(following.start() if following else len(think), marker.end() + _LONGEST_SENTENCE)
        begin = _BEGIN.search(think, marker.end(), end)
        sentence_end = _SENTENCE_END.search(think, begin.start() if begin else end, end)
        end = sentence_end.start() if sentence_end else end
        strong = bool(marker["strong"])
        answers = read.answers(think[marker.end():end], strong)
        if answers:
            doubt = _DOUBT.search(think, marker.end(), end)
            if doubt and read.answers(think[marker.end():doubt.start()], strong):
                end = doubt.start()
            found.append(Conclusion(answers[0] if len(answers) == 1 else None, marker.start(), end))
    return sorted(found, key=lambda conclusion: conclusion.start)


def supported_answer(think: str, prompt: Prompt, given: Sequence[str] = ()) -> str | None:
    """The answer of the last conclusion; None when the text draws none, when the last is ambiguous, and when a
    reflection follows that ends in no conclusion of its own."""
    think = plain(think)
    found = _conclusions(think, prompt, given)
    return None if not found or _DOUBT.search(think, found[-1].end) else found[-1].answer


class _Reader:
    """Reads concluding sentences for one prompt, equal ones once; `given` as in `conclusions`."""

    def __init__(self, prompt: Prompt, given: tuple[str, ...]) -> None:
        self.prompt = prompt
        numbers = len(given) > 0 and all(map(read_number, given))
        self.numeric = numbers or prompt.problem_type in ("number", "estimate")
        short = tuple(text for text in given if len(text) <= _LONGEST_SENTENCE)
        self.phrases = _phrase_patterns(short, short)
        self._known: dict[tuple[str, bool], list[str]] = {}

    def answers(self, span: str, strong: bool) -> list[str]:
        """The distinct answers that one concluding sentence names."""
        key = (span, strong)
        if key not in self._known:
            self._known[key] = self._read(span, strong)
        return self._known[key]

    def _read(self, span: str, strong: bool) -> list[str]:
        if self.prompt.problem_type == "choice":
            return _distinct(_choices(span, self.prompt.options), strong)
        if self.numeric:
            stated = _numbers(span, strong)
            return stated if self.prompt.problem_type in _MEASURED else [text.split()[0] for text in stated]
        mentions = _phrases(span, self.phrases)
        if not mentions and strong and span.strip(" :.,"):
            return [span.strip(" :.,")]
        return _distinct(mentions, strong)


def _distinct(mentions: list[_Mention], strong: bool) -> list[str]:
    mentions = sorted(mentions, key=lambda mention: mention.start)
    if strong and mentions and mentions[0].start <= _NEAR:
        mentions = mentions[:1]
    return list(dict.fromkeys(mention.answer for mention in mentions))


# Choices

_LETTER = re.compile(r"(?i:option|choice)\s+\(?([A-Z])\)?(?![\w'])|\(([A-Za-z])\)|(?<![\w'(])([B-HJ-Z])(?![\w'])"
                     r"|(?<![\w'(])([AI])(?=\s*(?:$|[.,:!?)]|is\b|because\b|since\b))")


def _choices(span: str, options: tuple[str, ...]) -> list[_Mention]:
    """Options named by letter or by text; numeric options also by value (`three`)."""
    allowed = letters(options)
    lettered = [_Mention(letter, match.start(), match.end()) for match in _LETTER.finditer(span)
                if (letter := next(group for group in match.groups() if group).upper()) in allowed]
    values = _option_values(options)
    if len(values) == len(options) > 0:
        return _outermost(span, lettered) or [_Mention(values[value], 0, 0) for text in _numbers(span, strong=False)
                                              if (value := float(text.split()[0].rstrip("%"))) in values]
    phrases = _phrases(span, _phrase_patterns(options, tuple(allowed)))
    return _outermost(span, lettered + phrases) or _distinctive(span, options)


@lru_cache(maxsize=256)
def _option_values(options: tuple[str, ...]) -> dict[float, str]:
    """Value -> letter of the options that are numbers."""
    return {number.value: letter for option, letter in zip(options, letters(options), strict=False)
            if (number := read_number(option)) is not None}


@lru_cache(maxsize=256)
def _phrase_patterns(texts: tuple[str, ...], answers: tuple[str, ...]) -> list[tuple[re.Pattern[str], str]]:
    """What finds each text as whole words, articles aside, and the answer that it stands for."""
    patterns = []
    for text, answer in dict(zip(texts, answers, strict=False)).items():
        said = re.findall(r"[^\W_]+", plain(text).casefold())
        said = said[1:] if len(said) > 1 and said[0] in ("a", "an", "the") else said
        pattern = r"(?<![\w.])" + r"(?:\W+(?:an?|the))?\W+".join(map(re.escape, said)) + r"(?!\w)(?!\.\d)"
        if said:
            patterns.append((re.compile(pattern, re.IGNORECASE), answer))
    return patterns


def _phrases(span: str, patterns: Sequence[tuple[re.Pattern[str], str]]) -> list[_Mention]:
    """Where the texts stand in the span; longer ones hide those inside them."""
    return _outermost(span, [_Mention(answer, match.start(), match.end())
                             for pattern, answer in patterns for match in pattern.finditer(span)])


def _outermost(span: str, mentions: list[_Mention]) -> list[_Mention]:
    """Drop mentions inside longer ones ("right" in "top right") and those that the text denies ("not left")."""
    def hidden(mention: _Mention) -> bool:
        return any(other.start <= mention.start and mention.end <= other.end
                   and other.end - other.start > mention.end - mention.start for other in mentions)

    return [mention for mention in mentions if not hidden(mention) and not _denied(span, mention)]


_DENIAL = re.compile(
    r"(?:\b(?:not|never|rather than|instead of|neither|nor|unlike|except)|n't)(?:\s+(?!but\b)[\w-]+){0,3}\s*\(?$",
    re.IGNORECASE)
_REFUTED = re.compile(
    r"\W*(?:is|are|was|were|can be|must be)(?:\s+not|n't|\s+(?:wrong|incorrect|false|ruled|excluded))\b",
    re.IGNORECASE)


def _denied(span: str, mention: _Mention) -> bool:
    return bool(_DENIAL.search(span[:mention.start]) or _REFUTED.match(span[mention.end:]))


def _distinctive(span: str, options: tuple[str, ...]) -> list[_Mention]:
    """Options whose distinguishing words all occur: "It moves to the right" is meant by "moving right"."""
    said = set(normalise_text(span).split())
    if said & {"not", "never", "isnt", "doesnt"}:
        return []
    return [_Mention(letter, 0, 0) for letter, words in zip(letters(options), _own_words(options), strict=False)
            if words and words <= said]


@lru_cache(maxsize=256)
def _own_words(options: tuple[str, ...]) -> list[set[str]]:
    """The words of each option that the options do not all share."""
    worded = [set(normalise_text(option).split()) for option in options]
    shared = set.intersection(*worded) if worded else set()
    return [words - shared for words in worded]


# Numbers

_MEASURED = ("number", "rounded", "quantity", "estimate")
"""Types whose answers are compared as measures."""
_TIME = frozenset(("s", "sec", "secs", "second", "seconds", "st", "nd", "rd", "th"))
_NOT_A_RESULT = frozenset(("at", "from", "frame", "frames", "second", "seconds", "of", "between", "option", "after",
                           "by"))
_RESULT = frozenset(("is", "are", "was", "were", "be", "total", "equals", "gives", "only", "exactly", "about", "just",
                     "count", "to", "has", "have", "see", "so"))


def _numbers(span: str, strong: bool) -> list[str]:
    """The number that a concluding sentence states, as text; several when it is unclear which one is meant."""
    span = re.split(r"=|≈|\bequals\b", span)[-1]
    found = [number for number in find_numbers(span) if not _is_pronoun(number, span)]
    for wanted in (lambda number: number.unit not in _TIME, lambda number: number.before not in _NOT_A_RESULT,
                   lambda number: number.before in _RESULT):
        if len({number.value for number in found}) > 1:
            found = [number for number in found if wanted(number)] or found
    texts = {f"{number.value:.12g}{'%' if number.percent else ''}": _unit(number) for number in reversed(found)}
    stated = [f"{text}{texts[text]}" for text in dict.fromkeys(reversed(texts))]
    return stated[:1] if strong else stated


def _unit(number: Number) -> str:
    """The unit of a measure, so that 200 cm are 2 m; `in` of "3 in all" and `a` are none."""
    return f" {number.unit}" if measure(number.unit) and number.unit not in ("in", "a") else ""


def _is_pronoun(number: Number, span: str) -> bool:
    """`one` in "the red one": counted only at the start of the sentence or after a word such as "is"."""
    return number.word == "one" and number.before not in _RESULT and not span.lower().lstrip(" :,").startswith("one")


# Reflection

_DOUBT = re.compile(
    r"(?<=[.!?;,:\n(\u2013\u2014-])\s{0,3}(?:(?:but|and|oh|hmm?|no)\b[\s,]{0,3})?"
    r"(?:(?:wait|hold on)\b(?!\s+(?:for|until|till|at|in|on|to)\b)|actually\b(?=\s*,|\s+\w))"
    r"|\b(?:on second thoughts?|scratch that|my mistake|i was wrong|i made a mistake"
    r"|(?:let me|let['\u2019]?s|i (?:should|must|need to))\s+(?:\w+\s+){0,2}(?:double[- ]?check"
    r"|re-?(?:check|count|examin|consider|evaluat|think)\w*|(?:look|check|think|count)\s+(?:\w+\s+){0,3}again)"
    r"|(?:that|this)(?:['\u2019]s|\s+(?:is|was|seems|looks|must be))\s+(?:wrong|incorrect|mistaken"
    r"|not\s+(?:right|correct))"
    r"|(?:that|this)\s+can(?:not|['\u2019]t)\s+be\b)\b", re.IGNORECASE)
"""A step back from what was just concluded. Narrower than `_REFLECTION`: behind a conclusion, "they wait for the bus"
and "there are actually 3" step back from nothing."""
_REFLECTION = re.compile(
    r"\b(?:wait|actually|hold on|on second thought|correction|my mistake|i was wrong|double[- ]?check"
    r"|re-?(?:check|examin|consider|evaluat)\w*|(?:look|check|think|count) again)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Reflection:
    """Signs that a reasoning text looks back at itself."""

    markers: int
    """Occurrences of words such as "wait", "actually", "let me check again"."""
    self_corrected: bool
    """Whether it first concludes one answer and at last another."""

    @property
    def reflective(self) -> bool:
        return self.markers > 0 and self.self_corrected


def reflectiveness(think: str, prompt: Prompt, given: Sequence[str] = ()) -> Reflection:
    """Read the signs of reflection in a think span."""
    answers = [conclusion.answer for conclusion in conclusions(think, prompt, given) if conclusion.answer is not None]
    return Reflection(len(_REFLECTION.findall(think)), len(answers) > 1 and answers[0] != answers[-1])
