"""The rows of the video bench, each a function from a Session to result lines.

`ours` and `peer` are processes pinned to one core (worker.py). A round measures every way once, in an order that
turns; ratios are those of one round, of CPU seconds and of wall seconds.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from bench.measure import Ratio, digits, paired
from bench.video import clips
from bench.video.textured import Size, described, textured
from bench.video.worker import Answer, Worker, WorkerError, bundled_ffmpeg
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.video.contract import frame_indices

Row = dict[str, Any]
CLIP_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))
PATCH_SIDES = (3, 2, 14, 14)
"""Channels, frames, height and width in a row of pixel values of Qwen2.5-VL."""
DECODERS = ("auto", "torchcodec", "pyav")
LONG_CLIP = "half-hour.mp4"


@dataclass(frozen=True)
class Scale:
    """How large everything is; `QUICK` only shows that it runs."""

    sizes: tuple[Size, ...] = tuple(Size(height, width, noise=noise, crf=crf)
                                    for noise, crf in ((3.5, 23), (0.0, 23), (0.0, 26))
                                    for height, width in ((720, 1280), (360, 640), (240, 426)))
    frames: int = 64
    pixels: tuple[int, int] = (4 * 28 * 28, 115_000)
    """Least and most pixels of a frame after resizing: 252 x 448 from 16:9, at which both sides agree."""
    group: int = 8
    prompts: int = 4
    clips: tuple[str, ...] = (*clips.PLAIN, *clips.MADE)
    steps: int = 9
    prompts_per_step: int = 24


QUICK = Scale((Size(120, 160, seconds=2),), 8, (784, 8_000), 2, 2, ("h264-closed.mp4", "variable-rate.mp4", "av1.mp4"),
              3, 2)


class Session:
    """The two processes and what is measured with them; a context manager.

    Args:
        folder: for what may go when the session ends.
        kept: for the clips that take long to make.
        torchvision: folder that holds one for the peer, empty where it is installed.
    """

    def __init__(self, scale: Scale, rounds: int, folder: Path, kept: Path, torchvision: str) -> None:
        self.scale, self.rounds, self.folder, self.kept = scale, rounds, folder, kept
        self.core = {max(os.sched_getaffinity(0))}
        self._environment = bundled_ffmpeg(folder / "ffmpeg") | {"BENCH_TORCHVISION": torchvision}
        self._workers: dict[str, Worker] = {}
        about = self.peer.call("readers")
        self.versions: dict[str, str] = about["versions"]
        self.unusable: dict[str, str | None] = about["readers"]
        self.decord_missing: str | None = about["decord"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for worker in self._workers.values():
            worker.close()

    @property
    def ours(self) -> Worker:
        return self._worker("ours.py")

    @property
    def peer(self) -> Worker:
        return self._worker("peer.py", self._environment)

    def _worker(self, script: str, environment: dict[str, str] | None = None) -> Worker:
        """The running one, or another where it crashed."""
        worker = self._workers.get(script)
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            worker = self._workers[script] = Worker(script, self.core, environment)
        return worker

    @property
    def readers(self) -> list[str]:
        """Of qwen-vl-utils, those that work here."""
        return [name for name, reason in self.unusable.items() if reason is None]

    def common(self, row: str) -> Row:
        return {"bench": "video", "row": row, "cores": 1, "frames": self.scale.frames, "peer_versions": self.versions}

    def left_out(self, row: str) -> Iterator[Row]:
        """A line for each reader of the peer that cannot be measured."""
        for name, reason in self.unusable.items():
            if reason is not None:
                yield self.common(row) | {"peer": peer_name(name), "not_measured": reason}


def peer_name(reader: str) -> str:
    return f"qwen-vl-utils ({reader}) + HF processor"


def interleaved(ways: dict[str, Callable[[], Answer]], rounds: int) -> dict[str, list[Answer]]:
    """What each way spent in each round, after one that is not counted."""
    return paired(ways, rounds, lambda run: run(), warmups=1)


def ratios(ours: list[Answer], theirs: list[Answer]) -> Row:
    """Seconds of both, and how many times more the peer spent, round by round."""
    row: Row = {}
    for kind in ("cpu", "wall"):
        times = {side: [spent[f"{kind}_seconds"] for spent in answers]
                 for side, answers in (("ours", ours), ("peer", theirs))}
        row |= {f"{side}_{kind}_seconds": [digits(value) for value in values] for side, values in times.items()}
        row |= Ratio.of(times["peer"], times["ours"]).fields(f"{kind}_speedup")
    return row


# -- file to pixel values -------------------------------------------------------------------------------------------

def end_to_end(session: Session) -> Iterator[Row]:
    """64 frames of a file to pixel values, and the same from decoded frames."""
    scale = session.scale
    yield from session.left_out("end_to_end")
    for size in scale.sizes if session.readers else ():
        path = str(textured(size, session.kept))
        about = described(Path(path), size)
        arguments = {"path": path, "frames": scale.frames, "pixels": list(scale.pixels)}
        ours = session.ours.call("end_to_end", **arguments, save=str(session.folder / "ours.pt"))
        ways: dict[str, Callable[[], Answer]] = {"ours": partial(session.ours.call, "end_to_end", **arguments)}
        agreement = {}
        for reader in session.readers:
            found = session.peer.call("end_to_end", **arguments, reader=reader, save=str(session.folder / "peer.pt"))
            assert found["grid"] == ours["grid"], f"{peer_name(reader)} resizes to {found['grid']}, not {ours['grid']}"
            agreement[reader] = agreeing(session.folder, ours, found)
            ways[reader] = partial(session.peer.call, "end_to_end", **arguments, reader=reader)
        ways["decode"] = partial(session.ours.call, "decode_alone", **arguments)
        spent = interleaved(ways, session.rounds)
        for reader in session.readers:
            yield session.common("end_to_end") | about | agreement[reader] | {
                "peer": peer_name(reader), "grid": ours["grid"], "decoder": ours["decoder"],
                **ratios(spent["ours"], spent[reader]), **bound(spent["decode"], spent[reader])}
        yield session.common("preprocessing") | about | {"peer": "qwen-vl-utils + HF processor"} | preprocessing(
            session, arguments, ours)


def bound(decoding: list[Answer], theirs: list[Answer]) -> Row:
    """What FFmpeg alone takes of our side, and how many times more the peer would spend if all the rest were free."""
    times = [[spent["cpu_seconds"] for spent in answers] for answers in (decoding, theirs)]
    return {"frames_decoded": decoding[0]["decoded"], "frames_held": decoding[0]["held"],
            "decode_cpu_seconds": [digits(value) for value in times[0]],
            **Ratio.of(times[1], times[0]).fields("cpu_bound")}


def preprocessing(session: Session, arguments: Row, ours: Answer) -> Row:
    """Both from the same frames in memory; the peer takes the frames that it would have read itself."""
    ways = {"ours": partial(session.ours.call, "preprocess", **arguments, indices=ours["indices"]),
            "peer": partial(session.peer.call, "preprocess", **arguments)}
    spent = interleaved(ways, session.rounds)
    grids = {tuple(answer["grid"]) for answers in spent.values() for answer in answers}
    assert grids == {tuple(ours["grid"])}, grids
    return {"grid": ours["grid"]} | ratios(spent["ours"], spent["peer"])


def agreeing(folder: Path, ours: Answer, theirs: Answer) -> Row:
    """Difference of the pixel values of the frames that both took, in levels of 255, and PSNR."""
    rows = [_frames(torch.load(folder / f"{side}.pt"), answer["grid"])
            for side, answer in (("ours", ours), ("peer", theirs))]
    pairs = [(position, theirs["indices"].index(index)) for position, index in enumerate(ours["indices"])
             if index in theirs["indices"]]
    own, other = (row[[pair[side] for pair in pairs]] for side, row in enumerate(rows))
    levels = (own - other) * 255 * CLIP_STD.view(1, 1, 3, 1, 1)
    square = float(levels.double().square().mean())
    return {"frames_compared": len(pairs), "mae_levels": digits(float(levels.abs().mean())),
            "max_levels": digits(float(levels.abs().max())),
            "psnr_db": round(10 * float(torch.log10(torch.tensor(255**2 / square))), 1) if square else None}


def _frames(values: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """[N, 3 * 2 * 14 * 14] -> [frames, patches, 3, 14, 14]."""
    return values.view(grid[0], -1, *PATCH_SIDES).transpose(1, 3).transpose(2, 3).flatten(0, 1)


# -- one GRPO step --------------------------------------------------------------------------------------------------

def grpo_step(session: Session) -> Iterator[Row]:
    """Video work of a step: ours once per prompt, the peer's once per completion; and ours in later epochs."""
    scale, size = session.scale, session.scale.sizes[0]
    yield from session.left_out("grpo_step")
    original = textured(size, session.kept)
    copies = [session.folder / f"prompt-{number}.mp4" for number in range(scale.prompts)]
    for copy in copies:
        shutil.copyfile(original, copy)
    arguments = {"paths": [str(copy) for copy in copies], "frames": scale.frames, "pixels": list(scale.pixels)}
    ways: dict[str, Callable[[], Answer]] = {
        "frozen": partial(session.ours.call, "step", **arguments, frozen=True),
        "trained": partial(session.ours.call, "step", **arguments, frozen=False)}
    if session.readers:
        ways["peer"] = partial(session.peer.call, "step", **arguments, group=scale.group, reader=session.readers[0])
    spent = paired(ways, session.rounds, lambda run: run())  # the processes are warm, and a step is its own average
    for copy in copies:
        copy.unlink()
    common = session.common("grpo_step") | described(original, size) | {"group": scale.group, "prompts": scale.prompts}
    for tower in ("frozen", "trained"):
        first = [answer["first"] for answer in spent[tower]]
        if session.readers:
            yield common | {"epoch": "first", "tower": tower, "peer": peer_name(session.readers[0])} | _counts(
                spent[tower], "first") | ratios(first, spent["peer"])
        for epoch in ("disk", "memory") if tower == "frozen" else ("disk",):  # no output of a tower that trains is kept
            later = [answer[epoch] for answer in spent[tower]]
            yield common | {"epoch": epoch, "tower": tower, "peer": "ours, first epoch"} | _counts(
                spent[tower], epoch) | ratios(later, first)


