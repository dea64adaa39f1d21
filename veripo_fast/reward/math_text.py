r"""The one mathematical expression of an answer, in LaTeX: `The answer is $2\sqrt{3}$ cm`, `2√3`, `x²`, `60°`.

An answer with two expressions, or with a rest that changes the expression ("not $12$", "$12$ x"), has none.
"""

from __future__ import annotations

import re

from veripo_fast.reward.answers import LONGEST_ANSWER, clean
from veripo_fast.reward.number_answers import CHANGED
from veripo_fast.reward.number_signs import plain_signs
from veripo_fast.reward.units import measure

LONGEST = 1000
"""Characters of an expression that is compared."""
_SEGMENT = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{(.*)\}", re.DOTALL)
_SEVERAL = re.compile(r"\b(?:or|either|maybe)\b", re.IGNORECASE)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_OUTSIDE = re.compile(r"[\d^+*/<>=|_√±≠≤≥{}'\"\\-]")
_ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]*)\)|\{([^{}]*)\})")
_SIGNS = {"π": r"\pi ", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ",
          "∞": r"\infty ",
          "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "−": "-",
          "∅": r"\emptyset ", "α": r"\alpha ", "β": r"\beta ", "θ": r"\theta ", "λ": r"\lambda ",
          "φ": r"\phi ", "ω": r"\omega "}
_PRIME = re.compile(r"\d\s*['\"′″]")


def math_text(text: str) -> str:
    r"""The one expression in a text, without `$` and `\boxed`; empty when there is none, several,
          or an unread rest."""
    if len(text) > LONGEST_ANSWER:
        return ""
    text = _latex(clean(text))
    found = list(_SEGMENT.finditer(text))
    if len(found) > 1 or _SEVERAL.search(text) or not text.isascii() or _PRIME.search(text):
        return ""
    if CHANGED.search(_COMMAND.sub(" ", text)):
        return ""
    if found and _changes(text[:found[0].start()] + " " + text[found[0].end():]):
        return ""
    text = (next(part for part in found[0].groups() if part) if found else text).strip()
    boxed = _BOXED.fullmatch(text.rstrip(" .,;"))
    text = (boxed.group(1) if boxed else text).strip().rstrip(".,;").strip()
    return text if len(text) <= LONGEST else ""


def _latex(text: str) -> str:
    text = plain_signs(text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2] or match[3] or ''}}}", text)
    return "".join(_SIGNS.get(character, character) for character in text) if not text.isascii() else text


def _changes(rest: str) -> bool:
    """Whether the text around an expression is more than words and a unit."""
    alone = re.findall(r"(?<!\w)[A-Za-z](?!\w)", rest)
    return bool(_OUTSIDE.search(rest)) or any(measure(letter) is None and letter not in "aAI" for letter in alone)


def constant_sides(text: str) -> list[str]:
    """The sides of an equation that hold no variable,
          the last one among them; none when that one holds a variable."""
    sides = [side.strip() for side in re.split(r"=", math_text(text))]
    constant = [side for side in sides if side and not _has_a_variable(side)]
    return constant if constant and constant[-1] == sides[-1] else []


def _has_a_variable(side: str) -> bool:
    return bool(re.search(r"[^\W\d_]", re.sub(r"\\text\s*\{[^{}]*\}", "", _COMMAND.sub(" ", side)).replace("e^", "")))
