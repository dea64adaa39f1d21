"""What the headers of H.264 and HEVC units say of a packet, without decoding it: their types, and who refers to it.

Sources: ITU-T H.264 (2021) 7.4.1 and table 7-1, ITU-T H.265 (2021) 7.4.2.2 and table 7-1.
"""

from __future__ import annotations

from dataclasses import dataclass

from av.video.codeccontext import VideoCodecContext

_H264_BESIDE = {6, 9, 12}
"""Units that may stand beside the slices of a frame that is left out: SEI, delimiter, filler."""
_H264_SLICE = 1
_HEVC_BESIDE = {35, 38, 39, 40}
_HEVC_UNREFERENCED = {0, 2, 4, 6, 8, 10, 12, 14}
"""Sub-layer non-reference pictures: no picture of the same temporal layer refers to them."""


@dataclass(frozen=True)
class Units:
    """The units of one packet."""

    types: tuple[int, ...]
    spare: bool
    """Whether no frame of the same temporal layer refers to this one, and the packet holds nothing but this frame."""
    layer: int
    """Temporal layer; a frame of the highest one that is `spare` is referred to by no frame at all."""


def length_bytes(context: VideoCodecContext) -> int:
    """Bytes of the length before each unit of an H.264 or HEVC packet; 0 where units are not written so."""
    data, place = context.extradata or b"", {"h264": 4, "hevc": 21}.get(context.name)
    return (data[place] & 3) + 1 if place and len(data) > place and data[0] == 1 else 0


def read_units(packet: memoryview, prefix: int, codec: str) -> Units | None:
    """None when the lengths do not add up to the packet or a header bit is wrong.

    Args:
        prefix: bytes of the length before each unit (see length_bytes). codec: `h264` or `hevc`.
    """
    headers: list[tuple[int, int]] = []
    place = 0
    while place + prefix < len(packet):
        length, first = int.from_bytes(packet[place:place + prefix], "big"), packet[place + prefix]
        if first & 0x80:
            return None
        second = packet[place + prefix + 1] if place + prefix + 1 < len(packet) else 0
        headers.append((first, second))
        place += prefix + length
    if place != len(packet):
        return None
    if codec == "h264":
        types = tuple(first & 0x1F for first, _ in headers)
        spare = _H264_SLICE in types and all(kind in _H264_BESIDE or (kind == _H264_SLICE and first & 0x60 == 0)
                                             for kind, (first, _) in zip(types, headers, strict=True))
        return Units(types, spare, 0)
    types = tuple(first >> 1 & 0x3F for first, _ in headers)
    slices = [kind for kind in types if kind not in _HEVC_BESIDE]
    layer = max(((second & 7) - 1 for _, second in headers), default=0)
    return Units(types, bool(slices) and _HEVC_UNREFERENCED.issuperset(slices), layer)
