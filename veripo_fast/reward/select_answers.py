"""Which choices an answer names, where several may be right (`A, C`, `A and C`, `(A)(C)`, `AC`), and yes or no."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from veripo_fast.reward.answers import LONGEST_ANSWER, clean, plain
from veripo_fast.reward.choice_answers import LEAD_INS, letters, read_choice

_SEPARATOR = re.compile(r"\s*(?:[,;/&+、，；\n|]|\band\b|\bas well as\b|和|及|與|与)*\s*", re.IGNORECASE)
_PLURAL = re.compile(
    r"(?:(?:so|thus|therefore|the|my|correct|right|final)\s+)*(?:answers?|options?|choices?|letters?)\b\s*"
    r"(?:(?:is|are|include|includes|[:=])\s*)*(?:(?:the\s+)?(?:options?|choices?|letters?)\b\s*:?\s*)?", re.IGNORECASE)
_BOTH = re.compile(r"(?:both|options?|choices?)\s+", re.IGNORECASE)
_RUN = re.compile(r"[A-Z]{2,26}")
_ALL = re.compile(r"all(?:\s+of\s+(?:them|the\s+above|these|the\s+options))?|everything", re.IGNORECASE)


def multi_select_accuracy(answer: str, gold: str, options: Sequence[str] = ()) -> float:
    """1 when the answer names the gold's choices, all of them and no other, else 0."""
    wanted, given = read_choices(gold, options), read_choices(answer, options)
    return float(wanted is not None and wanted == given)


def soft_select_accuracy(answer: str, gold: str, options: Sequence[str] = ()) -> float:
    """The share of the gold's choices that the answer names; 0 when it names another one: naming all does not pay."""
    wanted, given = read_choices(gold, options), read_choices(answer, options)
    if wanted is None or given is None or not given <= wanted:
        return 0.0
    return len(given) / len(wanted)


def read_choices(text: str, options: Sequence[str] = ()) -> frozenset[str] | None:
    """The letters of the choices that an answer lists; None when a rest is left, or a choice is listed twice.

    Accepted: `A`, `A, C`, `a and c`, `(A)(C)`, `AC`, `A. Bed, C. Table`, the options' own texts, `["A", "C"]`, `all of
    the above`, with a lead-in (`The answers are A and C`).
    """
    if len(text) > LONGEST_ANSWER:
        return None
    text = unicodedata.normalize("NFKC", plain(clean(text))).replace("。", ".").strip(" \t\r\n\"'“”‘’*_`")
    lister = _lister(tuple(options))
    starts = {match.end() for pattern in (*LEAD_INS, _PLURAL) if (match := pattern.match(text))} | {0}
    for start in sorted(starts):
        found = lister.read(text[start:])
        if found is not None:
            return found
    single = read_choice(text, options)
    return None if single is None else frozenset(single)


