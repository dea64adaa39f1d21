"""One video file -> its facts: what its packets and its first frame say, before the wanted frames are decoded.

The timeline (timeline.py) decides which frames exist; this file adds what a corpus is judged by: key frames, colour
tags, rotation, hidden frames, packets that are not whole, and how many frames must be decoded to reach the wanted ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from av.container import InputContainer
from av.video.stream import VideoStream

from veripo_fast.errors import MediaError
from veripo_fast.video import dali
from veripo_fast.video.decoders import first_decoder, nvdec_refuses, refuses
from veripo_fast.video.orientation import UPRIGHT, Orientation, orientation_of
from veripo_fast.video.packets import PacketFacts, decoded_frames, open_video, read_packets
from veripo_fast.video.timeline import Timeline, timeline_of
from veripo_fast.video.units import length_bytes

UNTAGGED = "untagged"
_PRIMARIES = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020", 12: "display-p3"}
_TRANSFER = {1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 13: "srgb",
             14: "bt2020-10", 15: "bt2020-12", 16: "pq", 18: "hlg"}
_MATRIX = {0: "rgb", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}
_RANGE = {1: "limited", 2: "full"}
"""Names of the code points of ITU-T H.273; another code is shown as its number."""
_HEVC_SKIPPED_LEADING = {8, 9}
"""NAL types (RASL) of pictures that refer to the group before the key frame that they lead."""


@dataclass(frozen=True)
class VideoFacts:
    """What is known of a video file without decoding more than one frame. Times in seconds."""

    container: str
    """FFmpeg's name of the format, the first of its synonyms."""
    codec: str
    profile: str | None
    pixel_format: str | None
    bit_depth: int | None
    width: int
    """As stored, in pixels; a rotation by 90 degrees swaps it with the height when shown."""
    height: int
    rotation: int
    """Degrees that a player turns the picture by, counter-clockwise, in (-180, 180]."""
    mirrored: bool
    """Whether a player exchanges left and right, after it has turned the picture."""
    fps: float
    """Average frame rate of the frames that are there; 0 for a single frame."""
    container_fps: float | None
    """Frame rate that the header names."""
    interval_spread: float
    """(longest - shortest) / median time between frames; 0 for a constant rate."""
    variable: bool
    """Whether the frame rate varies by more than rounding of time stamps explains."""
    seconds: float
    """From the first frame to the end of the last."""
    promised_seconds: float | None
    """Duration that the header names."""
    frames: int
    """Frames that a player would show, counted from whole packets."""
    header_frames: int | None
    """Frames that the header names; None where it names none."""
    hidden_frames: int
    """Frames that an edit list hides: they must be decoded, and are not shown."""
    offset_seconds: float
    """Presentation time of the first frame on the stream's own clock."""
    damaged_packets: int
    """Packets that the container calls corrupt, or (H.264 and HEVC in mp4 and mkv) whose units do not add up."""
    damaged_seconds: float | None
    """Where the first of them lies, from the first frame."""
    keyframes: int
    gop_median: float
    """Frames from one key frame to the next."""
    gop_max: int
    """Also from the last key frame to the end."""
    open_gop: bool | None
    """Whether frames refer across key frames; None for codecs where packets do not tell."""
    color_primaries: str
    color_transfer: str
    color_matrix: str
    color_range: str
    audio: bool
    auto_decoder: str
    """Where `video.decoder: auto` begins. Always on the CPU: GPU decoders notice less damage, and round colours."""
    nvdec_hopper: bool
    """Whether NVDEC of H100 and H200 decodes it."""
    nvdec_refusal: str | None
    """Why `video.decoder: nvdec` leaves it to the CPU all the same; None where NVDEC is given it."""
    dali_refusal: str | None
    """Likewise for `dali` on such a GPU."""


@dataclass(frozen=True)
class Probe:
    """A video's facts and its timeline."""

    facts: VideoFacts
    timeline: Timeline

    def frames_to_decode(self, wanted: Sequence[int], decoder: str) -> int:
        """How many frames a decoder of that name (see decoders.py) reads to return those at positions `wanted`."""
        timeline = self.timeline
        if not timeline.places:
            return max(wanted) + 1
        if decoder == "pyav-sequential":
            return max(timeline.places[position] for position in wanted) + 1
        left_out = timeline.left_out(wanted) if decoder == "pyav" else frozenset()
        return sum(sum(number not in left_out for number in run) for run in timeline.runs(wanted))


