"""What the headers of H.264 and HEVC units say of a packet, without decoding it: where decoding may begin, and which
frames nobody refers to.

Sources: ITU-T H.264 (2021) 7.3.3, 7.4.1, tables 7-1 and 7-6; ITU-T H.265 (2021) 7.4.2.2, table 7-1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from av.video.codeccontext import VideoCodecContext

UNIT_CODECS = ("h264", "hevc")
_H264_BESIDE = {6, 9, 12}
"""Units that may stand beside the slices of a frame that is left out: SEI, delimiter, filler."""
_H264_SLICE, _H264_IDR = 1, 5
_H264_INTRA = {2, 4, 7, 9}
"""Slice types I and SI."""
_HEVC_BESIDE = {35, 38, 39, 40}
_HEVC_UNREFERENCED = {0, 2, 4, 6, 8, 10, 12, 14}
"""Sub-layer non-reference pictures: no picture of the same temporal layer refers to them."""
_HEVC_RANDOM_ACCESS = range(16, 24)

_SLICE_BYTES = 11
"""Of a slice after the first byte of its unit: enough for two numbers."""
_LENGTH = struct.Struct(">I")


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
    sure_entry: bool = False
    """Whether pictures after it do not refer to earlier ones either, whatever the container says. After an intra
    picture of H.264 that is no IDR some may."""


def length_bytes(context: VideoCodecContext) -> int:
    """Bytes of the length before each unit of an H.264 or HEVC packet; 0 where units are not written so."""
    data, place = context.extradata or b"", {"h264": 4, "hevc": 21}.get(context.name)
    return (data[place] & 3) + 1 if place and len(data) > place and data[0] == 1 else 0


def read_units(packet: memoryview, prefix: int, codec: str) -> Units | None:
    """None when the lengths do not add up to the packet or a header bit is wrong.

    Args:
        prefix: bytes of the length before each unit (see length_bytes). codec: `h264` or `hevc`.
    """
    sign = _h264_sign if codec == "h264" else _hevc_sign
    signs = []
    place, size = 0, len(packet)
    while place + prefix < size:
        start = place + prefix
        length = (_LENGTH.unpack_from(packet, place)[0] if prefix == 4
                  else int.from_bytes(packet[place:start], "big"))
        if packet[start] & 0x80:
            return None
        signs.append(sign(packet, start))
        place = start + length
    if place != size:
        return None
    return (_h264 if codec == "h264" else _hevc)(tuple(signs))


def _h264_sign(packet: memoryview, start: int) -> tuple[int, int]:
    """First byte of a unit, and the type of a slice (-1 where it is none, or broken)."""
    first = packet[start]
    if first & 0x1F != _H264_SLICE:
        return first, -1
    after = packet[start + 1] if start + 1 < len(packet) else 0
    if after & 0x80 and after & 0x78:  # first macroblock 0, and a type of at most 7 bits: nearly every slice
        return first, _SLICE_TYPES[after]
    return first, _slice_type(bytes(packet[start + 1:start + 1 + _SLICE_BYTES]).ljust(_SLICE_BYTES, b"\0"))


def _slice_type(header: bytes) -> int:
    """The second Exp-Golomb number of a slice; the first one is its first macroblock."""
    bits = int.from_bytes(header, "big")
    left = 8 * len(header)
    value = 0
    for _ in range(2):
        zeros = left - bits.bit_length()
        left -= 2 * zeros + 1
        if left < 0:
            return -1
        value = (bits >> left) - 1
        bits &= (1 << left) - 1
    return value


_SLICE_TYPES = tuple(_slice_type(bytes([first])) for first in range(256))


@lru_cache(maxsize=256)  # few kinds of packets make up a file, and objects that are shared cost no garbage collection
def _h264(signs: tuple[tuple[int, int], ...]) -> Units:
    types = tuple(first & 0x1F for first, _ in signs)
    spare = _H264_SLICE in types and all(
        kind in _H264_BESIDE or (kind == _H264_SLICE and first & 0x60 == 0)
        for kind, (first, _) in zip(types, signs, strict=True))
    slices = [slice_type for kind, (_, slice_type) in zip(types, signs, strict=True) if kind == _H264_SLICE]
    return Units(types, spare, 0, _H264_IDR in types or (bool(slices) and _H264_INTRA.issuperset(slices)),
                 _H264_IDR in types)


def _hevc_sign(packet: memoryview, start: int) -> tuple[int, int]:
    """Type of a unit, and its temporal layer."""
    return packet[start] >> 1 & 0x3F, ((packet[start + 1] if start + 1 < len(packet) else 0) & 7) - 1


@lru_cache(maxsize=256)
def _hevc(signs: tuple[tuple[int, int], ...]) -> Units:
    types = tuple(kind for kind, _ in signs)
    slices = [kind for kind in types if kind < 32]
    spare = _HEVC_UNREFERENCED.issuperset(kind for kind in types if kind not in _HEVC_BESIDE)
    layer = max((layer for _, layer in signs), default=0)
    entry = bool(slices) and all(kind in _HEVC_RANDOM_ACCESS for kind in slices)
    return Units(types, bool(slices) and spare, layer, entry, entry)
