"""The data that flows through the trainer, stage by stage; no logic lives here.

Shape letters: T tokens or frames (said where it matters), G group, P prompt tokens, R completion tokens, N patches,
D hidden. Lists of numbers are plain Python so that a rollout can be stored, compared and shipped without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

ProblemType: TypeAlias = Literal[
    "choice", "multi_select", "soft_select", "boolean", "number", "rounded", "quantity", "estimate", "math", "text",
    "ocr", "rouge", "time_span", "timestamp", "box", "boxes"]
"""What an answer is; `reward.graders.GRADERS` says how each is graded."""
PairFamily: TypeAlias = Literal["accuracy", "consistency", "reflection", "repetition"]
FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a record asks for one medium in place of the sampling contract; None: as the contract says."""

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """A video file or the part of it between two times, or frames that are a picture file each."""

    path: str
    """The file; a folder of frames; or the first of `frames`."""
    start_seconds: float | None = None
    end_seconds: float | None = None
    sampling: Sampling | None = None
    frames: tuple[str, ...] = ()
    """Picture files in order, where a record lists them."""
    frame_fps: float | None = None
    """Pictures per second of `frames` or of a folder; None: 2, as qwen-vl-utils takes them."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image file."""

    path: str
    sampling: Sampling | None = None


Media: TypeAlias = Video | Image


@dataclass(frozen=True)
class Frames:
    """Decoded frames of one video, already resized to what the policy sees."""

    pixels: torch.Tensor
    """uint8 [T, 3, H, W], RGB."""
    pts_seconds: torch.Tensor
    """float64 [T]: the true presentation time of each frame, relative to the first frame of the (part of the) video."""
    indices: tuple[int, ...]
    """Index of each frame in decoding-independent presentation order."""
    decoder: str
    """Which decoder produced them: a name of `video.decoders.readers`, or `pyav-sequential`."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; media stand where they appear in the text."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | Video | Image, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """How a completion has to be written (reward/spans.py reads it)."""

    tags: tuple[str, ...] = ("think", "answer")
    """Names of its spans in order: `<think>...</think>`; `boxed` is `\\boxed{...}`; a name with ? may be absent."""
    pattern: str = ""
    """Regular expression that the whole of a well-formed completion matches; empty: the spans in order."""


THINK_ANSWER = Form()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question with its media and the typed gold answer. `prompt_id` is unique within a data set."""

    prompt_id: str
    messages: tuple[Message, ...]
    problem_type: ProblemType
    gold: str
    options: tuple[str, ...] = ()
    """Texts of the choices A, B, C, ... without their letters; empty when there are none."""
    data_source: str = ""
    form: Form = THINK_ANSWER
    """How its completions have to be written."""
    side: str = ""
    """JSON of what the record says beside, for rewards (`data.keep_keys`); empty: nothing."""

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for message in self.messages for part in message.parts if not isinstance(part, str))

    @property
    def text(self) -> str:
        return "\n".join(part for message in self.messages for part in message.parts if isinstance(part, str))


@dataclass(frozen=True)
class MediaInputs:
    """All images and videos of one prompt as the vision tower reads them, in the order they appear in the text."""

    pixel_values: torch.Tensor | None
    """float32 or bfloat16 [N, 3*2*patch*patch], patches in Qwen's order; None once the tower's output is at hand."""
    grid_thw: torch.Tensor
    """int64 [media, 3]: frames / 2, height and width in patches before merging."""
    kinds: tuple[Literal["image", "video"], ...]
    """What each row of grid_thw is."""
    grid_seconds: tuple[tuple[float, ...], ...]
    """Per medium and temporal grid: mean presentation time of its two frames, in seconds."""
    key: str
    """Content fingerprint of the media under the sampling contract; equal keys mean equal pixel values."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the policy reads it."""

    token_ids: torch.Tensor
    """int64 [P], media pad tokens expanded to one per merged patch."""
    positions: torch.Tensor
    """int64 [3, P], M-RoPE positions (time, height, width)."""
    next_position: int
    """Position of the first completion token (the same on all three axes)."""
    media: MediaInputs | None = None
    """None for a text-only prompt."""


