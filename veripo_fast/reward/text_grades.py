"""Grading texts: by their longest common subsequence, by word error rate, and by ROUGE as Video-R1 uses it."""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

from veripo_fast.errors import UserError
from veripo_fast.reward.answers import WORD, clean, normalise_text, words

_LONGEST_TEXT = 512
LONGEST_ROUGE = 1024
"""Words of a text that ROUGE reads; its library compares every word with every other."""
_QUOTES = ("\"\"", "“”", "''", "‘’", "``", "「」")


def text_accuracy(answer: str, gold: str) -> float:
    """1 for the same normalised text; otherwise the F1 of the longest common word subsequence (Lin 2004, ROUGE-L).

    The order of words counts, so "dog bites man" is not "man bites dog"; extra words cost precision, so listing
    everything does not pay. An answer above 512 words keeps its first 512 and its real length.
    """
    given, wanted = words(answer), words(gold)
    if not wanted:
        return 0.0
    if normalise_text(answer) == normalise_text(gold):
        return 1.0
    common = _common_subsequence(given[:_LONGEST_TEXT], wanted[:_LONGEST_TEXT])
    return 2 * common / (len(given) + len(wanted))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for column, candidate in enumerate(other, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == candidate else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def ocr_accuracy(answer: str, gold: str) -> float:
    """1 - word error rate, at least 0: what Video-R1 gives for OCR. Case and punctuation count.

    The word error rate is the number of words to insert, delete or replace over the number of the gold's words. Each
    Chinese character or Japanese kana is a word. Quotation marks around the whole answer are not read.
    """
    given, wanted = _seen_words(answer), _seen_words(gold)
    if not wanted or len(given) >= 2 * len(wanted):
        return 0.0
    return max(0.0, 1.0 - edit_distance(given, wanted) / len(wanted))


def _seen_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", clean(text)).strip()
    if len(text) > 2 and text[0] + text[-1] in _QUOTES and text[0] not in text[1:-1]:
        text = text[1:-1]
    return WORD.findall(text)


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Items to insert, delete or replace between two sequences (Levenshtein), by bits of one integer per item.

    Hyyrö 2003, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances".
    """
    if not one:
        return len(other)
    places: dict[Hashable, int] = {}
    for number, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << number
    ones = (1 << len(one)) - 1
    last = 1 << (len(one) - 1)
    rising, falling, distance = ones, 0, len(one)
    for item in other:
        match = places.get(item, 0)
        diagonal = (((match & rising) + rising) ^ rising) | match | falling
        up = falling | ~(diagonal | rising) & ones
        down = diagonal & rising
        distance += bool(up & last) - bool(down & last)
        up = (up << 1 | 1) & ones
        rising = (down << 1 | ~(diagonal | up)) & ones
        falling = up & diagonal
    return distance


def rouge_accuracy(answer: str, gold: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with Porter's stemmer, of the rouge-score library: Video-R1's free-form.

    The same words in the same order are 1 (a single word has no ROUGE-2). The library reads the letters a to z and
    digits only: a gold without them is refused when the data is loaded. Texts above 1024 words score 0.

    Raises:
        UserError: rouge-score is not installed.
    """
    given, wanted = _stems(answer), _stems(gold)
    if not given or not wanted:
        return 0.0
    if given == wanted:
        return 1.0
    scores = _rouge().score(gold, answer)
    return float(sum(score.fmeasure for score in scores.values()) / len(scores))


def rouge_reads(gold: str) -> bool:
    """Whether ROUGE finds words in a gold answer, and not too many.

    Raises:
        UserError: rouge-score is not installed.
    """
    return bool(_stems(gold))


def same_words(one: str, other: str) -> bool:
    """Whether two texts have the same words, in case and punctuation too, and any."""
    return _seen_words(one) == _seen_words(other) != []


@lru_cache(maxsize=4096)
def _stems(text: str) -> tuple[str, ...]:
    scorer = _rouge()
    if len(text) > 64 * LONGEST_ROUGE:
        return ()
    found = scorer._tokenizer.tokenize(text)
    return tuple(found) if len(found) <= LONGEST_ROUGE else ()


@lru_cache(maxsize=1)
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("problem_type rouge needs the package rouge-score, which is not installed: pip install "
                          "'veripo-fast[answers]'") from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
