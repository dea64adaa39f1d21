"""Which choice an answer names: `B`, `B. Chair`, `It is B because ...`, `答案是B`, the option's own text.

An answer begins with its choice; what follows must be that option's text, a reason, or a denial of other options. An
answer that names a second choice, hedges or takes its choice back names none, so the first letter alone never scores.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from veripo_fast.reward.answers import LONGEST_ANSWER, clean, normalise_text, plain


def letters(options: Sequence[str] = ()) -> str:
    """The letters an answer may use: one per option, or A to Z when the options are unknown."""
    return string.ascii_uppercase[:len(options) or None]


_OPEN, _CLOSE = r"[(\[{<]\s*", r"\s*[)\]}>]"
_MARKED = re.compile(r"(?:\*\*?|__?|`|\$|\\\(|\\(?:boxed|fbox|text(?:bf|it|rm)?|math(?:bf|rm|it))\s*\{)\s*([A-Za-z])\s*"
                     r"(?:\*\*?|__?|`|\$|\\\)|\})")
LEAD_INS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (
    r"(?:(?:so|thus|therefore|hence|my|the|it['’]s|it|this|that|is|i['’]d|i|would|will|choose|pick|select|think|say|go"
    r"|with|there|they|are)\b[\s,:]*)*"
    r"(?:(?:(?:final|correct|best|right)\s+)*(?:answer|option|choice|ans)\b\.?\s*"
    r"(?:(?:is|would be|should be|must be|[:=])\s*)*(?:the\s+)?(?:(?:option|choice)\b\s*:?\s*)?)?",
    r"(?:(?:la|el|le|die|a)\s+)?(?:respuesta|réponse|resposta|risposta|antwort)(?:\s+correcta|\s+correcte|\s+corretta)?"
    r"\s*(?:(?:es|est|é|è|ist)\b)?\s*:?\s*",
    r"(?:所以|因此)?\s*[,]?\s*(?:我)?(?:正确的?|最终)?(?:答案|选项|選択肢|答え|正解|解答|정답)?(?:应该|應該)?"
    r"(?:是|为|為|は|은)?(?:应|應)?(?:选择|選擇|选|選)?\s*:?\s*"))
_HEAD = re.compile(
    rf"(?:{_OPEN}(?P<bracketed>[A-Za-z]){_CLOSE}|(?P<bare>[A-Za-z])(?![^\W_]|['’]))(?P<rest>.*)", re.DOTALL)
_END = re.compile(r"\s*[)\].,:;!]?\s*")
_DELIMITER = re.compile(r"\s*[)\]}>.:]+\s*|\s*[,;=]\s*|\s+[–—-]+\s*|\s*\n\s*")
_REASON = re.compile(
    r"[\s.,;:()–—-]*(?:because|since|as|for|due|given|explanation|reason\w*|which|where|when|that|it|this|he|she|they"
    r"|there|in|at|on|based|from|we)\b", re.IGNORECASE)
_AFFIRMED = re.compile(
    r"\s+is\s+(?:the\s+|my\s+)?(?:(?:correct|right|best|final)\b(?:\s+(?:answer|option|choice|one)\b)?|answer\b|choice\b)",
    re.IGNORECASE)
_FOLLOWS_A_LETTER = re.compile(r"\s+(?:because|since|as|instead|rather|not)\b", re.IGNORECASE)
_ABOUT_LETTERS = re.compile(r"(?:both|neither|all|only|none|either)\b[\w\s,()]*|[(\[]?[A-Z][)\]]? only", re.IGNORECASE)
_HEDGE = re.compile(
    r"\b(?:actually|maybe|perhaps|possibly|probably not|wait|correction|sorry|alternatively|might|could|hmm|unsure"
    r"|not sure|no longer|second thought|instead(?! of)|wrong|incorrect|false|mistake\w*|not (?:correct|right|it|the"
    r" (?:correct |right )?(?:answer|option|choice))"
    r"|isn['’]t (?:it|right|correct|the)|except|anything but|also|(?:among|and) others|etc)\b|\bnot?\W*\Z|不|或|\?|≠",
    re.IGNORECASE)
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_BEHIND = re.compile(r"\s*[(\[]\s*([A-Za-z])\s*[)\]][.!]?$")
_LONGEST_LETTER = 5
"""Characters of `( B )`; a longer mention is an option's text."""
_NEGATED = (r"(?:not|nor|neither|never|unlike|rather than|instead of|except for)\s+(?:the\s+|an?\s+)?"
            r"(?:option\s+|choice\s+)?")
