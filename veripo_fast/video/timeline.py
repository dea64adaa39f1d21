"""Which frames a video file holds, when each is shown, and what must be decoded for it, before any is decoded.

Packets are read without decoding (7 ms for 900 frames, 0.1 s for half an hour of video), so frame counts and times come
from the stream itself and not from the header, which lies for cut, truncated and variable-rate files.
"""

from __future__ import annotations

import stat
import time
from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from veripo_fast.errors import MediaError
from veripo_fast.shards import ffmpeg_source, locate
from veripo_fast.video.units import Units, length_bytes, read_units

LOST_SECONDS, LOST_SHARE = 0.5, 0.02
"""A file may lack so much at its end (the larger of the two) before it counts as truncated: headers round."""


@dataclass(frozen=True)
class Stream:
    """What a decoder is chosen by."""

    index: int
    container: str
    """FFmpeg's name of the format, the first of its synonyms."""
    codec: str
    pixel_format: str | None
    width: int
    """As stored, in pixels."""
    height: int
    matrix: int
    """Code point of the colour matrix (ITU-T H.273); 2 where the stream names none."""


@dataclass(frozen=True)
class PacketFacts:
    """What a packet with content says of itself."""

    stamp: int | None
    """Presentation time stamp."""
    duration: int
    """0 where unknown."""
    key: bool
    hidden: bool
    """Decoded and not shown: an edit list cuts it off."""
    corrupt: bool
    """The container says so."""
    units: Units | None
    """None where the packet is not written as units with their lengths, or they do not add up."""
    damaged: bool
    """The container says so, or its units do not add up."""


@dataclass(frozen=True)
class Timeline:
    """Frames of one video stream in presentation order, and where their packets stand in the file."""

    seconds: tuple[float, ...]
    """Presentation time of each frame on the stream's own clock, ascending."""
    keys: tuple[int, ...]
    """What identifies each frame while decoding: its integer time stamp, or its number when there are no stamps."""
    has_stamps: bool
    """Whether keys are time stamps."""
    end_seconds: float
    """When the last frame leaves the screen, on the stream's own clock."""
    promised_seconds: float | None
    """Duration of the stream as the header has it, or None where it has none."""
    stream: Stream
    places: tuple[int, ...] = ()
    """Of each frame: the number of its packet in the file. Empty where packets carry no time stamps."""
    key_stamps: tuple[int, ...] = ()
    """Time stamps of the key frames that decoding can begin at, ascending."""
    key_places: tuple[int, ...] = ()
    """Their packets' numbers, in the same order."""
    spare: frozenset[int] = frozenset()
    """Numbers of packets that no other frame refers to: left out, they change no other picture."""
    hidden: int = 0
    """Frames that an edit list hides."""
    trouble: str | None = None
    """Why decoders that trust the container would return wrong pictures in silence; None where they would not."""

    def runs(self, wanted: Sequence[int]) -> list[range]:
        """Packets to decode for the frames at positions `wanted`: from each one's key frame up to its own packet.

        A frame that leads its key frame (open GOP) is decoded from the key frame before. Ascending and disjoint; empty
        without `places`.
        """
        runs: list[range] = []
        for place, position in sorted((self.places[position], position) for position in wanted if self.places):
            key = bisect_right(self.key_stamps, self.keys[position]) - 1
            while key >= 0 and self.key_places[key] > place:
                key -= 1
            start = self.key_places[key] if key >= 0 else 0
            while runs and start <= runs[-1].stop:
                start = min(start, runs.pop().start)
            runs.append(range(start, place + 1))
        return runs

    def left_out(self, wanted: Sequence[int]) -> frozenset[int]:
        """Packets that need not be decoded for the frames at positions `wanted`, also inside of their runs."""
        return self.spare.difference(self.places[position] for position in wanted) if self.spare else self.spare

    @property
    def length(self) -> float:
        """From the first frame to the end of the last, in seconds."""
        return self.end_seconds - self.seconds[0]

    @property
    def fps(self) -> float:
        """Average frame rate; 0 for a single frame."""
        span = self.seconds[-1] - self.seconds[0]
        return (len(self.seconds) - 1) / span if span > 0 else 0.0


def check_deadline(path: str, deadline: float) -> None:
    """Raise MediaError when the monotonic clock has passed `deadline`."""
    if time.monotonic() > deadline:
        raise MediaError(f"{path} took longer to decode than video.timeout_seconds allows")


