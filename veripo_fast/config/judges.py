"""The judge that reports, beside the one that chooses pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from veripo_fast.config.checks import inside, require
from veripo_fast.config.objectives import VerifierConfig

_PLACES = {"endpoint": "llm_path", "llm": "endpoint_url"}
"""Of a judge that reads: where the model of the other one is."""


def reporting(verifier: VerifierConfig, judge: str, options: Mapping[str, Any]) -> VerifierConfig:
    """The settings of an evaluation's judge: those of the verifier, but for `options`.

    Raises:
        ConfigError: an option is none of the section `verifier`, or has a value that it refuses.
    """
    names = {field.name for field in fields(VerifierConfig)}
    unknown = [name for name in options if name not in names or name in ("judge", "calibration")]
    with inside("eval.judge_options"):
        require(not unknown, f"{', '.join(unknown)} is no option of the judge; those of the section verifier are")
        require(judge != "rules" or not options, "the judge `rules` has no options")
        changes = {"judge": judge, "calibration": "", **({_PLACES[judge]: ""} if judge in _PLACES else {}), **options}
        return replace(verifier, **changes)


def same_judge(one: VerifierConfig, other: VerifierConfig) -> bool:
    """Whether two settings name one judge: the rules, the same folder, or a model of the same name on any server."""
    if one.judge != other.judge:
        return False
    if one.judge == "endpoint":
        return one.endpoint_model == other.endpoint_model
    return one.judge != "llm" or one.llm_path.rstrip("/") == other.llm_path.rstrip("/")


def judge_name(settings: VerifierConfig) -> str:
    """`rules`, `endpoint qwen3-32b`, `llm Qwen2.5-7B-Instruct`."""
    model = {"endpoint": settings.endpoint_model, "llm": settings.llm_path.rstrip("/").rpartition("/")[2]}
    return f"{settings.judge} {model.get(settings.judge, '')}".strip()
