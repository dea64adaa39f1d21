"""Sections of the configuration that say what is optimised: rollout, reward, GRPO, verifier."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from veripo_kernels.options import (
    AdvantageKind,
    Aggregation,
    Importance,
    KlKind,
    PolicyLoss,
    PolicyLossName,
)

from veripo_fast.config.checks import (
    as_config_error,
    check_loss_options,
    known_or_own,
    positive,
    require,
    unit_interval,
)
from veripo_fast.config.terms import DEFAULT_TERMS, RewardTerm, check_terms
from veripo_fast.config.tokens import TokensConfig, check_tokens

SAMPLING = ("group_size", "temperature", "top_p", "top_k", "max_new_tokens")
"""Fields of `RolloutConfig` that a stage may change; the engine is built once for the whole run."""
VLLM_OPTIONS = ("tensor_parallel", "weights", "vision", "kv_cache_gb", "max_sequences", "router_replay", "parity_every",
                "parity_tolerance", "stall_seconds")
"""Fields of `RolloutConfig` that only the engine vllm reads."""
_POLICY_OPTIONS = dict.fromkeys(("sapo", "sapo_sequence"), ("sapo_temperature_pos", "sapo_temperature_neg")) | {
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")}
SamplerName = Literal["shuffled", "sequential", "curriculum", "prioritized", "mixed"]
ReferenceName = Literal["stage_start", "base", "ema"]
BatchAdvantage = Literal["live_scaled"]
"""Advantages that are no kernel: further keys of `recipes.tables.ADVANTAGES`."""
MovingAdvantage = Literal["task_std"]
"""Advantages that remember earlier steps: keys of `recipes.tables.MOVING_ADVANTAGES`."""
_ADVANTAGES = get_args(AdvantageKind) + get_args(BatchAdvantage) + get_args(MovingAdvantage)


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: Literal["torch", "vllm"] = "torch"
    """What samples: plain torch, which runs anywhere, or vLLM in this process (`pip install veripo-fast[vllm]`)."""
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
    weights: Literal["alias", "copy"] = "alias"
    """Of vllm: the engine samples from the trainer's own weights wherever the layouts allow it (`alias`), or from a
    second copy that is brought up to date after each update (`copy`)."""
    vision: Literal["output", "pixels"] = "output"
    """What vllm gets of a video: the tower's output, so that nothing is encoded twice, or, where the tower is trained,
    pixels that a tower of its own encodes."""
    tensor_parallel: int = 1
    """Neighbouring ranks that share one vllm engine, each with a part of every layer."""
    kv_cache_gb: float = 0.0
    """GiB of vllm's key/value cache; 0: a quarter of the GPU's memory, 1 GiB on a CPU."""
    max_sequences: int = 256
    """Completions that vllm samples together."""
    router_replay: bool = False
    """Of vllm and a family with experts: updates run the experts that the engine chose for each token of prompts and
    completions, weighted by the trainer's router, in place of its own choice (docs/models.md)."""
    parity_every: int = 50
    """vllm's log-probs are compared with the trainer's at the start and every so many steps."""
    parity_tolerance: float = 0.0
    """Largest difference of a log-prob that passes, in nats; 0: 5e-5 for float32 weights, and for bfloat16 1.0 on a
    token and 0.05 in the mean. Below temperature 1 it is divided by the temperature."""
    stall_seconds: float = 600.0
    """A vllm engine that computes nothing for so long ends the process, which can then be resumed."""

    def __post_init__(self) -> None:
        changed = [item.name for item in fields(self)
                   if item.name in VLLM_OPTIONS and getattr(self, item.name) != item.default]
        require(self.engine == "vllm" or not changed, f"{', '.join(changed)} changes nothing while engine is torch")
        positive(self, "max_sequences", "parity_every", "stall_seconds", "tensor_parallel")
        require(self.kv_cache_gb >= 0, f"kv_cache_gb must be 0 or larger, got {self.kv_cache_gb}")
        require(self.parity_tolerance >= 0, f"parity_tolerance must be 0 or larger, got {self.parity_tolerance}")
        require(self.group_size >= 2, f"group_size must be at least 2, got {self.group_size}")
        positive(self, "temperature", "max_new_tokens")
        require(0.0 < self.top_p <= 1.0, f"top_p must be above 0 and at most 1, got {self.top_p}")
        require(self.top_k >= 0, f"top_k must be 0 or larger, got {self.top_k}")


