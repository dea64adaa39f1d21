"""Signs for numbers that are no plain digits, written in plain ones: `½`, `²`, `③`, `–4`, `1 234 567`, `2,5`, `三`."""

from __future__ import annotations

import re
import unicodedata

_MINUS = re.compile(r"(?<![\d\w)])\s?[\u2010-\u2015\u2212\uff0d]\s?(?=[.\d\\])")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴-⁹⁻⁺]+")
_SUBSCRIPT = re.compile(r"(?<=[^\W_])[₀-₉]+")
_UNUSUAL = re.compile(r"[\u00bc-\u00be\u2150-\u215e\u2160-\u216b\u2189\u2460-\u2473]")
_CHINESE = {sign: value for value, sign in enumerate("零一二三四五六七八九十")} | {"两": 2, "〇": 0}
_CHINESE_NUMBER = re.compile(f"(?<![{''.join(_CHINESE)}百千万])[{''.join(_CHINESE)}](?![{''.join(_CHINESE)}百千万])")
_CHINESE_LEAD = re.compile(r"(?:答案|一共|总共|大约|共有|约|共|有|是|为)+[::]?\s*(?=-?[\d零一二三四五六七八九十两])")
_COUNTER = re.compile(
    r"(?<=[\d零一二三四五六七八九十两])\s*(?:个人?|人|次|张|只|条|辆|把|块|本|位|名|件|元|年"
    r"|岁|天|つ|個|回|枚)(?!\w)")
_CHINESE_UNIT = {"公里": "km", "千米": "km", "厘米": "cm", "毫米": "mm", "米": "m", "公斤": "kg", "千克": "kg",
                 "克": "g",
                 "分钟": "min", "小时": "h", "秒": "s", "度": "deg"}
_UNIT = re.compile(rf"(?<=\d)\s*({'|'.join(_CHINESE_UNIT)})(?!\w)")


def plain_signs(text: str) -> str:
    """Text with fractions, exponents, minus signs and full-width characters in their ASCII form."""
    if text.isascii():
        return text
    text = _UNUSUAL.sub(_spelt, _SUBSCRIPT.sub(lambda match: "_" + unicodedata.normalize("NFKC", match[0]), text))
    text = _SUPERSCRIPT.sub(lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = unicodedata.normalize("NFKC", text).replace("^{\u2212", "^{-")
    return _MINUS.sub(" -", text).replace("。", ".")


def _spelt(match: re.Match[str]) -> str:
    sign = unicodedata.normalize("NFKC", match[0])
    if "\u2044" in sign:
        return " " + sign.replace("\u2044", "/")
    return f" {unicodedata.numeric(match[0]):g} "


def plain_chinese(text: str) -> str:
    """Text whose short Chinese and Japanese phrases around a number (`答案是三个`) are in its ASCII form."""
    if text.isascii():
        return text
    text = _COUNTER.sub(" ", _CHINESE_LEAD.sub(" ", text))
    text = _CHINESE_NUMBER.sub(lambda match: f" {_CHINESE[match[0]]} ", text)
    return _UNIT.sub(lambda match: " " + _CHINESE_UNIT[match[1]], text)


_BY_SPACES = re.compile(r"(?<![\w.,])\d{1,3}(?: \d{3})+(?![\w]|[.,]?\d| \d)")
_BY_POINTS = re.compile(r"(?<![\w.,])\d{1,3}(?:\.\d{3}){2,}(?![\w]|[.,]\d)")
_INDIAN = re.compile(r"(?<![\w.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\w]|,\d)")
_DECIMAL_COMMA = re.compile(r"(?<![\w.,])(0,\d+|\d+,(?:\d{1,2}|\d{4,}))(?!\d|[.,]\d)")


def plain_groups(text: str) -> str:
    """Text whose numbers have no separators of thousands but commas, and a point as decimal sign."""
    for pattern, separator in ((_BY_SPACES, " "), (_BY_POINTS, "."), (_INDIAN, ",")):
        text = pattern.sub(lambda match, separator=separator: match[0].replace(separator, ""), text)  # type: ignore[misc]
    if not re.search(r"[(\[{]", text):  # (1,2) is a pair
        text = _DECIMAL_COMMA.sub(lambda match: match[0].replace(",", "."), text)
    return text
