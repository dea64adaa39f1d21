"""How large a step can get: tokens, patches and completions of one rank, from a configuration and a model's shape.

It is a bound for prompts with one video each, whose completions all reach their limit. What a record asks for itself
(several videos, more frames) is in no configuration; data.max_prompt_tokens bounds that.
"""

from __future__ import annotations

from dataclasses import dataclass

from veripo_fast.config.families import FAMILIES
from veripo_fast.config.schema import Config
from veripo_fast.schedule.shapes import ModelShape

PREFILL_TOKENS = 2048
"""Prompt tokens of one forward pass of the torch engine; a longer prompt runs alone."""
MOST_LOGITS = 1 << 25
"""Rows times vocabulary that the torch engine holds at once: 128 MiB in float32, with their copies four times that."""
TEXT_TOKENS = 512
"""Of a question with its options, the instruction and the chat template."""
STAMP_TOKENS = 10
"""Qwen3-VL's time before each pair of frames, with the tokens around the pair."""
STAMPED = [name for name, family in FAMILIES.items() if family.video_time == "stamps"]
"""Families that have such stamps."""


@dataclass(frozen=True)
class Workload:
    """What one rank does in a step."""

    prompt_tokens: int
    """P, of the longest prompt."""
    patches: int
    """Of its video."""
    pixels: int
    """Of all frames of its video."""
    features: int
    """Merged tokens of its video."""
    completion_tokens: int
    """R."""
    group_size: int
    """G."""
    prompts: int
    """That this rank loads and samples for in a rollout."""
    groups: int
    """That it trains on in an update."""
    pairs: int
    """The same of a dpo step."""
    demonstrated: int
    """Prompts of an sft step that this rank learns from."""
    demonstrated_tokens: int
    """Of the longest answer that it learns."""
    media: int
    """Videos of the stage and of evaluations that any rank loads, at most."""


def itemsize_of(config: Config) -> int:
    """Bytes of a weight."""
    return 4 if config.model.dtype == "float32" else 2


def workload_of(config: Config, shape: ModelShape, ranks: int) -> Workload:
    """The largest step of a stage, whose overrides are in `config`."""
    video, tower, rollout = config.video, shape.tower, config.rollout
    frames = video.num_frames or video.max_frames
    pairs = -(-frames // tower.temporal_patch_size)
    tokens = pairs * max(video.max_pixels // tower.factor ** 2, 1)
    stamps = pairs * STAMP_TOKENS if shape.family in STAMPED else 2
    longest = shape.positions - min(rollout.max_new_tokens, shape.positions - 1)
    prompt = min(tokens + stamps + TEXT_TOKENS, config.data.max_prompt_tokens, longest)
    features = min(tokens, prompt)
    engines = max(ranks // rollout.tensor_parallel, 1)
    grpo = config.grpo
    return Workload(
        prompt, features * tower.merged, features * tower.factor ** 2 * tower.temporal_patch_size, features,
        rollout.max_new_tokens, rollout.group_size, -(-config.plan.groups(grpo.prompts_per_step) // engines),
        -(-(grpo.prompts_per_step * config.plan.wordings // grpo.updates_per_rollout) // ranks),
        -(-config.dpo.pairs_per_step // ranks), -(-config.sft.prompts_per_step // ranks),
        config.sft.max_completion_tokens,
        -(-(grpo.steps * config.plan.sampled_prompts(grpo.prompts_per_step) + _evaluated(config)) // ranks))


def _evaluated(config: Config) -> int:
    """Prompts of evaluations, as far as the options tell: without `eval.limit` those between stages take all."""
    settings = config.eval
    if not config.data.eval:
        return 0
    between = settings.limit or 0 if settings.at != "never" else 0
    return max(between, settings.every_limit if settings.every is not None else 0)


def steps_of(config: Config, kind: str) -> int | None:
    """Optimizer steps of a stage as far as the options tell; None: as many as there are prompts or pairs for."""
    if kind == "grpo":
        return config.grpo.steps * config.grpo.updates_per_rollout
    return config.dpo.max_steps if kind == "dpo" else config.sft.max_steps
