"""Whether a run fits: predicted peaks against free memory, the sentence that refuses it, and the option to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veripo_fast.config.schema import Config
from veripo_fast.schedule.phase import Phase
from veripo_fast.schedule.shapes import ModelShape
from veripo_fast.schedule.workload import workload_of
from veripo_fast.text import memory, plural


@dataclass(frozen=True)
class Room:
    """What one rank may take."""

    device: str
    """Its name for people, such as `cuda:0`."""
    device_bytes: int
    """Free on the device, in the share of a rank."""
    host_bytes: int | None = None
    """Of a GPU's rank: free host memory in its share. None: the device is the host."""
    held_bytes: int = 0
    """What the process holds of the host already, and the prediction counts too."""


@dataclass(frozen=True)
class Excess:
    """A phase that does not fit."""

    stage: str
    phase: Phase
    place: str
    needed: int
    free: int
    largest: str
    largest_bytes: int


def worst_excess(stages: Mapping[str, Sequence[Phase]], room: Room) -> Excess | None:
    """The phase that lacks most; None where all fit."""
    found = [excess for stage, phases in stages.items() for phase in phases for excess in _excesses(stage, phase, room)]
    return max(found, key=lambda excess: excess.needed - excess.free, default=None)


def _excesses(stage: str, phase: Phase, room: Room) -> list[Excess]:
    on_host = room.host_bytes is None
    checks = [(phase.device, room.device, room.device_bytes + (room.held_bytes if on_host else 0))]
    if room.host_bytes is not None:
        checks.append((phase.host, "the host", room.host_bytes + room.held_bytes))
    found = []
    for owners, place, free in checks:
        needed = sum(owners.values())
        if owners and needed > free:
            largest = max(owners, key=lambda owner: owners[owner])
            found.append(Excess(stage, phase, place, needed, free, largest, owners[largest]))
    return found


def refusal(excess: Excess, config: Config, shape: ModelShape, ranks: int) -> str:
    """One sentence: how much which phase takes, what there is, who takes most, and which option changes it.

    Args:
        config: with the overrides of the stage.
    """
    each = " on each rank" if ranks > 1 else ""
    return (f"stage {excess.stage} would take {memory(excess.needed)} of memory{each} in its phase "
            f"{excess.phase.name}, and {memory(excess.free)} can be had on {excess.place}; most of it, "
            f"{memory(excess.largest_bytes)}, is {excess.largest}: {remedy(excess, config, shape, ranks)} "
            "(train.check_memory false starts it all the same)")


def remedy(excess: Excess, config: Config, shape: ModelShape, ranks: int) -> str:
    """What to change when an owner is the largest."""
    owner, phase = excess.largest, excess.phase.name
    kind = next((stage.kind for stage in config.stages if stage.name == excess.stage), "grpo")
    rollout, video = config.rollout, config.video
    if phase in _EVALUATIONS and (of_evaluation := _smaller_evaluation(owner, phase, config)):
        return of_evaluation
    if owner in ("activations", "allocator", "backward", "logits", "loss") and phase != "rollout":
        return _smaller_rows(config, shape, ranks, kind)
    if owner in _OF_ROLLOUT:
        return (f"lower grpo.prompts_per_step (now {config.grpo.prompts_per_step}), rollout.group_size (now "
                f"{rollout.group_size}) or data.max_prompt_tokens, or take rollout.engine vllm")
    if owner == "judge key/value cache" and rollout.engine == "torch":
        return "take a smaller judge (verifier.llm_path), or verifier.judge endpoint"
    if owner in ("key/value cache", "engine activations", "judge key/value cache"):
        asked = f"now {rollout.kv_cache_gb:g}" if rollout.kv_cache_gb else "0, which is a quarter of a GPU or 1 GiB"
        return f"lower rollout.kv_cache_gb ({asked}) or data.max_prompt_tokens"
    if owner == "engine weights":
        return "raise rollout.tensor_parallel, which shares them out, or take a smaller model"
    if owner in ("tower activations", "patches", "patches of the step", "host patches", "frames"):
        frames = "video.num_frames" if video.num_frames else "video.max_frames"
        return (f"lower {frames} (now {video.num_frames or video.max_frames}) or video.max_pixels (now "
                f"{video.max_pixels})" + ("" if config.model.freeze_vision else ", or set model.freeze_vision"))
    if owner in ("AdamW's moments", "masters") and _can_move_adamw(excess, config):
        return "set optimizer.offload, which keeps it in host memory while completions are sampled"
    if owner in _BY_NAME:
        return _BY_NAME[owner]
    return _smaller_share(config, ranks)


_OF_ROLLOUT = ("activations", "allocator", "prompt cache", "completion cache", "recurrent states", "draws", "logits",
               "attention scores")
