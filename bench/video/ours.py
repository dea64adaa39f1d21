"""Our side of the video bench, served by worker.py: decoding, patches, the prompt loader, the demo's training."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
from av.packet import Packet
from veripo_kernels import resize_frames

from bench.video.worker import Answer, measured, serve
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.inputs import CacheConfig, ModelConfig, VideoConfig
from veripo_fast.config.schema import StageConfig
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import demo_config
from veripo_fast.demo.tiny_model import init_model
from veripo_fast.errors import MediaError
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.run.folder import RunDir
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train
from veripo_fast.types import MediaInputs, Message, Prompt, Video
from veripo_fast.video.buffers import room
from veripo_fast.video.contract import frame_indices, resized_size
from veripo_fast.video.decode import decode
from veripo_fast.video.ffmpeg import torchcodec_decoder
from veripo_fast.video.packets import decoded_frames, open_video, read_packets
from veripo_fast.video.timeline import timeline_of

_ready: dict[str, torch.Tensor] = {}
_models = TemporaryDirectory(prefix="veripo-bench-model-")


def contract_of(frames: int, pixels: list[int], decoder: str = "auto") -> VideoConfig:
    return VideoConfig(fps=None, num_frames=frames, min_pixels=pixels[0], max_pixels=pixels[1], workers=1,
                       decoder=decoder, timeout_seconds=600)


@cache
def checkpoint() -> Path:
    """A tiny Qwen2.5-VL with the real patch geometry."""
    folder = Path(_models.name) / "model"
    init_model(folder, "qwen2_5_vl", 0)
    return folder


@cache
def encoder() -> PromptEncoder:
    return PromptEncoder(checkpoint())


def prompt_of(path: str) -> Prompt:
    return Prompt(path, (Message("user", (Video(path), "What happens?")),), "choice", "A")


def end_to_end(path: str, frames: int, pixels: list[int], decoder: str = "auto", save: str = "") -> Answer:
    """File to pixel values, as training encodes a prompt."""
    contract = contract_of(frames, pixels, decoder)
    media, spent = measured(lambda: encoder().load_media(prompt_of(path), contract))
    answer: Answer = spent | {"grid": media.grid_thw[0].tolist()}
    if save:
        torch.save(media.pixel_values, save)
        decoded = decode(Video(path), contract, encoder().vision.factor)
        answer |= {"indices": list(decoded.indices), "decoder": decoded.decoder}
    return answer


def decode_alone(path: str, frames: int, pixels: list[int]) -> Answer:
    """FFmpeg's share of `end_to_end`: the packets that it needs, already read, to pictures that nobody looks at."""
    deadline = time.monotonic() + 600
    with open_video(path) as (container, stream):
        kept: list[Packet] = []
        timeline = timeline_of(path, container, stream, read_packets(path, container, stream, deadline, kept))
        wanted = frame_indices(timeline.seconds, contract_of(frames, pixels))
        assert kept, f"{path} is too large to keep its packets"
        pictures = decoded_frames(path, container, stream, deadline, timeline.runs(wanted), timeline.left_out(wanted),
                                  kept)
        count, spent = measured(lambda: sum(1 for _ in pictures))
    assert count >= len(wanted), (count, len(wanted))
    return spent | {"decoded": count, "held": len(timeline.seconds)}


def preprocess(path: str, frames: int, pixels: list[int], indices: list[int]) -> Answer:
    """Decoded frames, as FFmpeg leaves them in memory, to pixel values, by the two calls that training makes."""
    if path not in _ready:
        _ready.clear()
        _ready[path] = torchcodec_decoder()(path, num_ffmpeg_threads=1).get_frames_at(indices).data
    size = resized_size(*_ready[path].shape[2:], encoder().vision.factor, *pixels)
    seconds = torch.zeros(frames, dtype=torch.float64)

    def run() -> MediaInputs:
        resized = resize_frames(_ready[path], *size, out=room((frames, 3, *size), torch.uint8))
        return encoder().media_inputs([("video", resized, seconds)], "")

    media, spent = measured(run)
    return spent | {"grid": media.grid_thw[0].tolist()}


