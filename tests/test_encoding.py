"""Prompts as the policy reads them, against the real Hugging Face processors and M-RoPE; and checkpoints in and out,
read back by a process that knows nothing of veripo."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import policies
import pytest
import torch
from test_patches import oracle_folder

from veripo_fast.config import ModelConfig
from veripo_fast.encoding import PromptEncoder
from veripo_fast.errors import CheckpointError, DataError
from veripo_fast.model import load_policy, save_policy
from veripo_fast.positions import GridSpan, TextSpan, mrope_positions
from veripo_fast.types import EncodedPrompt, Image, MediaInputs, Message, Prompt, Video


class Clip(NamedTuple):
    """Frames taken every `step` source frames; sides in units of the factor. Images have one frame and fps 0."""

    frames: int
    height: int
    width: int
    fps: float
    step: int = 1

    @property
    def kind(self) -> str:
        return "video" if self.fps else "image"


PICTURE, SHORT, LONG = Clip(1, 2, 3, 0.0), Clip(4, 3, 2, 2.0), Clip(18, 2, 2, 8.0, 4)
CASES: dict[str, list[tuple[str, list[str | Clip]]]] = {
    "text": [("user", ["Which way does it move?\n(A) left\n"])],
    "video": [("user", [LONG, "\nWhich way?"])],
    "video after text": [("user", ["Look:", SHORT, "Which way?"])],
    "video after a space": [("user", ["This is it: ", SHORT, " Which way?"])],
    "odd number of frames": [("user", [Clip(5, 2, 3, 2.0), "What?"])],
    "one frame": [("user", [Clip(1, 2, 2, 2.0), "What?"])],
    "29.97 fps": [("user", [Clip(6, 2, 2, 30000 / 1001, 17), "What?"])],
    "image": [("user", ["a", PICTURE, "b"])],
    "two videos": [("user", [SHORT, " then ", Clip(6, 2, 3, 25.0, 10), " Which is longer?"])],
    "image between videos": [("user", [SHORT, PICTURE, LONG, "?"])],
    "several turns": [("system", ["Be brief."]), ("user", [SHORT, "What?"]), ("assistant", ["A circle."]),
                      ("user", ["And here? ", PICTURE])],
}


def pixels(clip: Clip, encoder: PromptEncoder) -> torch.Tensor:
    return torch.randint(0, 256, (clip.frames, 3, clip.height * encoder.vision.factor,
                                  clip.width * encoder.vision.factor), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(clip.frames * clip.width))


def clips_of(case: str) -> list[Clip]:
    return [part for _, parts in CASES[case] for part in parts if isinstance(part, Clip)]


def encode(family: str, case: str) -> EncodedPrompt:
    encoder = policies.policy(family).encoder
    media = {"video": Video(""), "image": Image("")}
    prompt = Prompt(case, tuple(Message(role, tuple(media[p.kind] if isinstance(p, Clip) else p for p in parts))
                                for role, parts in CASES[case]), "text", "yes")
    frames = [(clip.kind, pixels(clip, encoder),
               torch.arange(clip.frames, dtype=torch.float64) * clip.step / (clip.fps or 1.0))
              for clip in clips_of(case)]
    return encoder.encode(prompt, encoder.media_inputs(frames, case) if frames else None)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[str, dict[str, torch.Tensor]]]:
    """(chat text, inputs) of every case from the processors, in one process: it takes seconds to start."""
    folder, names, cases = tmp_path_factory.mktemp("oracle"), [], []
    for family in policies.FAMILIES:
        encoder = policies.policy(family).encoder
        for case, turns in CASES.items():
            messages = [{"role": role, "content": [
                {"type": p.kind} if isinstance(p, Clip) else {"type": "text", "text": p} for p in parts]}
                for role, parts in turns]
            videos = [clip for clip in clips_of(case) if clip.fps]
            metadata = [{"fps": clip.fps, "total_num_frames": clip.frames * clip.step,
                         "frames_indices": [i * clip.step for i in range(clip.frames)]} for clip in videos]
            images = [pixels(clip, encoder)[0] for clip in clips_of(case) if not clip.fps]
            names.append((family, case))
            cases.append((str(policies.checkpoint(family)), messages, images,
                          [pixels(clip, encoder) for clip in videos], metadata))
    torch.save(cases, folder / "cases.pt")
    script = Path(__file__).with_name("processor_oracle.py")
    done = subprocess.run([sys.executable, script, folder / "cases.pt", folder / "answers.pt"], text=True,
                          capture_output=True, env={**os.environ, "VERIPO_TEST_ORACLE": oracle_folder() or ""})
    assert done.returncode == 0, done.stderr
    return dict(zip(names, torch.load(folder / "answers.pt"), strict=True))


# -- token ids and patches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", policies.FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_token_ids_and_patches_are_the_processors(oracle: dict, family: str, case: str) -> None:
    ours, (text, theirs) = encode(family, case), oracle[family, case]
    decode = policies.policy(family).encoder.tokenizer.decode
    assert decode(ours.token_ids) == decode(theirs["input_ids"][0]), text
    assert ours.token_ids.tolist() == theirs["input_ids"][0].tolist()
    for kind, values, grid in (("image", "pixel_values", "image_grid_thw"),
                               ("video", "pixel_values_videos", "video_grid_thw")):
        rows = [] if ours.media is None else [i for i, name in enumerate(ours.media.kinds) if name == kind]
        assert bool(rows) == (values in theirs)
        if rows:
            split = ours.media.pixel_values.split(ours.media.grid_thw.prod(-1).tolist())
            assert torch.equal(ours.media.grid_thw[rows], theirs[grid])
            torch.testing.assert_close(torch.cat([split[i] for i in rows]), theirs[values], rtol=1e-6, atol=1e-6)


def test_timestamps_are_written_into_qwen3_prompts() -> None:
    encoder = policies.policy("qwen3_vl").encoder
    assert "<0.1 seconds><|vision_start|>" in encoder.tokenizer.decode(encode("qwen3_vl", "29.97 fps").token_ids) or \
        "<0.3 seconds><|vision_start|>" in encoder.tokenizer.decode(encode("qwen3_vl", "29.97 fps").token_ids)