@dataclass(frozen=True)
class RewardConfig:
    """reward = sum of weight * column; by default accuracy in [0, 1] + 0.5 * format in {0, 1} (VerIPO)."""

    terms: tuple[RewardTerm, ...] = DEFAULT_TERMS
    """The columns that are added up. An option names one by number or name: `--reward.terms.format.weight 0.2`."""
    on_error: Literal["stop", "count"] = "stop"
    """When a function of your own fails: stop the run, or count it, and its column is 0 for all of that prompt."""
    number_tolerance: float = 1e-6
    """Relative tolerance of typed numbers (`number`); estimates use MRA instead."""
    reference_logprobs: bool = False
    """Rewards are told each completion's log-probs under `grpo.reference`, which runs over a rollout batch before it is
    scored; nothing is scored while others are sampled then."""
    vision_text: str = ""
    """Folder of a SigLIP model, which tells rewards how like each frame a reasoning is; empty: none is run. Nothing is
    scored while others are sampled then. It lies in host memory and comes to the policy's device for the reward."""
    streamed: bool = True
    """Completions are scored while others are still sampled; false: behind the rollout, with the same scores."""
    math_seconds_per_batch: float = 60.0
    """Seconds for comparing the mathematics of a rollout batch, or of one run of the verifier; an answer that finds no
    time left counts as not equal, and the number of these is said."""

    def __post_init__(self) -> None:
        positive(self, "math_seconds_per_batch")
        require(self.number_tolerance >= 0, f"number_tolerance must be 0 or larger, got {self.number_tolerance}")
        check_terms(self.terms)

    @property
    def needs_contrast(self) -> bool:
        """Whether a term compares with a contrast group."""
        return any(term.use == "temporal" for term in self.terms)

    @property
    def needs_frames(self) -> bool:
        """Whether a shipped term compares with frames."""
        return any(term.use == "semantic" for term in self.terms)

    @property
    def needs_reference(self) -> bool:
        """Whether a shipped term reads log-probs of the reference."""
        return any(term.use == "likely_answer" for term in self.terms)


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
    sampler: str = "shuffled"
    """Order of the prompts: another shuffle in each epoch; `sequential`, as in the files; `curriculum`, from high pass
    rates to low ones; `prioritized`, drawn by 1 - pass rate; or your own function."""
    sampler_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the sampler."""
    advantage: str = "std"
    """`std`: (r - mean) / std of the group; `no_std`: r - mean (Dr. GRPO); `leave_one_out`: r - mean of the others
    (RLOO); `batch_std`: over the std of the batch; `live_scaled`: r - mean, times groups over those with a signal
    (GPG); `task_std`: over a std of the task that moves from step to step (OneThinker); or a function of your own, on
    the rewards of a group."""
    advantage_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the advantage; `std` and `batch_std` take eps, what is added to the std (1e-6);
    `task_std` also decay (0.99), guard (5.0) and by: problem_type, data_source or a key of data.keep_keys."""
    loss: PolicyLossName = "grpo"
    """The policy loss; formulas and sources: veripo_kernels.PolicyLoss."""
    loss_options: dict[str, Any] = field(default_factory=dict)
    """Other numbers of the loss: entropy_coef, the weight of an entropy bonus, and squared_coef, that of half the
    squared log-ratio of a completion (Kimi's tau), of any; sapo_temperature_pos and sapo_temperature_neg of sapo and
    sapo_sequence; vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg of vespo. Their defaults:
    veripo_kernels.PolicyLoss."""
    clip_low: float = 0.2
    """Ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above 1 + clip_high (DAPO: 0.28)."""
    dual_clip: float | None = None
    """Bound c > 1 on ratio * |advantage| for negative advantages; null: none."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference; 0: no reference model is run."""
    reference: str = "stage_start"
    """What the KL pulls towards, and what rewards are told the log-probs of: the policy at the start of the stage;
    `base`: that of `model.path`; `ema`: a moving mean of the policy (GRPO-CARE); or what a function of your own
    names."""
    reference_decay: float = 0.995
    """Of `ema`: mean = reference_decay * mean + (1 - reference_decay) * policy, from the start of the stage on."""
    reference_every: int = 10
    """Of `ema`: steps from one such move to the next."""
    kl_kind: KlKind = "k3"
    """Estimator of the KL (Schulman 2020)."""
    aggregation: Aggregation | None = None
    """Mean per completion then over completions, over all tokens, or sum / max_new_tokens; null: the loss's own."""
    importance: Importance | None = None
    """Corrects for an engine whose log-probs are not the trainer's: a weight exp(trainer - engine), truncated or
    masked, per token or completion; null: none. With several updates per rollout it costs a pass for the trainer's."""
    importance_floor: float = 0.0
    """Smallest such weight."""
    importance_cap: float = 2.0
    """Largest such weight."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    drop_easy: float = 0.0
    """Share of the prompts with group accuracy 1 in the previous GRPO stage that are left out (VerIPO: 0.8)."""
    dpo_rate: float = 0.0
    """Weight of the preference losses beside the policy loss, summed over pairs that the verifier builds from the
    step's own rollouts and divided by its prompts: at most dpo.pairs_per_step in each optimizer step, against
    `reference`. 0: no pairs are built."""

    def __post_init__(self) -> None:
        positive(self, "steps", "prompts_per_step", "updates_per_rollout", "learning_rate", "reference_every")
        require(self.prompts_per_step % self.updates_per_rollout == 0,
                 f"prompts_per_step {self.prompts_per_step} must be divisible by "
                 f"updates_per_rollout {self.updates_per_rollout}")
        require(0 <= self.clip_low <= 1, f"clip_low must be in [0, 1], got {self.clip_low}")
        require(self.clip_high >= 0, f"clip_high must be 0 or larger, got {self.clip_high}")
        check_tokens(self.tokens, self.policy_loss(1), self.updates_per_rollout)
        known_or_own("sampler", self.sampler, get_args(SamplerName))
        known_or_own("advantage", self.advantage, _ADVANTAGES)
        known_or_own("reference", self.reference, get_args(ReferenceName))
        require(self.dpo_rate >= 0, f"dpo_rate must be 0 or larger, got {self.dpo_rate}")
        require(self.reference == "ema" or (self.reference_decay, self.reference_every) == (0.995, 10),
                f"reference_decay and reference_every change nothing while reference is {self.reference}")
        require(0 <= self.reference_decay < 1, f"reference_decay must be in [0, 1), got {self.reference_decay}")
        require(0 <= self.importance_floor < self.importance_cap,
                f"importance_floor must be at least 0 and below importance_cap, got {self.importance_floor} and "
                f"{self.importance_cap}")
        unit_interval(self, "drop_easy")

    @property
    def needs_reference(self) -> bool:
        """Whether a term of the loss compares with the reference."""
        return self.kl_coef > 0 or self.dpo_rate > 0

    def policy_loss(self, constant_length: int) -> PolicyLoss:
        """The loss that these options describe; `constant_length` divides sums of aggregation `constant`.

        Raises:
            ConfigError: it does not exist.
        """
        check_loss_options(self.loss, self.loss_options,
                            (*_POLICY_OPTIONS.get(self.loss, ()), "entropy_coef", "squared_coef"))
        with as_config_error():
            return PolicyLoss(
                self.loss, aggregation=self.aggregation, constant_length=constant_length, clip_low=self.clip_low,
                clip_high=self.clip_high, dual_clip=self.dual_clip, kl_coef=self.kl_coef, kl_kind=self.kl_kind,
                importance=self.importance or "token_truncate", importance_floor=self.importance_floor,
                importance_cap=self.importance_cap, **self.loss_options)


@dataclass(frozen=True)
class VerifierConfig:
    """The Rollout-Aware Verifier: checks, judge, and how pairs are built; a stage may override any field."""

    judge: Literal["rules", "likelihood", "endpoint", "llm"] = "rules"
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
    """Base URL of an OpenAI-compatible server (`.../v1`); needed by the endpoint judge. It holds no credentials."""
    endpoint_model: str = ""
    """Model name sent to the endpoint."""
    endpoint_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset: no key is sent."""
    endpoint_concurrency: int = 16
    """Requests in flight."""
    endpoint_timeout_seconds: float = 30.0
    """Time-out of one request, from looking up the host to the last byte of the reply."""
    endpoint_retries: int = 4
    """Attempts after the first, with exponential back-off."""
    endpoint_max_failures: float = 0.2
    """Share of items without a verdict above which the stage stops instead of going on with what it has."""
    llm_path: str = ""
    """llm: folder of a causal language model with a chat template. It judges in this process, in model.dtype, by
    vLLM where rollout.engine is vllm and else by transformers, while the policy's engine sleeps."""
    llm_max_failures: float = 0.2
    """The same as endpoint_max_failures, of the judge llm."""
    likelihood_margin: float = 0.0
    """likelihood: the answer given must beat every other candidate by this many nats to be consistent."""
    likelihood_floor: float = 0.1
    """likelihood: no verdict where all candidates together have a smaller probability, 0 to 1."""
    calibration: str = ""
    """Labelled set on which the judge is tried before it judges a stage: `planted` (shipped) or a JSONL file. A judge
    under one of the floors, or one that always says the same, stops the run. Empty: no trial."""
    min_precision: float = 0.9
    """Floor: of what the judge calls inconsistent, the share that is."""
    min_recall: float = 0.5
    """Floor: of what is inconsistent, the share that the judge calls so."""
    min_coverage: float = 0.5
    """Floor: of the reasonings that support an answer, the share with a verdict."""

    def __post_init__(self) -> None:
        unit_interval(self, "max_repetition", "endpoint_max_failures", "llm_max_failures", "min_length_ratio",
                      "likelihood_floor", "min_precision", "min_recall", "min_coverage")
        positive(self, "repetition_ngram", "max_pairs_per_prompt", "endpoint_concurrency", "endpoint_timeout_seconds")
        require(self.max_length_ratio >= 1, f"max_length_ratio must be at least 1, got {self.max_length_ratio}")
        require(self.length_match >= 1, f"length_match must be at least 1, got {self.length_match}")
        require(self.endpoint_retries >= 0, f"endpoint_retries must be 0 or larger, got {self.endpoint_retries}")
        require(len(self.families) > 0, "families must name at least one pair family")
        require(not re.search(r"[@?#]", self.endpoint_url),
                "endpoint_url must be a plain address without user, password or ?query, because config.yaml and the "
                "report show it; put the key into the environment variable that endpoint_key_env names")
        require(not (self.endpoint_url and self.llm_path),
                "endpoint_url and llm_path are two places for one judge; give the one that verifier.judge names")
        require(self.judge != "llm" or bool(self.llm_path), "judge `llm` needs llm_path, a language model's folder")
        if self.judge == "endpoint":
            require(bool(self.endpoint_url) and bool(self.endpoint_model),
                     "judge `endpoint` needs endpoint_url and endpoint_model")
