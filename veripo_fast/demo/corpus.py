"""`veripo synth`: the embedded corpus as real files: H.264 mp4 clips and questions in the Video-R1 layout.

    OUT/clips/000000.mp4 ...   128 x 128, 8 frames per second, from 0 to 3.5 seconds
    OUT/train.jsonl            questions on the first clips
    OUT/heldout.jsonl          questions on other clips
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from veripo_fast.demo.questions import LETTERS, Question, questions
from veripo_fast.demo.world import Clip, random_clip, render
from veripo_fast.errors import DataError

FPS = 8
FRAMES = 29
"""Up to 3.5 seconds, so that eight frames evenly spread fall on every half second."""
QUESTIONS_PER_CLIP = 2
_DECLARED = {"choice": "multiple choice", "number": "numerical", "estimate": "regression"}
_SEEDS_PER_CORPUS = 1 << 20


def write_corpus(out: Path, train: int, heldout: int, seed: int) -> None:
    """Render a corpus of `train` and `heldout` questions; no clip is in both. The same seed gives the same corpus.

    Raises:
        DataError: `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} exists and is not empty; name another folder")
    (out / "clips").mkdir(parents=True, exist_ok=True)
    clip_seeds = iter(range(seed * _SEEDS_PER_CORPUS, (seed + 1) * _SEEDS_PER_CORPUS))
    number = 0
    with tqdm(total=train + heldout, desc="synth", unit="question") as bar:
        for name, wanted in (("train", train), ("heldout", heldout)):
            with (out / f"{name}.jsonl").open("w") as file:
                for clip, asked in _asked(clip_seeds, wanted):
                    path = f"clips/{number:06d}.mp4"
                    write_clip(out / path, clip)
                    number += 1
                    for question in asked:
                        file.write(json.dumps(record(question, path, f"{name}-{bar.n:06d}")) + "\n")
                        bar.update(1)


def _asked(clip_seeds: Iterator[int], wanted: int) -> Iterator[tuple[Clip, list[Question]]]:
    """Clips with the questions to ask of each, rarest kinds first so that all kinds end up equally frequent."""
    counts: Counter[str] = Counter()
    while (total := counts.total()) < wanted:
        seed = next(clip_seeds)
        clip = random_clip(seed)
        by_kind = {question.kind: question for question in questions(clip, seed)}
        kinds = sorted(by_kind, key=lambda kind: (counts[kind], kind))[:min(QUESTIONS_PER_CLIP, wanted - total)]
        counts.update(kinds)
        yield clip, [by_kind[kind] for kind in kinds]


def record(question: Question, path: str, problem_id: str) -> dict[str, Any]:
    """A question as a Video-R1 record."""
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)]
    return {"problem_id": problem_id, "problem": question.text, "data_type": "video",
            "problem_type": _DECLARED[question.problem_type], "options": options,
            "solution": f"<answer>{question.gold}</answer>", "path": path, "data_source": f"synth-{question.kind}"}


def write_clip(path: Path, clip: Clip) -> None:
    """Encode a clip as H.264 in mp4."""
    frames = render(clip, [index / FPS for index in range(FRAMES)])
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
