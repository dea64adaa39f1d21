"""What a corpus of videos holds, what training would skip, and what a contract costs on it, medium by medium.

Every medium is probed (video/probe.py) and decoded at its first, middle and last wanted frame. One whose packets look
damaged is decoded at every wanted frame. command.py runs this over all media; page.py shows the result.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.archives import locate
from veripo_fast.data.remote import local_medium
from veripo_fast.data.skipped import Skipped
from veripo_fast.data.sources import check_some, evenly, find_sources, read_listed_prompts
from veripo_fast.errors import MediaError
from veripo_fast.report.frames import data_uri, spread
from veripo_fast.types import Image, Media, Video
from veripo_fast.video.contract import TEMPORAL_PATCH, contract_of, resized_size
from veripo_fast.video.deadline import run_with_deadline
from veripo_fast.video.decode import decode, decode_image, wanted_frames
from veripo_fast.video.decoders import first_decoder
from veripo_fast.video.pictures import pictures_of
from veripo_fast.video.probe import Probe, probe_video

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SAMPLES = 3
"""Frames decoded of a video that looks whole: the first and last wanted one, and one half way."""
MAX_SHOWN = 60
"""Media with thumbnails on the page, evenly spread over the corpus."""
JPEG_QUALITY = 95
"""Of the proxy that `proxy_jpeg_bytes` estimates."""


@dataclass(frozen=True)
class Target:
    """A medium to inspect."""

    media: Media
    prompts: int
    """Records that name it; 0 for a file found in a folder."""
    missing: str = ""
    """Why its file is not there."""


@dataclass(frozen=True)
class Corpus:
    """What DATA names."""

    targets: list[Target]
    total: int
    """Distinct media before `--limit`."""
    records: list[Skipped]
    """Records that cannot be used for another reason than their medium."""
    other_files: int
    """Files of the folders that are no videos by name."""


@dataclass(frozen=True)
class PolicySizes:
    """What decides the number of tokens, and the bytes of the tower's output per token."""

    patch_size: int
    merge_size: int
    bytes_per_token: int

    @property
    def factor(self) -> int:
        """Frame sides are multiples of this, in pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Identity:
    """The first columns of a row."""

    path: str
    kind: str
    """`video` or `image`; `missing` where the file is not there."""
    start_seconds: float | None
    """Part of the video that the records name, from its first frame; None: from its start."""
    end_seconds: float | None
    prompts: int
    bytes: int | None
    status: str
    """`ok` or `skipped`: what training would do with it."""
    reason: str
    """Why it is skipped, in one sentence; empty when it is not."""


@dataclass(frozen=True)
class Plan:
    """What the contract takes from a medium, and what that costs. Known without decoding."""

    taken_frames: int
    resized_width: int
    resized_height: int
    tokens: int
    """Merged patches: pad tokens that the medium puts into a prompt."""
    decode_frames: int
    """Frames that a decoder reads for the frames taken."""
    proxy_bytes: int
    """The frames taken, resized, as uint8."""
    tower_bytes: int
    """The vision tower's output in the type of model.dtype."""


@dataclass(frozen=True)
class Sampled:
    """What decoding for real showed."""

    decoder: str
    """As video.decoder names it, `pyav-sequential`, or `pillow` for an image."""
    sampled_frames: int
    sampled_decode_frames: int
    """Frames that were decoded for them."""
    sampled_seconds: float
    """Wall time, opening and resizing included."""
    proxy_jpeg_bytes: int
    """The frames taken, resized, as JPEG of quality 95: an estimate from the first, middle and last."""


@dataclass(frozen=True)
class Finding:
    """One medium's row (columns that are not known are absent) and thumbnails as data URIs."""

    row: dict[str, Any]
    thumbnails: tuple[str, ...] = ()


def skipped_media(table: pa.Table) -> list[Skipped]:
    """The rows that training would skip, as skipped.jsonl names them."""
    columns = (table[name].to_pylist() for name in ("path", "status", "reason"))
    return [Skipped(path, path, reason) for path, status, reason in zip(*columns, strict=True) if status == "skipped"]


def find_media(data: Sequence[Path], config: Config, limit: int | None) -> Corpus:
    """Distinct media of data files and folders, in order.

    Raises:
        DataError: a path does not exist, a data file cannot be read, or there is no medium.
    """
    sources = find_sources(data)
    files = sources.files
    prompts, skipped = read_listed_prompts(sources, config.data)
    uses: Counter[Media] = Counter(medium for prompt in prompts for medium in prompt.media)
    missing = Counter((item.path, item.reason) for item in skipped if item.path not in files)
    targets = [Target(medium, count) for medium, count in uses.items()]
    targets += [Target(medium, 0) for medium in sources.media if medium not in uses]
    targets += [Target(Video(path), count, reason) for (path, reason), count in missing.items()]
    check_some(targets, data)
    records = [item for item in skipped if item.path in files] + sources.broken
    return Corpus(evenly(targets, limit), len(targets), records, sources.other_files)


def policy_sizes(config: Config) -> PolicySizes:
    """From the checkpoint of `model.path`, as training would load it. Raises CheckpointError."""
    from veripo_fast.model.checkpoint_files import resolve_path
    from veripo_fast.model.encoding import PromptEncoder

    encoder = PromptEncoder(resolve_path(config.model.path))
    return PolicySizes(encoder.vision.patch_size, encoder.vision.merge_size,
                       encoder.tower_bytes_per_token(config.model.dtype))


# One medium