def _counts(answers: list[Answer], epoch: str) -> Row:
    """Of the last round: decodes and hits, which must not change; the tower's own median."""
    counts = {name: answers[-1][epoch][name] for name in ("video_decodes", "cache_hits", "tower_runs")}
    tower = statistics.median(answer[epoch]["tower_cpu_seconds"] for answer in answers)
    return counts | {"tower_cpu_seconds": digits(tower), "cache_bytes": answers[-1]["cache_bytes"]}


# -- right frames ---------------------------------------------------------------------------------------------------

def wrong_frames(session: Session) -> Iterator[Row]:
    """The clip set and its damaged copies by every decoder: a line per decoder, with each clip."""
    folder = session.folder / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    made = clips.make_clip_set(folder, session.scale.clips)
    bad = clips.damaged(folder, made)
    ways: dict[str, Callable[[clips.Clip, int], Answer]] = {
        f"veripo ({decoder})": partial(_ours_shown, session, decoder) for decoder in DECODERS}
    if session.decord_missing is None:
        ways["decord2"] = partial(_decord_shown, session)
    else:
        yield session.common("wrong_frames") | {"decoder": "decord2", "not_measured": session.decord_missing}
    for name, shown in ways.items():
        row = session.common("wrong_frames") | {"decoder": name}
        for group, members in (("whole", made), ("damaged", bad)):
            found = {key: judged(clip, shown, 64 if key == LONG_CLIP else 32) for key, clip in members.items()}
            row[group] = {count: sum(clip[count] for clip in found.values())
                          for count in ("asked", "right", "wrong", "refused")} | {"clips": found}
        yield row
    shutil.rmtree(folder)


