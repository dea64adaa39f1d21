"""What a plan's costs rest on: how long prompts and completions are, and what a device reaches of its peaks."""

from __future__ import annotations

from dataclasses import dataclass

from veripo_fast.schedule.hardware import Hardware
from veripo_fast.schedule.workload import Workload


@dataclass(frozen=True)
class Lengths:
    """What the prompts and completions of a stage are like, on average."""

    prompt_tokens: float
    patches: float
    """Of a prompt's media."""
    completion_tokens: float
    longest: float
    """The longest completion of a rollout batch."""
    live_share: float = 1.0
    """Groups with a signal; others are not trained on."""
    spread: float = 0.5
    """Standard deviation of a group's mean completion over the mean, which decides how long ranks wait."""

    @classmethod
    def bound(cls, work: Workload) -> Lengths:
        """Every prompt and completion as long as the configuration lets it be."""
        return cls(work.prompt_tokens, work.patches, work.completion_tokens, work.completion_tokens, spread=0.0)

    @classmethod
    def demonstrated(cls, work: Workload) -> Lengths:
        """The same of an sft stage."""
        return cls(work.prompt_tokens, work.patches, work.demonstrated_tokens, work.demonstrated_tokens, spread=0.0)


@dataclass(frozen=True)
class Rates:
    """What one device reaches."""

    train: float
    """FLOPs per second of an update, of a forward pass and of the tower."""
    decode: float
    """FLOPs per second while completions are written, where arithmetic bounds that."""
    memory: float
    """Bytes per second of weights and keys that decoding reads; 0: never the bound."""
    link: float
    """Bytes per second that a rank sends to the others, on a CPU (memory 0) in place of computing; 0: at no cost."""
    load_seconds: float = 0.0
    """Of a prompt: what training waits for its media."""
    reward_seconds: float = 0.0
    """Of a completion."""
    step_seconds: float = 0.0
    """Of a step, whatever its size: checkpoints, books."""

    @classmethod
    def assumed(cls, hardware: Hardware) -> Rates:
        """Shares of the peaks that are usual for bfloat16 on such GPUs."""
        return cls(TRAIN_SHARE * hardware.bf16_flops, DECODE_SHARE * hardware.bf16_flops,
                   MEMORY_SHARE * hardware.memory_bandwidth, LINK_SHARE * hardware.nvlink_bandwidth / 2)


TRAIN_SHARE, DECODE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.4, 0.2, 0.6, 0.7
"""Assumed, not measured here: `--from RUN` takes what a run has reached."""
