"""video file -> frames: uint8 RGB, already resized to what the policy sees, with their true times.

The packets (timeline.py) and the contract (contract.py) decide which frames are wanted; then decoders.py says who
decodes them. All decoders answer the same question. Where one refuses, the next one takes over; that is counted, and
said once per reason.
"""

from __future__ import annotations

import io
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from av.packet import Packet
from PIL import Image as PilImage
from PIL import ImageOps
from veripo_kernels import resize_frames

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.data.archives import locate
from veripo_fast.data.remote import local_medium
from veripo_fast.errors import ConfigError, MediaError
from veripo_fast.types import Frames, Image, Video
from veripo_fast.video import dali
from veripo_fast.video.buffers import room
from veripo_fast.video.contract import TEMPORAL_PATCH, contract_of, frame_indices, resized_size, window
from veripo_fast.video.deadline import run_with_deadline
from veripo_fast.video.decoders import GPU_DECODERS, PICKED, readers, refuses
from veripo_fast.video.ffmpeg import torchcodec_decoder
from veripo_fast.video.packets import KeptPackets, check_file, open_video, read_packets
from veripo_fast.video.pictures import decode_pictures, pictures_of
from veripo_fast.video.pool import MediaPool
from veripo_fast.video.readers import LostFrameError, RefusedError, check_frames, read_pyav, read_torchcodec
from veripo_fast.video.timeline import Timeline, check_complete, scan_decoded, timeline_of

__all__ = ["MediaPool", "check_decoder", "decode", "decode_image", "fallbacks"]

_LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()
_FALLBACKS: Counter[str] = Counter()
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
"""Formats whose further frames are shown in time; those of TIFF and of a phone's MPO are pages and previews."""
_DIGITS = re.compile(r"\d+(\.\d+)?")


def decode(video: Video, contract: VideoConfig, factor: int, device: str = "cuda") -> Frames:
    """Decode the frames that the contract takes from a video; what the record asks for it (`sampling`) goes first.

    Args:
        video: the file; `start_seconds` and `end_seconds` count from its first frame.
        factor: frame sides are multiples of it, in pixels (patch size * merge size).
        device: GPU that decodes where `contract.decoder` is `nvdec` or `dali`.

    Returns:
        Frames with pixels uint8 [T, 3, H, W] in RGB, upright, in host memory.

    Raises:
        MediaError: the file is missing, damaged, no video, or took longer than `contract.timeout_seconds`.
    """
    contract, video = contract_of(video, contract), local_medium(video)
    if pictures := pictures_of(video):
        return run_with_deadline(
            lambda deadline: decode_pictures(video, pictures, contract, factor, _load_image, deadline),
            video.path, contract.timeout_seconds)
    if video.frame_fps is not None:
        raise MediaError(f"{video.path} is a video file, and its record gives sample_fps, which frames have: "
                         "write fps to sample it")
    decoder_class = torchcodec_decoder()  # before the clock starts: first imports take seconds
    if contract.decoder == "dali":
        dali.missing(torch.device(device))
    return run_with_deadline(lambda deadline: _decode(video, contract, factor, decoder_class, device, deadline),
                             video.path, contract.timeout_seconds)


def check_decoder(contract: VideoConfig, device: torch.device) -> None:
    """ConfigError when `contract.decoder` cannot be used on this machine at all: each would have other pixels."""
    if contract.decoder not in GPU_DECODERS:
        return
    if device.type != "cuda":
        raise ConfigError(f"video.decoder {contract.decoder} needs a GPU, and the policy is on {device.type}")
    reason = dali.missing(device) if contract.decoder == "dali" else None
    if reason is not None:
        raise ConfigError(f"video.decoder {contract.decoder} cannot be used: {reason}")


def fallbacks() -> dict[str, int]:
    """How often this process decoded by another decoder than the chosen one, by reason (numbers in it as `#`)."""
    with _LOCK:
        return dict(_FALLBACKS)


def decode_image(image: Image, contract: VideoConfig, factor: int) -> torch.Tensor:
    """Decode an image (any format Pillow reads) as uint8 [2, 3, H, W]: the same picture fills the temporal patch.

    EXIF orientation is applied, transparency is laid over white, and min_pixels and max_pixels bound its area.

    Raises:
        MediaError: the file is missing, damaged, no image, or took longer than `contract.timeout_seconds`.
    """
    contract, image = contract_of(image, contract), local_medium(image)
    pixels = run_with_deadline(lambda deadline: _load_image(image.path), image.path, contract.timeout_seconds)
    resized = resize_frames(pixels, *_size(pixels, image.path, contract, factor))
    return resized.expand(TEMPORAL_PATCH, -1, -1, -1).contiguous()


def wanted_frames(video: Video, timeline: Timeline, contract: VideoConfig) -> list[int]:
    """Positions in the timeline of the frames that the contract takes of (the part of) a video.

    Raises:
        MediaError: the part holds no frame.
    """
    contract = contract_of(video, contract)
    part = window(timeline.seconds, video.start_seconds, video.end_seconds)
    if not part:
        raise MediaError(f"{video.path} has no frame from {video.start_seconds or 0:g} s to "
                         f"{'its end' if video.end_seconds is None else f'{video.end_seconds:g} s'}: "
                         f"it is {timeline.length:.2f} s long")
    return [part.start + index for index in frame_indices(timeline.seconds[part.start:part.stop], contract)]


