"""Seconds of a step by phase: FLOPs and bytes over what a device reaches of its peaks.

A cost model, not a simulation: each phase takes the longer of its arithmetic and its traffic, as in a roofline
(Williams et al. 2009). What no formula knows (decoding of videos that training does not hide, rewards, a verifier's
judge, AdamW's way to host memory and back) is 0 until a finished run has measured it.

Letters: P prompt tokens, R completion tokens, G group size, N weights, b bytes of a weight, K ranks, E engines.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.schema import Config
from veripo_fast.distributed.balance import deal, idle_share
from veripo_fast.distributed.flops import ModelCost, TowerCost, group_flops, tower_flops
from veripo_fast.schedule.adapters import adapter_shapes
from veripo_fast.schedule.layer_bytes import state_bytes, unread
from veripo_fast.schedule.passes import (
    FORWARD,
    dpo_head_products,
    dpo_passes,
    grpo_head_products,
    grpo_passes,
    recomputed,
    rounds_of,
    trained_groups,
    trained_size,
)
from veripo_fast.schedule.rates import Lengths, Rates
from veripo_fast.schedule.shapes import ModelShape, numbers
from veripo_fast.schedule.workload import itemsize_of

ADAMW_BYTES = 28
"""Read and written for a weight by AdamW in float32: gradient, master and two moments read, three of them written."""


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a step on the rank that has most."""

    encode_flops: float
    prefill_flops: float
    decode_flops: float
    decode_bytes: float
    reference_flops: float
    """Of the reference's pass over what was sampled, for rewards that are told its log-probs."""
    update_flops: float
    link_bytes: float
    """That a rank receives for an update."""
    sync_bytes: float
    """That a rank's engine receives of the new weights."""
    step_bytes: float
    """Of AdamW."""
    idle_share: float
    """Mean over ranks: what they wait for the fullest one in an update."""
    prompts: float
    """That a rank loads."""
    completions: float
    """Of all ranks."""
    tokens: float
    """Sampled by all ranks."""


