"""Samples with vLLM, in the trainer's process and from the trainer's weights.

Prompts are rendered here: token ids with expanded pads, media keys, and the tower's output, so that no tokenizer,
template, processor or decoder of vLLM runs. Two methods of its model are replaced; both of its model runners call them.
`compute_logits` divides by the temperature, because no `logprobs_mode` gives log softmax(logits / T) before bans, top-k
and top-p; `get_mrope_input_positions` gives the trainer's positions. Noise comes from a seed per completion, and no
cache outlives a call, so completions depend on weights, prompts, sampling and the engine's limits alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from veripo_fast.errors import ConfigError, TrainingError
from veripo_fast.model.policy import Policy, in_own_memory
from veripo_fast.rollout import vllm_library as library
from veripo_fast.rollout.engine_input import Vision, media_of
from veripo_fast.rollout.limits import EngineLimits
from veripo_fast.rollout.protocol import OnGroup, Sampling
from veripo_fast.rollout.vllm_hooks import EngineFailure, Hooks, TowerStub, call, guarded, let_seeds_work_on_cpu
from veripo_fast.rollout.vllm_output import group_of
from veripo_fast.rollout.vllm_weights import sync_of
from veripo_fast.rollout.watchdog import Watchdog
from veripo_fast.run.memory import free_bytes, return_freed_memory
from veripo_fast.run.seeds import derive_seed
from veripo_fast.text import memory
from veripo_fast.types import LoadedPrompt, Message, Prompt, RolloutGroup

log = logging.getLogger(__name__)
Weights = Literal["alias", "copy"]
_IDLE_STEPS = 1000
"""Engine steps in a row that compute nothing while requests wait."""


class VllmEngine:
    """Samples with vLLM from weights that are the policy's own, or follow it.

    Args:
        policy, limits, vision: whose weights are sampled, what the engine is built for, what it gets of a medium.
        weights: `alias` shares the trainer's weights wherever it can, `copy` keeps a second copy.
        stall_seconds: an engine that computes nothing for so long ends the process.
        tensor_parallel: neighbouring ranks that share one engine; torch.distributed must be initialised.
        router_replay: whether completions come with the experts that were chosen; the policy must have some.

    Raises:
        ConfigError: no vLLM, or a version that was not tested or does not call what is replaced.
    """

    def __init__(self, policy: Policy, limits: EngineLimits, *, vision: Vision = "output", weights: Weights = "alias",
                 stall_seconds: float = 600.0, tensor_parallel: int = 1, router_replay: bool = False) -> None:
        self.library_version = library.check_version(policy.encoder.family)
        self.policy, self.limits = policy, limits
        self.vision: Vision = vision
        self.weights: Weights = "copy" if policy.backend.distributed else weights  # a shard is no part of an engine
        self.tensor_parallel, self.router_replay = tensor_parallel, router_replay
        self.watchdog = Watchdog(stall_seconds)
        self.engine: Any = None
        self.rebuilds = self._requests = 0
        self.hooks = Hooks()
        self._asleep: set[str] = set()
        self._version: int | None = None
        self._gpu = policy.device.type == "cuda"
        try:
            self._start()
        except EngineFailure as error:
            raise ConfigError(f"{self.library_version} cannot be used here: {error}") from error
        self.sleep()

    # -- protocol -----------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[LoadedPrompt], sampling: Sampling, on_group: OnGroup | None = None, *,
                 numbers: Sequence[int] | None = None, keep_caches: bool = False) -> list[RolloutGroup]:
        """See `RolloutEngine`.

        Raises:
            TrainingError: a prompt is too long, the weights are not finite, or the engine failed twice.
        """
        if not prompts:
            self._wake("kv_cache")  # as on other ranks: what is asleep decides what a sync sends
            return []
        self.limits.check([len(item.encoded.token_ids) for item in prompts], sampling.max_new_tokens)
        seeds = [derive_seed(sampling.seed, number) for number in numbers or range(len(prompts))]
        try:
            return self._attempt(prompts, sampling, seeds, on_group, keep_caches)
        except EngineFailure as error:
            self._rebuild(error)
        try:
            return self._attempt(prompts, sampling, seeds)
        except EngineFailure as error:
            raise TrainingError(f"the engine failed again after it was built anew for the batch: {error}") from error

    def sync(self) -> dict[str, float]:
        """See `RolloutEngine`: the bytes moved, and the time over that of a plain copy of as many."""
        if self._version == self.policy.version:
            return {}
        self._wake("weights")
        report = self._sync.sync(self.policy.version, everything=self._version is None)
        self._version = self.policy.version
        values = {"sync_bytes": float(report.bytes), "sync_over_plain_copy": report.ratio_to_plain_copy}
        return {name: value for name, value in values.items() if value is not None}

    def sleep(self) -> None:
        """See `RolloutEngine`. Shared weights stay; a CPU frees nothing."""
        if self._asleep or self.engine is None:
            return
        if self.weights == "copy":
            self.engine.sleep(level=2)
            self._version, self._asleep = None, {"weights", "kv_cache"}
        elif self._gpu:
            self.engine.sleep(level=0)
            self.engine.release_kv_cache_memory()
            self._asleep = {"kv_cache"}

    def close(self) -> None:
        """See `RolloutEngine`."""
        self.watchdog.close()
        self._shut_down()

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _attempt(self, prompts: Sequence[LoadedPrompt], sampling: Sampling, seeds: Sequence[int],
                 on_group: OnGroup | None = None, keep_caches: bool = False) -> list[RolloutGroup]:
        """One try to complete every prompt."""
        numbers: dict[str, int] = {}
        groups: dict[int, RolloutGroup] = {}
        with guarded(lambda: self.engine.abort_request(list(numbers)), self.watchdog):
            self.sync()
            self._wake("kv_cache")
            if not keep_caches:
                self.reset_caches()
            self.hooks.positions.clear()
            self.hooks.temperature = sampling.temperature or 1.0
            if self.tensor_parallel > 1:
                library.check_same_requests([item.encoded.token_ids.tolist() for item in prompts], sampling, seeds)
            for number, item in enumerate(prompts):
                name = f"veripo-{self._requests}"
                self._requests += 1
                numbers[name] = number  # before: Ctrl-C may come right behind
                self._add(name, item, sampling, seeds[number])
            for output in self._steps():
                number = numbers[output.request_id]
                groups[number] = group_of(prompts[number], output, sampling, self.policy, experts=self.router_replay)
                if on_group is not None:
                    call(on_group, number, groups[number])
        return [groups[number] for number in range(len(prompts))]

    def _add(self, name: str, item: LoadedPrompt, sampling: Sampling, seed: int) -> None:
        """Hand over a prompt.

        vLLM gives the completions of a prompt the seeds s, s + 1, ..., so prompts get seeds far from each other.
        """
        encoder, greedy = self.policy.encoder, sampling.temperature == 0
        parameters = library.sampling_parameters(
            completions=1 if greedy else sampling.group_size, greedy=greedy, top_p=sampling.top_p, top_k=sampling.top_k,
            seed=seed, max_tokens=sampling.max_new_tokens, end_ids=encoder.end_ids,
            banned_ids=encoder.banned_ids)
        media = media_of(encoder, item, self.vision)
        self.hooks.positions.add(item.encoded, [medium.key for medium in media])
        self.engine.add_request(name, library.rendered(item.encoded.token_ids.tolist(), media), parameters)

    def _steps(self) -> Iterator[Any]:
        """Finished requests as they come. Raises EngineFailure when the engine computes nothing any more."""
        idle, calls = 0, -1
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    yield output
            idle = idle + 1 if self.hooks.calls["compute_logits"] == calls else 0
            calls = self.hooks.calls["compute_logits"]
            if idle == 0:
                self.watchdog.progress()
            if idle == _IDLE_STEPS:
                raise EngineFailure(f"it computed nothing in {idle} steps while requests were waiting")

    # -- what is kept -------------------------------------------------------------------------------------------------

    def reset_caches(self) -> None:
        """Forget prefixes and tower outputs: they may come from other weights, and a resumed run, which does not have
        them, would round otherwise.

        Raises:
            TrainingError: the engine refuses.
        """
        self._reset_prefix_cache()
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()

    def remedies(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """See `RolloutEngine`."""
        yield "the engine's prefix cache holds keys and values of earlier weights", self._reset_prefix_cache
        yield "the engine's encoder cache holds tower outputs of earlier weights", self.reset_caches
        if not self.policy.backend.distributed:
            yield "the engine's weights are older than the trainer's", self._sync_again

    def _reset_prefix_cache(self) -> None:
        if not self.engine.reset_prefix_cache():
            raise TrainingError("the engine refused to reset its prefix cache, so stale keys and values would be used; "
                                "a request of an earlier batch must still be running")

    def _sync_again(self) -> None:
        self._sync.sync(self.policy.version, everything=True)
        self.reset_caches()

    # -- life of the engine -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Build the engine; one that cannot be used does not stay."""
        started = time.perf_counter()
        with guarded(self._shut_down):
            self.engine = library.build(self.policy, self.limits, tensor_parallel=self.tensor_parallel,
                                        returns_experts=self.router_replay)
            self._connect(started)

    def _connect(self, started: float) -> None:
        """Hook the model of a new engine, share or copy the weights, and see that it works."""
        runner = library.runner_of(self.engine)
        self.model = runner.model
        if not self._gpu:
            let_seeds_work_on_cpu(runner)
        if self.vision == "output":
            self.model.visual = TowerStub(self.model.visual)
        self.hooks.install(self.model)
        self._sync = sync_of(self.policy, self.model, self.weights, tower=self.vision == "pixels",
                             tensor_parallel=self.tensor_parallel)
        self._sync.self_test(self._reload)
        aliasing, report = self._sync.start(self.policy.version)
        return_freed_memory()  # views have just replaced all of the trainer's or the engine's weights
        if self.weights == "alias" and aliasing.copied and self.tensor_parallel == 1:
            log.warning("the engine keeps copies of %d parameters, which it cannot share: %s", len(aliasing.copied),
                        ", ".join(aliasing.copied[:3]))
        self._version = self.policy.version
        self._probe(type(runner).__name__)
        log.info("%s (%s) is ready after %.1f s; of %d parameters %d are the trainer's own, %d are copied: %s",
                 self.library_version, type(runner).__name__, time.perf_counter() - started,
                 len(aliasing.aliased) + len(aliasing.copied), len(aliasing.aliased), len(aliasing.copied), report)

    def _probe(self, runner: str) -> None:
        """One token of one text prompt: whether this version calls what was replaced.

        Raises:
            ConfigError: it does not, so its log-probs or positions would be others.
        """
        prompt, before = Prompt("probe", (Message("user", ("?",)),), "text", ""), dict(self.hooks.calls)
        loaded = LoadedPrompt(prompt, self.policy.encoder.encode(prompt, None), None)
        self._attempt([loaded], Sampling(1, 0.5, 1, 0), [0])
        unused = [name for name, count in self.hooks.calls.items() if count == before[name]]
        if unused:
            raise ConfigError(f"{self.library_version} with its {runner} does not call {' and '.join(unused)} of its "
                              f"model; take version {library.TESTED[-1]}")

    def _rebuild(self, error: EngineFailure) -> None:
        """Build the engine again after a failure; the weights are the trainer's."""
        if self.policy.backend.distributed:  # the other ranks do not build theirs again
            raise TrainingError(f"the rollout engine failed: {error}; --resume goes on") from error
        if "CUDA error" in str(error):  # it stays with the process
            raise TrainingError(f"the rollout engine failed: {error}. A CUDA error cannot be mended in the process; "
                                "--resume goes on from the last checkpoint") from error
        log.warning("the rollout engine failed (%s); it is built again, and samples with the same seeds", error)
        self.rebuilds += 1
        if self.weights == "alias":  # out of the engine's memory, which ends with it
            in_own_memory(self.policy)
        self._shut_down()
        try:
            self._start()
        except EngineFailure as again:
            raise TrainingError(f"the rollout engine failed ({error}) and cannot be built again: {again}") from again

    def _shut_down(self) -> None:
        if self.engine is not None:
            library.shut_down(self.engine)
        self.engine = self.model = self._version = None
        self._asleep = set()

    # -- weights ------------------------------------------------------------------------------------------------------

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """vLLM's own way to new weights, from Hugging Face's names."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _wake(self, kind: str) -> None:
        """Take back the memory of `weights` or `kv_cache` where it was given away. Raises TrainingError without it."""
        if kind not in self._asleep:
            return
        for last_try in (False, True):
            try:
                self.engine.wake_up([kind])
                break
            except RuntimeError as error:  # out of memory
                free = memory(free_bytes(self.policy.device))
                if last_try:
                    raise TrainingError(f"the engine cannot take back the memory of its {kind}, {free} are free; lower "
                                        "rollout.kv_cache_gb or optimizer.max_tokens") from error
                log.warning("the engine could not take back the memory of its %s (%s); tried once more", kind, error)
                torch.cuda.empty_cache()
        self._asleep.discard(kind)
