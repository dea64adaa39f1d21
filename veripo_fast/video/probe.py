"""One video file -> its facts: what its packets and its first frame say, before the wanted frames are decoded.

The timeline (timeline.py) decides which frames exist; this file adds what a corpus is judged by: key frames, colour
tags, rotation, hidden frames, packets that are not whole, and how many frames must be decoded to reach the wanted ones.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import av
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from veripo_fast.errors import MediaError
from veripo_fast.video.timeline import Timeline, check_deadline, decoded_frames, open_video, scan_packets

UNTAGGED = "untagged"
_PRIMARIES = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020", 12: "display-p3"}
_TRANSFER = {1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 13: "srgb",
             14: "bt2020-10", 15: "bt2020-12", 16: "pq", 18: "hlg"}
_MATRIX = {0: "rgb", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020"}
_RANGE = {1: "limited", 2: "full"}
"""Names of the code points of ITU-T H.273; another code is shown as its number."""
_NVDEC_HOPPER = {"h264": (4096, {"yuv420p", "yuvj420p"}), "hevc": (8192, {"yuv420p", "yuvj420p", "yuv420p10le"}),
                 "vp9": (8192, {"yuv420p"})}
"""Codec -> longest side in pixels and pixel formats that NVDEC of H100 and H200 decodes. They have no AV1 decoder."""
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
    nvdec_hopper: bool
    """Whether NVDEC of H100 and H200 decodes it."""


@dataclass(frozen=True)
class Probe:
    """A video's facts, its timeline, and where its frames stand in decoding order."""

    facts: VideoFacts
    timeline: Timeline
    decode_places: tuple[int, ...]
    """Of each frame of the timeline: its packet's number in the file. Empty when packets carry no time stamps."""
    key_stamps: tuple[int, ...]
    """Time stamps of the key frames, ascending."""
    key_places: tuple[int, ...]
    """Their packets' numbers, in the same order."""

    def frames_to_decode(self, wanted: Sequence[int], *, seeks: bool = True) -> int:
        """How many frames a decoder reads to return the frames at positions `wanted` of the timeline.

        One that `seeks` starts each group of pictures at its key frame and stops at the last wanted frame in it;
        another one reads from the start of the file.
        """
        if not self.decode_places:
            return max(wanted) + 1
        if not seeks:
            return max(self.decode_places[position] for position in wanted) + 1
        stops: dict[int, int] = {}
        for position in wanted:
            key = bisect_right(self.key_stamps, self.timeline.keys[position]) - 1
            start = self.key_places[key] if key >= 0 else 0
            stops[start] = max(stops.get(start, start), self.decode_places[position])
        return sum(stop - start + 1 for start, stop in stops.items())


@dataclass(frozen=True)
class _Packet:
    stamp: int | None
    key: bool
    hidden: bool
    whole: bool
    leads: bool
    """Whether it refers to the group before the key frame that it follows in the file."""


def probe_video(path: str, deadline: float) -> Probe:
    """Read a file's packets and its first frame.

    Raises:
        MediaError: unreadable, without video stream, without a single frame, or past `deadline` (monotonic seconds).
    """
    timeline = scan_packets(path, deadline)
    with open_video(path) as (container, stream):
        rotation = round(next((frame.rotation for frame in decoded_frames(path, container, stream, deadline)), 0))
    with open_video(path) as (container, stream):
        packets = _read_packets(path, container, stream, deadline)
        facts = _facts(container, stream, timeline, packets, rotation)
    places = {packet.stamp: place for place, packet in enumerate(packets)}
    stamped = timeline.has_stamps and all(key in places for key in timeline.keys)
    keys = sorted((packet.stamp, place) for place, packet in enumerate(packets) if packet.key and
                  packet.stamp is not None) if stamped else []
    return Probe(facts, timeline, tuple(places[key] for key in timeline.keys) if stamped else (),
                 tuple(stamp for stamp, _ in keys), tuple(place for _, place in keys))


def _read_packets(path: str, container: InputContainer, stream: VideoStream, deadline: float) -> list[_Packet]:
    codec, prefix = stream.codec_context.name, _length_bytes(stream.codec_context)
    packets: list[_Packet] = []
    key_stamp: int | None = None
    try:
        for packet in container.demux(stream):
            check_deadline(path, deadline)
            if not packet.size:
                continue
            types = _unit_types(memoryview(packet), prefix, codec) if prefix else []
            if packet.is_keyframe:
                key_stamp = packet.pts
            early = packet.pts is not None and key_stamp is not None and packet.pts < key_stamp
            leads = early and (codec == "h264" or not _HEVC_SKIPPED_LEADING.isdisjoint(types or ()))
            packets.append(_Packet(packet.pts, packet.is_keyframe, packet.is_discard,
                                   types is not None and not packet.is_corrupt, leads))
    except av.FFmpegError as error:
        raise MediaError(f"{path} cannot be read to its end ({error.strerror or error})") from error
    return packets