_REFUTED = r"\s+(?:is|are|was|were|does|do|can)(?:\s+not|n['’]t|\s+(?:wrong|incorrect|false|excluded|ruled out))\b"
_OTHER_LETTER = (r"(?<![\w'’])[(\[{]\s*[A-Za-z]\s*[)\]}]|(?<![\w'’])[B-HJ-Z](?![\w'’])"
                 r"|(?<!\d)(?<!\d\s)(?<![\w'’])[b-hj-z](?![\w'’])"
                 r"|(?<![\w'’])[AI](?![\w'’])(?!\s+[a-z]{2})"
                 r"|(?<![\w'’])[AIa](?=\W*$|\s*[,/&.;:)]|\s+(?:is|or|and|was|because|too|also|as|would|could|might)\b)")
"""A letter that stands alone; `a` and `I` only where they are no article and no pronoun."""


def read_choice(text: str, options: Sequence[str] = ()) -> str | None:
    r"""The one choice that an answer names, as a capital letter; None when it names none, several or one out of range.

    Accepted: `B`, `b`, `(B)`, `B.`, `B. Chair`, `Option B`, `The answer is B`, `B because ...`, `Chair (B)`, `$B$`,
    `\boxed{B}`, and the option's own text. A letter with the text of another option is no answer.
    """
    if len(text) > LONGEST_ANSWER:
        return None
    reader = _reader(tuple(options))
    whole = _tidy(plain(clean(text)))
    text = _tidy(plain(_MARKED.sub(r"(\1)", clean(text))))
    ends = {match.end() for pattern in LEAD_INS if (match := pattern.match(text))}
    attempts = list(dict.fromkeys([text, *(text[end:].strip() for end in sorted(ends, reverse=True))]))
    steps = ((reader.bare, attempts), (reader.exact, [whole]), (reader.option, attempts), (reader.led, attempts))
    for read, texts in steps:
        for attempt in texts:
            letter = read(attempt)
            if letter is not None:
                return letter
    return None


