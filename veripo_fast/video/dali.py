"""Frames from NVIDIA DALI, NVDEC on a GPU and VP8, VP9 and MJPEG on a CPU, in the shape of readers.py.

DALI numbers frames itself and tells no times: files whose numbering it would get wrong are refused, and its count of
frames is compared with the timeline's. It converts all colours by BT.601 (41 dB to FFmpeg's RGB on saturated VP9, other
chroma interpolation; 32 dB where BT.709 is meant). BT.709 is repaired in DALI's graph, which leaves 38 dB: what was
clipped stays clipped. Measured on a CPU only.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from ctypes import CDLL
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from veripo_kernels.once import once

from veripo_fast.data.archives import locate
from veripo_fast.video.deadline import check_deadline
from veripo_fast.video.decoders import UNSPECIFIED, nvdec_refuses, untagged_hd
from veripo_fast.video.readers import CHUNK, RefusedError, first_orientation
from veripo_fast.video.timeline import Stream, Timeline

MAX_FILE_BYTES = 2 << 30
"""A file is read into memory as a whole."""
RUN_BYTES = 256 << 20
"""RGB frames that one run of a pipeline decodes; two runs are in memory."""
CPU_CODECS = ("vp8", "vp9", "mjpeg")
CONTAINERS = ("mov", "matroska", "webm")
"""Others carry decoding times only (avi) or may start inside a group of pictures (mpegts)."""
LONGEST_STEP = 1.5
"""Times the median time between frames. A longer one may be a hole in the file: of 120 files with holes or flipped
bytes, DALI returned one with all later frames one too far, and FFmpeg none."""
FILL = (255, 0, 255)
"""RGB of what DALI returns in place of a frame that it does not have."""
BT709, BT601 = 1, (5, 6)
"""Code points of colour matrices (ITU-T H.273)."""
_LOCK = threading.Lock()
_IDLE: dict[tuple[torch.device, bool], list[Any]] = {}


# -- what it can take -------------------------------------------------------------------------------------------------


@once
def missing(device: torch.device) -> str | None:
    """Why DALI cannot be used on a device of this machine; None where it can."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        return f"nvidia.dali cannot be imported ({error}); `pip install 'veripo-fast[dali]'` brings it"
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    try:
        CDLL("libnvcuvid.so.1")
    except OSError:
        return "the driver's libnvcuvid.so.1 is not here (containers need the driver capability `video`)"
    return None


def refusal(timeline: Timeline, device: torch.device) -> str | None:
    """Why DALI must not be given this file; None where its numbers are the timeline's."""
    stream = timeline.stream
    if device.type == "cuda" and nvdec_refuses(stream) is not None:
        return nvdec_refuses(stream)
    if device.type == "cuda" and stream.codec == "vp9":
        return "DALI gives a picture the time of the next packet, and VP9 has packets that show an earlier picture"
    if device.type == "cpu" and stream.codec not in CPU_CODECS:
        return f"DALI decodes {', '.join(CPU_CODECS)} on a CPU, not {stream.codec}"
    if stream.container not in CONTAINERS:
        return f"DALI's frame numbers are not trusted in {stream.container}"
    if not timeline.places:
        return "its packets carry no time stamps"
    if timeline.hidden:
        return f"DALI counts the {timeline.hidden} frames that its edit list hides"
    if timeline.keys[0] < 0:
        return "DALI leaves out frames of negative time"
    if longest_step(timeline) > LONGEST_STEP:
        return "its frame rate varies or frames are missing, and DALI numbers frames as they come out of the decoder"
    if stream.matrix not in (UNSPECIFIED, BT709, *BT601):
        return f"DALI does not convert colour matrix {stream.matrix}"
    if device.type == "cuda" and (stream.width % 2 or stream.height % 2):
        return f"DALI reads the chroma of {stream.width}x{stream.height} in whole pairs"
    if device.type == "cuda" and stream.codec == "hevc" and leads(timeline):
        return "DALI gives other frames the times of those that NVDEC skips after seeking (open groups of pictures)"
    return None


def means_bt709(stream: Stream) -> bool:
    """Whether its colours have to be repaired."""
    return stream.matrix == BT709 or untagged_hd(stream)


