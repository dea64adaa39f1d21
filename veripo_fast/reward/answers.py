"""Reading completions: the think and answer spans, and what an answer says (a choice, a text).

Numbers are read in number_answers.py and mathematics in math_answers.py. A reader returns None for an answer that
hedges ("A or B"), so hedging never scores. Nothing here needs torch.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_ANSWER = 2000
"""Characters; a longer answer names no choice and no number."""
_LETTERS_WITHOUT_OPTIONS = 10
_DEEPEST_NESTING = 4


@dataclass(frozen=True)
class Parsed:
    """The two spans of a completion, white space stripped."""

    think: str | None
    """None when <think> and </think> do not each occur once in that order, or when nothing lies between them."""
    answer: str | None
    """None when <answer> and </answer> do not each occur once in that order, or when nothing lies between them."""
    format_ok: bool
    """Whether the whole completion has the one accepted form."""


def parse_completion(text: str) -> Parsed:
    """Read `<think>...</think> <answer>...</answer>`.

    format_ok: each of the four tags occurs exactly once, the think span is not empty, only white space lies between
    </think> and <answer>, and the answer is not empty. New lines are allowed everywhere, and so is text before <think>
    and after </answer> (it is never scored). Two answer spans are no answer at all: hedging does not pay.
    """
    think, answer = _span(text, "<think>", "</think>"), _span(text, "<answer>", "</answer>")
    if think is None or answer is None:
        return Parsed(think, answer, False)
    between = text[text.index("</think>") + len("</think>"):text.index("<answer>")]
    adjoining = text.index("</think>") < text.index("<answer>") and not between.strip()
    return Parsed(think, answer, adjoining)


def _span(text: str, opening: str, closing: str) -> str | None:
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    return text[text.index(opening) + len(opening):text.index(closing)].strip() or None


def answer_prefix(text: str) -> str | None:
    """The completion up to the first character of its answer, or None when `parse_completion` finds no answer."""
    if parse_completion(text).answer is None:
        return None
    start = text.index("<answer>") + len("<answer>")
    return text[:start] + re.match(r"\s*", text[start:]).group()  # type: ignore[union-attr]


_WRAPPER = re.compile(
    r"\\(?:boxed|fbox|emph|operatorname|text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt))\s*\{([^{}]*)\}")
_MARKS = re.compile(r"\\?\$|\\[()\[\]]|\*\*|`")


def plain(text: str) -> str:
    r"""Text without LaTeX wrappers (`$B$`, `\text{B}`, `\boxed{B}`, `\(B\)`) and Markdown marks (`**B**`)."""
    for _ in range(_DEEPEST_NESTING):
        text = _WRAPPER.sub(r"\1", text)
    return _MARKS.sub("", text).strip()


def letters(options: Sequence[str] = ()) -> str:
    """The letters an answer may use: one per option, or A to J when the options are unknown."""
    return string.ascii_uppercase[:len(options) or _LETTERS_WITHOUT_OPTIONS]


_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence|my|the|final|correct|best|right|it|is|i|choose|pick|select)\b[\s,:]*)*"
    r"(?:answer|option|choice)\b\s*(?:(?:is|would be|should be|must be|[:=])\s*)*(?:(?:the\s+)?(?:option|choice)\s+)?",
    re.IGNORECASE)
_BARE_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?\s*[.,:;)]?")
_LETTER_THEN_TEXT = re.compile(r"[(\[]?([A-Za-z])\s*[)\].:]+\s*(.+)", re.DOTALL)
_LETTER_SPACE_TEXT = re.compile(r"[(\[]?([A-Za-z])[)\]]?[\s,–—-]+(.+)", re.DOTALL)
_OTHER_LETTER = re.compile(
    r"(?:^|(?:\b(?:or|and|not)|[/,&])\s*)[(\[]?[A-J][)\]]?(?=$|[\s.,:;/)&])|[(\[][A-J][)\]]")


def read_choice(text: str, options: Sequence[str] = ()) -> str | None:
    r"""The one choice that an answer names, as a capital letter; None when it names none, several or one out of range.

    Accepted: `B`, `b`, `(B)`, `B.`, `B. Chair`, `Option B`, `The answer is B`, `$B$`, `\text{B}`, `\boxed{B}`, and
    the option's own text. A letter with the text of another option is no answer.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    text = unicodedata.normalize("NFKC", plain(text)).strip(" \t\r\n\"'“”‘’")
    lead_in = _LEAD_IN.match(text)
    attempts = [text] if lead_in is None else [text, text[lead_in.end():].strip()]
    for attempt in attempts:
        letter = _bare_letter(attempt) or _option_of(attempt, options) or _lettered(attempt, options)
        if letter is not None:
            return letter if letter in letters(options) else None
    return None


def _bare_letter(text: str) -> str | None:
    match = _BARE_LETTER.fullmatch(text)
    return match.group(1).upper() if match else None


def _option_of(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text this is; articles and punctuation count only to break a tie."""
    for form in (_folded, normalise_text):
        wanted = form(text)
        found = [letter for letter, option in zip(letters(options), options, strict=False) if form(option) == wanted]
        if wanted and len(found) == 1:
            return found[0]
    return None


def _lettered(text: str, options: Sequence[str]) -> str | None:
    """`B. Chair`: the letter, unless what follows is another option's text or names another letter."""
    match = _LETTER_SPACE_TEXT.fullmatch(text)
    if match and _option_of(match.group(2), options) == match.group(1).upper():
        return match.group(1).upper()
    match = _LETTER_THEN_TEXT.fullmatch(text)
    if match is None:
        return None
    letter, rest = match.group(1).upper(), match.group(2)
    named = _option_of(rest, options)
    if named is not None:
        return letter if named == letter else None
    return None if _OTHER_LETTER.search(rest) else letter


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", plain(text)).casefold().split()).strip(" .,;:!?\"'()")


_ARTICLES = frozenset(("a", "an", "the"))
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_KEPT_POINT = re.compile(r"(?<=\d)\.(?=\d)|(?<![^\W_])\.(?=\d)|(?<![^\W_])-(?=[.\d])")


def normalise_text(text: str) -> str:
    """Text for comparison: no LaTeX wrappers, case, punctuation or articles; single spaces.

    A point inside a number, the minus before one and the percent sign stay: "-2.5" is not "25".
    """
    text = unicodedata.normalize("NFKC", plain(text)).casefold().replace("\u2212", "-")
    text = _THOUSANDS.sub("", re.sub(r"['’]", "", text))
    kept = {match.start() for match in _KEPT_POINT.finditer(text)}
    words = "".join(character if index in kept or _is_word(character) else " "
                    for index, character in enumerate(text)).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "%" or unicodedata.category(character)[0] == "M"


_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


def words(text: str) -> list[str]:
    """The words of `normalise_text`; each Chinese character or Japanese kana is a word."""
    return _TOKEN.findall(normalise_text(text))
