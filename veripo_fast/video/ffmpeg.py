"""Makes torchcodec load on a machine without FFmpeg, from the libraries inside the `av` wheel.

torchcodec asks the loader for `libavcodec.so.62`; the wheel holds `libavcodec-<hash>.so.62.28.102`, whose SONAME is
hashed too, and LD_LIBRARY_PATH is read only when a process starts. glibc remembers a loaded library under every name
that a search has found it by. So we write a 1 KB shared object that needs the plain names and has RPATH `$ORIGIN`, put
it beside symbolic links with those names, and load it: from then on the plain names mean the copies that PyAV already
uses. The folder is deleted at once. Takes 10 to 20 ms and shares one FFmpeg between torchcodec and PyAV, so both
give the same pixels.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import re
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from veripo_kernels.once import once

_LOG = logging.getLogger(__name__)
_FFMPEG_FILE = re.compile(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+\.so\.(\d+)")


@once
def torchcodec_decoder() -> Any:
    """`torchcodec.decoders.VideoDecoder`, or None when torchcodec cannot be loaded (said once; PyAV is used then)."""
    if importlib.util.find_spec("torchcodec") is None:
        _LOG.warning("torchcodec is not installed; PyAV decodes all videos")
        return None
    if "torchcodec" not in sys.modules:
        register_bundled_ffmpeg()
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: none of its FFmpeg variants could be loaded
        reason = str(error).strip().splitlines()[0]
        _LOG.warning("torchcodec cannot be loaded (%s); PyAV decodes all videos", reason)
        return None
    return VideoDecoder


def register_bundled_ffmpeg() -> bool:
    """Let plain names such as `libavcodec.so.62` find the FFmpeg of the `av` wheel in this process.

    Returns:
        False where the wheel brings no FFmpeg (conda, a source build) or the system is not Linux: the loader then
        finds a system FFmpeg or none.
    """
    import av

    libraries = _plain_names(Path(av.__file__).parent.parent / "av.libs")
    if not libraries or not sys.platform.startswith("linux"):
        return False
    with tempfile.TemporaryDirectory(prefix="veripo-ffmpeg-") as folder:
        for name, library in libraries.items():
            ctypes.CDLL(str(library))
            (Path(folder) / name).symlink_to(library)
        stub = Path(folder) / "names.so"
        stub.write_bytes(_stub_library(sorted(libraries), next(iter(libraries.values()))))
        try:
            ctypes.CDLL(str(stub))
        except OSError as error:
            _LOG.warning("the FFmpeg inside the av wheel cannot be shared with torchcodec: %s", error)
            return False
    return True


def _plain_names(folder: Path) -> dict[str, Path]:
    """`libavcodec.so.62` -> .../libavcodec-5e6b81c2.so.62.28.102, for every FFmpeg library in the folder."""
    if not folder.is_dir():
        return {}
    matches = [(_FFMPEG_FILE.match(path.name), path) for path in sorted(folder.iterdir())]
    return {f"{match[1]}.so.{match[2]}": path for match, path in matches if match}


_HEADER_BYTES, _SEGMENT_BYTES = 64, 56
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_READ_WRITE = 6
_DT_NEEDED, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_RPATH = 1, 4, 5, 6, 10, 11, 15


def _stub_library(needed: list[str], sibling: Path) -> bytes:
    """A 64-bit little-endian ELF shared object without code: it needs the libraries named and searches `$ORIGIN`.

    Machine type and flags are copied from `sibling`. No segment is executable, so a noexec /tmp does not stop it.
    """
    with sibling.open("rb") as file:
        like = file.read(_HEADER_BYTES)
    names, strings = [], b"\0"
    for name in [*needed, "$ORIGIN"]:
        names.append(len(strings))
        strings += name.encode() + b"\0"
    symbol_at = _HEADER_BYTES + 3 * _SEGMENT_BYTES
    hash_at = symbol_at + 24
    strings_at = hash_at + 16
    dynamic_at = -(-(strings_at + len(strings)) // 16) * 16
    entries = [*((_DT_NEEDED, name) for name in names[:-1]), (_DT_RPATH, names[-1]), (_DT_HASH, hash_at),
               (_DT_STRTAB, strings_at), (_DT_SYMTAB, symbol_at), (_DT_STRSZ, len(strings)), (_DT_SYMENT, 24), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", tag, value) for tag, value in entries)
    total = dynamic_at + len(dynamic)
    machine, flags = struct.unpack_from("<H", like, 18)[0], struct.unpack_from("<I", like, 48)[0]
    header = like[:16] + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, _HEADER_BYTES, 0, flags,
                                     _HEADER_BYTES, _SEGMENT_BYTES, 3, 64, 0, 0)
    segments = (struct.pack("<IIQQQQQQ", _PT_LOAD, _READ_WRITE, 0, 0, 0, total, total, 0x10000)
                + struct.pack("<IIQQQQQQ", _PT_DYNAMIC, _READ_WRITE, dynamic_at, dynamic_at, dynamic_at,
                              len(dynamic), len(dynamic), 8)
                + struct.pack("<IIQQQQQQ", _PT_GNU_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16))
    tables = bytes(24) + struct.pack("<4I", 1, 1, 0, 0) + strings
    return (header + segments + tables).ljust(dynamic_at, b"\0") + dynamic
