"""YAML files and dotted command-line options -> `Config`, strictly, and back.

A tree of plain values (what YAML gives) is built first, options of the command line are put into it, and the result is
converted field by field under the types that config/ declares. Messages name the dotted field, the value and what was
expected. Imports no torch, so `veripo show-config` answers at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from veripo_fast.config.describe import is_section, join, kinds, strip_optional, to_tree, words
from veripo_fast.config.objectives import SAMPLING
from veripo_fast.config.placing import Reader, flatten, is_free, mismatch, place, typed, unknown, value_at
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.errors import ConfigError

STAGE_SECTIONS = {"grpo": ("grpo", "plan", "rollout", "reward", "optimizer"), "dpo": ("dpo", "verifier", "optimizer"),
                  "sft": ("sft", "optimizer")}
"""Sections that `set` of a stage of each kind may change; everything else holds for the whole run."""

# PyYAML follows YAML 1.1, where a number with an exponent but no point or no sign (1e-6) is text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file (None: the defaults) with command-line options on top.

    `overrides` are tokens as typed: `["--grpo.clip-high", "0.28", "--model.device=cpu"]`. Every `set` of a stage is
    checked and its values converted. Raises ConfigError: one sentence that names the file and line or the dotted field.
    """
    return _with_options({} if path is None else _read_yaml(Path(path)), overrides)


def with_options(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with command-line options on top, as in `load_config`."""
    return _with_options(to_tree(config), overrides)


def _with_options(tree: Any, overrides: Sequence[str]) -> Config:
    for name, text in split_overrides(overrides):
        tree = place(Config, tree, name.split("."), _text_reader(text), "")
    return check_stages(_build(Config, tree, ""))


def apply_overrides(config: Config, changes: Mapping[str, object]) -> Config:
    """A copy with fields replaced by dotted name, e.g. `{"grpo.steps": 5}`. Raises ConfigError like load_config."""
    tree = to_tree(config)
    for name, value in flatten(changes):
        tree = place(Config, tree, name.split("."), _value_reader(value), "")
    changed: Config = _build(Config, tree, "")
    return changed


def check_stages(config: Config) -> Config:
    """The same configuration with the `set` of every stage checked, flattened to dotted names and converted."""
    return replace(config, stages=tuple(_checked_stage(config, i, stage) for i, stage in enumerate(config.stages)))


def split_overrides(tokens: Sequence[str]) -> list[tuple[str, str | None]]:
    """`--a.b-c 1`, `--a.b-c=1` and `--a.b-c` -> [("a.b_c", "1"), ("a.b_c", "1"), ("a.b_c", None)]."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"unexpected argument {token!r}; options are written --name value")
        name, equals, text = token[2:].partition("=")
        takes_next = not equals and bool(rest) and not rest[0].startswith("--")
        pairs.append((typed(name), rest.pop(0) if takes_next else text if equals else None))
    return pairs


# Reading YAML

class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (looked at before `<<` merges, which may repeat keys).

    `on` as a key is text: YAML 1.1 takes it for true.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice (first in line {lines[key.value]})",
                                           problem_mark=key.start_mark)
            lines[str(key.value)] = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return node


def _read_yaml(path: Path) -> Any:
    try:
        tree = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML text: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"{path} must hold a mapping of options (name: value), got {got}")
    return tree


# Plain values -> typed fields

def _build(cls: Any, value: object, where: str) -> Any:
    """An instance of a configuration class; `value` None (an empty section) means its defaults."""
    tree = {} if value is None else value
    if not isinstance(tree, dict):
        raise mismatch(cls, value, where)
    for key in tree:
        if key not in kinds(cls):
            raise unknown(cls, where, str(key))
    arguments = {key: _convert(kinds(cls)[key], item, join(where, key)) for key, item in tree.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _convert(kind: Any, value: object, where: str) -> object:
    inner, optional = strip_optional(kind)
    if optional and value is None:
        return None
    if is_section(inner):
        return _build(inner, value, where)
    if get_origin(inner) is tuple:
        return _convert_list(inner, value, where)
    if not _fits(inner, value):
        raise mismatch(kind, value, where)
    if get_origin(inner) is dict and is_free(inner):
        return {key: _number(item) for key, item in value.items()}  # type: ignore[attr-defined]
    return float(str(value)) if inner is float else value


def _number(value: object) -> object:
    """A number with an exponent, which YAML 1.1 takes for text, as a number; all else as it is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _convert_list(kind: Any, value: object, where: str) -> tuple[object, ...]:
    element, *more = get_args(kind)
    if not isinstance(value, (list, tuple)) or (more != [Ellipsis] and len(value) != 1 + len(more)):
        raise mismatch(kind, value, where)
    return tuple(_convert(element, item, f"{where}.{i}") for i, item in enumerate(value))


def _fits(kind: Any, value: object) -> bool:
    """Whether a plain value is one of the type; an int is a float, a bool is no number, floats are finite."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if kind is float and isinstance(value, str):
        return _EXPONENT.fullmatch(value) is not None and math.isfinite(float(value))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _checked_stage(config: Config, index: int, stage: StageConfig) -> StageConfig:
    where, allowed = f"stages.{index}.set", STAGE_SECTIONS[stage.kind]
    changes = dict(flatten(stage.set))
    for name in changes:
        section = name.split(".")[0]
        if section in kinds(Config) and section not in allowed:
            raise ConfigError(f"{where}: {name} cannot be set for one {stage.kind} stage, "
                              f"only options of {', '.join(allowed)} can")
        if section == "rollout" and name.partition(".")[2] not in SAMPLING:
            raise ConfigError(f"{where}: {name} holds for the whole run; of rollout a stage can set "
                              f"{', '.join(SAMPLING)}")
    try:
        changed = to_tree(apply_overrides(config, changes))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return replace(stage, set={name: value_at(changed, name) for name in changes})


def _text_reader(text: str | None) -> Reader:
    return lambda kind, where: _parse(kind, text, where)


def _value_reader(value: object) -> Reader:
    return lambda kind, where: value


def _parse(kind: Any, text: str | None, where: str) -> object:
    """Command-line text -> plain value. Text and choices stay as typed, lists may be `a,b`, the rest is YAML."""
    inner, optional = strip_optional(kind)
    if text is None:
        if inner is bool:
            return True
        raise ConfigError(f"--{where} needs a value: {words(kind)}")
    if optional and text.lower() in ("null", "none", "~"):
        return None
    if inner is str or get_origin(inner) is Literal:
        return text
    if get_origin(inner) is tuple and not text.lstrip().startswith("["):
        return [_parse(get_args(inner)[0], part.strip(), where) for part in text.split(",") if part.strip()]
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise mismatch(kind, text, where) from None