def _decode(video: Video, contract: VideoConfig, factor: int, decoder_class: Any, device: str,
            deadline: float) -> Frames:
    packets: list[Packet] = []
    try:
        with open_video(video.path) as (container, stream):
            facts = read_packets(video.path, container, stream, deadline, packets)
            timeline = timeline_of(video.path, container, stream, facts)
            check_complete(video.path, timeline, video.end_seconds)
            reason = "its packets carry no time stamps"
            for name in readers(timeline, contract.decoder):
                if name == "torchcodec" and decoder_class is None:
                    continue
                if name != "pyav":
                    packets.clear()  # it reads the file itself
                wanted = wanted_frames(video, timeline, contract)
                try:
                    chunks = _read(name, decoder_class, video.path, timeline, wanted, device, deadline,
                                   KeptPackets(container, stream, packets) if packets else None)
                    return _collect(chunks, video, timeline, wanted, contract, factor, name)
                except RefusedError as refusal:
                    reason = str(refusal)
                    _count_fallback(name, video.path, reason)
                    if isinstance(refusal, LostFrameError):  # another decoder would show what FFmpeg makes up for it
                        break
    finally:
        packets.clear()  # an error's traceback holds this frame for longer
    return _decode_as_it_comes(video, contract, factor, timeline, reason, deadline)


def _read(name: str, decoder_class: Any, path: str, timeline: Timeline, wanted: Sequence[int], device: str,
          deadline: float, kept: KeptPackets | None) -> Iterator[torch.Tensor]:
    reason = refuses(name, timeline)
    if reason is not None:
        raise RefusedError(reason)
    if name == "pyav":
        return read_pyav(path, timeline, wanted, deadline, kept=kept)
    if name == "dali":
        return dali.read_dali(path, timeline, wanted, deadline, torch.device(device))
    if decoder_class is None:
        raise RefusedError("torchcodec cannot be loaded")
    if name == "nvdec" and not device.startswith("cuda"):
        raise RefusedError("NVDEC needs a GPU")
    if name == "torchcodec" and timeline.stream.codec in PICKED:
        check_frames(path, timeline, wanted, deadline)
    return read_torchcodec(decoder_class, path, timeline, wanted, deadline, device if name == "nvdec" else "cpu")


def _decode_as_it_comes(video: Video, contract: VideoConfig, factor: int, promised: Timeline, reason: str,
                        deadline: float) -> Frames:
    """Take the frames that the decoder returns as the truth: MPEG-TS that starts mid-group, AVI without times."""
    timeline = scan_decoded(video.path, deadline)
    expected = {key for key in promised.keys if key >= timeline.keys[0]}
    if promised.has_stamps and timeline.has_stamps and not expected <= set(timeline.keys):
        raise MediaError(f"{video.path} is damaged: {reason}")
    wanted = wanted_frames(video, timeline, contract)
    try:
        chunks = read_pyav(video.path, timeline, wanted, deadline, sequential=True)
        return _collect(chunks, video, timeline, wanted, contract, factor, "pyav-sequential")
    except RefusedError as refusal:
        raise MediaError(f"{video.path} is damaged: {refusal}") from refusal


def _collect(chunks: Iterator[torch.Tensor], video: Video, timeline: Timeline, wanted: Sequence[int],
             contract: VideoConfig, factor: int, decoder: str) -> Frames:
    pixels: torch.Tensor | None = None
    done = 0
    for chunk in chunks:
        size = _size(chunk, video.path, contract, factor)
        if pixels is None:
            pixels = room((len(wanted), 3, *size), torch.uint8)
        if size != tuple(pixels.shape[2:]):
            raise MediaError(f"{video.path} changes its frame size on the way")
        place = pixels[done:done + len(chunk)]
        if chunk.device.type == "cpu":
            resize_frames(chunk, *size, out=place)
        else:
            place.copy_(resize_frames(chunk, *size))
        done += len(chunk)
    assert pixels is not None and done == len(wanted)
    start = window(timeline.seconds, video.start_seconds, video.end_seconds).start
    times = [timeline.seconds[position] - timeline.seconds[start] for position in wanted]
    return Frames(pixels, torch.tensor(times, dtype=torch.float64), tuple(wanted), decoder)


def _size(pixels: torch.Tensor, path: str, contract: VideoConfig, factor: int) -> tuple[int, int]:
    """Height and width that the contract takes for uint8 [T, 3, H, W]."""
    try:
        return resized_size(pixels.shape[2], pixels.shape[3], factor, contract.min_pixels, contract.max_pixels)
    except ValueError as error:
        raise MediaError(f"{path} cannot be resized: {error}") from error


def _load_image(path: str) -> torch.Tensor:
    """uint8 [1, 3, H, W]."""
    check_file(path)
    try:
        member = locate(path)
        with PilImage.open(path if member is None else io.BytesIO(member.read())) as file:
            frames = getattr(file, "n_frames", 1) if file.format in _ANIMATED else 1
            if frames > 1:
                raise MediaError(f"{path} is an animation of {frames} frames, not an image: make it an mp4 and "
                                 "name it as a video, or keep one frame")
            picture = ImageOps.exif_transpose(file)
            if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = PilImage.alpha_composite(PilImage.new("RGBA", picture.size, "white"), picture)
            pixels = np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, PilImage.DecompressionBombError) as error:
        raise MediaError(f"{path} is not an image that Pillow can read ({str(error).rstrip('.')})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _count_fallback(decoder: str, path: str, reason: str) -> None:
    kind = f"{decoder}: {_DIGITS.sub('#', reason)}"
    with _LOCK:
        _FALLBACKS[kind] += 1
        if _FALLBACKS[kind] > 1:
            return
    _LOG.warning("%s refuses %s (%s); the next decoder is tried, as for others like it", decoder, path, reason)