def inspect_medium(target: Target, config: Config, sizes: PolicySizes, *, thumbnails: bool = False) -> Finding:
    """Probe and sample one medium; never raises MediaError: what is wrong is the row's reason."""
    medium = target.media
    known: dict[str, Any] = {}
    pictures: list[Picture] = []
    reason = target.missing
    if not reason:
        try:
            steps = (_inspect_video(medium, config, sizes) if isinstance(medium, Video)
                     else _inspect_image(medium, config, sizes))
            for facts, shown in steps:
                known |= asdict(facts)
                pictures = shown
            reason = _too_long(known["tokens"], config)
        except MediaError as error:
            reason = str(error)
    part = (medium.start_seconds, medium.end_seconds) if isinstance(medium, Video) else (None, None)
    kind = "missing" if target.missing else type(medium).__name__.lower()
    identity = Identity(medium.path, kind, *part, target.prompts, _bytes(medium.path),
                        "skipped" if reason else "ok", reason)
    return Finding(asdict(identity) | known, tuple(data_uri(picture) for picture in pictures if thumbnails))


Step = tuple[Any, "list[Picture]"]
"""Facts (a dataclass whose fields are columns) and the pictures known so far; a row keeps what came before an error."""


def _inspect_video(video: Video, config: Config, sizes: PolicySizes) -> Iterator[Step]:
    contract = contract_of(video, config.video)
    config, video = replace(config, video=contract), replace(local_medium(video), sampling=None)
    if pictures_of(video):
        yield from _inspect_pictures(video, contract, sizes)
        return
    probe = run_with_deadline(lambda deadline: probe_video(video.path, deadline), video.path, contract.timeout_seconds)
    yield probe.facts, []
    wanted = wanted_frames(video, probe.timeline, config.video)
    plan = _plan(probe, wanted, config, sizes)
    yield plan, []
    if probe.facts.damaged_packets == 0 and len(wanted) > SAMPLES:
        contract = replace(contract, fps=None, num_frames=SAMPLES)
    started = time.perf_counter()
    frames = decode(video, contract, sizes.factor)
    seconds = time.perf_counter() - started
    pictures = [_picture(pixels) for pixels in spread(list(frames.pixels), SAMPLES)]
    yield replace(plan, decode_frames=probe.frames_to_decode(wanted, frames.decoder)), pictures
    positions = [position for position in frames.indices if position < probe.facts.frames]
    yield Sampled(frames.decoder, len(frames.indices), probe.frames_to_decode(positions, frames.decoder), seconds,
                  _jpeg_bytes(pictures) * len(wanted) // len(pictures)), pictures


def _inspect_pictures(video: Video, contract: VideoConfig, sizes: PolicySizes) -> Iterator[Step]:
    """A list or folder of frames: all that are wanted are read, as each is a file."""
    started = time.perf_counter()
    frames = decode(video, contract, sizes.factor)
    seconds = time.perf_counter() - started
    count, _, height, width = frames.pixels.shape
    pictures = [_picture(pixels) for pixels in spread(list(frames.pixels), SAMPLES)]
    tokens = -(-count // TEMPORAL_PATCH) * (height // sizes.factor) * (width // sizes.factor)
    yield Plan(count, width, height, tokens, count, frames.pixels.nbytes, tokens * sizes.bytes_per_token), pictures
    yield Sampled("pillow", count, count, seconds, _jpeg_bytes(pictures) * count // len(pictures)), pictures


def _inspect_image(image: Image, config: Config, sizes: PolicySizes) -> Iterator[Step]:
    started = time.perf_counter()
    pixels = decode_image(image, config.video, sizes.factor)[:1]
    seconds = time.perf_counter() - started
    height, width = pixels.shape[2:]
    pictures = [_picture(pixels[0])]
    tokens = height * width // sizes.factor**2
    yield Plan(1, width, height, tokens, 1, pixels.nbytes, tokens * sizes.bytes_per_token), pictures
    yield Sampled("pillow", 1, 1, seconds, _jpeg_bytes(pictures)), pictures


def _plan(probe: Probe, wanted: Sequence[int], config: Config, sizes: PolicySizes) -> Plan:
    height, width = probe.facts.height, probe.facts.width
    if round(probe.facts.rotation / 90) % 2:
        height, width = width, height
    try:
        height, width = resized_size(height, width, sizes.factor, config.video.min_pixels, config.video.max_pixels)
    except ValueError as error:
        raise MediaError(f"the video cannot be resized: {error}") from error
    decoder = first_decoder(probe.timeline, config.video.decoder)
    pairs = -(-len(wanted) // TEMPORAL_PATCH)
    tokens = pairs * (height // sizes.factor) * (width // sizes.factor)
    return Plan(len(wanted), width, height, tokens, probe.frames_to_decode(wanted, decoder),
                len(wanted) * 3 * height * width, tokens * sizes.bytes_per_token)


def _too_long(tokens: int, config: Config) -> str:
    limit = config.data.max_prompt_tokens
    return "" if tokens <= limit else f"its {tokens} tokens alone are more than data.max_prompt_tokens {limit}"


def _picture(pixels: Any) -> Picture:
    """The picture of uint8 [3, H, W]."""
    import PIL.Image

    return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _jpeg_bytes(pictures: Sequence[Picture]) -> int:
    total = 0
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        total += buffer.tell()
    return total


def _bytes(path: str) -> int | None:
    try:
        member = locate(path)
        return member.size if member else Path(path).stat().st_size
    except (MediaError, OSError):
        return None
