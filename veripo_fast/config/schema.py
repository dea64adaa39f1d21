"""The configuration tree: one dataclass per part of the system, one docstring per field, checked where it is built.

Every field is read by code and set by a test or a shipped YAML file. Values from VerIPO's Table 1 are the defaults
where the paper gives one (G 8, temperature 1.0, dpo_beta 0.1, drop_easy 0.8).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from veripo_fast.errors import ConfigError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value is None or value > 0, f"{name} must be greater than 0, got {value}")


def _unit(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(0.0 <= value <= 1.0, f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = "tiny"
    """Folder of a Qwen2.5-VL or Qwen3-VL checkpoint, or `tiny`: the demo policy shipped in the package."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; `auto` takes a GPU when there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights while training."""
    freeze_vision: bool = True
    """Leave the vision tower and its merger as they are; its output is then computed once per video and cached."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass: less memory, about a third more time."""
    attention: Literal["auto", "sdpa", "varlen", "flash2", "flash3", "flash4", "flex"] = "auto"
    """What computes the attention of a packed group: SDPA, torch's varlen_attn, flash-attn 2, 3 or 4, or FlexAttention;
    `auto` takes the first that is installed, fits the GPU and agrees with SDPA, and says in the log which."""
    liger: bool = False
    """Liger's RMSNorm, SwiGLU and rotary embedding in the language model; needs a GPU, triton and liger-kernel."""