def judged(clip: clips.Clip, shown: Callable[[clips.Clip, int], Answer], count: int) -> Row:
    """How many of the frames asked for came back right, wrong (another frame, or no picture), or not at all."""
    asked = min(count, len(clip.frames) or count)
    row: Row = {"why": clip.why, "asked": asked, "right": 0, "wrong": 0, "refused": 0}
    try:
        answer = shown(clip, asked)
    except WorkerError as error:
        return row | {"refused": asked, "reason": str(error).replace(f"{clip.path.parent}/", "")}
    truth = [clip.frames[index] if index < len(clip.frames) else None for index in answer["indices"]]
    right = sum(code == index for code, index in zip(answer["codes"], truth, strict=True))
    row |= {"right": right, "wrong": asked - right}
    return row | {"taken_by": answer["decoder"]} if "decoder" in answer else row


def _ours_shown(session: Session, decoder: str, clip: clips.Clip, count: int) -> Answer:
    return session.ours.call("shown", path=str(clip.path), count=count, decoder=decoder, bits=clip.bits,
                             rotation=clip.rotation, timeout_seconds=300)


def _decord_shown(session: Session, clip: clips.Clip, count: int) -> Answer:
    """decord is given the indices that the contract takes of the true times."""
    times = clip.times or [index / 30 for index in range(max(len(clip.frames), count))]
    indices = list(frame_indices(times, VideoConfig(fps=None, num_frames=count)))
    return {"indices": indices} | session.peer.call("shown", path=str(clip.path), indices=indices, bits=clip.bits,
                                                    rotation=clip.rotation, timeout_seconds=120)


# -- waiting --------------------------------------------------------------------------------------------------------

def prefetch_wait(session: Session) -> Iterator[Row]:
    """Share of a training step, after the first, in which it stands still for video: with prefetch and without."""
    scale = session.scale
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    folder = session.folder / "training"
    arguments = {"folder": str(folder), "prompts": scale.steps * scale.prompts_per_step, "steps": scale.steps,
                 "prompts_per_step": scale.prompts_per_step}
    with Worker("ours.py", cores) as worker:
        for prefetch in (True, False):
            found = worker.call("training", **arguments, prefetch=prefetch)
            yield session.common("prefetch_wait") | {
                "cores": len(cores), "frames": 8, "prefetch": prefetch, "prompts_per_step": scale.prompts_per_step,
                "wait_share": digits(found["wait_share"]), "median_step_seconds": digits(found["median_step_seconds"]),
                "wait_seconds": [digits(value) for value in found["wait_seconds"]],
                "step_seconds": [digits(value) for value in found["step_seconds"]],
                "video_decodes": found["video_decodes"]}
    shutil.rmtree(folder)


ROWS: dict[str, Callable[[Session], Iterator[Row]]] = {
    "end_to_end": end_to_end, "grpo_step": grpo_step, "wrong_frames": wrong_frames, "prefetch_wait": prefetch_wait}
