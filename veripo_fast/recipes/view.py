"""What a reward sees: one prompt with all its groups of completions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from veripo_fast.types import LoadedPrompt, ProblemType, Prompt

if TYPE_CHECKING:
    import torch

Column: TypeAlias = list[float]
"""A number for every completion of a group, in their order."""
MAIN = "main"
"""Name of the group that is trained on."""
CONTRAST = "contrast"
"""Name of the group that saw the frames in another order (`plan.contrast`)."""


def side_of(prompt: Prompt) -> dict[str, Any]:
    """The record's own values of the keys in `data.keep_keys`."""
    side: dict[str, Any] = json.loads(prompt.side) if prompt.side else {}
    return side


@dataclass(frozen=True)
class CompletionView:
    """A completion as a reward reads it."""

    text: str
    """What the policy wrote, without the end of turn."""
    spans: Mapping[str, str | None]
    """Content of each tag of `data.tags` by name, white space stripped; None where it does not occur exactly once or
    is empty."""
    token_ids: Sequence[int]
    """The end of turn included."""
    logprobs: Sequence[float]
    """The engine's, of each token at the temperature of the rollout."""
    finished: bool
    """Whether it ended by itself; false: it was cut at `rollout.max_new_tokens`."""
    accuracy: float
    """0 to 1."""
    format: float
    """0 or 1."""
    reference_logprobs: Sequence[float] | None = None
    """Of each token under `grpo.reference`, at the temperature of the rollout; None without
    `reward.reference_logprobs`."""
    answer_tokens: tuple[int, int] | None = None
    """Where the answer begins and ends among the tokens; None where there is none, and without
    `reward.reference_logprobs`."""

    frame_likeness: Sequence[float] | None = None
    """Cosine of the reasoning with each frame that the policy saw, media in the order of the text; None without media,
    and without `reward.vision_text`."""

    @property
    def think(self) -> str | None:
        """The think span."""
        return self.spans.get("think")

    @property
    def answer(self) -> str | None:
        """The answer span, be it that of <answer> or of \\boxed."""
        return self.spans.get("answer") if "answer" in self.spans else self.spans.get("boxed")

    @property
    def num_tokens(self) -> int:
        """The end of turn included."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Question:
    """A question as a template words it."""

    text: str
    """The last text of the record's last turn, without options and instruction."""
    options: tuple[str, ...]
    """Texts of the choices without their letters; empty when there are none."""
    problem_type: ProblemType
    data_source: str
    side: Mapping[str, Any]
    """The record's own values of the keys in `data.keep_keys`."""


class Completions(Sequence[CompletionView]):
    """The completions of a group; remembers which one was read last, so that an error can name it."""

    def __init__(self, completions: Sequence[CompletionView]) -> None:
        self._completions = tuple(completions)
        self.last_read: int | None = None

    @overload
    def __getitem__(self, index: int) -> CompletionView: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[CompletionView]: ...

    def __getitem__(self, index: int | slice) -> CompletionView | Sequence[CompletionView]:
        found = self._completions[index]
        if isinstance(index, int):
            self.last_read = index % len(self)
        return found

    def __iter__(self) -> Iterator[CompletionView]:
        for number in range(len(self)):
            yield self[number]

    def __len__(self) -> int:
        return len(self._completions)


@dataclass(frozen=True)
class PromptView:
    """A prompt with all its groups, as a reward reads it."""

    prompt: Prompt
    """Its `text`, `gold`, `options`, `problem_type` and `data_source` among others."""
    groups: Mapping[str, Completions]
    """By name; `main` is the group that is trained on, `contrast` the one that `plan.contrast` asks for."""
    loaded: LoadedPrompt | None = None
    """The prompt as the policy reads it; None where groups are scored that were stored."""

    @property
    def completions(self) -> Completions:
        """Those of the group that is trained on."""
        return self.groups[MAIN]

    @cached_property
    def side(self) -> Mapping[str, Any]:
        """The record's own values of the keys in `data.keep_keys`."""
        return side_of(self.prompt)

    @property
    def frame_seconds(self) -> tuple[tuple[float, ...], ...]:
        """Per medium the time of each temporal patch, in seconds: the mean of its two frames. Empty without media."""
        media = None if self.loaded is None else self.loaded.encoded.media
        return () if media is None else media.grid_seconds

    @property
    def grid_thw(self) -> torch.Tensor | None:
        """int64 [media, 3]: temporal patches, height and width in patches before merging."""
        media = None if self.loaded is None else self.loaded.encoded.media
        return None if media is None else media.grid_thw

    @property
    def embeddings(self) -> torch.Tensor | None:
        """[tokens, D]: the tower's output of all media in the order of the text, after its merger; None without."""
        features = None if self.loaded is None else self.loaded.features
        return None if features is None else features.embeddings
