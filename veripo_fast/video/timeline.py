"""Which frames a video file holds, when each is shown, and what must be decoded for it, before any is decoded.

Frame counts and times come from the packets and not from the header, which lies for cut, truncated and variable-rate
files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from av.container import InputContainer
from av.video.stream import VideoStream

from veripo_fast.errors import MediaError
from veripo_fast.video.packets import PacketFacts, decoded_frames, open_video, read_packets

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


def scan_packets(path: str, deadline: float) -> Timeline:
    """Timeline from the packets that a player would show and that are whole.

    Raises:
        MediaError: unreadable, without video stream, or without a single frame.
    """
    with open_video(path) as (container, stream):
        return timeline_of(path, container, stream, read_packets(path, container, stream, deadline))


def timeline_of(path: str, container: InputContainer, stream: VideoStream, packets: Sequence[PacketFacts]) -> Timeline:
    """From all packets of a stream; MediaError when none of them would be shown."""
    shown = [(packet.stamp, packet.duration) for packet in packets if not packet.hidden and not packet.corrupt]
    keys, seconds, end, has_stamps = _times(path, stream, shown)
    numbers = {packet.stamp: number for number, packet in enumerate(packets)}
    stamped = has_stamps and len(numbers) == len(packets)
    lies = any(map(_lies, packets))
    key_packets = sorted((packet.stamp, number) for number, packet in enumerate(packets)
                         if packet.stamp is not None and _is_entry(packet, lies)) if stamped else []
    top = max((packet.units.layer for packet in packets if packet.units), default=0)
    return Timeline(
        seconds, keys, has_stamps, end, _promised(stream, seconds[0]), _stream(container, stream),
        places=tuple(numbers[key] for key in keys) if stamped else (),
        key_stamps=tuple(stamp for stamp, _ in key_packets), key_places=tuple(number for _, number in key_packets),
        spare=frozenset(number for number, packet in enumerate(packets)
                        if packet.units and packet.units.spare and packet.units.layer == top and not packet.key),
        hidden=sum(packet.hidden for packet in packets), trouble=_trouble(packets))


def _trouble(packets: Sequence[PacketFacts]) -> str | None:
    if any(packet.damaged for packet in packets):
        return "packets in it are damaged"
    if any(map(_lies, packets)):
        return "it calls frames key frames that refer to others"
    if any(packet.entry is None for packet in packets):
        return "its packets do not tell where decoding may begin"
    if packets and not packets[0].entry:
        return "it does not begin with a key frame"
    return None


def _lies(packet: PacketFacts) -> bool:
    """Whether the container calls it a key frame, and its content says that it is none."""
    return packet.key and packet.entry is False and not packet.damaged


def _is_entry(packet: PacketFacts, lies: bool) -> bool:
    return bool(packet.entry) and not (lies and packet.units and not packet.units.sure_entry)


def scan_decoded(path: str, deadline: float) -> Timeline:
    """Timeline from the frames that the decoder really returns: for streams whose packets carry no usable times."""
    with open_video(path) as (container, stream):
        shown = [(frame.pts, 0) for frame in decoded_frames(path, container, stream, deadline)]
        keys, seconds, end, has_stamps = _times(path, stream, shown)
        return Timeline(seconds, keys, has_stamps, end, _promised(stream, seconds[0]), _stream(container, stream))


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


def _promised(stream: VideoStream, start_seconds: float) -> float | None:
    """Duration of the stream in seconds, from its first frame at `start_seconds`: the stream's own, or from
    the tag that Matroska muxers write."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        tagged = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None
    counted = "_STATISTICS_WRITING_APP" in stream.metadata  # mkvmerge writes a duration, FFmpeg the time of the end
    return tagged if counted else tagged - max(start_seconds, 0.0)
