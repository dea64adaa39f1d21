"""The memory ledger: how many bytes each phase of a run will hold on one rank, and who owns them, before anything runs.

Pure functions of the model's shape, the configuration, the number of ranks and the kind of device. What the numbers
are made of lies in placement.py (weights, gradients, AdamW), activations.py (forward and backward) and workload.py (the
largest step); this file says what is there at the same time. A phase has several moments, and its peak is the largest.

Not in it: what a CUDA context holds, which the free memory of a GPU leaves out too, and how an allocator splinters on a
GPU. On a CPU the process itself is an owner, and so is what glibc keeps of freed blocks (`SPLINTERED`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.schedule.activations import (
    Row,
    layer_working_bytes,
    liger_bytes,
    loss_bytes,
    row_of,
    saved_bytes,
    tower_saved_bytes,
    tower_working_bytes,
)
from veripo_fast.schedule.adapters import adapter_shapes, loss_with, saved_by_adapters
from veripo_fast.schedule.engine import EngineShape
from veripo_fast.schedule.judge import JudgeShape, judging_owners
from veripo_fast.schedule.phase import Phase, largest
from veripo_fast.schedule.placement import Held, Owners, Placement, held_by, reference_owners
from veripo_fast.schedule.process import LOADING, compiled_bytes, process_bytes
from veripo_fast.schedule.sampling import Batch, moments
from veripo_fast.schedule.shapes import ModelShape, numbers
from veripo_fast.schedule.workload import Workload, itemsize_of, steps_of, workload_of

ROOM_BYTES = 256 << 20
"""Frames and patches that wait to be used again: MAX_BYTES of video/buffers.py."""
SPLINTERED, IDLE_BYTES = 0.35, 256 << 20
"""Of what the layers of an update save on a CPU, if only while they run: freed blocks that glibc can neither use again
nor give back meanwhile; and how many bytes may lie so, that of model/layer_memory.py."""


def predict(shape: ModelShape, config: Config, ranks: int = 1, *, gpu_bytes: int = 0,
            judges: Mapping[str, JudgeShape] | None = None) -> dict[str, list[Phase]]:
    """The phases of every stage of a run, by the stage's name.

    Args:
        gpu_bytes: all memory of a rank's GPU; 0: it is a CPU.
        judges: of the stages with a judge `llm`, by its folder.
    """
    stages = {}
    for stage in config.stages:
        stages[stage.name] = stage_phases(shape, config, stage, ranks, gpu_bytes, judges)
    return stages


def stage_phases(shape: ModelShape, run: Config, stage: StageConfig, ranks: int, gpu_bytes: int,
                 judges: Mapping[str, JudgeShape] | None = None) -> list[Phase]:
    """The phases of one stage of a run, with the evaluations inside of it (`eval`) and behind it (`evaluation`)."""
    config = apply_overrides(run, stage.set)
    ledger = Ledger(shape, config, ranks, gpu_bytes, workload_of(config, shape, ranks))
    phases = ledger.phases(stage.kind)
    if stage.kind == "dpo" and config.verifier.judge == "llm" and judges is not None:
        phases.insert(1, ledger.verify(judges[config.verifier.llm_path]))
    reporting = (judges or {}).get(run.reporting_judge.llm_path) if run.eval.judge == "llm" else None
    if run.data.eval and run.eval.every is not None:
        phases.insert(-1, ledger.evaluation(run, reporting, inside=True))
    if run.data.eval and run.eval.at != "never":
        phases.append(ledger.evaluation(run, reporting, inside=False))
    return phases


class Ledger:
    """The owners of one stage on one rank.

    Args:
        work: the step that is looked at.
    """

    def __init__(self, shape: ModelShape, config: Config, ranks: int, gpu_bytes: int, work: Workload) -> None:
        self.shape, self.config, self.ranks, self.work = shape, config, ranks, work
        self.gpu_bytes, self.on_gpu = gpu_bytes, gpu_bytes > 0
        self.itemsize = itemsize_of(config)
        self.placement = Placement.of(config.distributed, ranks)
        self.trained_tower = not config.model.freeze_vision
        self.adapters = adapter_shapes(shape, config.model.lora)
        self.held: Held = held_by(shape, self.placement, self.itemsize, self.trained_tower, self.on_gpu, self.adapters)
        self._engine = EngineShape(shape, config.rollout, self.itemsize, gpu_bytes,
                                   work.prompt_tokens + work.completion_tokens, self.placement.backend == "none",
                                   self.adapters)
        self.masked = not self.on_gpu or config.model.attention == "sdpa"
        offloads = config.optimizer.offload and self.placement.backend in ("none", "fsdp")
        self.away = {name: self.held.resident[name] for name in ("masters", "AdamW's moments") if offloads}
        """In host memory from a rollout to the step behind it."""
        self.reference: Owners = {}
        """The reference of a GRPO stage, which is there for all of it."""
        self.compiled = 0  # of products in bfloat16 on a CPU
        self.one_step = False  # whether the stage ends with its first step, before which AdamW has no moments

    def phases(self, kind: str) -> list[Phase]:
        """Of a stage, in the order in which they come. Of an sft stage one answer to each prompt is looked at."""
        steps, work = steps_of(self.config, kind), self.work
        self.one_step = steps == 1
        if self.one_step:
            self.away.pop("AdamW's moments", None)
        trained = work.group_size * (self.config.plan.wordings if self.config.plan.pairing == "all" else 1)
        completions, length, groups, prompts = {
            "sft": (1, work.demonstrated_tokens, work.demonstrated, work.demonstrated),
            "dpo": (2, work.completion_tokens, work.pairs, work.pairs),
            "grpo": (trained, work.completion_tokens, work.groups, work.prompts)}[kind]
        row = row_of(work.prompt_tokens, completions, length, groups, self.config.optimizer.max_tokens)
        if self.itemsize < 4 and not self.on_gpu:
            self.compiled = compiled_bytes(self.shape, steps and steps * math.ceil(groups / row.groups))
        if kind == "grpo":
            self.reference = reference_owners(self.shape, self.config, self.ranks, self.itemsize, self.adapters)
        before = [self._rollout()] if kind == "grpo" else []
        if kind == "dpo":
            before = [self._reference(row)]
        coupled = kind == "grpo" and self.config.grpo.policy_loss(self.config.rollout.max_new_tokens).couples_tokens
        update = self._update(row, groups, prompts, 2 if kind == "dpo" else int(coupled))
        return [self._load(), self._vision(prompts), *before, update, self._checkpoint()]

    # -- phases -------------------------------------------------------------------------------------------------------

    def _load(self) -> Phase:
        """The files are mapped, and each weight is copied into memory of its own; every rank loads all of them. Experts
        that lie there one by one are all read before they are put together."""
        whole = (self.shape.language_numbers + self.shape.vision_numbers) * self.itemsize
        mapped = self.shape.stored_bytes if not self.on_gpu else 0
        engine = self._engine.weights(starting=True)
        return self._phase("load", {"weights": whole, "checkpoint files": mapped, **engine},
                           {"process": LOADING, "experts one by one": self.shape.apart * self.itemsize})

    def _vision(self, prompts: int) -> Phase:
        return self._encoding("vision", prompts, self._resident(early=True))

    def _encoding(self, name: str, prompts: int, resident: Owners) -> Phase:
        """While videos run through the tower, and the frames of all prompts are there."""
        work = self.work
        tower = {"tower activations": tower_working_bytes(self.shape.tower, work.patches, self.itemsize),
                 "patches": 2 * work.patches * self.shape.tower.features * self.itemsize}
        frames = 3 * work.pixels * prompts
        return self._phase(name, {**resident, **self._features(prompts), **tower}, {"frames": frames, **self._host()})

    def _rollout(self) -> Phase:
        return largest(self._sampling("rollout", Batch.of(self.work), self._resident(away=True, early=True)))

    def _sampling(self, name: str, batch: Batch, resident: Owners) -> list[Phase]:
        """The moments in which an engine writes completions."""
        always = {**resident, **self._features(batch.prompts)}
        if self.config.rollout.engine == "vllm":
            engine = {**self._engine.weights(starting=False), **self._engine.cache()}
            return [self._phase(name, {**always, **engine}, self._host(batch.prompts))]
        always["whole weights"] = self.held.whole
        return [self._phase(name, {**always, **owners}, self._host(batch.prompts))
                for owners in moments(self.shape, batch, self.config.rollout, self.itemsize, self.on_gpu)]

    def evaluation(self, run: Config, judge: JudgeShape | None, *, inside: bool) -> Phase:
        """The largest moment of an evaluation: videos run through the tower, completions are written, a judge reads.

        Args:
            run: the configuration of the run, because no stage overrides what is evaluated. judge: a judge `llm`.
            inside: of one inside of a stage, which is greedy, on a part of the prompts, and beside AdamW's state.
        """
        limit = run.eval.every_limit if inside else run.eval.limit
        together = min(run.eval.prompts_per_batch, limit or run.eval.prompts_per_batch)
        prompts = -(-together // max(self.ranks // run.rollout.tensor_parallel, 1))
        batch = Batch(prompts, 1 if inside else max(run.eval.samples, 1), self.work.prompt_tokens,
                      run.rollout.max_new_tokens)
        name, resident = ("eval", self._resident(away=True)) if inside else ("evaluation", self._between())
        found = [self._encoding(name, prompts, resident), *self._sampling(name, batch, resident)]
        if judge is not None:
            found.append(self._judging(name, judge, resident))
        return largest(found)

    def verify(self, judge: JudgeShape) -> Phase:
        """A judge `llm` in this process."""
        return self._judging("verify", judge, self._between())

    def _judging(self, name: str, judge: JudgeShape, resident: Owners) -> Phase:
        """While a judge works, the policy's engine sleeps; on a CPU an engine cannot."""
        asleep: Owners = {}
        cache = 0
        if self.config.rollout.engine == "vllm":
            cache = self._engine.cache()["key/value cache"]
            asleep = {} if self.on_gpu else {**self._engine.weights(starting=False), "key/value cache": cache}
        return self._phase(name, {**resident, **asleep, **judging_owners(judge, self.itemsize, cache)}, self._host())

    def _reference(self, row: Row) -> Phase:
        return self._phase("reference", {**self._between(), **self._features(self.work.pairs),
                                         **self._forward(row)}, self._host(self.work.pairs))

    def _update(self, row: Row, groups: int, prompts: int, whole: int) -> Phase:
        shape, b, held = self.shape, self.itemsize, self.held
        always = {**self._resident(away=True, early=True), **self._features(prompts), "gathered layers": held.gathered}
        several = groups > row.groups
        model = self.config.model
        trimmed = shape.trims_last_layer(model.router_balance)
        layers = saved_bytes(shape, row, b, self.masked, False, trimmed)
        saved = {"activations": saved_bytes(shape, row, b, self.masked, model.gradient_checkpointing, trimmed)}
        if model.liger and not model.gradient_checkpointing:
            saved["activations"] += liger_bytes(shape, row, b)
        if self.trained_tower:
            patches = round(self.work.patches * row.groups)
            saved["tower activations"] = tower_saved_bytes(shape.tower, patches, b)
        saved["adapters"] = saved_by_adapters(self.adapters, model.lora, row.tokens, b, self.on_gpu)
        loss = loss_with(self.adapters, loss_bytes(shape, row, b, self.on_gpu, whole), shape, b)
        earlier = {"gradients": held.gradients if several else 0}
        backward = {"backward": layer_working_bytes(shape, row.sequences, b),
                    "head gradient": loss["head gradient"] * (1 if b == 4 else 2)}  # else one in the weight's dtype too
        splintered = {} if self.on_gpu else {"allocator": min(round(SPLINTERED * layers), IDLE_BYTES)}
        held_at = [{**always, **saved, **loss, **earlier, **splintered},
                   {**always, **saved, **earlier, **backward, **splintered},
                   {**always, **self._resident(), "offloaded AdamW": 0, "gradients": held.gradients,
                    "AdamW's step": held.stepping}]
        return largest(self._phase("update", owners, self._host(prompts)) for owners in held_at)

    def _checkpoint(self) -> Phase:
        """Rank 0's: a whole copy in host memory where ranks share the weights or training goes on, and what safetensors
        writes from."""
        saved = self.shape.language_numbers + self.shape.vision_numbers
        whole = (saved if self.adapters is None else numbers(self.adapters.all)) * self.itemsize
        copies = 2 if self.placement.backend != "none" or self.config.checkpoint.asynchronous else 1
        host = {"checkpoint": copies * whole}
        if self.config.checkpoint.asynchronous:
            host["checkpoint"] += self.held.resident["AdamW's moments"] + self.held.resident["masters"]
        return self._phase("checkpoint", self._resident(), {**host, **self._host()})

    # -- owners -------------------------------------------------------------------------------------------------------

    def _phase(self, name: str, device: Owners, host: Owners) -> Phase:
        device, host = ({owner: count for owner, count in part.items() if count} for part in (device, host))
        return Phase(name, device, host) if self.on_gpu else Phase(name, {**device, **host})

    def _resident(self, stepped: bool = True, away: bool = False, early: bool = False) -> Owners:
        resident = {**self.held.resident, **self.reference}
        if away:
            resident |= dict.fromkeys(self.away, 0)
            if not self.on_gpu:
                resident["offloaded AdamW"] = sum(self.away.values())
        if self.one_step and early:
            resident["AdamW's moments"] = 0
        return resident if stepped else {name: resident[name] for name in ("weights", "tower")}

    def _between(self) -> Owners:
        """Outside of steps: DeepSpeed's state stays, other backends drop theirs with the stage."""
        return self._resident(stepped=self.placement.backend.startswith("zero"))

    def _features(self, prompts: int) -> Owners:
        """The tower's output, and while the tower trains the patches of every prompt of the step."""
        work, tower = self.work, self.shape.tower
        entry = work.features * tower.out_hidden * (1 + tower.deepstack) * self.itemsize
        cached = min(work.media * entry, self.config.cache.gpu_bytes if self.on_gpu else self.config.cache.host_bytes)
        if self.trained_tower:
            kept = prompts * work.patches * tower.features * self.itemsize
            return {"tower output": prompts * entry, "host patches" if self.on_gpu else "patches of the step": kept}
        return {"tower output": max(prompts * entry, cached)}

    def _forward(self, row: Row) -> Owners:
        activations = layer_working_bytes(self.shape, row.sequences, self.itemsize)
        activations += (row.tokens * self.shape.hidden + (row.mask_numbers if self.masked else 0)) * self.itemsize
        return {"activations": activations, "gathered layers": self.held.gathered}

    def _host(self, prompts: int = 0) -> Owners:
        """What lies in host memory all the time, with the buffers that the media of `prompts` prompts were in."""
        work = self.work
        patches = 2 * work.patches * self.shape.tower.features * self.itemsize
        buffers = min(ROOM_BYTES, 3 * work.pixels * prompts + patches) if prompts else 0
        ahead = min(self.config.cache.prefetch_prompts, work.prompts) * 3 * work.pixels
        process = process_bytes(self.placement.backend, self.config.rollout.engine)
        host = {**self.held.host, **process, "compiled products": self.compiled, "free buffers": buffers,
                "frames ahead": min(ahead, self.config.cache.prefetch_bytes)}
        if self.on_gpu and self.away:
            host["offloaded AdamW"] = host.get("offloaded AdamW", 0) + sum(self.away.values())
        if self.on_gpu and not self.trained_tower:
            entry = work.features * self.shape.tower.out_hidden * (1 + self.shape.tower.deepstack) * self.itemsize
            host["vision cache"] = min(work.media * entry, self.config.cache.host_bytes)
        return host
