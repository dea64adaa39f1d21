"""Sections of the configuration that say what goes in: policy, frames, cache, data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from veripo_fast.config.checks import OWN, inside, known_or_own, positive, require
from veripo_fast.config.lora import LoraConfig
from veripo_fast.errors import ConfigError
from veripo_fast.types import ProblemType


@dataclass(frozen=True)
class ModelConfig:
    """The policy."""

    path: str = "tiny"
    """Folder of a checkpoint of a family that is supported (docs/models.md), or `tiny`: the demo policy shipped in the
    package."""
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
    router_balance: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, added to the loss of every stage; 0: none."""
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        require(self.router_balance >= 0, f"router_balance must be 0 or larger, got {self.router_balance}")
        if self.lora.rank:
            merger = "merger" in self.lora.targets
            require(not merger or not self.freeze_vision,
                    "lora.targets has merger, whose output is cached while freeze_vision is true; set it to false")
            require(merger or self.freeze_vision,
                    "freeze_vision is false, and lora trains nothing before the language model; leave it true, or add "
                    "merger to lora.targets")


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
        require((self.fps is None) != (self.num_frames is None),
                 f"exactly one of fps and num_frames must be set, got fps={self.fps}, num_frames={self.num_frames}")
        positive(self, "fps", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "workers",
                  "timeout_seconds")
        require(self.min_frames <= self.max_frames,
                 f"min_frames {self.min_frames} is larger than max_frames {self.max_frames}")
        require(self.min_pixels <= self.max_pixels,
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
        positive(self, "disk_bytes", "prefetch_bytes")
        for name in ("host_bytes", "gpu_bytes", "prefetch_prompts"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or larger, got {getattr(self, name)}")
        require(not self.frames or bool(self.folder), "frames are kept on disk: name a folder")


DEFAULT_INSTRUCTION = "Think in <think></think>, then give the {kind} in <answer></answer>."
SPANS = ("think", "answer")
_TAG = re.compile(r"[A-Za-z][\w-]*\??")


@dataclass(frozen=True)
class SourceConfig:
    """How the questions of one `data_source` are put, where that is another way; null: as `data` says."""

    source: str = ""
    """The data_source of the records."""
    template: str | None = None
    """As `data.template`."""
    instruction: str | None = None
    """As `data.instruction`."""
    system: str | None = None
    """As `data.system`."""
    tags: tuple[str, ...] | None = None
    """As `data.tags`."""
    pattern: str | None = None
    """As `data.pattern`."""

    def __post_init__(self) -> None:
        require(bool(self.source), "source must name the data_source of some records")


@dataclass(frozen=True)
class DataConfig:
    """Where the questions come from, how they are put, and how they have to be answered."""

    train: tuple[str, ...] = ()
    """JSONL or Parquet files in any accepted layout (Video-R1, EasyR1/verl, chat messages), or WebDataset shards: plain
    tar archives of KEY.json beside KEY.mp4."""
    eval: tuple[str, ...] = ()
    """Held-out files, same layouts."""
    media_root: str = ""
    """Folder that relative media paths start from; empty: the folder of the data file."""
    confine: bool = False
    """Skip records whose media lie outside of that folder, symbolic links followed: for data that others wrote."""
    template: str = "instruct"
    """`instruct` puts the options and the instruction behind a question, `none` the options alone; or a function of
    your own that words the question."""
    instruction: str = DEFAULT_INSTRUCTION
    """What `instruct` adds; {kind} is letter, number, result or answer. With {question} in it, it stands around the
    question and its options; else behind them, unless the question asks for the answer's tag by itself."""
    system: str = ""
    """System prompt of records that have none; empty: none."""
    tags: tuple[str, ...] = SPANS
    """Spans of a well-formed completion, in order: `think` is <think>...</think>, `boxed` is \\boxed{...}, any other
    name is a tag too; with a question mark it may be absent (`map?`). One is `answer` or `boxed`."""
    pattern: str = ""
    """Regular expression that a well-formed completion matches as a whole (`.` is any character); empty: its spans
    stand in order with only white space between them, \\boxed aside."""
    by_source: tuple[SourceConfig, ...] = ()
    """Other ways for records of some data_source."""
    keep_keys: tuple[str, ...] = ()
    """Keys of a record that travel with its prompt, for rewards, templates and samplers (`side`)."""
    max_prompt_tokens: int = 16384
    """Longer prompts are skipped and named in skipped.jsonl (they are never truncated)."""
    text_only: bool = False
    """Take records that name no video and no image. Without it they are skipped, unless they say `data_type: text`:
    a misspelt key of a medium looks the same."""
    answer_index: int | None = None
    """What an answer that is an index of its options counts from, 0 or 1; null: such records are skipped, unless
    their keys say it (a0, a1, ...)."""
    ignore_keys: tuple[str, ...] = ()
    """Keys that are left unread wherever a record holds them, for keys that are refused and mean something else."""

    media_patterns: tuple[str, ...] = ()
    """Where the media of a record lie, from its own keys: `{dataset}/{scene_name}.mp4`. For suites whose records name
    an id in place of a file; what the media keys of a record say is then not read."""
    problem_types: tuple[str, ...] = ()
    """What a problem_type of the records is graded as: `free-form=rouge`, `numerical=rounded`, `their name=box`."""

    def __post_init__(self) -> None:
        positive(self, "max_prompt_tokens")
        for pattern in self.media_patterns:
            require(re.search(r"\{[^{}]+\}", pattern) is not None,
                    f"media_patterns must name a key of the records in braces, got {pattern!r}")
        for given in self.problem_types:
            theirs, _, ours = given.partition("=")
            known = get_args(ProblemType)
            require(bool(theirs.strip()) and ours.strip() in known,
                    f"problem_types must be NAME=TYPE with TYPE one of {', '.join(known)}, got {given!r}")
        require(self.answer_index in (None, 0, 1), f"answer_index must be 0, 1 or null, got {self.answer_index}")
        require(self.template != "think_answer", "template think_answer is now called instruct")
        known_or_own("template", self.template, ("instruct", "none"))
        _check_tags(self.tags)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"pattern {self.pattern!r} is no regular expression: {error}") from error
        if self.template == "instruct":
            require(bool(self.instruction), "instruction is empty: template `none` leaves it out")
            require(self.tags == SPANS or self.instruction != DEFAULT_INSTRUCTION,
                    f"tags are {', '.join(self.tags)}: write an instruction that asks for them")
        else:
            require(self.instruction == DEFAULT_INSTRUCTION,
                    f"instruction changes nothing while template is {self.template}")
        sources = [entry.source for entry in self.by_source]
        for number, entry in enumerate(self.by_source):
            require(entry.source not in sources[:number], f"by_source names {entry.source} twice")
            with inside(f"by_source.{number}"):
                self.for_source(entry.source)

    def for_source(self, source: str) -> DataConfig:
        """The same with what `by_source` says of a data_source in its place."""
        for entry in self.by_source:
            if entry.source == source:
                own = {item.name: getattr(entry, item.name) for item in fields(entry)[1:]}
                if entry.template not in (None, "instruct"):
                    own["instruction"] = own["instruction"] or DEFAULT_INSTRUCTION
                return replace(self, **{name: value for name, value in own.items() if value is not None}, by_source=())
        return replace(self, by_source=()) if self.by_source else self

    def own_templates(self) -> list[str]:
        """The templates that are functions of the user's."""
        named = [self.template, *(entry.template for entry in self.by_source if entry.template)]
        return [name for name in named if OWN.fullmatch(name)]


def _check_tags(tags: tuple[str, ...]) -> None:
    """ConfigError unless the tags have names, each once, and one of them holds the answer."""
    for tag in tags:
        require(_TAG.fullmatch(tag) is not None, f"tags must be names such as think or `map?`, got {tag!r}")
    names = [tag.removesuffix("?") for tag in tags]
    require(len(set(names)) == len(names), f"tags name one twice: {', '.join(tags)}")
    require(sum(tag in ("answer", "boxed") for tag in tags) == 1 and not {"answer?", "boxed?"} & set(tags),
            f"one of tags must be answer or boxed, which holds the answer, got {', '.join(tags)}")