def probe_video(path: str, deadline: float) -> Probe:
    """Read a file's packets and its first frame.

    Raises:
        MediaError: unreadable, without video stream, without a single frame, or past `deadline` (monotonic seconds).
    """
    with open_video(path) as (container, stream):
        packets = read_packets(path, container, stream, deadline)
        timeline = timeline_of(path, container, stream, packets)
        with open_video(path) as (again, video):
            first = next(decoded_frames(path, again, video, deadline), None)
            orientation = UPRIGHT if first is None else orientation_of(first)
        if orientation is None:
            raise MediaError(f"{path} is to be shown turned by no quarter, skewed or scaled")
        return Probe(_facts(container, stream, timeline, packets, orientation), timeline)


def _facts(container: InputContainer, stream: VideoStream, timeline: Timeline, packets: list[PacketFacts],
           orientation: Orientation) -> VideoFacts:
    context = stream.codec_context
    spread, variable = _variation(timeline, float(stream.time_base or 0))
    keys = [place for place, packet in enumerate(packets) if packet.key]
    gops = [after - before for before, after in pairwise(keys)] or [len(packets)]
    tells = timeline.has_stamps and (context.name == "h264" or (context.name == "hevc" and length_bytes(context) > 0))
    damaged = [packet for packet in packets if packet.damaged]
    components = context.format.components if context.format else ()
    return VideoFacts(
        container=timeline.stream.container, codec=timeline.stream.codec,
        profile=stream.profile, pixel_format=context.pix_fmt, bit_depth=components[0].bits if components else None,
        width=context.width, height=context.height,
        rotation=orientation.rotation, mirrored=orientation.mirrored,
        fps=timeline.fps, container_fps=float(stream.average_rate) if stream.average_rate else None,
        interval_spread=spread, variable=variable,
        seconds=timeline.length, promised_seconds=timeline.promised_seconds,
        frames=len(timeline.seconds), header_frames=stream.frames or None,
        hidden_frames=timeline.hidden, offset_seconds=timeline.seconds[0],
        damaged_packets=len(damaged), damaged_seconds=_place_seconds(damaged, stream, timeline),
        keyframes=len(keys), gop_median=statistics.median(gops),
        gop_max=max(*gops, len(packets) - max(keys, default=0)),
        open_gop=_leads(packets, context.name) if tells else None,
        color_primaries=_tag(context.color_primaries, _PRIMARIES), color_transfer=_tag(context.color_trc, _TRANSFER),
        color_matrix=_tag(context.colorspace, _MATRIX), color_range=_tag(context.color_range, _RANGE, unknown=0),
        audio=bool(container.streams.audio), auto_decoder=first_decoder(timeline, "auto"),
        nvdec_hopper=nvdec_refuses(timeline.stream) is None,
        nvdec_refusal=gpu_refusal("nvdec", timeline), dali_refusal=gpu_refusal("dali", timeline))


def gpu_refusal(decoder: str, timeline: Timeline) -> str | None:
    """Why a decoder of a Hopper GPU, `nvdec` or `dali`, is not given a file; None where it is."""
    if not timeline.has_stamps:
        return "its packets carry no time stamps, so every frame is decoded from the start"
    reason = refuses(decoder, timeline)
    if reason is None and decoder == "dali":
        reason = dali.refusal(timeline, torch.device("cuda"))
    return reason


def _leads(packets: list[PacketFacts], codec: str) -> bool:
    """Whether a frame is shown before the key frame that it follows in the file, and refers to the group before."""
    key_stamp: int | None = None
    for packet in packets:
        if packet.key:
            key_stamp = packet.stamp
        if packet.stamp is None or key_stamp is None or packet.stamp >= key_stamp:
            continue
        if codec == "h264" or (packet.units and not _HEVC_SKIPPED_LEADING.isdisjoint(packet.units.types)):
            return True
    return False


def _variation(timeline: Timeline, tick_seconds: float) -> tuple[float, bool]:
    """(spread of the frame intervals, whether that is more than a tenth of the median and one tick of the clock)."""
    intervals = [after - before for before, after in pairwise(timeline.seconds)]
    median = statistics.median(intervals) if intervals else 0.0
    if median <= 0:
        return 0.0, False
    spread = max(intervals) - min(intervals)
    rounding = tick_seconds if tick_seconds < median / 2 else 0.0  # mkv counts milliseconds: 33, 33, 34, ...
    return spread / median, spread > rounding * 1.001 + 0.1 * median


def _place_seconds(damaged: list[PacketFacts], stream: VideoStream, timeline: Timeline) -> float | None:
    stamps = [packet.stamp for packet in damaged if packet.stamp is not None]
    return float(min(stamps) * (stream.time_base or 0)) - timeline.seconds[0] if stamps else None


def _tag(code: int, names: dict[int, str], unknown: int = 2) -> str:
    return UNTAGGED if code == unknown else names.get(code, str(int(code)))
