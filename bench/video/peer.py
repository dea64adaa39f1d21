"""The peer of the video bench: qwen-vl-utils and Hugging Face's video processor of Qwen2.5-VL; decord alone.

Served by worker.py in a process that never imports veripo. torchvision has no CPU build on PyPI: the CUDA one is
found in the folder that BENCH_TORCHVISION names.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench.recipe import version_of
from bench.video import torchvision_folder
from bench.video.worker import Answer, measured, serve

if side := os.environ.get("BENCH_TORCHVISION"):
    torchvision_folder.add(side)

READERS = {"torchcodec": ("torchcodec", "torchcodec"), "decord": ("decord", "decord2")}
"""Reader of qwen-vl-utils -> its import name and its package."""
_ready: dict[str, tuple[torch.Tensor, dict[str, Any], float]] = {}


def readers() -> Answer:
    """Versions of what there is, and why each reader cannot be used (None: it can)."""
    stack = _missing("torchvision") or _missing("qwen_vl_utils")
    versions = {}
    for name in ("qwen-vl-utils", "torchvision", "transformers", "decord2", "torchcodec", "torch", "av"):
        try:
            versions[name] = version_of(name)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "decord": _missing("decord"),
            "readers": {name: stack or _missing(module) for name, (module, _) in READERS.items()}}


def _missing(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} cannot be imported: {str(error).strip().splitlines()[0]}"
    return None


@cache
def _stack() -> tuple[Any, Any]:
    """qwen-vl-utils, and the video processor with the constants of Qwen2.5-VL."""
    from qwen_vl_utils import vision_process
    from transformers import Qwen2VLVideoProcessor

    return vision_process, Qwen2VLVideoProcessor(patch_size=14, merge_size=2, temporal_patch_size=2)


def _use(reader: str) -> None:
    vision_process, _ = _stack()
    vision_process.FORCE_QWENVL_VIDEO_READER = reader
    vision_process.get_video_reader_backend.cache_clear()


def pixel_values(path: str, frames: int, pixels: list[int]) -> tuple[torch.Tensor, list[int], list[int]]:
    """As training scripts call it: (pixel values [N, 1176], grid [3], indices of the frames)."""
    vision_process, processor = _stack()
    message = {"role": "user", "content": [
        {"type": "video", "video": path, "nframes": frames, "min_pixels": pixels[0], "max_pixels": pixels[1]}]}
    _, videos, options = vision_process.process_vision_info([message], return_video_kwargs=True,
                                                            return_video_metadata=True)
    (video, about), = videos
    inputs = processor(videos=[video], do_resize=False, return_tensors="pt", **options)
    indices = [int(index) for index in about["frames_indices"]]
    return inputs["pixel_values_videos"], inputs["video_grid_thw"][0].tolist(), indices


def end_to_end(reader: str, path: str, frames: int, pixels: list[int], save: str = "") -> Answer:
    """File to pixel values."""
    _use(reader)
    (values, grid, indices), spent = measured(lambda: pixel_values(path, frames, pixels))
    if save:
        torch.save(values, save)
    return spent | {"grid": grid, "indices": indices}


def preprocess(path: str, frames: int, pixels: list[int]) -> Answer:
    """Decoded frames to pixel values: the whole of qwen-vl-utils and the processor, with a reader that has the frames
    ready."""
    vision_process, _ = _stack()
    if path not in _ready:
        _ready.clear()
        _ready[path] = vision_process.VIDEO_READER_BACKENDS["torchcodec"]({"video": path, "nframes": frames})
    vision_process.VIDEO_READER_BACKENDS["ready"] = lambda about: _ready[about["video"]]
    _use("ready")
    (_, grid, _), spent = measured(lambda: pixel_values(path, frames, pixels))
    return spent | {"grid": grid}


def step(reader: str, paths: list[str], group: int, frames: int, pixels: list[int]) -> Answer:
    """Every video once per completion, as trainers do whose rollouts carry messages and not pixels."""
    _use(reader)

    def run() -> None:
        for path in paths:
            for _ in range(group):
                pixel_values(path, frames, pixels)

    return measured(run)[1]


def shown(path: str, indices: list[int], bits: int, rotation: int) -> Answer:
    """Bar codes of the frames that decord gives for these indices."""
    import decord

    from bench.video import clips

    try:
        frames = decord.VideoReader(path).get_batch(indices).asnumpy()
    except decord.DECORDError as error:
        raise RuntimeError(str(error)) from error
    clip = clips.Clip(Path(path), (), None, "", bits, rotation)
    return {"codes": clip.read(torch.from_numpy(frames).permute(0, 3, 1, 2))}


def alone() -> Answer:
    """Whether this process has stayed free of veripo."""
    return {"alone": not any(name.startswith("veripo") for name in sys.modules)}


if __name__ == "__main__":
    serve({task.__name__: task for task in (readers, end_to_end, preprocess, step, shown, alone)},
          (RuntimeError, ValueError, OSError, IndexError, AttributeError, ImportError))
