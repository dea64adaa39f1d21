"""What a run would cost on so many GPUs: whether it fits, seconds of a step by phase, days and GPU-hours.

Pure, and quick for 1,024 GPUs: the memory ledger (ledger.py) and the cost model (costs.py) on shapes, with the dealer
that a run uses. `search` tries the options that move most.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.errors import ConfigError
from veripo_fast.schedule.admission import Excess, Room, worst_excess
from veripo_fast.schedule.costs import Work, dpo_work, grpo_work, seconds, sft_work
from veripo_fast.schedule.hardware import Hardware
from veripo_fast.schedule.judge import JudgeShape
from veripo_fast.schedule.ledger import stage_phases
from veripo_fast.schedule.phase import Phase
from veripo_fast.schedule.rates import Lengths, Rates
from veripo_fast.schedule.shapes import ModelShape
from veripo_fast.schedule.workload import workload_of

WORK = {"grpo": grpo_work, "dpo": dpo_work, "sft": sft_work}
USABLE = 0.97
"""Of a GPU's memory; a context and what the allocator cannot use take the rest."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    name: str
    config: Config
    """With the overrides of the stage."""
    steps: int | None
    """None: a DPO stage, whose pairs the verifier will find, or an SFT stage, whose data are not read."""
    lengths: Lengths
    work: Work
    seconds: Mapping[str, float]
    """Of a step, by phase."""
    phases: tuple[Phase, ...]
    excess: Excess | None
    """The phase that lacks most memory; None where all fit."""

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tightest(self) -> Phase:
        """The phase with most bytes on the device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)


@dataclass(frozen=True)
class RunPlan:
    """All stages of a configuration."""

    config: Config
    gpus: int
    hardware: Hardware | None
    rates: Rates
    stages: tuple[StagePlan, ...]

    @property
    def fits(self) -> bool:
        return all(stage.excess is None for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages whose number of steps is known."""
        return sum(stage.step_seconds * stage.steps for stage in self.stages if stage.steps)


def plan(shape: ModelShape, config: Config, gpus: int, hardware: Hardware | None, rates: Rates,
         lengths: Mapping[str, Lengths], judges: Mapping[str, JudgeShape] | None = None) -> RunPlan:
    """Plan every stage.

    Args:
        hardware: None: CPUs, whose memory is not looked at.
        lengths: by kind of stage, as a run has seen them; for a kind that is not there, as the configuration bounds it.
        judges: of the stages with a judge `llm`, by its folder.

    Raises:
        ConfigError: the ranks fit neither the batch nor the engines.
    """
    if gpus % config.rollout.tensor_parallel:
        raise ConfigError(f"{gpus} GPUs cannot be shared out to engines of rollout.tensor_parallel "
                          f"{config.rollout.tensor_parallel}")
    return RunPlan(config, gpus, hardware, rates, tuple(
        _stage(shape, config, stage, gpus, hardware, rates, lengths.get(stage.kind), judges)
        for stage in config.stages))


def _stage(shape: ModelShape, run: Config, stage: StageConfig, gpus: int, hardware: Hardware | None, rates: Rates,
           lengths: Lengths | None, judges: Mapping[str, JudgeShape] | None) -> StagePlan:
    config = apply_overrides(run, stage.set)
    bound = Lengths.demonstrated if stage.kind == "sft" else Lengths.bound
    lengths = lengths or bound(workload_of(config, shape, gpus))
    work = WORK[stage.kind](shape, config, gpus, lengths)
    phases = tuple(stage_phases(shape, run, stage, gpus, hardware.memory_bytes if hardware else 0, judges))
    excess = None
    if hardware is not None:
        excess = worst_excess({stage.name: phases}, Room(hardware.name, int(hardware.memory_bytes * USABLE), None))
    steps = {"grpo": config.grpo.steps, "sft": config.sft.max_steps}.get(stage.kind)
    return StagePlan(stage.name, config, steps, lengths, work, seconds(work, rates), phases, excess)


def search(shape: ModelShape, config: Config, gpus: int, hardware: Hardware, rates: Rates,
           lengths: Mapping[str, Lengths], judges: Mapping[str, JudgeShape] | None = None
           ) -> list[tuple[dict[str, object], RunPlan]]:
    """Plans with other options that fit, the quickest first, each with what it changes."""
    found = []
    for options in _choices(config, gpus):
        try:
            changed = apply_overrides(config, options)
            made = plan(shape, changed, gpus, hardware, rates, lengths, judges)
        except ConfigError:  # options that do not go together
            continue
        if made.fits:
            found.append((options, made))
    return sorted(found, key=lambda pair: (pair[1].seconds, len(pair[0])))


def _choices(config: Config, gpus: int) -> Iterator[dict[str, object]]:
    """Options that differ from the configuration's own."""
    several: list[dict[str, object]] = [{}]
    if gpus > 1:
        fsdp = "auto" if config.distributed.backend == "auto" else "fsdp"
        several = [{"distributed.backend": fsdp, "distributed.zero_stage": 2, "distributed.offload": "none"},
                   {"distributed.backend": "deepspeed", "distributed.zero_stage": 2},
                   {"distributed.backend": "deepspeed", "distributed.zero_stage": 2, "distributed.offload": "cpu"}]
    sizes = [size for size in (1, 2, 4, 8) if gpus % size == 0] if config.rollout.engine == "vllm" else [1]
    batches = [config.optimizer.max_tokens * factor // 4 for factor in (1, 2, 4, 8, 16)]
    for backend, size, tokens, again in itertools.product(several, sizes, batches, (False, True)):
        options: dict[str, object] = {**backend, "optimizer.max_tokens": tokens,
                                      "model.gradient_checkpointing": again}
        if config.rollout.engine == "vllm":
            options["rollout.tensor_parallel"] = size
        yield {name: value for name, value in options.items() if value != _value(config, name)}


def _value(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
