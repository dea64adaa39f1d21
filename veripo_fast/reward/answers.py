"""Reading the text of an answer.

The spans of a completion are found in spans.py. Choices are read in choice_answers.py, numbers in number_answers.py,
mathematics in math_answers.py. A reader returns None for an answer that hedges ("A or B") or that it cannot read to its
end. Nothing here needs torch.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

LONGEST_ANSWER = 2000
"""Characters; a longer answer names no choice and no number."""
_DEEPEST_NESTING = 4


def clean(text: str) -> str:
    """Text without characters that nobody sees: control characters, zero-width spaces, marks of direction."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(character for character in text
                   if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf"))


_WRAPPER = re.compile(
    r"\\(?:boxed|fbox|emph|operatorname|text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf|tt))\s*\{([^{}]*)\}")
_MARKS = re.compile(r"\\?\$|\\[()\[\]]|\*\*|`")


def plain(text: str) -> str:
    r"""Text without LaTeX wrappers (`$B$`, `\text{B}`, `\boxed{B}`, `\(B\)`) and Markdown marks (`**B**`)."""
    for _ in range(_DEEPEST_NESTING):
        text = _WRAPPER.sub(r"\1", text)
    return _MARKS.sub("", text).strip()


_ARTICLE = re.compile(r"(?<![^\W_])(?:(?:\A\W*a|\A\W*A|(?<!\w)a)(?=\s+[^\W\d_]{2})|(?i:an|the)(?=\s+\w))\s+")
"""`a` is an article before a word, `A` only where it begins the text: `Vitamin A`, `A. Chair`, `A B` name a letter."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_KEPT_POINT = re.compile(r"(?<=\d)\.(?=\d)|(?<![^\W_])\.(?=\d)|(?<![^\W_])-(?=[.\d])")

_MARK_OF = {".": "\ue000", "-": "\ue001"}
"""What holds the place of a point and a minus that stay: characters of private use, which are no part of a word."""
_NO_MARKS = {ord(mark): " " for mark in _MARK_OF.values()}
_POINT_OF = {ord(mark): point for point, mark in _MARK_OF.items()}


def normalise_text(text: str) -> str:
    """Text for comparison: no LaTeX wrappers, case, punctuation or articles; single spaces.

    A point inside a number, the minus before one and the percent sign stay: "-2.5" is not "25".
    """
    text = _ARTICLE.sub(" ", compatible(plain(clean(text))).replace("\u2212", "-")).casefold()
    text = _THOUSANDS.sub("", re.sub(r"['’]", "", text))
    text = _KEPT_POINT.sub(lambda match: _MARK_OF[match.group()], text.translate(_NO_MARKS))
    dropped = {ord(character): " " for character in set(text) if not _is_word(character)}
    return " ".join(text.translate(dropped | _POINT_OF).split())


def compatible(text: str) -> str:
    """NFKC of a text; a text that it makes more than twice as long stays, because U+FDFA alone becomes 18 letters."""
    if text.isascii():
        return text
    length = sum(count * len(unicodedata.normalize("NFKC", character)) for character, count in Counter(text).items())
    return text if length > 2 * len(text) + 64 else unicodedata.normalize("NFKC", text)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "%" or unicodedata.category(character)[0] == "M"


WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
"""A word; each Chinese character or Japanese kana is one."""


def words(text: str) -> list[str]:
    """The words of `normalise_text`; each Chinese character or Japanese kana is a word."""
    return WORD.findall(normalise_text(text))