def model_cost(shape: ModelShape, model: ModelConfig | None = None) -> ModelCost:
    """The shape as `group_flops` wants it; its tower counts where it is trained."""
    adapters = None if model is None else adapter_shapes(shape, model.lora)
    trimmed = shape.trims_last_layer(model.router_balance if model else 0.0)
    head_size = max(shape.queries // shape.heads, 1)
    return ModelCost(shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.keys // head_size, head_size,
                     shape.vocabulary, None, bool(shape.delta), shape.experts, shape.delta,
                     0 if adapters is None else numbers(adapters.language), trimmed,
                     0 if adapters is None else numbers(adapters.unread))


def read_numbers(shape: ModelShape, rows: int) -> float:
    """Weights that are read for one token of each of `rows` completions."""
    return shape.language_numbers - (unread(shape.experts, shape.hidden, rows) if shape.experts else 0)


def _trained_numbers(shape: ModelShape, config: Config) -> int:
    """Of the language model: all its weights, or its adapters."""
    adapters = adapter_shapes(shape, config.model.lora)
    return shape.language_numbers if adapters is None else numbers(adapters.language)


def tower_cost(shape: ModelShape) -> TowerCost:
    """The tower of a shape."""
    tower = shape.tower
    return TowerCost(tower.depth, tower.hidden, tower.intermediate, tower.out_hidden, 3 if tower.gated else 2,
                     tower.merged, 1 + tower.deepstack, tower.features, tower.full_blocks, tower.window)


def grpo_work(shape: ModelShape, config: Config, ranks: int, lengths: Lengths) -> Work:
    """A GRPO step whose overrides are in `config`, with as many rounds of sampling as `lengths.live_share` leads to."""
    size, grpo, plan, tensor = config.rollout.group_size, config.grpo, config.plan, config.rollout.tensor_parallel
    engines, cost = max(ranks // tensor, 1), model_cost(shape, config.model)
    rounds = rounds_of(plan, grpo.prompts_per_step, lengths.live_share)
    own = [max(round(lengths.completion_tokens), 1)] * size
    prompt = max(round(lengths.prompt_tokens), 1)
    prefill = group_flops(cost, prompt, [1], backward=False)
    decode = group_flops(cost, prompt, own, backward=False) - prefill
    told = prefill + decode if config.reward.reference_logprobs else 0
    if plan.contrast != "none":
        contrast = group_flops(cost, prompt, own[:1] * plan.contrast_size, backward=False)
        prefill, decode = 2 * prefill, decode + contrast - prefill
        size += plan.contrast_size
    groups = [math.ceil(count * plan.wordings / engines) for count in rounds]
    read = sum(_read_bytes(shape, config, lengths, count * size) for count in groups) / tensor
    encode = tower_flops(tower_cost(shape), _grid(shape, config, lengths), backward=False)
    loaded = sum(math.ceil(count / ranks) for count in rounds)
    again = 2 if plan.contrast != "none" and plan.contrast_by == "frame" else 1
    most, idle = _dealt(shape, config, ranks, lengths)
    completions = sum(rounds) * plan.wordings * size
    return Work(
        encode * loaded * again, prefill * sum(groups) / tensor, decode * sum(groups) / tensor, read,
        told * sum(math.ceil(count * plan.wordings / ranks) for count in rounds), most,
        _link_bytes(shape, config, ranks, most), sync_bytes(shape, config),
        ADAMW_BYTES * _trained_numbers(shape, config) / ranks * grpo.updates_per_rollout, idle, loaded * again,
        completions, completions * lengths.completion_tokens)


def _read_bytes(shape: ModelShape, config: Config, lengths: Lengths, rows: int) -> float:
    """Bytes that an engine of one rank reads while it writes `rows` completions together."""
    itemsize = itemsize_of(config)
    read = lengths.longest * read_numbers(shape, rows) * itemsize
    cache = rows * lengths.completion_tokens * 2 * shape.keys * shape.attending * itemsize
    read += cache * (lengths.prompt_tokens + lengths.completion_tokens / 2)
    if shape.delta:  # each token reads a state and writes it
        read += 2 * rows * shape.delta.layers * state_bytes(shape.delta) * lengths.completion_tokens
    return read


def dpo_work(shape: ModelShape, config: Config, ranks: int, lengths: Lengths) -> Work:
    """A DPO step, the reference's passes before the first one spread over all."""
    pairs = math.ceil(config.dpo.pairs_per_step / ranks)
    own = [max(round(lengths.completion_tokens), 1)] * 2
    prompt = max(round(lengths.prompt_tokens), 1)
    flops = group_flops(model_cost(shape, config.model), prompt, own) * dpo_passes(config)
    flops += dpo_head_products(config) * _head_flops(shape, own)
    update = (flops + _tower_update(shape, config, lengths)) * pairs
    encode = tower_flops(tower_cost(shape), _grid(shape, config, lengths), backward=False) * pairs
    return Work(encode, 0, 0, 0, 0, update, _link_bytes(shape, config, ranks, update), 0,
                ADAMW_BYTES * _trained_numbers(shape, config) / ranks, 0.0, pairs, 0,
                config.dpo.pairs_per_step * 2 * lengths.completion_tokens)


def sft_work(shape: ModelShape, config: Config, ranks: int, lengths: Lengths) -> Work:
    """An SFT step, with one answer to each prompt."""
    prompts = math.ceil(config.sft.prompts_per_step / ranks)
    own = [max(round(lengths.completion_tokens), 1)]
    flops = group_flops(model_cost(shape, config.model), max(round(lengths.prompt_tokens), 1), own) * prompts
    update = flops * recomputed(config) + _tower_update(shape, config, lengths) * prompts
    encode = tower_flops(tower_cost(shape), _grid(shape, config, lengths), backward=False) * prompts
    return Work(encode, 0, 0, 0, 0, update, _link_bytes(shape, config, ranks, update), 0,
                ADAMW_BYTES * _trained_numbers(shape, config) / ranks, 0.0, prompts, 0,
                config.sft.prompts_per_step * lengths.completion_tokens)


def seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Seconds of each phase of a step."""
    decode = work.decode_flops / rates.decode
    if rates.memory:
        decode = max(decode, work.decode_bytes / rates.memory)
    update = work.update_flops / rates.train
    if rates.memory and update:
        update += work.step_bytes / rates.memory
    sending = work.link_bytes / rates.link if rates.link else 0.0
    sync = max(work.sync_bytes / rates.link if rates.link and work.link_bytes else 0.0,
               2 * work.sync_bytes / rates.memory) if rates.memory else 0.0
    found = {"vision": work.encode_flops / rates.train + rates.load_seconds * work.prompts, "sync": sync,
             "rollout": work.prefill_flops / rates.train + decode, "reward": rates.reward_seconds * work.completions,
             "reference": work.reference_flops / rates.train,
             "update": max(update, sending) if rates.memory else update + sending, "rest": rates.step_seconds}
    return {name: value for name, value in found.items() if value}


def sync_bytes(shape: ModelShape, config: Config) -> float:
    """Bytes of a rank's part of the engine, which follow the policy's weights before each rollout."""
    if config.rollout.engine != "vllm":
        return 0.0
    itemsize = itemsize_of(config)
    return (1 / config.rollout.tensor_parallel) * shape.language_numbers * itemsize


def _grid(shape: ModelShape, config: Config, lengths: Lengths) -> list[list[int]]:
    """One video, whose frames are as large as the configuration lets them be."""
    patches = round(lengths.patches)
    if not patches:
        return []
    largest = max(config.video.max_pixels // shape.tower.patch_size ** 2, shape.tower.merged)
    pairs = max(round(patches / largest), 1)
    return [[pairs, max(round(patches / pairs), 1), 1]]


def _tower_update(shape: ModelShape, config: Config, lengths: Lengths) -> float:
    """FLOPs of the tower for a prompt of an update."""
    if config.model.freeze_vision:
        return 0
    return tower_flops(tower_cost(shape), _grid(shape, config, lengths)) * recomputed(config)


def _head_flops(shape: ModelShape, completions: Sequence[int]) -> int:
    """Of one product of the completions' hidden states with the head."""
    return 2 * shape.hidden * shape.vocabulary * sum(completions)


def _dealt(shape: ModelShape, config: Config, ranks: int, lengths: Lengths) -> tuple[float, float]:
    """FLOPs of an update's fullest rank, and the mean share that ranks wait for it."""
    live = trained_groups(config.plan, config.grpo.prompts_per_step, lengths.live_share)
    groups = math.ceil(live)
    if not groups:
        return 0.0, 0.0
    draw = random.Random(0)
    sigma = math.sqrt(math.log1p(lengths.spread ** 2))
    drawn = [math.exp(sigma * draw.gauss(0.0, 1.0)) for _ in range(groups)]
    drawn = [value * groups / sum(drawn) for value in drawn]
    limit, size, cost = config.rollout.max_new_tokens, trained_size(config), model_cost(shape, config.model)
    prompt, tower = max(round(lengths.prompt_tokens), 1), _tower_update(shape, config, lengths)
    passes, products = grpo_passes(config), grpo_head_products(config)
    flops = []
    for factor in drawn:
        mean = min(max(round(lengths.completion_tokens * factor), 1), limit)
        own = [mean] * size
        flops.append(round(group_flops(cost, prompt, own) * passes + products * _head_flops(shape, own) + tower))
    share = math.ceil(groups / config.grpo.updates_per_rollout)
    most, idle = _fullest(tuple(flops), ranks, share)
    return most * live / groups + _pair_flops(shape, config, ranks, lengths), idle


def _pair_flops(shape: ModelShape, config: Config, ranks: int, lengths: Lengths) -> float:
    """FLOPs of a rank for the pairs of a GRPO step and their reference, where every update has as many as it may."""
    if not config.grpo.dpo_rate:
        return 0.0
    mean = min(max(round(lengths.completion_tokens), 1), config.rollout.max_new_tokens)
    one = group_flops(model_cost(shape), max(round(lengths.prompt_tokens), 1), [mean] * 2)
    pairs = config.dpo.pairs_per_step * config.grpo.updates_per_rollout
    return one * pairs * (recomputed(config) + FORWARD) / ranks


@lru_cache(maxsize=64)
def _fullest(flops: tuple[int, ...], ranks: int, share: int) -> tuple[float, float]:
    """FLOPs of the fullest rank, added up over updates of `share` groups, and the mean share that ranks wait for it.
    Groups are dealt out by the trainer's own dealer."""
    most = idle = 0.0
    parts = [flops[start:start + share] for start in range(0, len(flops), share)]
    for part in parts:
        dealt = deal(part, ranks)
        most += max(sum(part[index] for index in own) for own in dealt)
        idle += sum(idle_share(part, dealt)) / ranks / len(parts)
    return most, idle


def _link_bytes(shape: ModelShape, config: Config, ranks: int, flops: float) -> float:
    """Bytes that a rank receives for an update: weights for each forward and backward, and gradients once."""
    if ranks == 1 or not flops:
        return 0.0
    itemsize = itemsize_of(config)
    weights = shape.language_numbers * itemsize * (ranks - 1) / ranks
    cost = model_cost(shape, config.model)
    per_batch = group_flops(cost, config.optimizer.max_tokens, [1]) * recomputed(config)
    batches = max(math.ceil(flops / per_batch), 1)
    sharded = config.distributed.backend != "deepspeed" or config.distributed.zero_stage == 3
    return weights * (3 * batches if sharded else 2 * config.grpo.updates_per_rollout)