class _Lister:
    """Reads lists of these options."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self._letters = letters(options)
        self._all = frozenset(self._letters) if options else None
        folded = [" ".join(unicodedata.normalize("NFKC", plain(option)).casefold().split()).strip(" .")
                  for option in options]
        self._by_text = {text: letter for text, letter in zip(folded, self._letters, strict=False)
                         if (len(text) > 1 or text.isdecimal()) and folded.count(text) == 1}
        texts = "|".join(r"\s+".join(map(re.escape, text.split()))
                         for text in sorted(self._by_text, key=len, reverse=True)) or "(?!)"
        self._item = re.compile(
            rf"(?:options?\s+|choices?\s+)?(?:[(\[]\s*(?P<bracketed>[A-Za-z])\s*[)\]]|(?P<bare>[A-Za-z])(?![A-Za-z\d'’-]))"
            rf"(?:\s*[.:)=-]?\s*(?:the\s+|an?\s+)?(?P<own>{texts})(?!\w)|\s*[.:)](?=\s|$))?"
            rf"|(?:the\s+|an?\s+)?(?P<text>{texts})(?!\w)", re.IGNORECASE)

    def read(self, text: str) -> frozenset[str] | None:
        """The letters of a text that is a list and nothing else."""
        text = text.strip().rstrip(".!")
        listed = _json_list(text)
        if listed is not None:
            text = ", ".join(listed)
        if self._all is not None and _ALL.fullmatch(text):
            return self._all
        if _RUN.fullmatch(text) and list(text) == sorted(set(text)):
            return self._known(list(text))
        place = match.end() if (match := _BOTH.match(text)) else 0
        named: list[str] = []
        while place < len(text):
            item = self._item.match(text, place)
            letter = None if item is None else self._letter(item)
            if item is None or letter is None:
                return None
            named.append(letter)
            place = item.end()
            separator = _SEPARATOR.match(text, place)
            place = separator.end() if separator else place
        return self._known(named)

    def _letter(self, item: re.Match[str]) -> str | None:
        text = item["own"] or item["text"]
        of_text = self._by_text.get(" ".join(text.casefold().split())) if text else None
        letter = (item["bracketed"] or item["bare"] or of_text or "").upper()
        return None if not letter or (of_text is not None and of_text != letter) else letter

    def _known(self, named: list[str]) -> frozenset[str] | None:
        whole = frozenset(named)
        return whole if named and len(whole) == len(named) and whole <= set(self._letters) else None


def _json_list(text: str) -> list[str] | None:
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and value and all(isinstance(part, str) for part in value) else None


@lru_cache(maxsize=256)
def _lister(options: tuple[str, ...]) -> _Lister:
    return _Lister(options)


# -- yes and no -------------------------------------------------------------------------------------------------------

_YES = frozenset(("yes", "true", "y", "t", "yeah", "yep", "是", "对", "對", "はい", "sí", "oui", "ja"))
_NO = frozenset(("no", "false", "n", "f", "nope", "否", "不是", "不对", "不對", "いいえ", "non", "nein"))
_VERDICT = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b[\s,]*)?(?:(?:the\s+)?(?:(?:final|correct)\s+)?(?:answer|statement)\s*(?:is|:|=)\s*"
    r"|it\s+is\s+|it['’]s\s+|that\s+is\s+)?(?P<word>[^\W\d_]+)(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_REASON = re.compile(r"\s*(?:\Z|[.,;:!\n(–—-]|because\b|since\b|as\b)", re.IGNORECASE)
_DOUBT = re.compile(r"\b(?:or|maybe|perhaps|possibly|probably|actually|wait|but|however|sorry|unsure|not\s+sure|might"
                    r"|could|unless|depends|both|neither)\b|\?", re.IGNORECASE)
_AGAINST_YES = re.compile(r"\b(?:no|not|n|f|false|incorrect|wrong|never|nope)\b|n['’]t\b|否|不", re.IGNORECASE)
_AGAINST_NO = re.compile(r"\b(?:yes|y|t|true|correct|right|yeah)\b|是的|はい", re.IGNORECASE)


def boolean_accuracy(answer: str, gold: str) -> float:
    """1 when the answer says yes (true) or no (false) as the gold does, else 0."""
    wanted = read_boolean(gold)
    return float(wanted is not None and read_boolean(answer) == wanted)


def read_boolean(text: str) -> bool | None:
    """True for `Yes`, `true.`, `Y`, `Yes, because ...`, `是`; False for the likes of `No`; None for doubt or both."""
    if len(text) > LONGEST_ANSWER:
        return None
    text = unicodedata.normalize("NFKC", plain(clean(text))).strip(" \t\r\n\"'“”‘’*_`。()[]{}<>")
    match = _VERDICT.fullmatch(text)
    if match is None or not _REASON.match(match["rest"]) or _DOUBT.search(match["rest"]):
        return None
    word, rest = match["word"].casefold(), match["rest"]
    if word in _YES and not _AGAINST_YES.search(rest):
        return True
    return False if word in _NO and not _AGAINST_NO.search(rest) else None