@dataclass(frozen=True)
class VideoConfig:
    """The sampling contract: which frames of a video, and how large. Policy, engine and evaluation obey one."""

    fps: float | None = 2.0
    """Frames taken per second of video; conflicts with num_frames."""
    num_frames: int | None = None
    """Exactly so many frames, evenly spread, whatever the duration; set `fps: null` to use it."""
    min_frames: int = 4
    """At least so many frames when sampling by fps (fewer only if the video has fewer)."""
    max_frames: int = 64
    """At most so many frames when sampling by fps."""
    min_pixels: int = 4 * 28 * 28
    """Smallest frame area after resizing, in pixels."""
    max_pixels: int = 128 * 28 * 28
    """Largest frame area after resizing, in pixels."""
    decoder: Literal["auto", "pyav", "torchcodec", "nvdec", "dali"] = "auto"
    """`auto`: PyAV or torchcodec on the CPU, per file; or the one to begin with, another takes over where it refuses a
    file: `pyav`, `torchcodec`, or on a GPU `nvdec` (torchcodec) or `dali`. GPU decoders round colours differently."""
    workers: int = 2
    """Threads that decode; each holds one video."""
    timeout_seconds: float = 60.0
    """A video that takes longer to decode is skipped."""

    def __post_init__(self) -> None:
        _require((self.fps is None) != (self.num_frames is None),
                 f"exactly one of fps and num_frames must be set, got fps={self.fps}, num_frames={self.num_frames}")
        _positive(self, "fps", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "workers",
                  "timeout_seconds")
        _require(self.min_frames <= self.max_frames,
                 f"min_frames {self.min_frames} is larger than max_frames {self.max_frames}")
        _require(self.min_pixels <= self.max_pixels,
                 f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")


@dataclass(frozen=True)
class CacheConfig:
    """Where decoded videos and tower outputs are kept, and what is decoded ahead; changes time, never results."""

    folder: str = ""
    """Folder of the disk level, shared by runs, stages, evaluation and the ranks of a node; empty: no disk level."""
    disk_bytes: int = 64 << 30
    """Most bytes in `folder`; the least recently used entries are deleted."""
    host_bytes: int = 4 << 30
    """Most bytes of tower output in host memory, pinned where there is a GPU; 0: none."""
    gpu_bytes: int = 0
    """Most bytes of tower output kept on the GPU; 0: none beyond the current step."""
    frames: bool = False
    """Keep decoded frames in `folder` beside the output of a frozen tower, so that another tower decodes nothing; while
    the tower trains they are kept anyway, because its output cannot be."""
    prefetch_prompts: int = 256
    """Prompts of the next step whose media are decoded while the current one runs, at most; 0: none."""
    prefetch_bytes: int = 2 << 30
    """Most bytes of frames decoded ahead."""

    def __post_init__(self) -> None:
        _positive(self, "disk_bytes", "prefetch_bytes")
        for name in ("host_bytes", "gpu_bytes", "prefetch_prompts"):
            _require(getattr(self, name) >= 0, f"{name} must be 0 or larger, got {getattr(self, name)}")
        _require(not self.frames or bool(self.folder), "frames are kept on disk: name a folder")


@dataclass(frozen=True)
class DataConfig:
    """Where the questions come from."""

    train: tuple[str, ...] = ()
    """JSONL or Parquet files in any accepted layout (Video-R1, EasyR1/verl, chat messages), or WebDataset shards: plain
    tar archives of KEY.json beside KEY.mp4."""
    eval: tuple[str, ...] = ()
    """Held-out files, same layouts."""
    media_root: str = ""
    """Folder that relative media paths start from; empty: the folder of the data file."""
    template: Literal["think_answer", "none"] = "think_answer"
    """Instruction put around a question; `none` sends it as it is."""
    max_prompt_tokens: int = 16384
    """Longer prompts are skipped and named in skipped.jsonl (they are never truncated)."""

    def __post_init__(self) -> None:
        _positive(self, "max_prompt_tokens")


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: Literal["torch"] = "torch"
    """The engine that samples."""
    group_size: int = 8
    """G, completions per prompt."""
    temperature: float = 1.0
    """Softmax temperature while sampling; the loss uses the same one."""
    top_p: float = 1.0
    """Nucleus sampling: keep the smallest set of tokens with this probability."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    max_new_tokens: int = 1024
    """Longest completion; one that reaches it is marked unfinished."""

    def __post_init__(self) -> None:
        _require(self.group_size >= 2, f"group_size must be at least 2, got {self.group_size}")
        _positive(self, "temperature", "max_new_tokens")
        _require(0.0 < self.top_p <= 1.0, f"top_p must be above 0 and at most 1, got {self.top_p}")
        _require(self.top_k >= 0, f"top_k must be 0 or larger, got {self.top_k}")


@dataclass(frozen=True)
class RewardConfig:
    """reward = accuracy in [0, 1] + format_weight * format in {0, 1}."""

    format_weight: float = 0.5
    """Weight of the format term."""
    number_tolerance: float = 1e-6
    """Relative tolerance of typed numbers (`number`); estimates use MRA instead."""

    def __post_init__(self) -> None:
        _require(self.format_weight >= 0, f"format_weight must be 0 or larger, got {self.format_weight}")
        _require(self.number_tolerance >= 0, f"number_tolerance must be 0 or larger, got {self.number_tolerance}")


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation; a stage may override any field."""

    steps: int = 100
    """Rollout batches in the stage."""
    prompts_per_step: int = 64
    """Prompts per rollout batch (VerIPO Table 1: rollout batch 64)."""
    updates_per_rollout: int = 1
    """Optimizer steps per rollout batch; each takes an equal share of the groups."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    advantage: Literal["std", "no_std", "leave_one_out", "batch_std"] = "std"
    """(r - mean) / std of the group, r - mean (Dr. GRPO), r - mean of the others (RLOO), or over the std of the
    batch."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "gspo_token", "gmpo"] = "grpo"
    """The policy loss; formulas and sources: veripo_kernels.PolicyLoss."""
    clip_low: float = 0.2
    """Ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above 1 + clip_high (DAPO: 0.28)."""
    dual_clip: float | None = None
    """Bound c > 1 on ratio * |advantage| for negative advantages; null: none."""
    kl_coef: float = 0.0
    """Weight of the KL to the policy at the start of the stage; 0: no reference model is run."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL (Schulman 2020)."""
    aggregation: Literal["sequence", "token", "constant"] | None = None
    """Mean per completion then over completions, over all tokens, or sum / max_new_tokens; null: the loss's own."""
    drop_easy: float = 0.0
    """Share of the prompts with group accuracy 1 in the previous GRPO stage that are left out (VerIPO: 0.8)."""

    def __post_init__(self) -> None:
        _positive(self, "steps", "prompts_per_step", "updates_per_rollout", "learning_rate")
        _require(self.prompts_per_step % self.updates_per_rollout == 0,
                 f"prompts_per_step {self.prompts_per_step} must be divisible by "
                 f"updates_per_rollout {self.updates_per_rollout}")
        _require(0.0 <= self.clip_low < 1.0, f"clip_low must be at least 0 and below 1, got {self.clip_low}")
        _require(self.clip_high >= 0, f"clip_high must be 0 or larger, got {self.clip_high}")
        _require(self.dual_clip is None or self.dual_clip > 1 + self.clip_high,
                 f"dual_clip must be above 1 + clip_high = {1 + self.clip_high:g}, got {self.dual_clip}")
        _require(self.kl_coef >= 0, f"kl_coef must be 0 or larger, got {self.kl_coef}")
        _unit(self, "drop_easy")


@dataclass(frozen=True)
class VerifierConfig:
    """The Rollout-Aware Verifier: checks, judge, and how pairs are built; a stage may override any field."""

    judge: Literal["rules", "likelihood", "endpoint"] = "rules"
    """Who decides which answer a reasoning supports."""
    max_repetition: float = 0.3
    """A think span with a larger share of repeated n-grams is repetitive."""
    repetition_ngram: int = 4
    """Length of the n-grams, in words."""
    min_length_ratio: float = 0.25
    """A think span shorter than this share of its group's median length fails the length check."""
    max_length_ratio: float = 4.0
    """A think span longer than this multiple of its group's median length fails the length check."""
    families: tuple[Literal["accuracy", "consistency", "reflection", "repetition"], ...] = (
        "accuracy", "consistency", "repetition")
    """Pair families to build: correct/wrong, consistent/inconsistent, reflective/not, concise/repetitive."""
    max_pairs_per_prompt: int = 4
    """At most so many pairs of one prompt, spread over the families."""
    length_match: float = 2.0
    """The longer completion of an accuracy or consistency pair has at most this multiple of the shorter's tokens."""
    endpoint_url: str = ""
    """Base URL of an OpenAI-compatible server (`.../v1`); needed by the endpoint judge."""
    endpoint_model: str = ""
    """Model name sent to the endpoint."""
    endpoint_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset: no key is sent."""
    endpoint_concurrency: int = 16
    """Requests in flight."""
    endpoint_timeout_seconds: float = 30.0
    """Time-out of one request."""
    endpoint_retries: int = 4
    """Attempts after the first, with exponential back-off."""
    endpoint_max_failures: float = 0.2
    """Share of items without a verdict above which the stage stops instead of going on with what it has."""
    likelihood_margin: float = 0.0
    """likelihood: the answer given must beat every other candidate by this many nats to be consistent."""

    def __post_init__(self) -> None:
        _unit(self, "max_repetition", "endpoint_max_failures", "min_length_ratio")
        _positive(self, "repetition_ngram", "max_pairs_per_prompt", "endpoint_concurrency", "endpoint_timeout_seconds")
        _require(self.max_length_ratio >= 1, f"max_length_ratio must be at least 1, got {self.max_length_ratio}")
        _require(self.length_match >= 1, f"length_match must be at least 1, got {self.length_match}")
        _require(self.endpoint_retries >= 0, f"endpoint_retries must be 0 or larger, got {self.endpoint_retries}")
        _require(len(self.families) > 0, "families must name at least one pair family")
        if self.judge == "endpoint":
            _require(bool(self.endpoint_url) and bool(self.endpoint_model),
                     "judge `endpoint` needs endpoint_url and endpoint_model")


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation; a stage may override any field."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "exo", "nca", "apo_zero", "apo_down", "sppo"] = "sigmoid"
    """The preference loss; formulas and sources: veripo_kernels.formulas."""
    dpo_beta: float = 0.1
    """Strength of the pull towards the reference (VerIPO Table 1: 0.1)."""
    nll_coef: float = 0.0
    """Weight of the negative log-likelihood of the chosen completion."""
    length_normalize: bool = False
    """Divide each log-ratio by the number of its tokens."""
    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round (sigmoid, robust, exo)."""
    ld_alpha: float | None = None
    """Weight of tokens beyond the shorter completion of a pair (LD-DPO); null: 1."""
    learning_rate: float = 5e-7
    """Peak learning rate (VerIPO Table 1: 5e-7)."""
    pairs_per_step: int = 32
    """Pairs per optimizer step (VerIPO Table 1: 32)."""
    epochs: int = 1
    """Passes over the pairs."""
    max_steps: int | None = None
    """Stop after so many optimizer steps; null: all pairs."""

    def __post_init__(self) -> None:
        _positive(self, "dpo_beta", "learning_rate", "pairs_per_step", "epochs", "max_steps")
        _require(self.nll_coef >= 0, f"nll_coef must be 0 or larger, got {self.nll_coef}")
        _require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        smooth = self.loss in ("sigmoid", "robust", "exo")
        _require(0 <= self.label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        _require(smooth or not self.label_smoothing, f"loss {self.loss} does not use label_smoothing")
        _require(self.loss != "exo" or self.label_smoothing > 0, "loss exo needs label_smoothing above 0")


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
    max_tokens: int = 16384
    """Packed tokens per forward-backward; a larger group still runs, alone."""

    def __post_init__(self) -> None:
        for beta in self.betas:
            _require(0.0 <= beta < 1.0, f"betas must be at least 0 and below 1, got {self.betas}")
        _positive(self, "max_grad_norm", "max_tokens", "max_bad_steps")
        _require(self.weight_decay >= 0, f"weight_decay must be 0 or larger, got {self.weight_decay}")
        _require(self.warmup_steps >= 0, f"warmup_steps must be 0 or larger, got {self.warmup_steps}")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is written."""

    every: int = 50
    """Optimizer phases between two checkpoints; one more is written at the end of each stage."""
    keep: int = 2
    """How many are kept; older ones are deleted after a newer one is complete."""

    def __post_init__(self) -> None:
        _positive(self, "every", "keep")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation between stages."""

    at: Literal["stages", "ends", "never"] = "stages"
    """Evaluate before the first and after every stage, before the first and after the last, or not at all."""
    limit: int | None = None
    """Use the first so many prompts; null: all."""
    samples: int = 4
    """Sampled completions per prompt (temperature of `rollout`), besides one greedy; 0: greedy only."""
    prompts_per_batch: int = 64
    """Prompts sampled together."""
    bootstrap: int = 2000
    """Resamples behind each 95 % interval."""

    def __post_init__(self) -> None:
        _positive(self, "limit", "prompts_per_batch", "bootstrap")
        _require(self.samples >= 0, f"samples must be 0 or larger, got {self.samples}")


@dataclass(frozen=True)
class StageConfig:
    """One stage of the loop. A grpo stage explores; a dpo stage verifies the rollouts of an earlier one and aligns."""

    kind: Literal["grpo", "dpo"] = "grpo"
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
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: tuple[StageConfig, ...] = ()
    """Stages in order; each continues from the policy of the one before."""

    def __post_init__(self) -> None:
        _positive(self, "threads")
        _require(bool(self.run_dir), "run_dir must name a folder")
        object.__setattr__(self, "stages", _named(self.stages))


def _named(stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
    """Fill in stage names (grpo-1, dpo-1, grpo-2, ...) and check references between stages."""
    counts: dict[str, int] = {}
    named: list[StageConfig] = []
    for stage in stages:
        counts[stage.kind] = counts.get(stage.kind, 0) + 1
        stage = replace(stage, name=stage.name or f"{stage.kind}-{counts[stage.kind]}")
        earlier = [done.name for done in named if done.kind == "grpo"]
        _require(stage.name not in [done.name for done in named], f"two stages are named {stage.name!r}")
        if stage.kind == "dpo":
            source = stage.rollouts_from or (earlier[-1] if earlier else "")
            _require(bool(source), f"stage {stage.name!r} is dpo but no grpo stage comes before it")
            _require(source in earlier, f"stage {stage.name!r} takes rollouts_from {source!r}, "
                                        f"which is not an earlier grpo stage ({', '.join(earlier) or 'none'})")
            stage = replace(stage, rollouts_from=source)
        else:
            _require(not stage.rollouts_from, f"stage {stage.name!r} is grpo and takes no rollouts_from")
        named.append(stage)
    return tuple(named)
