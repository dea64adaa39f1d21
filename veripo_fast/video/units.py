"""What the headers of H.264 and HEVC units say of a packet, without decoding it: where decoding may begin, and which
frames nobody refers to.

Sources: ITU-T H.264 (2021) 7.3.3, 7.4.1, tables 7-1 and 7-6; ITU-T H.265 (2021) 7.4.2.2, table 7-1.
"""

from __future__ import annotations

from dataclasses import dataclass

from av.video.codeccontext import VideoCodecContext

_H264_BESIDE = {6, 9, 12}
"""Units that may stand beside the slices of a frame that is left out: SEI, delimiter, filler."""
_H264_SLICE, _H264_IDR = 1, 5
_H264_INTRA = {2, 4, 7, 9}
"""Slice types I and SI."""
_HEVC_BESIDE = {35, 38, 39, 40}
_HEVC_UNREFERENCED = {0, 2, 4, 6, 8, 10, 12, 14}
"""Sub-layer non-reference pictures: no picture of the same temporal layer refers to them."""
_HEVC_RANDOM_ACCESS = range(16, 24)


_HEADER_BYTES = 12
"""Enough for the unit's header and two numbers of a slice's."""


@dataclass(frozen=True)
class Units:
    """The units of one packet."""

    types: tuple[int, ...]
    spare: bool
    """Whether no frame of the same temporal layer refers to this one, and the packet holds nothing but this frame."""
    layer: int
    """Temporal layer; a frame of the highest one that is `spare` is referred to by no frame at all."""
    entry: bool
    """Whether its picture refers to no other. Streams with intra refresh call packets key frames that are none."""


def length_bytes(context: VideoCodecContext) -> int:
    """Bytes of the length before each unit of an H.264 or HEVC packet; 0 where units are not written so."""
    data, place = context.extradata or b"", {"h264": 4, "hevc": 21}.get(context.name)
    return (data[place] & 3) + 1 if place and len(data) > place and data[0] == 1 else 0


def read_units(packet: memoryview, prefix: int, codec: str) -> Units | None:
    """None when the lengths do not add up to the packet or a header bit is wrong.

    Args:
        prefix: bytes of the length before each unit (see length_bytes). codec: `h264` or `hevc`.
    """
    headers: list[bytes] = []
    place = 0
    while place + prefix < len(packet):
        length, start = int.from_bytes(packet[place:place + prefix], "big"), place + prefix
        if packet[start] & 0x80:
            return None
        headers.append(bytes(packet[start:start + _HEADER_BYTES]).ljust(_HEADER_BYTES, b"\0"))
        place += prefix + length
    if place != len(packet):
        return None
    return _h264(headers) if codec == "h264" else _hevc(headers)


def _h264(headers: list[bytes]) -> Units:
    types = tuple(header[0] & 0x1F for header in headers)
    spare = _H264_SLICE in types and all(kind in _H264_BESIDE or (kind == _H264_SLICE and header[0] & 0x60 == 0)
                                         for kind, header in zip(types, headers, strict=True))
    slices = [header for kind, header in zip(types, headers, strict=True) if kind == _H264_SLICE]
    return Units(types, spare, 0, _H264_IDR in types or (
        bool(slices) and all(_slice_type(header) in _H264_INTRA for header in slices)))


def _slice_type(header: bytes) -> int:
    """The second Exp-Golomb number after the first byte of a unit; the first one is its first macroblock."""
    bits = int.from_bytes(header[1:], "big")
    left = 8 * (len(header) - 1)
    value = 0
    for _ in range(2):
        zeros = left - bits.bit_length()
        left -= 2 * zeros + 1
        if left < 0:
            return -1
        value = (bits >> left) - 1
        bits &= (1 << left) - 1
    return value


def _hevc(headers: list[bytes]) -> Units:
    types = tuple(header[0] >> 1 & 0x3F for header in headers)
    slices = [kind for kind in types if kind < 32]
    spare = _HEVC_UNREFERENCED.issuperset(kind for kind in types if kind not in _HEVC_BESIDE)
    layer = max(((header[1] & 7) - 1 for header in headers), default=0)
    return Units(types, bool(slices) and spare, layer,
                 bool(slices) and all(kind in _HEVC_RANDOM_ACCESS for kind in slices))