@dataclass
class Completion:
    """What the policy wrote for one prompt."""

    token_ids: list[int]
    """The tokens sampled, the end-of-turn token included when it was reached."""
    text: str
    rollout_logprobs: list[float]
    """log softmax(logits / temperature) of each token: the distribution the trainer computes, without top-p/top-k."""
    finish_reason: FinishReason
    policy_version: int
    """Number of optimizer steps behind the weights that wrote it."""
    accuracy: float | None = None
    """This and the next three: None until `reward_groups` has scored it."""
    format: float | None = None
    reward: float | None = None
    advantage: float | None = None
    columns: dict[str, float | None] = field(default_factory=dict)
    """The number of each term of the reward, before gate and weight; None where its function failed."""
    reference_logprobs: list[float] | None = None
    """Those of the reference of the stage, at the temperature of the rollout; None unless the reward asks for them."""
    answer_tokens: tuple[int, int] | None = None
    """Where its answer begins and ends among its tokens; None without an answer, and unless the reward asks for it."""
    frame_likeness: list[float] | None = None
    """Cosine of its reasoning with each frame under `reward.vision_text`; None without media, and without it."""
    experts: bytes | None = None
    """int16 [R - 1, layers, k], little-endian: which experts the engine chose for its tokens but the last, which the
    engine did not read; below 0 where that is not known. None without `rollout.router_replay`."""


@dataclass
class RolloutGroup:
    """The G completions of one prompt."""

    prompt: Prompt
    completions: list[Completion]
    think_opened: bool = False
    """Whether the prompt ended with `<think>`, so that the completions begin inside their think span."""
    contrast: RolloutGroup | None = None
    """Completions of the same prompt that saw its frames in another order; nothing trains on them."""
    prompt_experts: bytes | None = None
    """int16 [P, layers, k] as `Completion.experts`, of the prompt as the first completion of the engine read it."""


@dataclass(frozen=True)
class PreferencePair:
    """A chosen and a rejected completion of the same prompt, as tokens that enter DPO."""

    prompt_id: str
    family: PairFamily
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_loss_mask: tuple[int, ...]
    """1 on tokens that enter the loss; same length as chosen_ids."""
    rejected_loss_mask: tuple[int, ...]
    chosen_text: str
    rejected_text: str
    chosen_index: int
    """Index of the completion in its group, or -1 when the text was assembled from several."""
    rejected_index: int
    reason: str = ""
    """One sentence: why this is a pair."""


@dataclass
class Verdict:
    """What the Rollout-Aware Verifier says of one completion."""

    prompt_id: str
    index: int
    """Index of the completion in its group."""
    accuracy: float
    format_ok: bool
    finished: bool
    length_tokens: int
    """Tokens inside the think span."""
    repetition: float
    """Share of the think span covered by repeated n-grams, 0 to 1."""
    consistent: bool | None
    """Whether the answer is what the reasoning supports; None when the judge could not say."""
    supported_answer: str | None
    """The answer that the reasoning supports, as the judge reads it, or None."""
    judge_score: float | None = None
    """The judge's own number where it has one (likelihood judge: log-probability margin)."""
    flags: tuple[str, ...] = field(default_factory=tuple)
    """Names of failed checks: format, unfinished, length, repetition, inconsistent, wrong."""


@dataclass(frozen=True)
class VisionFeatures:
    """Tower output of all media of one prompt, in the order of the pad tokens."""

    embeddings: torch.Tensor
    """[tokens, D], after the merger."""
    deepstack: tuple[torch.Tensor, ...] = ()
    """Qwen3-VL: [tokens, D] for each of the first decoder layers; empty for Qwen2.5-VL."""

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + sum(level.nbytes for level in self.deepstack)


@dataclass(frozen=True)
class LoadedPrompt:
    """A prompt ready for the policy; the tower's output is shared by rollout, every log-prob pass and the update."""

    prompt: Prompt
    encoded: EncodedPrompt
    features: VisionFeatures | None
    """Detached tower output, None for a text-only prompt."""
