"""One value put into a tree of plain values at a dotted name, or found there; and what is refused, by name and value.

Entries of a list are named by number or, where they have a name, by that: `reward.terms.format.weight`. A list that the
tree lacks begins as its default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args, get_origin

from veripo_fast.config.describe import (
    guesses,
    is_section,
    join,
    kinds,
    nearest,
    option_names,
    strip_optional,
    to_tree,
    words,
)
from veripo_fast.config.schema import Config
from veripo_fast.errors import ConfigError

Reader: TypeAlias = Callable[[Any, str], object]
"""(declared type, dotted name) -> the plain value to put there."""
MOVED = {"reward.format_weight": "the weight of a term: `--reward.terms.format.weight 0.5`, or in a file "
                                 "`reward: {terms: [{use: accuracy}, {use: format, weight: 0.5}]}`"}
"""Options of earlier versions -> what they are now."""


def place(kind: Any, node: Any, parts: list[str], read: Reader, where: str) -> Any:
    """The plain tree `node` of type `kind` with one value put at `parts`."""
    if not parts:
        return read(kind, where)
    inner = strip_optional(kind)[0]
    if is_section(inner):
        return _place_field(inner, node, parts, read, where)
    if get_origin(inner) is dict and is_free(inner):
        return _place_free(node or {}, parts, read, where)
    if get_origin(inner) is dict:
        name = ".".join(parts)
        return {**(node or {}), name: read(kind_at(Config, parts), join(where, name))}
    if _is_list_of_sections(inner):
        return _place_item(get_args(inner)[0], list(node or ()), parts, read, where)
    raise ConfigError(f"{join(where, parts[0])} does not exist: {where} takes one value, {words(kind)}")


def is_free(kind: Any) -> bool:
    """Whether a mapping holds what a function takes; that of a stage's `set` has dotted names of Config as keys."""
    return get_args(kind)[1] is Any


def _is_list_of_sections(kind: Any) -> bool:
    return get_origin(kind) is tuple and is_section(get_args(kind)[0])


def _place_free(node: Any, parts: list[str], read: Reader, where: str) -> Any:
    """A mapping inside of a mapping is reached by dots too, unless a key with those dots is there."""
    name, head = ".".join(parts), parts[0]
    if len(parts) == 1 or name in node:
        return {**node, name: read(Any, join(where, name))}
    inside = node.get(head, {})
    if not isinstance(inside, dict):
        raise ConfigError(f"{join(where, name)} does not exist: {join(where, head)} is {inside!r}")
    return {**node, head: _place_free(inside, parts[1:], read, join(where, head))}


def _place_field(cls: Any, node: Any, parts: list[str], read: Reader, where: str) -> Any:
    head, *rest = parts
    if head not in kinds(cls):
        raise unknown(cls, where, head)
    if not isinstance(node, (dict, NoneType)):
        raise mismatch(cls, node, where)
    node = node or {}
    before = node.get(head)
    if before is None and _is_list_of_sections(kinds(cls)[head]):
        before = to_tree(cls.__dataclass_fields__[head].default)
    return {**node, head: place(kinds(cls)[head], before, rest, read, join(where, head))}


def _place_item(cls: Any, items: list[Any], parts: list[str], read: Reader, where: str) -> Any:
    head, *rest = parts
    number = _number(items, head)
    if number is None:
        raise ConfigError(f"{join(where, head)} does not exist: {where} has {len(items)} entries, counted from 0")
    items[number] = place(cls, items[number], rest, read, join(where, head))
    return items


def _number(items: Sequence[Any], head: str) -> int | None:
    """Which entry of a list is meant, by its number or name; None: there is no such one."""
    if head.isdecimal():
        return int(head) if int(head) < len(items) else None
    for number, item in enumerate(items):
        named = [str(item.get(key) or "") for key in ("name", "use", "source")] if isinstance(item, dict) else []
        if head.replace("-", "_") in [name.rpartition(":")[2].replace("-", "_") for name in named]:
            return number
    return None


def flatten(changes: Mapping[str, object], where: str = "") -> Iterator[tuple[str, object]]:
    """`{"grpo": {"steps": 1}, "dpo.epochs": 2}` -> ("grpo.steps", 1), ("dpo.epochs", 2).

    A mapping that a function takes as one argument stays whole: its keys are data, and may have dots.
    """
    for key, value in changes.items():
        name = join(where, key)
        if isinstance(value, dict) and value and not _is_data(name):
            yield from flatten(value, name)
        else:
            yield name, value


def typed(name: str) -> str:
    """An option's name as the command line has it: a dash is an underscore, but not in the names of data."""
    parts = name.split(".")
    plain = [part.replace("-", "_") for part in parts]
    for depth in range(1, len(parts)):
        if _is_data(".".join(plain[:depth])):
            return ".".join([*plain[:depth], *parts[depth:]])
    return ".".join(plain)


def _is_data(name: str) -> bool:
    """Whether a name lies in a mapping that a function takes."""
    try:
        return kind_at(Config, name.split(".")) is Any
    except ConfigError:
        return False


def kind_at(cls: Any, parts: Sequence[str]) -> Any:
    """The declared type at a dotted name."""
    for depth, part in enumerate(parts):
        if _is_list_of_sections(cls):
            cls = get_args(cls)[0]
        elif get_origin(cls) is dict and is_free(cls):
            return Any
        elif not is_section(cls) or part not in kinds(cls):
            raise unknown(cls, ".".join(parts[:depth]), part)
        else:
            cls = kinds(cls)[part]
    return cls


def value_at(tree: Any, name: str) -> object:
    """The value at a dotted name of a whole tree, as `place` puts it there."""
    if not isinstance(tree, list) and name in tree:
        return tree[name]
    head, _, rest = name.partition(".")
    key: Any = _number(tree, head) if isinstance(tree, list) else head
    inner = tree[key]
    return value_at(inner, rest) if rest else inner


# Refusals

def mismatch(kind: Any, value: object, where: str) -> ConfigError:
    """The error of a value that is not of the declared type."""
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    hint = ""
    if kind is str and not isinstance(value, (dict, list)):
        hint = " (in quotes it is text)"
    elif get_origin(kind) is Literal and isinstance(value, str) and (choice := nearest(value, get_args(kind))):
        hint = f"; did you mean {choice}?"
    return ConfigError(f"{where} must be {words(kind)}, got {shown if len(shown) <= 80 else shown[:77] + '...'}{hint}")


def unknown(cls: Any, where: str, key: str) -> ConfigError:
    """The error of a name that no option has."""
    if join(where, key) in MOVED:
        return ConfigError(f"{join(where, key)} is now {MOVED[join(where, key)]}")
    siblings = list(kinds(cls)) if is_section(cls) else []
    if match := nearest(key, siblings):
        hint = f"did you mean {join(where, match)}?"
    elif found := guesses(key, option_names()):
        hint = f"did you mean {found}?"
    else:
        hint = f"options here: {', '.join(siblings)}"
    return ConfigError(f"unknown option {join(where, key)}; {hint}")