def _length_bytes(context: VideoCodecContext) -> int:
    """Bytes of the length before each unit of an H.264 or HEVC packet; 0 where units are not written so."""
    data, place = context.extradata or b"", {"h264": 4, "hevc": 21}.get(context.name)
    return (data[place] & 3) + 1 if place and len(data) > place and data[0] == 1 else 0


def _unit_types(packet: memoryview, prefix: int, codec: str) -> list[int] | None:
    """NAL types of the units in a packet; None when their lengths do not add up to it or a header bit is wrong."""
    types, place = [], 0
    while place + prefix < len(packet):
        length, header = int.from_bytes(packet[place:place + prefix], "big"), packet[place + prefix]
        if header & 0x80:
            return None
        types.append(header & 0x1F if codec == "h264" else header >> 1 & 0x3F)
        place += prefix + length
    return types if place == len(packet) else None


def _facts(container: InputContainer, stream: VideoStream, timeline: Timeline, packets: list[_Packet],
           rotation: int) -> VideoFacts:
    context = stream.codec_context
    spread, variable = _variation(timeline, float(stream.time_base or 0))
    keys = [place for place, packet in enumerate(packets) if packet.key]
    gops = [after - before for before, after in pairwise(keys)] or [len(packets)]
    tells = timeline.has_stamps and (context.name == "h264" or (context.name == "hevc" and _length_bytes(context) > 0))
    damaged = [packet for packet in packets if not packet.whole]
    components = context.format.components if context.format else ()
    return VideoFacts(
        container=container.format.name.partition(",")[0], codec=context.codec.canonical_name,
        profile=stream.profile, pixel_format=context.pix_fmt, bit_depth=components[0].bits if components else None,
        width=context.width, height=context.height, rotation=rotation,
        fps=timeline.fps, container_fps=float(stream.average_rate) if stream.average_rate else None,
        interval_spread=spread, variable=variable,
        seconds=timeline.length, promised_seconds=timeline.promised_seconds,
        frames=len(timeline.seconds), header_frames=stream.frames or None,
        hidden_frames=sum(packet.hidden for packet in packets), offset_seconds=timeline.seconds[0],
        damaged_packets=len(damaged), damaged_seconds=_place_seconds(damaged, stream, timeline),
        keyframes=len(keys), gop_median=statistics.median(gops),
        gop_max=max(*gops, len(packets) - max(keys, default=0)),
        open_gop=any(packet.leads for packet in packets) if tells else None,
        color_primaries=_tag(context.color_primaries, _PRIMARIES), color_transfer=_tag(context.color_trc, _TRANSFER),
        color_matrix=_tag(context.colorspace, _MATRIX), color_range=_tag(context.color_range, _RANGE, unknown=0),
        audio=bool(container.streams.audio), nvdec_hopper=_nvdec_hopper(context))


def _variation(timeline: Timeline, tick_seconds: float) -> tuple[float, bool]:
    """(spread of the frame intervals, whether that is more than a tenth of the median and one tick of the clock)."""
    intervals = [after - before for before, after in pairwise(timeline.seconds)]
    median = statistics.median(intervals) if intervals else 0.0
    if median <= 0:
        return 0.0, False
    spread = max(intervals) - min(intervals)
    rounding = tick_seconds if tick_seconds < median / 2 else 0.0  # mkv counts milliseconds: 33, 33, 34, ...
    return spread / median, spread > rounding * 1.001 + 0.1 * median


def _place_seconds(damaged: list[_Packet], stream: VideoStream, timeline: Timeline) -> float | None:
    stamps = [packet.stamp for packet in damaged if packet.stamp is not None]
    return float(min(stamps) * (stream.time_base or 0)) - timeline.seconds[0] if stamps else None


def _tag(code: int, names: dict[int, str], unknown: int = 2) -> str:
    return UNTAGGED if code == unknown else names.get(code, str(int(code)))


def _nvdec_hopper(context: VideoCodecContext) -> bool:
    side, formats = _NVDEC_HOPPER.get(context.codec.canonical_name, (0, set()))
    return max(context.width, context.height) <= side and context.pix_fmt in formats
