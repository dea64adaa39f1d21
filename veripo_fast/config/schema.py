"""The configuration tree: one dataclass per part of the system, one docstring per field, checked where it is built.

Every field is read by code and set by a test or a shipped YAML file. Values from VerIPO's Table 1 are the defaults
where the paper gives one (G 8, temperature 1.0, dpo_beta 0.1, drop_easy 0.8).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from veripo_kernels.options import AdvantageKind

from veripo_fast.config.alignment import DpoConfig, SftConfig
from veripo_fast.config.checks import positive, require
from veripo_fast.config.evaluation import EvalConfig
from veripo_fast.config.inputs import CacheConfig, DataConfig, ModelConfig, VideoConfig
from veripo_fast.config.judges import reporting
from veripo_fast.config.objectives import (
    GrpoConfig,
    MovingAdvantage,
    RewardConfig,
    RolloutConfig,
    VerifierConfig,
)
from veripo_fast.config.plans import PlanConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what guards it."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    warmup_steps: int = 0
    """Steps of linear warm-up at the start of each stage."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up; cosine ends at a tenth of the peak."""
    max_bad_steps: int = 5
    """Steps in a row with NaN or infinity in loss or gradient that are skipped before the run stops."""
    offload: bool = False
    """AdamW's state lies in host memory from the start of a rollout to the next step, which leaves its room on the GPU
    to the engine and to activations. Of deepspeed see distributed.offload."""
    max_tokens: int = 16384
    """Packed tokens per forward-backward; a larger group still runs, alone."""
    tower_rate: float = 1.0
    """Learning rate of a vision tower that trains, as a multiple of the stage's."""
    merger_rate: float = 1.0
    """The same of its mergers, which project to the language model."""
    language_rate: float = 1.0
    """The same of the language model and its head."""
    part_norms: bool = False
    """Note the gradient norms of tower, mergers, language model and head by themselves in the metrics."""

    def __post_init__(self) -> None:
        for beta in self.betas:
            require(0.0 <= beta < 1.0, f"betas must be at least 0 and below 1, got {self.betas}")
        positive(self, "max_grad_norm", "max_tokens", "max_bad_steps", "tower_rate", "merger_rate", "language_rate")
        require(self.weight_decay >= 0, f"weight_decay must be 0 or larger, got {self.weight_decay}")
        require(self.warmup_steps >= 0, f"warmup_steps must be 0 or larger, got {self.warmup_steps}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is written."""

    every: int = 50
    """Optimizer phases between two checkpoints; one more is written at the end of each stage."""
    keep: int = 2
    """How many are kept; older ones are deleted after a newer one is complete."""
    asynchronous: bool = False
    """Go on training while a checkpoint is written, from a copy in host memory; not at the end of a stage."""

    def __post_init__(self) -> None:
        positive(self, "every", "keep")


@dataclass(frozen=True)
class TrainConfig:
    """How long a run may take, what it asks before it begins, and what it notes."""

    max_hours: float | None = None
    """Stop before this many hours are over, with a checkpoint to go on from (exit code 75); null: no limit."""
    timeline: bool = True
    """Note where time goes on every rank, in timeline.jsonl of the run folder (`veripo timeline`)."""
    check_memory: bool = True
    """Refuse to start a run that is predicted to need more memory than there is; false: predict, and start."""
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)
    """What gets the metrics besides metrics.jsonl; one that fails costs the run nothing."""
    project: str = "veripo"
    """Of trackio and wandb: the project that the run belongs to. The run has the name of its folder."""
    show_samples: int | None = None
    """Print two completions of a grpo stage, the best and the worst, every so many steps; null: never."""

    def __post_init__(self) -> None:
        positive(self, "max_hours", "show_samples")
        require(len(set(self.trackers)) == len(self.trackers), f"trackers name one twice: {', '.join(self.trackers)}")
        online = [name for name in self.trackers if name != "tensorboard"]
        require(bool(online) or self.project == TrainConfig.project,
                "project changes nothing without trackio or wandb in trackers")
        require(bool(self.project.strip()), "project must not be empty")


@dataclass(frozen=True)
class DistributedConfig:
    """How training is spread over ranks, as torchrun starts them."""

    backend: Literal["auto", "none", "fsdp", "deepspeed"] = "auto"
    """FSDP2, DeepSpeed, or none: one process; `auto` takes FSDP2 where there are several ranks."""
    zero_stage: int = 2
    """Of deepspeed: what is sharded besides AdamW's state (1): gradients (2), weights (3)."""
    offload: Literal["none", "cpu"] = "none"
    """Of deepspeed: where AdamW's state lies, on the GPUs or in host memory."""
    deepspeed_config: str = ""
    """Of deepspeed: a JSON file of its own options; one that contradicts this configuration is refused."""
    timeout_seconds: float = 1800.0
    """An exchange between ranks that takes longer ends the run: a rank hangs."""

    def __post_init__(self) -> None:
        positive(self, "timeout_seconds")
        require(self.zero_stage in (1, 2, 3), f"zero_stage must be 1, 2 or 3, got {self.zero_stage}")
        changed = [name for name in ("zero_stage", "offload", "deepspeed_config")
                   if getattr(self, name) != getattr(DistributedConfig, name)]
        require(self.backend == "deepspeed" or not changed,
                f"{', '.join(changed)} changes nothing while backend is {self.backend}")


