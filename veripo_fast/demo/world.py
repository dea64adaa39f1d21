"""The embedded corpus' world: coloured shapes that move, appear and vanish on a dark ground, second by second.

Each shape keeps to a lane of its own (rows in one clip, columns in another), so none hides another. Times of appearing
and vanishing are whole seconds; positions are percent of the frame. Nothing here knows about questions or files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

COLOURS = {"red": (220, 50, 47), "green": (60, 170, 70), "blue": (50, 110, 230), "yellow": (230, 200, 50)}
KINDS = ("circle", "square", "triangle")
SECONDS = 4
SIZE = 128
_RADIUS = 13.0
_LANES = (20, 50, 80)
_ALONG = (20, 30, 40, 50, 60, 70, 80)


@dataclass(frozen=True)
class Shape:
    """One shape: where its lane lies, how it moves along it, and when it is visible (seconds, end excluded)."""

    colour: str
    kind: str
    lane: int
    start: int
    end: int
    appears: int
    vanishes: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def moves(self) -> bool:
        return self.start != self.end

    def visible(self, second: float) -> bool:
        return self.appears <= second < self.vanishes

    def along(self, second: float) -> float:
        """Position along the lane in percent; a mover reaches `end` a second before the clip does and rests."""
        return self.start + (self.end - self.start) * min(second / (SECONDS - 1), 1.0)


@dataclass(frozen=True)
class Clip:
    """Shapes in rows (`axis` x: they move left and right) or columns (y: up and down)."""

    axis: str
    shapes: tuple[Shape, ...]
    seed: int

    def centre(self, shape: Shape, second: float) -> tuple[float, float]:
        """(x, y) of a shape in percent of the frame."""
        along = shape.along(second)
        return (along, shape.lane) if self.axis == "x" else (shape.lane, along)

    def cell(self, shape: Shape, second: float) -> str:
        """Where a shape is, in words: `top left`, `center middle`, ..."""
        x, y = self.centre(shape, second)
        return f"{_third(y, ('top', 'center', 'bottom'))} {_third(x, ('left', 'middle', 'right'))}"

    def side(self, shape: Shape, second: float) -> str:
        """Where a shape is along its lane, in one word."""
        words = ("left", "middle", "right") if self.axis == "x" else ("top", "center", "bottom")
        return _third(shape.along(second), words)


def _third(percent: float, words: tuple[str, str, str]) -> str:
    return words[0] if percent < 40 else words[1] if percent <= 60 else words[2]


def random_clip(seed: int) -> Clip:
    """A clip of two or three shapes; a third of the shapes move through the whole clip, the others come and go."""
    rng = random.Random(seed)
    lanes = rng.sample(_LANES, rng.choice((2, 3, 3)))
    looks = rng.sample([(colour, kind) for colour in COLOURS for kind in KINDS], len(lanes))
    return Clip(rng.choice("xy"), tuple(_random_shape(rng, look, lane)
                                        for look, lane in zip(looks, lanes, strict=True)), seed)


def _random_shape(rng: random.Random, look: tuple[str, str], lane: int) -> Shape:
    if rng.random() < 0.4:
        start, end = rng.choice([(a, b) for a in _ALONG for b in _ALONG if abs(a - b) >= 30])
        return Shape(*look, lane, start, end, 0, SECONDS)
    place = rng.choice(_LANES)
    appears = rng.choice((0, 0, 1, 2, 3))
    vanishes = rng.choice([SECONDS, *range(appears + 1, SECONDS + 1)])
    return Shape(*look, lane, place, place, appears, vanishes)


def render(clip: Clip, seconds: list[float]) -> np.ndarray:
    """Frames uint8 [len(seconds), SIZE, SIZE, 3] of a clip at the given times."""
    rng = np.random.default_rng(clip.seed)
    noise = rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32) * 4
    ground = rng.integers(15, 60, 3).astype(np.float32) + noise
    frames = []
    for second in seconds:
        frame = ground.copy()
        for shape in clip.shapes:
            if shape.visible(second):
                _draw(frame, shape, *(value * SIZE / 100 for value in clip.centre(shape, second)))
        frames.append(frame)
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def _draw(frame: np.ndarray, shape: Shape, x: float, y: float) -> None:
    """Draw a shape around (x, y), in pixels, into a float frame [SIZE, SIZE, 3]."""
    reach = int(_RADIUS) + 3
    left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
    window = frame[top:int(y) + reach, left:int(x) + reach]
    rows, columns = np.mgrid[0:window.shape[0], 0:window.shape[1]].astype(np.float32)
    cover = _cover(shape.kind, columns + left - x, rows + top - y)[..., None]
    window += (np.array(COLOURS[shape.colour], dtype=np.float32) - window) * cover


def _cover(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers, from its signed distance: soft edges one pixel wide."""
    if kind == "circle":
        distance = np.hypot(x, y) - _RADIUS
    elif kind == "square":
        distance = np.maximum(abs(x), abs(y)) - _RADIUS * 0.88
    else:
        distance = np.maximum(y - _RADIUS * 0.75, abs(x) * 0.894 - (y + _RADIUS) * 0.447)
    return np.clip(0.5 - distance, 0, 1)
