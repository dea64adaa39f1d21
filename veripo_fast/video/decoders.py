"""Which decoder takes a file, decided from its packets before anything is decoded.

`pyav`: packets picked by us, decoded by FFmpeg; it leaves out frames that nothing refers to, a third to a half of a
usual H.264 or HEVC file, notices damage, and can be told the colours of a file without tags. `torchcodec`: for codecs
where there is nothing to leave out; frames of H.264 and HEVC are checked by PyAV first, which costs as much again.
`nvdec` (torchcodec on CUDA) and `dali` decode on the GPU. `pyav-sequential`: every frame from the start, the last
resort.
"""

from __future__ import annotations

from veripo_fast.video.timeline import Stream, Timeline

GPU_DECODERS = ("nvdec", "dali")
HD_WIDTH, HD_HEIGHT = 1280, 720
"""From one of them on, a video without colour tags is taken as BT.709, below as BT.601: what encoders mean by it."""
PICKED = ("h264", "hevc")
"""Codecs whose packets tell what can be left out."""
UNSPECIFIED = 2
"""Code point of a colour matrix that is not named (ITU-T H.273)."""
_NVDEC = {"h264": (4096, {"yuv420p", "yuvj420p"}), "hevc": (8192, {"yuv420p", "yuvj420p", "yuv420p10le"}),
          "vp9": (8192, {"yuv420p"})}
"""Codec -> longest side in pixels and pixel formats that NVDEC of H100 and H200 decodes. They have no AV1 decoder."""


def untagged_hd(stream: Stream) -> bool:
    """Whether BT.709 must be assumed."""
    return stream.matrix == UNSPECIFIED and (stream.width >= HD_WIDTH or stream.height >= HD_HEIGHT)


def readers(timeline: Timeline, decoder: str) -> tuple[str, ...]:
    """Decoders to try, the best first; `decoder` is video.decoder of the configuration."""
    if not timeline.has_stamps:
        return ()
    picked = timeline.stream.codec in PICKED or untagged_hd(timeline.stream)
    on_cpu = ("pyav", "torchcodec") if picked else ("torchcodec", "pyav")
    return on_cpu if decoder == "auto" else (decoder, *(name for name in on_cpu if name != decoder))


def first_decoder(timeline: Timeline, decoder: str) -> str:
    """The one that is tried first."""
    return (*readers(timeline, decoder), "pyav-sequential")[0]


def refuses(name: str, timeline: Timeline) -> str | None:
    """Why a decoder must not be given this file although it might take it; None where it may."""
    stream = timeline.stream
    if name in ("torchcodec", "nvdec") and untagged_hd(stream):
        return f"it is HD without colour tags, so BT.709 is meant, and {name} assumes BT.601"
    if name != "pyav" and timeline.trouble:
        return timeline.trouble
    return nvdec_refuses(stream) if name == "nvdec" else None


def nvdec_refuses(stream: Stream) -> str | None:
    """Why NVDEC of H100 and H200 cannot decode a stream; None where it can."""
    side, formats = _NVDEC.get(stream.codec, (0, set()))
    if stream.pixel_format not in formats:
        return f"NVDEC does not decode {stream.codec} in {stream.pixel_format}"
    if max(stream.width, stream.height) > side:
        return f"NVDEC decodes {stream.codec} up to {side} pixels a side"
    return None