def longest_step(timeline: Timeline) -> float:
    """Longest time from one frame to the next over the median; 1 for a single frame."""
    steps = sorted(after - before for before, after in pairwise(timeline.keys))
    return steps[-1] / steps[len(steps) // 2] if steps else 1.0


def leads(timeline: Timeline) -> bool:
    """Whether frames stand behind a key frame in the file and are shown before it."""
    last_place = dict(zip(timeline.keys, accumulate(timeline.places, max), strict=True))
    return any(last_place.get(stamp, place) > place
               for stamp, place in zip(timeline.key_stamps, timeline.key_places, strict=True))


# -- reading ----------------------------------------------------------------------------------------------------------


def read_dali(path: str, timeline: Timeline, wanted: Sequence[int], deadline: float,
              device: torch.device) -> Iterator[torch.Tensor]:
    """Chunks of uint8 [k, 3, H, W] on `device` (NHWC in memory), upright: the frames at `wanted`, ascending.

    On a GPU they are ready on torch's current stream. While a chunk is used the next run of frames is being decoded.

    Raises:
        RefusedError: DALI is not here, must not be given the file, failed, or counts other frames than the timeline.
        MediaError: past `deadline` (monotonic seconds).
    """
    reason = missing(device) or refusal(timeline, device)
    if reason is not None:
        raise RefusedError(reason)
    member = locate(path)
    size = Path(path).stat().st_size if member is None else member.size
    if size > MAX_FILE_BYTES:
        raise RefusedError(f"DALI needs a file in memory, and it has {size >> 20} MiB, over {MAX_FILE_BYTES >> 20}")
    orientation = first_orientation(path, deadline)
    stream = timeline.stream
    per_run = max(CHUNK, RUN_BYTES // (3 * stream.width * stream.height))
    runs = [list(wanted[start:start + per_run]) for start in range(0, len(wanted), per_run)]
    last = len(timeline.seconds) - 1
    encoded = np.fromfile(path, np.uint8) if member is None else np.frombuffer(member.read(), np.uint8)
    queries = [*runs[:-1], [*runs[-1], last, last + 1]]  # the last frame is there, and the one after it is not
    with (_pipeline(device, means_bt709(stream)) as pipeline,
          closing(_decoded(pipeline, encoded, queries, path, deadline, device)) as results):
        for number, frames in enumerate(results):
            height, width = frames.shape[1:3]
            if (height, width) != (stream.height, stream.width):
                raise RefusedError(f"DALI gives {width}x{height}, not {stream.width}x{stream.height}")
            if number == len(runs) - 1:
                filled = _is_fill(frames[-2:])
                if filled != [False, True]:
                    raise RefusedError(f"DALI counts {'fewer' if filled[0] else 'more'} than its {last + 1} frames")
                frames = frames[:-2]
            yield from orientation(frames.permute(0, 3, 1, 2)).split(CHUNK)


def _is_fill(frames: torch.Tensor) -> list[bool]:
    """Of each frame [k, H, W, 3]: whether all its pixels have the same colour and that is FILL, after repair or not."""
    colour = frames[:, :1, :1]
    uniform = (frames == colour).flatten(1).all(1)
    fills = torch.tensor(np.array([FILL, _bt709_of_bt601() @ FILL]), device=frames.device).round().clamp(0, 255)
    near = ((colour.float() - fills[:, None, None, None]).abs() <= 1).flatten(2).all(2).any(0)
    return (uniform & near).tolist()


def _decoded(pipeline: Any, encoded: np.ndarray, queries: Sequence[Sequence[int]], path: str, deadline: float,
             device: torch.device) -> Generator[torch.Tensor]:
    """uint8 [len(query), H, W, 3] for each query, one run ahead of the consumer."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    running = False
    try:
        for query in (*queries, None):
            check_deadline(path, deadline)
            done, running = running, False
            frames = _take(pipeline, stream) if done else None
            if query is not None:
                pipeline.feed_input("encoded", [encoded])
                pipeline.feed_input("frames", [np.array(query, np.int32)])
                pipeline.schedule_run()
                running = True
            if frames is not None:
                yield frames
    except RuntimeError as error:  # all that DALI raises for a file that it cannot decode
        raise RefusedError(_reason(error)) from error
    finally:
        if running:  # nobody wants the result, but DALI still reads `encoded`
            with suppress(RuntimeError):
                _take(pipeline, stream)


def _take(pipeline: Any, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """The result of the run that was scheduled, not copied: DALI's default executor gives its outputs away."""
    (batch,) = pipeline.share_outputs(cuda_stream=stream)
    frames = torch.from_dlpack(batch[0])
    pipeline.release_outputs()
    return frames


def _reason(error: RuntimeError) -> str:
    """DALI's message without the operator's place in the graph and in the source."""
    text = str(error).rpartition("encountered:")[2].strip() or type(error).__name__
    return text.splitlines()[0].rpartition("failed: ")[2].rstrip(". ")


# -- pipelines --------------------------------------------------------------------------------------------------------


@contextmanager
def _pipeline(device: torch.device, bt709: bool) -> Iterator[Any]:
    """An idle pipeline, or a new one; it serves files of every size and codec. After an error it is not used again."""
    key = (device, bt709)
    with _LOCK:
        pipeline = _IDLE[key].pop() if _IDLE.get(key) else None
    if pipeline is None:
        try:
            pipeline = make_pipeline(device, bt709)
            pipeline.build()
        except RuntimeError as error:  # a driver too old for this DALI, or no memory left
            raise RefusedError(f"DALI cannot start ({str(error).strip().splitlines()[0]})") from error
    yield pipeline
    with _LOCK:
        _IDLE.setdefault(key, []).append(pipeline)


def make_pipeline(device: torch.device, bt709: bool) -> Any:
    """The graph: bytes of a file, frame numbers int32 [k] -> RGB uint8 [k, H, W, 3] on `device`. Not yet built."""
    import nvidia.dali

    library: Any = nvidia.dali  # its type stubs do not know all that its arguments may be
    fn, types = library.fn, library.types
    on_gpu = device.type == "cuda"
    index = torch.cuda.current_device() if on_gpu and device.index is None else device.index
    pipeline = library.Pipeline(batch_size=1, num_threads=1, prefetch_queue_depth=1, exec_dynamic=True,
                                device_id=index)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        numbers = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        frames = fn.decoders.video(encoded, frames=numbers, pad_mode="constant", fill_value=list(FILL),
                                   device="mixed" if on_gpu else "cpu", **({"affine": False} if on_gpu else {}))
        if bt709:
            frames = fn.coord_transform(frames, M=_bt709_of_bt601().flatten().tolist(), dtype=types.UINT8)
        pipeline.set_outputs(frames)
    return pipeline


def _bt709_of_bt601() -> np.ndarray:
    """[3, 3]: RGB that was converted by BT.601 -> RGB of the same YUV by BT.709. Blacks, greys and range stay."""
    matrices = []
    for red, blue in ((0.2126, 0.0722), (0.299, 0.114)):  # weights of R and B in Y: ITU-R BT.709, BT.601
        green = 1 - red - blue
        matrices.append([[1, 0, 2 * (1 - red)],
                         [1, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green],
                         [1, 2 * (1 - blue), 0]])
    return np.array(matrices[0]) @ np.linalg.inv(matrices[1])
