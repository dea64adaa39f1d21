"""One video file -> its packets: opened, read, judged by their headers, and decoded.

Packets are read without decoding (9 ms for 1800 frames). Those of a usual clip are kept, so that the file is read once;
what they say of themselves becomes a timeline (timeline.py), which says what to decode.
"""

from __future__ import annotations

import stat
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from veripo_fast.data.archives import ffmpeg_source, locate
from veripo_fast.errors import MediaError
from veripo_fast.video.deadline import check_deadline
from veripo_fast.video.entries import HEAD_BYTES, begins, entry_reader
from veripo_fast.video.units import UNIT_CODECS, Units, length_bytes, read_units

KEPT_BYTES = 64 << 20
"""Packets of a file beyond that many are read again for decoding: four minutes of 2 Mbit/s."""


FORMATS = ("3gp,3g2,mov,mp4,m4a,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,m4v,asf,asf_o,ogg,h264,hevc,h263,"
           "obu,ivf,av1,vc1,mjpeg,gif,rm,nut,mxf,dv,wtv,yuv4mpegpipe")
"""FFmpeg's containers of video. Not in it: playlists (hls, dash, concat) that lead to other files and hosts, texts and
pictures, which FFmpeg shows as videos, and devices."""
_NO_MEDIA = {
    b"version https://git-lfs.github.com/spec/": "is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"PK\x03\x04": "is a zip archive, not a media file: unpack it",
    b"Rar!": "is a rar archive, not a media file: unpack it",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive, not a media file: unpack it",
    b"\x1f\x8b": "is compressed (gzip), not a media file: unpack it",
    b"\xfd7zXZ": "is compressed (xz), not a media file: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd), not a media file: unpack it",
    b"Salted__": "is encrypted (openssl): decrypt it first", b"-----BEGIN PGP": "is encrypted (PGP): decrypt it first",
    b"age-encryption.org/": "is encrypted (age): decrypt it first"}
"""First bytes of what stands in a medium's place -> what it is and what to do."""
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"[playlist]")
_OPEN = {"protocol_whitelist": "file,subfile", "format_whitelist": FORMATS}


class PacketFacts(NamedTuple):
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
    entry: bool | None = None
    """Whether it is called a key frame and its own first bytes say so too; None where they tell nothing."""


class KeptPackets(NamedTuple):
    """An open file of which every packet was read, so that decoding need not read it again."""

    container: InputContainer
    stream: VideoStream
    packets: Sequence[Packet]
    """In the order of the file, empty ones included."""


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
    for magic, reason in _NO_MEDIA.items():
        if head.startswith(magic):
            raise MediaError(f"{path} {reason}")
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
        container = av.open(ffmpeg_source(path), container_options=_OPEN)
    except (av.FFmpegError, UnicodeError, ValueError) as error:
        if head[4:8] == b"ftyp":
            raise MediaError(_no_index(path)) from error
        if head.startswith(_PLAYLISTS):
            raise MediaError(f"{path} is a playlist that names other files, not a video") from error
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            raise MediaError(f"{path} is a WebP picture or animation, which FFmpeg does not decode as a video: "
                             "make it an mp4") from error
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


def read_packets(path: str, container: InputContainer, stream: VideoStream, deadline: float,
                 kept: list[Packet] | None = None) -> list[PacketFacts]:
    """Of every packet with content, in the order of the file; none is decoded.

    The packets themselves are put into `kept`, unless they are more than KEPT_BYTES: then it is left empty.
    """
    codec, prefix = stream.codec_context.name, length_bytes(stream.codec_context)
    reader = entry_reader(stream.codec_context)
    facts, nbytes = [], 0
    for packet in _packets(path, container, stream):
        check_deadline(path, deadline)
        nbytes += packet.size
        if kept is not None:
            kept.append(packet)
            if nbytes > KEPT_BYTES:
                kept.clear()
                kept = None
        if packet.size:
            units = read_units(memoryview(packet), prefix, codec) if prefix else None
            corrupt, key = packet.is_corrupt, packet.is_keyframe
            if key and packet.has_sidedata("encryption_info"):  # FFmpeg would decode what is no video
                raise MediaError(f"{path} is encrypted (common encryption, DRM): decrypt it first")
            entry = None
            if prefix:
                entry = key and units is not None and units.entry
            elif reader is not None:
                entry = key and reader(bytes(memoryview(packet)[:HEAD_BYTES]))
            facts.append(PacketFacts(packet.pts, packet.duration or 0, key, packet.is_discard, corrupt,
                                     units, corrupt or (prefix > 0 and units is None), entry))
    return facts


def decoded_frames(path: str, container: InputContainer, stream: VideoStream, deadline: float,
                   runs: Sequence[range] | None = None, left_out: Container[int] = (),
                   kept: Sequence[Packet] | None = None) -> Iterator[VideoFrame]:
    """Good frames in presentation order: all of them, or those of some runs of packets (see Timeline.runs).

    `kept` are the packets of the stream, where they have been read already. Damaged packets are left out, and with them
    every frame up to the next key frame, because it may refer to what is missing. So are frames before the first key
    frame of a run, whatever the container says; FFmpeg does that itself for H.264 and HEVC, intra refresh included.
    """
    wanted = iter(runs if runs is not None else [range(1 << 62)])
    run, number = next(wanted, range(0)), -1
    codec = stream.codec_context.codec
    unsure = codec.canonical_name not in UNIT_CODECS and not codec.intra_only
    damaged = unsure
    for packet in _packets(path, container, stream) if kept is None else kept:
        check_deadline(path, deadline)
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
                damaged = frame.is_corrupt or (damaged and not begins(frame, codec.canonical_name))
                if not damaged:
                    yield frame
        if ends:
            stream.codec_context.flush_buffers()
            damaged = damaged or unsure
            following = next(wanted, None)
            if following is None:
                return
            run = following


def _packets(path: str, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    try:
        yield from container.demux(stream)
    except av.FFmpegError as error:
        raise MediaError(f"{path} cannot be read to its end ({_words(error)})") from error


def _no_index(path: str) -> str:
    return f"{path} is truncated: the index (moov atom) of its mp4 is missing"


def _words(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".").lower()