class TimedTower:
    """Stands in for a policy's tower call and adds up what it costs."""

    def __init__(self, policy: Policy) -> None:
        self.run = policy.vision_features_of
        self.spent = {"wall_seconds": 0.0, "cpu_seconds": 0.0}

    def __call__(self, media: list[MediaInputs]) -> Any:
        result, spent = measured(lambda: self.run(media))
        self.spent = {name: value + spent[name] for name, value in self.spent.items()}
        return result


def step(paths: list[str], frames: int, pixels: list[int], frozen: bool) -> Answer:
    """Video work of the same prompts in a first epoch (with writing the cache), in a second one by a fresh loader on
    the same cache folder, and in a third one from that loader's host memory.

    Per epoch the CPU and wall seconds without the tower's, the tower's apart, and the counts of VideoWork.
    """
    folder = Path(mkdtemp(prefix="veripo-bench-cache-"))
    policy = load_policy(ModelConfig(path=str(checkpoint()), freeze_vision=frozen))
    policy.vision_features_of = tower = TimedTower(policy)
    prompts, answer = [prompt_of(path) for path in paths], {}

    def fail(prompt: Prompt, reason: str) -> None:
        raise RuntimeError(f"{prompt.prompt_id}: {reason}")

    def loader() -> PromptLoader:
        return PromptLoader(policy, contract_of(frames, pixels), 10**6, fail, CacheConfig(folder=str(folder)))

    def epoch(name: str, close: bool) -> None:
        counts, tower.spent = current.work, dict.fromkeys(tower.spent, 0.0)

        def load() -> None:
            current.load(prompts)
            if close:
                current.close()

        _, spent = measured(load)
        work = current.work - counts
        answer[name] = {key: spent[key] - tower.spent[key] for key in spent} | {
            f"tower_{key}": value for key, value in tower.spent.items()} | {
            "video_decodes": work.video_decodes, "cache_hits": work.cache_hits, "tower_runs": work.tower_runs}

    try:
        current = loader()
        epoch("first", close=True)
        current = loader()
        epoch("disk", close=False)
        epoch("memory", close=True)
        answer["cache_bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    finally:
        shutil.rmtree(folder)
    return answer


def shown(path: str, count: int, decoder: str, bits: int, rotation: int) -> Answer:
    """Positions that the contract takes and the bar codes of the frames that come back."""
    from bench.video import clips

    try:
        frames = decode(Video(path), contract_of(count, [784, 10**6], decoder), 28)
    except MediaError as error:
        raise RuntimeError(str(error).replace(path, Path(path).name)) from error
    return {"indices": list(frames.indices), "decoder": frames.decoder,
            "codes": clips.Clip(Path(path), (), None, "", bits, rotation).read(frames.pixels)}


def training(folder: str, prompts: int, prompts_per_step: int, steps: int, prefetch: bool) -> Answer:
    """Seconds of each step of the demo's first GRPO stage, and of them those in which it stood still for video."""
    out = Path(folder)
    corpus = out / "corpus"
    if not corpus.is_dir():
        write_corpus(corpus, prompts, 6, 0)
    config = demo_config(out, 0, quick=False)
    config = replace(config, run_dir=mkdtemp(dir=out), stages=(StageConfig("grpo"),),
                     grpo=replace(config.grpo, steps=steps, prompts_per_step=prompts_per_step),
                     eval=replace(config.eval, at="never"),
                     cache=config.cache if prefetch else replace(config.cache, prefetch_prompts=0))
    train(config)
    records = [record for record in read_records(RunDir(config.run_dir).metrics) if record["kind"] == "grpo"]
    waits = [record["seconds"]["decode"] for record in records]
    totals = [sum(record["seconds"].values()) for record in records]
    later = sum(waits[1:]) / sum(totals[1:])
    return {"wait_share": later, "wait_seconds": waits, "step_seconds": totals,
            "median_step_seconds": statistics.median(totals[1:]),
            "video_decodes": [record["video_decodes"] for record in records]}


if __name__ == "__main__":
    serve({task.__name__: task for task in (end_to_end, decode_alone, preprocess, step, shown, training)},
          (RuntimeError, MediaError))