def _tidy(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("。", ".")
    return text.strip(" \t\r\n\"'“”‘’*_`")


class _Reader:
    """Reads answers to a question with these options."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self._letters = letters(options)
        lettered = list(zip(map(_folded, options), self._letters, strict=False))
        self._exact = _only(lettered)
        self._loose = _only((normalise_text(option), letter) for option, letter in zip(options, self._letters,
                                                                                       strict=False))
        self._by_text = dict(reversed([pair for pair in lettered if len(pair[0]) > 1]))
        spelt = [r"\s+".join(map(re.escape, text.split())) for text in sorted(self._by_text, key=len, reverse=True)]
        texts = "|".join(spelt) or "(?!)"
        self._text = re.compile(rf"(?:(?:an?|the)\s+)?(?<!\w)(?P<text>{texts})(?!\w)", re.IGNORECASE)
        mention = rf"(?i:(?:(?:an?|the)\s+)?(?<!\w)(?:{texts})(?!\w))|{_OTHER_LETTER}"
        self._mention = re.compile(mention)
        self._denied = re.compile(rf"\b(?i:{_NEGATED})(?P<one>{mention})|(?P<two>{mention}){_REFUTED}")
        self._leading_denial = re.compile(
            rf"(?i:{_NEGATED})(?P<one>{mention})\s*[,;.]?\s*(?i:but|it is|it['’]s)\s+")

    def bare(self, text: str) -> str | None:
        """The letter of an answer that is nothing else."""
        match = _HEAD.fullmatch(text)
        if match is None or not _END.fullmatch(match["rest"]):
            return None
        return self._in_range(match)

    def exact(self, text: str) -> str | None:
        """The letter of the only option whose text this is to the letter."""
        return self._exact.get(_folded(text)) or None

    def option(self, text: str) -> str | None:
        """The letter of the only option whose text this is; articles and punctuation count only to break a tie."""
        return self.exact(text) or self._loose.get(normalise_text(text)) or None

    def led(self, text: str) -> str | None:
        """The letter at the start of an answer with more behind it, or behind its option's text."""
        denial = self._leading_denial.match(text)
        if denial:
            letter = self.bare(text[denial.end():]) or self.option(text[denial.end():])
            return None if letter == self._named(denial["one"]) else letter
        behind = _BEHIND.search(text)
        if behind and self.option(text[:behind.start()]) == behind[1].upper():
            return behind[1].upper()
        match = _HEAD.fullmatch(text)
        letter = self._in_range(match) if match else None
        if match is None or letter is None:
            return None
        rest = match["rest"]
        delimiter = _DELIMITER.match(rest)
        if delimiter is None and not match["bracketed"]:
            fits = self._fits_undelimited(rest, letter)
        else:
            fits = self._fits(rest[delimiter.end():] if delimiter else rest.strip(), letter)
        return letter if fits else None

    def _in_range(self, match: re.Match[str]) -> str | None:
        letter = (match["bracketed"] or match["bare"]).upper()
        return letter if letter in self._letters else None

    def _fits_undelimited(self, rest: str, letter: str) -> bool:
        """`B chair`, `B because ...`, `B is the correct answer`: nothing that makes the letter a word."""
        if self.option(rest) == letter:
            return True
        affirmed = _AFFIRMED.match(rest)
        if affirmed is None and not _FOLLOWS_A_LETTER.match(rest):
            return False
        return self._silent(rest[affirmed.end():] if affirmed else rest, letter, reason=True)

    def _fits(self, rest: str, letter: str) -> bool:
        """Whether what follows the letter is its option's text, a reason, or a denial of other options."""
        named = self.option(rest) or self.bare(rest)
        if named is not None:
            return named == self.option(rest) == letter
        own = self._text.match(rest)
        if own is None:
            if len(self._by_text) == 0 and _ABOUT_LETTERS.fullmatch(rest.strip(" .")):
                return True
            return self._silent(rest, letter, reason=bool(_REASON.match(rest)))
        rest = rest[own.end():]
        return self._named(own["text"]) == letter and self._silent(rest, letter, reason=bool(_REASON.match(rest)))

    def _silent(self, rest: str, letter: str, reason: bool) -> bool:
        """Whether a text names no other choice and no doubt; a reason may mention the texts of other options."""
        def spare(match: re.Match[str]) -> str:
            return "≠" if self._named(match["one"] or match["two"]) == letter else " "

        rest = self._denied.sub(spare, rest)
        if _HEDGE.search(rest) or (not reason and _OR.search(rest)):
            return False
        again = 0
        for match in self._mention.finditer(rest):
            named, is_text = self._named(match.group()), len(match.group()) > _LONGEST_LETTER
            spared = reason and is_text and not _OR.search(rest, max(0, match.start() - 4), match.start())
            again += named == letter and not is_text
            if again > 1 or (named is not None and named != letter and not spared):
                return False
        return True

    def _named(self, mention: str) -> str | None:
        text = self._text.fullmatch(mention.strip())
        if text:
            return self._by_text.get(" ".join(text["text"].casefold().split()))
        found = mention.strip(" ()[]{}").upper()
        return found if len(found) == 1 and found in self._letters else None


@lru_cache(maxsize=256)
def _reader(options: tuple[str, ...]) -> _Reader:
    return _Reader(options)


def _only(forms: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The letter of each form that one option alone has."""
    known: dict[str, str] = {}
    for form, letter in forms:
        known[form] = "" if form in known or not form else letter
    return known


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", plain(text)).casefold().split()).strip(" .,;:!?\"'()")
