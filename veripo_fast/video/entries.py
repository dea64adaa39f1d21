"""Where decoding may begin, from a packet's first bytes: containers call packets key frames that are none.

An mp4 without its table of key frames calls every packet one, and a decoder that starts at a P frame of MPEG-4 part 2,
MPEG-2 or Theora returns wrong pictures without an error. H.264 and HEVC are read in units.py.

Sources: ISO/IEC 14496-2 6.3.5, ITU-T H.262 6.3.9, ITU-T H.263 5.1, RFC 6386 9.1, VP9 bitstream 6.2, AV1 bitstream 5.3
and 5.9.2, Theora 7.1, and FFmpeg's decoders for Sorenson, MS-MPEG-4 and WMV.
"""

from __future__ import annotations

from collections.abc import Callable

from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

HEAD_BYTES = 4096
"""Of a packet, to look for its first picture in; sequence headers and user data stand before it."""
_INTRA, _SWITCHING_INTRA = 1, 5
"""FFmpeg's picture types I and SI; 0 is unknown."""
_UNMARKED = ("svq1",)
"""Codecs whose decoder names the type of a picture and forgets to call it a key frame."""


def entry_reader(context: VideoCodecContext) -> Callable[[bytes], bool] | None:
    """Tells of a packet's first HEAD_BYTES whether its picture refers to no other; None where packets do not tell."""
    if context.codec.intra_only:
        return lambda head: True
    return _READERS.get(context.codec.canonical_name)


def begins(frame: VideoFrame, codec: str) -> bool:
    """Whether a decoded frame says that it refers to no other. Decoders that know no picture types say nothing."""
    intra = frame.pict_type in (0, _INTRA, _SWITCHING_INTRA) or frame.interlaced_frame  # of its two fields, P is kept
    return intra and (frame.key_frame or codec in _UNMARKED)


def _bits(head: bytes, start: int, count: int) -> int:
    """A number of `count` bits; past the end of the packet there are zeros."""
    first, stop = start // 8, (start + count + 7) // 8
    value = int.from_bytes(head[first:stop].ljust(stop - first, b"\0"), "big")
    return value >> (8 * stop - start - count) & ((1 << count) - 1)


def _after(head: bytes, start_code: int) -> int:
    """The place, in bytes, behind the first 00 00 01 `start_code`; -1 without one."""
    place = head.find(bytes((0, 0, 1, start_code)))
    return place + 4 if place >= 0 else -1


def _mpeg4(head: bytes) -> bool:
    place = _after(head, 0xB6)  # a video object plane
    return place > 0 and _bits(head, 8 * place, 2) == 0


def _mpeg2(head: bytes) -> bool:
    place = _after(head, 0x00)  # a picture header
    return place > 0 and _bits(head, 8 * place + 10, 3) == 1


def _h263(head: bytes) -> bool:
    if _bits(head, 0, 22) != 0x20:
        return False
    if _bits(head, 35, 3) < 6:
        return _bits(head, 38, 1) == 0
    extended = _bits(head, 38, 3)  # 1: the optional part of 18 bits is there
    return extended <= 1 and _bits(head, 41 + 18 * extended, 3) == 0


def _sorenson(head: bytes) -> bool:
    size_bits = {0: 16, 1: 32}.get(_bits(head, 30, 3), 0)
    return _bits(head, 0, 17) == 1 and _bits(head, 33 + size_bits, 2) == 0


def _msmpeg4v1(head: bytes) -> bool:
    return _bits(head, 0, 32) == 0x100 and _bits(head, 37, 2) == 0


def _msmpeg4(head: bytes) -> bool:
    return _bits(head, 0, 2) == 0


def _wmv2(head: bytes) -> bool:
    return _bits(head, 0, 1) == 0


def _vp8(head: bytes) -> bool:
    return len(head) > 9 and head[0] & 1 == 0 and head[3:6] == b"\x9d\x01\x2a"


def _vp9(head: bytes) -> bool:
    profile = _bits(head, 2, 1) + 2 * _bits(head, 3, 1)
    place = 5 if profile == 3 else 4
    return _bits(head, 0, 2) == 2 and _bits(head, place, 2) == 0  # shows no earlier frame, and is a key frame


def _theora(head: bytes) -> bool:
    return _bits(head, 0, 2) == 0


def _av1(head: bytes) -> bool:
    """Of the first frame (OBU 6) or frame header (3): shown anew, key frame, and visible at once."""
    place = 0
    while place < len(head):
        kind, has_extension, has_size = head[place] >> 3 & 15, head[place] & 4, head[place] & 2
        place += 2 if has_extension else 1
        size, shift = 0, 0
        while has_size and place < len(head):
            size |= (head[place] & 0x7F) << shift
            shift, place = shift + 7, place + 1
            if head[place - 1] < 0x80:
                break
        if kind in (3, 6):
            return place < len(head) and _bits(head, 8 * place, 4) == 0b0001
        if not has_size:
            return False
        place += size
    return False


_READERS: dict[str, Callable[[bytes], bool]] = {
    "mpeg4": _mpeg4, "mpeg2video": _mpeg2, "mpeg1video": _mpeg2, "h263": _h263,
    "flv1": _sorenson, "msmpeg4v1": _msmpeg4v1, "msmpeg4v2": _msmpeg4, "msmpeg4v3": _msmpeg4, "wmv1": _msmpeg4,
    "wmv2": _wmv2, "vp8": _vp8, "vp9": _vp9, "av1": _av1, "theora": _theora}
