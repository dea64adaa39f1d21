"""Evaluation suites by name: how the records of each are read (`veripo eval --suite NAME`).

An option that the user gives as well is the user's. Where the media lie is data.media_root; the records are a local
copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from veripo_fast.config.describe import nearest
from veripo_fast.errors import ConfigError


@dataclass(frozen=True)
class Suite:
    """What is not said by the records themselves."""

    options: Mapping[str, object] = field(default_factory=dict)
    """By dotted name."""
    task: str = ""
    """Key of the records that names a task; scores are averaged within tasks, and then over them."""

    def tokens(self) -> list[str]:
        """The options as they would be typed."""
        options = dict(self.options)
        if self.task:
            options |= {"data.keep_keys": [self.task], "eval.task_key": self.task}
        return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def _media(*patterns: str) -> dict[str, object]:
    return {"data.media_patterns": list(patterns)}


SUITES: Mapping[str, Suite] = {
    "vsi-bench": Suite(_media("{dataset}/{scene_name}.mp4"), "question_type"),
    "video-mme": Suite(_media("data/{videoID}.mp4"), "duration"),
    "mmvu": Suite(),
    "video-mmmu": Suite(_media("{id}.mp4")),
    "mvbench": Suite(),
    "tempcompass": Suite(_media("videos/{video_id}.mp4"), "dim"),
    "tomato": Suite({"data.answer_index": 0}, "demonstration_type"),
    "lvbench": Suite(_media("{key}.mp4")),
    "longvideobench": Suite({}, "question_category"),
    "next-qa": Suite(_media("NExTVideo/{video}.mp4"), "type"),
    "egoschema": Suite(_media("{q_uid}.mp4")),
    "seed-bench-r1": Suite(_media("{video_basename}", "{current_observation_basename}")),
    "longvideo-reason": Suite(),
    "veripo": Suite(),
}
"""As published; docs/answers.md says from where. `veripo` is the layout of VerIPO's five evaluation files."""


def suite_named(name: str) -> Suite:
    """Raises ConfigError: there is no suite of that name; names the nearest."""
    if name not in SUITES:
        guess = nearest(name.lower(), list(SUITES))
        raise ConfigError(f"there is no suite {name!r}{f'; did you mean {guess}?' if guess else ';'} there are "
                          f"{', '.join(SUITES)}, and any other file is read by --data.eval alone")
    return SUITES[name]
