"""Questions about a synthetic clip, their gold answers, and the reasoning that reaches them second by second.

Six kinds, each needing several frames: which way a shape moves, which shape appears last, where one is last seen
(choices), how many are seen (a number), for how many seconds one is visible, and how far one moves (estimates, scored
by mean relative accuracy).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from veripo_fast.demo.world import SECONDS, Clip, Shape
from veripo_fast.types import ProblemType

LETTERS = "ABCD"
CELLS = tuple(f"{row} {column}" for row in ("top", "center", "bottom") for column in ("left", "middle", "right"))


@dataclass(frozen=True)
class Question:
    """A question about one clip."""

    kind: str
    text: str
    problem_type: ProblemType
    options: tuple[str, ...]
    answer: str
    """Text of the answer: an option's text or a number."""
    observations: tuple[str, ...]
    """What the clip shows that bears on the question, one per second, `0s ...` first."""

    @property
    def gold(self) -> str:
        """What stands between the answer tags: the option's letter or the number."""
        return self.tag(self.answer)

    def tag(self, answer: str) -> str:
        """The form in which `answer` is asked for: its letter when there are options."""
        return LETTERS[self.options.index(answer)] if self.options else answer

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every answer somebody could give without looking."""
        if self.options:
            return self.options
        return {"count": ("1", "2", "3"), "seconds": ("1", "2", "3", "4")}.get(self.kind, ("30", "40", "50", "60"))

    def reasoning(self, conclusion: str) -> str:
        """The observations and a conclusion, as the policy would write them."""
        return f"{' '.join(self.observations)} so {conclusion}."


def questions(clip: Clip, seed: int) -> list[Question]:
    """Every question that the clip can carry, with shuffled options."""
    rng = random.Random(seed)
    movers = [shape for shape in clip.shapes if shape.moves]
    passing = [shape for shape in clip.shapes if not shape.moves]
    found = [_count(clip)]
    for shape in movers:
        found += [_direction(clip, shape, rng), _distance(clip, shape)]
    for shape in passing:
        found += [_seconds(shape), _place(clip, shape, rng)]
    latest = max(shape.appears for shape in clip.shapes)
    if sum(shape.appears == latest for shape in clip.shapes) == 1:
        found.append(_last(clip, latest, rng))
    return found


def _by_second(words: list[str]) -> tuple[str, ...]:
    return tuple(f"{second}s {word}." for second, word in enumerate(words))


def _shuffled(rng: random.Random, options: list[str]) -> tuple[str, ...]:
    return tuple(rng.sample(options, len(options)))


def _direction(clip: Clip, shape: Shape, rng: random.Random) -> Question:
    forward, backward = ("right", "left") if clip.axis == "x" else ("down", "up")
    return Question("direction", f"Which way does the {shape.name} move?", "choice",
                    _shuffled(rng, ["left", "right", "up", "down"]), forward if shape.end > shape.start else backward,
                    _by_second([clip.side(shape, second) for second in range(SECONDS)]))


def _distance(clip: Clip, shape: Shape) -> Question:
    ends = (f"0s at {shape.start}.", f"{SECONDS - 1}s at {shape.end}.")
    return Question("distance", f"How many percent of the frame does the {shape.name} move?", "estimate", (),
                    str(abs(shape.end - shape.start)), ends)


def _seconds(shape: Shape) -> Question:
    return Question("seconds", f"For how many seconds is the {shape.name} visible?", "estimate", (),
                    str(shape.vanishes - shape.appears),
                    _by_second(["yes" if shape.visible(second) else "no" for second in range(SECONDS)]))


def _place(clip: Clip, shape: Shape, rng: random.Random) -> Question:
    answer = clip.cell(shape, shape.appears)
    others = rng.sample([cell for cell in CELLS if cell != answer], 3)
    seen = [clip.cell(shape, second) if shape.visible(second) else "no" for second in range(SECONDS)]
    return Question("place", f"Where is the {shape.name} last seen?", "choice", _shuffled(rng, [answer, *others]),
                    answer, _by_second(seen))


def _new_shapes(clip: Clip) -> tuple[str, ...]:
    words = []
    for second in range(SECONDS):
        new = [shape.name for shape in sorted(clip.shapes, key=lambda s: s.lane) if shape.appears == second]
        words.append(", ".join(new) or "none")
    return _by_second(words)


def _count(clip: Clip) -> Question:
    return Question("count", "How many shapes are seen in all?", "number", (), str(len(clip.shapes)), _new_shapes(clip))


def _last(clip: Clip, latest: int, rng: random.Random) -> Question:
    answer = next(shape.name for shape in clip.shapes if shape.appears == latest)
    return Question("last", "Which shape appears last?", "choice",
                    _shuffled(rng, [shape.name for shape in clip.shapes]), answer, _new_shapes(clip))


def describe(clip: Clip) -> str:
    """Dense description, second by second: what a captioner would write. Used to teach the tiny policy to see."""
    lines = []
    for second in range(SECONDS):
        seen = [f"{shape.name} {clip.cell(shape, second)}"
                for shape in sorted(clip.shapes, key=lambda s: s.lane) if shape.visible(second)]
        lines.append(f"{second}s {', '.join(seen) or 'none'}.")
    return " ".join(lines)