@dataclass(frozen=True)
class StageConfig:
    """One stage. A grpo stage explores; a dpo stage verifies the rollouts of an earlier one and aligns; an sft stage
    learns from demonstrations."""

    kind: Literal["grpo", "dpo", "sft"] = "grpo"
    """What the stage does."""
    name: str = ""
    """Name in metrics and folders; empty: kind and number, e.g. `grpo-1`."""
    data: tuple[str, ...] = ()
    """Training files of this stage; empty: those of `data.train`."""
    rollouts_from: str = ""
    """dpo: the grpo stage whose rollouts are verified; empty: the latest one."""
    set: dict[str, object] = field(default_factory=dict)
    """Overrides for this stage, by dotted name: `{grpo.learning_rate: 5e-7}` or `{verifier.judge: likelihood}`."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: str = "runs/run"
    """Folder of the run; must not exist yet unless resuming."""
    seed: int = 0
    """Seed of data order and sampling."""
    threads: int | None = None
    """CPU threads of torch; null: all cores. Bitwise resume needs the same number."""
    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: tuple[StageConfig, ...] = ()
    """Stages in order; each continues from the policy of the one before."""

    @property
    def needs_reference(self) -> bool:
        """Whether a GRPO stage runs a reference policy beside the policy."""
        return self.grpo.needs_reference or self.reward.reference_logprobs

    def __post_init__(self) -> None:
        positive(self, "threads")
        require(bool(self.run_dir), "run_dir must name a folder")
        require(self.rollout.vision == "output" or not self.model.freeze_vision,
                "rollout.vision pixels needs a tower that is trained (model.freeze_vision false); of a frozen one the "
                "output is at hand")
        require(self.rollout.engine != "torch" or self.distributed.backend != "deepspeed"
                or self.distributed.zero_stage < 3,
                "rollout.engine torch cannot sample from weights that distributed.zero_stage 3 has sharded: ranks "
                "would wait for each other in every token; take rollout.engine vllm, zero_stage 2, or backend fsdp")
        require(not self.optimizer.offload or self.distributed.backend != "deepspeed",
                "optimizer.offload cannot move AdamW's state of deepspeed, which lies in its own flat partitions; take "
                "distributed.offload cpu, or distributed.backend fsdp")
        require(not self.model.lora.rank or self.distributed.backend != "deepspeed",
                "model.lora cannot be trained with distributed.backend deepspeed; take fsdp")
        require(self.verifier.judge != "llm" or self.rollout.tensor_parallel == 1,
                "verifier.judge llm runs an engine of its own on each rank, which rollout.tensor_parallel "
                f"{self.rollout.tensor_parallel} does not leave room for in vLLM; take verifier.judge endpoint")
        require(self.eval.every is None or bool(self.data.eval), "eval.every is set, and data.eval names no files")
        rates = [name for name in ("tower_rate", "merger_rate") if getattr(self.optimizer, name) != 1.0]
        require(not rates or not self.model.freeze_vision,
                f"optimizer.{' and optimizer.'.join(rates)} changes nothing while model.freeze_vision is true")
        require(not self.model.lora.rank or self.optimizer.tower_rate == 1.0,
                "optimizer.tower_rate changes nothing while model.lora trains adapters, of which the tower has none")
        require(not self.optimizer.part_norms or self.distributed.backend != "deepspeed",
                "optimizer.part_norms cannot be read from deepspeed's flat partitions; take distributed.backend fsdp")
        require(not self.eval.task_key or self.eval.task_key in self.data.keep_keys,
                f"eval.task_key {self.eval.task_key} is read of the records; name it in data.keep_keys")
        _check_reference(self)
        task = self.grpo.advantage_options.get("by") if self.grpo.advantage in get_args(MovingAdvantage) else None
        require(task in (None, "problem_type", "data_source", *self.data.keep_keys),
                f"grpo.advantage_options.by {task} is read of the records; name it in data.keep_keys")
        _check_plan(self)
        require(not self.grpo.dpo_rate or self.verifier.judge in ("rules", "endpoint"),
                f"grpo.dpo_rate judges the rollouts of every step, for which verifier.judge {self.verifier.judge} "
                "would load a model or run the policy each time; take rules or endpoint")
        require(not self.grpo.dpo_rate or (self.dpo.match, self.dpo.weights) == ("pairs", "none"),
                "dpo.match and dpo.weights are of dpo stages; grpo.dpo_rate takes pairs as they are")
        require("shuffled" not in self.eval.controls or self.rollout.vision == "output",
                "eval.controls shuffled needs rollout.vision output: it reorders what the tower gave")
        object.__setattr__(self, "stages", _named(self.stages))
        reporting(self.verifier, self.eval.judge, self.eval.judge_options)

    @property
    def reporting_judge(self) -> VerifierConfig:
        """Of evaluations: who says whether answer and reasoning agree."""
        return reporting(self.verifier, self.eval.judge, self.eval.judge_options)


def _check_reference(config: Config) -> None:
    """ConfigError where a reference and its readers do not go together."""
    require(config.reward.reference_logprobs or not config.reward.needs_reference,
            "reward likely_answer reads log-probs of the reference; set reward.reference_logprobs to true")
    require(bool(config.reward.vision_text) or not config.reward.needs_frames,
            "reward semantic compares a reasoning with frames; set reward.vision_text to the folder of a SigLIP model")
    require(not config.reward.reference_logprobs or config.plan.pairing == "own",
            "reward.reference_logprobs cannot be combined with plan.pairing all")
    require(config.needs_reference or config.grpo.reference == "stage_start",
            "grpo.reference changes nothing while grpo.kl_coef and grpo.dpo_rate are 0 and reward.reference_logprobs "
            "is false")
    require(config.grpo.reference != "ema" or not config.model.lora.rank, "grpo.reference ema follows whole weights, "
            "and model.lora trains adapters; take stage_start or base")


def _check_plan(config: Config) -> None:
    """ConfigError where a plan asks for what another section rules out."""
    plan = config.plan
    require(plan.contrast == "none" or config.rollout.vision == "output",
            "plan.contrast needs rollout.vision output: with pixels the engine's own tower would run on every contrast")
    if plan.wordings > 1:
        missing = [key for key in (plan.question_key, plan.wordings_key) if key not in config.data.keep_keys]
        require(not missing, f"plan.wordings reads {' and '.join(missing)} of the records; name them in data.keep_keys")
    if plan.pairing == "all":
        require(config.grpo.importance is None, "grpo.importance cannot be combined with plan.pairing all: the engine "
                "gave no log-probs of a completion under another wording")
        require(config.grpo.advantage in get_args(AdvantageKind), "plan.pairing all takes the advantage over two kinds "
                f"of groups, so it needs one of {', '.join(get_args(AdvantageKind))}; got {config.grpo.advantage}")
        require(config.grpo.tokens.covariance == "none", "grpo.tokens.covariance cannot be combined with plan.pairing "
                "all: the engine gave no log-probs of a completion under another wording")
        require(not config.rollout.router_replay, "rollout.router_replay cannot be combined with plan.pairing all: the "
                "engine chose no experts for a completion under another wording")
    require(plan.wordings == 1 or not config.grpo.dpo_rate, "grpo.dpo_rate cannot be combined with plan.wordings: a "
            "pair belongs to one wording of its prompt")
    require(plan.contrast != "none" or not config.reward.needs_contrast,
            "reward temporal compares with a contrast group; set plan.contrast to shuffle or reverse")


def default_stage_name(kind: str, number: int) -> str:
    """Name of the `number`-th stage of a kind that has none of its own: `grpo-1`."""
    return f"{kind}-{number}"


def _named(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
    """Fill in stage names (grpo-1, dpo-1, grpo-2, ...) and check references between stages."""
    counts: dict[str, int] = {}
    named: list[StageConfig] = []
    for stage in stages:
        counts[stage.kind] = counts.get(stage.kind, 0) + 1
        stage = replace(stage, name=stage.name or default_stage_name(stage.kind, counts[stage.kind]))
        earlier = [done.name for done in named if done.kind == "grpo"]
        require(stage.name not in [done.name for done in named], f"two stages are named {stage.name!r}")
        if stage.kind == "dpo":
            source = stage.rollouts_from or (earlier[-1] if earlier else "")
            require(bool(source), f"stage {stage.name!r} is dpo but no grpo stage comes before it")
            require(source in earlier, f"stage {stage.name!r} takes rollouts_from {source!r}, "
                                        f"which is not an earlier grpo stage ({', '.join(earlier) or 'none'})")
            stage = replace(stage, rollouts_from=source)
        else:
            require(not stage.rollouts_from, f"stage {stage.name!r} is {stage.kind} and takes no rollouts_from")
        named.append(stage)
    return tuple(named)
