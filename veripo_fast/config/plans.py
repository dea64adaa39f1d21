"""The section `plan`: which groups of completions a GRPO step samples, beside the one of each prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from veripo_fast.config.checks import positive, require


@dataclass(frozen=True)
class PlanConfig:
    """Groups that a step samples, and how many; a GRPO stage may override any field. The defaults: one per prompt."""

    contrast: Literal["none", "shuffle", "reverse"] = "none"
    """A second group of each prompt that shows a video, which sees its frames in another order. Rewards compare with it
    (`temporal`), nothing trains on it. Prompts without a video have none."""
    contrast_size: int = 4
    """Completions of such a group (Video-R1: half of rollout.group_size)."""
    contrast_by: Literal["patch", "frame"] = "patch"
    """What changes its place: temporal patches, two frames each, whose tower output is at hand and reordered; or single
    frames, as in Video-R1, for which every video is decoded and encoded again in every step."""
    wordings: int = 1
    """Groups of each prompt with a wording of their own, the record's included (Share-GRPO: 2)."""
    wordings_key: str = "new_questions"
    """Key of the record with its list of other wordings, also in data.keep_keys."""
    question_key: str = "problem"
    """Key of the record with the text that another wording stands in for, also in data.keep_keys."""
    pairing: Literal["own", "all"] = "own"
    """Completions train with the wording that they were sampled with, or with all of their prompt (Share-GRPO)."""
    oversample: float = 1.0
    """Prompts that are sampled, as a multiple of those that are wanted; the first that carry a signal are taken."""
    refill: int = 0
    """Most further rounds of sampling until grpo.prompts_per_step groups carry a signal (DAPO's dynamic sampling)."""
    mask_unfinished: bool = False
    """Completions that were cut at rollout.max_new_tokens are rewarded, and do not enter the loss."""

    def __post_init__(self) -> None:
        positive(self, "contrast_size", "wordings")
        for name, default in (("contrast_size", 4), ("contrast_by", "patch")):
            require(self.contrast != "none" or getattr(self, name) == default,
                    f"{name} changes nothing while contrast is none")
        require(self.refill >= 0, f"refill must be 0 or larger, got {self.refill}")
        require(self.oversample >= 1, f"oversample must be at least 1, got {self.oversample}")
        require(self.wordings > 1 or self.pairing == "own", "pairing all needs wordings of at least 2")
        require(self.wordings == 1 or self.contrast == "none",
                "contrast and wordings cannot be combined: a contrast would be one of each wording")
        require(self.wordings == 1 or not self.selects,
                "refill and oversample cannot be combined with wordings: which of them carries the signal of a prompt "
                "is not defined")

    @property
    def selects(self) -> bool:
        """Whether a step trains on the groups with a signal out of those that were sampled."""
        return self.refill > 0 or self.oversample > 1

    def groups(self, wanted: int) -> int:
        """Groups of a round of sampling where `wanted` are wanted, contrasts aside."""
        return self.sampled_prompts(wanted) * self.wordings

    def sampled_prompts(self, wanted: int) -> int:
        """Prompts that are sampled where `wanted` groups are."""
        return math.ceil(wanted * self.oversample)
