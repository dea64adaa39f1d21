"""What config/ declares, in words: option names, expected values, the resolved tree with its docstrings.

The types and docstrings of the dataclasses are the only source; nothing is listed a second time here.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from veripo_fast.config.schema import Config

ELSEWHERE = {"num_generations": "rollout.group_size", "beta": "grpo.kl_coef or dpo.dpo_beta",
             "epsilon": "grpo.clip_low", "epsilon_high": "grpo.clip_high", "output_dir": "run_dir",
             "max_completion_length": "rollout.max_new_tokens", "max_prompt_length": "data.max_prompt_tokens",
             "model_name_or_path": "model.path", "per_device_train_batch_size": "optimizer.max_tokens",
             "lr": "grpo.learning_rate or dpo.learning_rate",
             "mask_truncated_completions": "plan.mask_unfinished",
             "reward_funcs": "reward.terms", "scale_rewards": "grpo.advantage", "system_prompt": "data.system",
             "num_iterations": "grpo.updates_per_rollout", "loss_type": "grpo.loss or dpo.loss"}
"""What options of TRL, verl and others are called here."""
_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "a value"}


@cache
def kinds(cls: Any) -> dict[str, Any]:
    """Field name -> declared type of a configuration class."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def is_section(value: Any) -> bool:
    """Whether a declared type or a value is a part of the configuration with fields of its own."""
    return is_dataclass(value)


def strip_optional(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (kind, False)."""
    if get_origin(kind) not in (Union, UnionType):
        return kind, False
    return next(item for item in get_args(kind) if item is not NoneType), True


def option_names() -> list[str]:
    """Dotted names of every option and section; those of a stage as `stages.0.name`."""
    return list(_names(Config, ""))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a mistyped word most likely meant, or None."""
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(choices), n=1)
    return found[0] if found else None


def guesses(word: str, names: Iterable[str]) -> str:
    """The dotted names whose last part the word most likely meant, joined by `or`; empty when there is none."""
    last_parts = {name: name.rsplit(".", 1)[-1].lstrip("-").replace("-", "_") for name in names}
    match = nearest(word.lstrip("-"), last_parts.values())
    return " or ".join(name for name, last in last_parts.items() if last == match)


def hint(word: str, choices: Iterable[str]) -> str:
    """What the word most likely meant, as the second half of a message."""
    if (here := ELSEWHERE.get(word.lstrip("-").replace("-", "_"))) is not None:
        return f"did you mean {' or '.join(f'--{name}' for name in here.split(' or '))}?"
    found = guesses(word, choices)
    return f"did you mean {found}?" if found else f"there are {', '.join(list(choices)[:12])}"


def split_options(argv: list[str], flags: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Separate the options of the configuration (`--grpo.steps 5`, `--seed=1`) from those of the command, `flags`."""
    own, overrides, rest = [], [], list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, _ = token[2:].partition("=")
        known = "." in name or name.replace("-", "_") in Config.__dataclass_fields__
        if not token.startswith("--") or f"--{name}" in flags or not known:
            own.append(token)
            continue
        overrides.append(token)
        if not equals and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return own, overrides


def join(where: str, name: object) -> str:
    """`grpo`, `steps` -> `grpo.steps`; the root has the empty name."""
    return f"{where}.{name}" if where else str(name)


def words(kind: Any) -> str:
    """What a value of a declared type is, for a message: `a number or null`."""
    inner, optional = strip_optional(kind)
    return f"{_plain_words(inner)} or null" if optional else _plain_words(inner)


def to_tree(value: Any) -> Any:
    """A configuration (or a part of it) as dicts, lists and scalars."""
    if is_section(value):
        return {item.name: to_tree(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: to_tree(item) for key, item in value.items()}
    return [to_tree(item) for item in value] if isinstance(value, (tuple, list)) else value


def to_yaml(config: Config) -> str:
    """YAML text that load_config reads back to an equal configuration."""
    def dump(allow_unicode: bool) -> str:
        return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=allow_unicode, width=120)

    text = dump(True)
    return dump(False) if "\x85" in text else text  # PyYAML does not escape this line break, and folds it when it reads


def describe(config: Config) -> str:
    """The resolved tree as YAML that load_config reads back, the docstring of every field above it."""
    return "\n".join(_described(config, "")) + "\n"


def _names(cls: Any, where: str) -> Iterator[str]:
    for name, kind in kinds(cls).items():
        is_list = get_origin(kind) is tuple
        inner = get_args(kind)[0] if is_list else kind
        yield join(where, name)
        if is_section(inner):
            yield from _names(inner, join(where, f"{name}.0" if is_list else name))


def _plain_words(kind: Any) -> str:
    if is_section(kind):
        return "a mapping of options"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        element, *more = get_args(kind)
        count = "" if more == [Ellipsis] else f" of {1 + len(more)}"
        return f"a list{count}, each {words(element)}"
    return _WORDS.get(kind, "a mapping")


@cache
def _docs(cls: Any) -> dict[str, str]:
    """The string literal under each field of a configuration class, by field name."""
    definition = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, doc in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(field.target)] = inspect.cleandoc(str(doc.value.value))
    return docs


def _described(part: Any, indent: str) -> Iterator[str]:
    cls: Any = type(part)
    for name, kind in kinds(cls).items():
        value = getattr(part, name)
        doc = inspect.getdoc(kind) or "" if is_section(kind) else _docs(cls)[name]
        yield from (f"{indent}# {line}".rstrip() for line in doc.splitlines())
        if is_section(value):
            yield from (f"{indent}{name}:", *_described(value, indent + "  "), "")
        elif value and isinstance(value, tuple) and is_section(value[0]):
            yield f"{indent}{name}:"
            for item in value:  # `-` alone on its line, so that comments may follow it
                yield from (f"{indent}  -", *_described(item, indent + "    "))
        else:
            yield f"{indent}{name}: {_flow(value)}"


def _flow(value: object) -> str:
    """A value as YAML on one line."""
    def line(**style: Any) -> str:
        return yaml.safe_dump([to_tree(value)], default_flow_style=True, width=math.inf, **style).strip()[1:-1]

    text = line(allow_unicode=True)
    return text if len(text.splitlines()) == 1 else line(default_style='"')