_EVALUATIONS = ("eval", "evaluation")
_BY_NAME = {
    "tower output": "lower cache.host_bytes, or cache.gpu_bytes on a GPU",
    "vision cache": "lower cache.host_bytes",
    "frames ahead": "lower cache.prefetch_bytes or cache.prefetch_prompts",
    "judge weights": "take a smaller judge (verifier.llm_path), or verifier.judge endpoint, which takes no memory here",
    "judge activations": "take a smaller judge (verifier.llm_path), or verifier.judge endpoint",
    "reference policy": "set grpo.kl_coef and grpo.dpo_rate to 0 and reward.reference_logprobs to false, which needs "
                        "no reference, or share it out over more ranks",
    "mean of the policy": "take grpo.reference stage_start, which has no float32 mean, or more ranks",
    "whole weights": "take rollout.engine vllm, which needs no rank to hold every weight",
    "checkpoint": "set checkpoint.asynchronous to false, or take a machine with more memory",
    "checkpoint files": "take a smaller model or a machine with more memory: every rank loads the whole model",
    "experts one by one": "take a machine with more memory: the files hold each expert by itself, and all are read "
                          "before they are put together",
    "compiled products": "set model.dtype to float32, of which a CPU keeps none, or take a machine with more memory",
    "process": "take a machine with more memory, or fewer ranks on this one",
}


def _smaller_evaluation(owner: str, phase: str, config: Config) -> str:
    """What makes an evaluation smaller; empty for an owner that others share."""
    settings, rollout = config.eval, config.rollout
    if owner.startswith("judge ") and (owner != "judge key/value cache" or rollout.engine == "torch"):
        return ("take a smaller judge (llm_path in eval.judge_options), or eval.judge endpoint, which takes no memory "
                "here")
    if owner not in (*_OF_ROLLOUT, "frames"):
        return ""
    other = f"eval.samples (now {settings.samples})"
    if phase == "eval":
        other = f"eval.every_limit (now {settings.every_limit})"
    engine = "" if owner == "frames" else ", or take rollout.engine vllm"
    return f"lower eval.prompts_per_batch (now {settings.prompts_per_batch}) or {other}{engine}"


def _can_move_adamw(excess: Excess, config: Config) -> bool:
    """Whether optimizer.offload would make room where it lacks."""
    return (excess.phase.name == "rollout" and excess.place not in ("cpu", "the host") and not config.optimizer.offload
            and config.distributed.backend != "deepspeed")


def _smaller_rows(config: Config, shape: ModelShape, ranks: int, kind: str) -> str:
    """A micro-batch is as large as optimizer.max_tokens, or as one group, pair or demonstration that is larger."""
    work, rollout = workload_of(config, shape, ranks), config.rollout
    limits = f"rollout.max_new_tokens (now {rollout.max_new_tokens})"
    what, completions, length = "pair", 2, work.completion_tokens
    if kind == "grpo":
        what, completions = "group", rollout.group_size
        limits = f"rollout.group_size (now {rollout.group_size}), {limits}"
    elif kind == "sft":
        what, completions, length = "demonstration", 1, work.demonstrated_tokens
        limits = f"sft.max_completion_tokens (now {config.sft.max_completion_tokens})"
    tokens = work.prompt_tokens + completions * (length - 1)
    checkpointing = "" if config.model.gradient_checkpointing else ", or set model.gradient_checkpointing"
    if config.optimizer.max_tokens > tokens:
        return f"lower optimizer.max_tokens (now {config.optimizer.max_tokens}){checkpointing}"
    return (f"one {what} alone is {plural(tokens, 'token')}, so lower {limits} or data.max_prompt_tokens (now "
            f"{config.data.max_prompt_tokens}){checkpointing}")


def _smaller_share(config: Config, ranks: int) -> str:
    """Weights, gradients and AdamW's state: more ranks, more of it sharded, or more of it on the host."""
    distributed = config.distributed
    if ranks == 1:
        dtype = "" if config.model.dtype == "bfloat16" else "set model.dtype to bfloat16, "
        return f"{dtype}share it out over several ranks (distributed.backend fsdp), or take a smaller model"
    if distributed.backend == "deepspeed" and distributed.zero_stage < 3 and config.rollout.engine == "vllm":
        return f"raise distributed.zero_stage (now {distributed.zero_stage}) to 3, or start more ranks"
    if distributed.offload == "none":
        return "start more ranks, or take distributed.backend deepspeed with distributed.offload cpu"
    return "start more ranks or take a smaller model"


def summary(stages: Mapping[str, Sequence[Phase]], ranks: int) -> list[str]:
    """A line per stage: its phases with their peaks."""
    each = " on each rank" if ranks > 1 else ""
    return [f"memory of {stage}, predicted{each}: "
            + ", ".join(f"{phase.name} {memory(phase.device_bytes)}" for phase in phases)
            for stage, phases in stages.items()]


def as_tree(stages: Mapping[str, Sequence[Phase]]) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Stage -> phase -> device and host -> owner -> bytes, as memory.json holds it."""
    return {stage: {phase.name: {"device": dict(phase.device), "host": dict(phase.host)} for phase in phases}
            for stage, phases in stages.items()}