def check_file(path: str) -> bytes:
    """The first 512 bytes of a regular, readable, non-empty file (or member of a tar archive) that is not a web page.

    Raises:
        MediaError: it is none.
    """
    try:
        member = locate(path)
        head = _head(path) if member is None else member.read(512)
    except FileNotFoundError:
        raise MediaError(f"{path} does not exist") from None
    except PermissionError:
        raise MediaError(f"{path} may not be read by this user (permission denied)") from None
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise MediaError(f"{path} is empty (0 bytes)")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        raise MediaError(f"{path} is a web page (HTML or XML), not a media file; its download probably failed")
    return head


def _head(path: str) -> bytes:
    status = Path(path).stat()
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{path} is a directory, not a media file")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(f"{path} is not a regular file")
    with Path(path).open("rb") as file:
        return file.read(512)


@contextmanager
def open_video(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its best video stream, decoded on one thread; MediaError when there is none."""
    head = check_file(path)
    try:
        container = av.open(ffmpeg_source(path))
    except (av.FFmpegError, UnicodeError, ValueError) as error:
        if head[4:8] == b"ftyp":
            raise MediaError(_no_index(path)) from error
        raise MediaError(f"{path} is not a video that FFmpeg can open ({_words(error)})") from error
    with container:
        if head[4:8] == b"ftyp" and not container.streams:
            raise MediaError(_no_index(path))
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = {"a cover picture" if other is stream else str(other.type) for other in container.streams}
            raise MediaError(f"{path} has no video stream (it holds {', '.join(sorted(kinds)) or 'nothing'})")
        if stream.codec_context is None:
            raise MediaError(f"{path} holds video in a format that this FFmpeg cannot decode")
        stream.codec_context.thread_count = 1
        yield container, stream


def scan_packets(path: str, deadline: float) -> Timeline:
    """Timeline from the packets that a player would show and that are whole.

    Raises:
        MediaError: unreadable, without video stream, or without a single frame.
    """
    with open_video(path) as (container, stream):
        return timeline_of(path, container, stream, read_packets(path, container, stream, deadline))


def read_packets(path: str, container: InputContainer, stream: VideoStream, deadline: float) -> list[PacketFacts]:
    """Every packet with content, in the order of the file, none decoded."""
    codec, prefix = stream.codec_context.name, length_bytes(stream.codec_context)
    packets = []
    for packet in _packets(path, container, stream, deadline):
        if packet.size:
            units = read_units(memoryview(packet), prefix, codec) if prefix else None
            packets.append(PacketFacts(packet.pts, packet.duration or 0, packet.is_keyframe, packet.is_discard,
                                       packet.is_corrupt, units, packet.is_corrupt or (prefix > 0 and units is None)))
    return packets


def timeline_of(path: str, container: InputContainer, stream: VideoStream, packets: Sequence[PacketFacts]) -> Timeline:
    """From all packets of a stream; MediaError when none of them would be shown."""
    shown = [(packet.stamp, packet.duration) for packet in packets if not packet.hidden and not packet.corrupt]
    keys, seconds, end, has_stamps = _times(path, stream, shown)
    numbers = {packet.stamp: number for number, packet in enumerate(packets)}
    stamped = has_stamps and len(numbers) == len(packets)
    trusted = length_bytes(stream.codec_context) > 0 or stream.codec_context.name not in ("h264", "hevc")
    key_packets = sorted((packet.stamp, number) for number, packet in enumerate(packets)
                         if packet.key and packet.stamp is not None and (
                             packet.units.entry if packet.units else trusted)) if stamped else []
    top = max((packet.units.layer for packet in packets if packet.units), default=0)
    return Timeline(
        seconds, keys, has_stamps, end, _promised(stream), _stream(container, stream),
        places=tuple(numbers[key] for key in keys) if stamped else (),
        key_stamps=tuple(stamp for stamp, _ in key_packets), key_places=tuple(number for _, number in key_packets),
        spare=frozenset(number for number, packet in enumerate(packets)
                        if packet.units and packet.units.spare and packet.units.layer == top and not packet.key),
        hidden=sum(packet.hidden for packet in packets), trouble=_trouble(packets))


def _trouble(packets: Sequence[PacketFacts]) -> str | None:
    if any(packet.damaged for packet in packets):
        return "packets in it are damaged"
    if any(packet.key and packet.units and not packet.units.entry for packet in packets):
        return "it calls frames key frames that refer to others (intra refresh)"
    return None


def scan_decoded(path: str, deadline: float) -> Timeline:
    """Timeline from the frames that the decoder really returns: for streams whose packets carry no usable times."""
    with open_video(path) as (container, stream):
        shown = [(frame.pts, 0) for frame in decoded_frames(path, container, stream, deadline)]
        keys, seconds, end, has_stamps = _times(path, stream, shown)
        return Timeline(seconds, keys, has_stamps, end, _promised(stream), _stream(container, stream))


def decoded_frames(path: str, container: InputContainer, stream: VideoStream, deadline: float,
                   runs: Sequence[range] | None = None, left_out: Container[int] = ()) -> Iterator[VideoFrame]:
    """Good frames in presentation order: all of them, or those of some runs of packets (see Timeline.runs).

    Damaged packets are left out, and with them every frame up to the next key frame, because it may refer to what is
    missing.
    """
    wanted = iter(runs if runs is not None else [range(1 << 62)])
    run, number = next(wanted, range(0)), -1
    damaged = False
    for packet in _packets(path, container, stream, deadline):
        number += packet.size > 0
        if packet.size and (number < run.start or number in left_out):
            continue
        ends = number == run.stop - 1
        for part in (packet, None) if ends else (packet,):  # None: what the decoder still holds back
            try:
                frames = stream.codec_context.decode(part)
            except av.FFmpegError:  # damage shows as InvalidData, but codecs return other codes as well
                damaged = True
                continue
            for frame in frames:
                damaged = frame.is_corrupt or (damaged and not frame.key_frame)
                if not damaged:
                    yield frame
        if ends:
            stream.codec_context.flush_buffers()
            following = next(wanted, None)
            if following is None:
                return
            run = following


def _packets(path: str, container: InputContainer, stream: VideoStream, deadline: float) -> Iterator[Packet]:
    try:
        for packet in container.demux(stream):
            check_deadline(path, deadline)
            yield packet
    except av.FFmpegError as error:
        raise MediaError(f"{path} cannot be read to its end ({_words(error)})") from error


def check_complete(path: str, timeline: Timeline, end_seconds: float | None) -> None:
    """MediaError when the file ends clearly before the wanted part does, as a download that broke off."""
    if timeline.promised_seconds is None:
        return
    promised, held = timeline.promised_seconds, timeline.length
    wanted = promised if end_seconds is None else min(promised, end_seconds)
    if wanted - held > max(LOST_SECONDS, LOST_SHARE * promised):
        raise MediaError(f"{path} is truncated: it holds {held:.1f} s of the {promised:.1f} s that its header promises")


def _times(path: str, stream: VideoStream, shown: list[tuple[int | None, int]]
           ) -> tuple[tuple[int, ...], tuple[float, ...], float, bool]:
    """Keys, seconds, end and has_stamps of a Timeline, from stamp and duration (0: unknown) of its frames."""
    if not shown:
        raise MediaError(f"{path} holds no video frame")
    stamps = sorted({stamp for stamp, _ in shown if stamp is not None})
    if len(stamps) == len(shown) and stream.time_base is not None:
        numerator, denominator = stream.time_base.numerator, stream.time_base.denominator
        spread = (stamps[-1] - stamps[0]) // max(len(stamps) - 1, 1)
        end = max(stamp + (duration or spread) for stamp, duration in shown if stamp is not None)
        return (tuple(stamps), tuple(stamp * numerator / denominator for stamp in stamps),
                end * numerator / denominator, True)
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    numbers = tuple(range(len(shown)))
    return numbers, tuple(number / rate for number in numbers), len(shown) / rate, False


def _stream(container: InputContainer, stream: VideoStream) -> Stream:
    context = stream.codec_context
    return Stream(stream.index, container.format.name.partition(",")[0], context.codec.canonical_name,
                  context.pix_fmt, context.width, context.height, int(context.colorspace))


def _promised(stream: VideoStream) -> float | None:
    """Duration of the stream in seconds: from the stream, or from the tag that Matroska muxers write."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None


def _no_index(path: str) -> str:
    return f"{path} is truncated: the index (moov atom) of its mp4 is missing"


def _words(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".").lower()
