"""Thumbnails of what the policy saw, as data URIs.

Frames come from the same decoder under the same sampling contract as in training. A medium that cannot be shown becomes
a sentence in its place: a report must not depend on videos that may have been moved since.
"""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.data.archives import locate
from veripo_fast.errors import ConfigError, MediaError
from veripo_fast.report.run_data import Row, RunData, part
from veripo_fast.types import Image, Media, Video

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture

MAX_FRAMES = 12
"""Thumbnails per video."""
THUMBNAIL_SIDE = 168
"""Longer side in pixels."""
JPEG_QUALITY = 72
DECODE_SECONDS = 180.0
"""Media not begun after so long are left out: a report of a large run must not take an hour."""
DEFAULT_FACTOR = 28
"""patch_size * spatial_merge_size of Qwen2.5-VL, when no checkpoint says otherwise."""


class FrameStrips:
    """Decodes each medium once; `shown` holds, by key, its frames or the reason why there are none.

    Args:
        factor: pixels per merged patch side.
        root: where relative paths that are not found start.
    """

    def __init__(self, contract: VideoConfig, factor: int, root: Path) -> None:
        self.contract, self.factor, self.root = contract, factor, root
        self.shown: dict[str, Row] = {}

    @classmethod
    def of_run(cls, run: RunData) -> FrameStrips:
        """As the policy of a run saw them."""
        return cls(video_contract(run.config), merge_factor(run),
                   Path(str(part(run.config, "data").get("media_root") or ".")))

    def key(self, media: Media) -> str:
        """What names a medium in the page."""
        if isinstance(media, Image):
            return media.path if media.sampling is None else f"{media.path}|{media.sampling}"
        extra = "" if media == Video(media.path, media.start_seconds, media.end_seconds) else f"|{media!r}"
        return f"{media.path}|{media.start_seconds}|{media.end_seconds}{extra}"

    def load(self, media: list[Media]) -> None:
        """Decode in the given order, several at a time."""
        unique = {self.key(item): item for item in media}
        deadline = time.monotonic() + DECODE_SECONDS
        with ThreadPoolExecutor(self.contract.workers) as pool:
            strips = pool.map(lambda item: self._strip(item, deadline), unique.values())
        self.shown = dict(zip(unique, strips, strict=True))

    def _strip(self, media: Media, deadline: float) -> Row:
        strip: Row = {"label": _label(media), "frames": [], "total": 0, "error": ""}
        if time.monotonic() > deadline:
            return strip | {"error": "left out: the time for thumbnails was spent on other samples"}
        try:
            total, pictures = self._pictures(media)
        except (MediaError, OSError) as error:
            return strip | {"error": _sentence(error)}
        frames = [{"seconds": seconds, "source": data_uri(picture), "width": picture.width, "height": picture.height}
                  for seconds, picture in pictures]
        return strip | {"frames": frames, "total": total}

    def _pictures(self, media: Media) -> tuple[int, list[tuple[float | None, Picture]]]:
        """(number of frames that the policy saw, at most MAX_FRAMES of them with their times)."""
        from veripo_fast.video.decode import decode, decode_image

        located = replace(media, path=str(self._path(media.path)))
        if isinstance(located, Video) and located.frames:
            located = replace(located, frames=tuple(str(self._path(frame)) for frame in located.frames))
        if isinstance(located, Image):
            return 1, [(None, _picture(decode_image(located, self.contract, self.factor)[0]))]
        frames = decode(located, self.contract, self.factor)
        total = len(frames.pts_seconds)
        return total, [(float(frames.pts_seconds[i]), _picture(frames.pixels[i]))
                       for i in spread(list(range(total)), MAX_FRAMES)]

    def _path(self, path: str) -> Path:
        here = Path(path).is_absolute() or Path(path).exists() or locate(path) is not None
        return Path(path) if here else self.root / path


def _picture(pixels: torch.Tensor) -> Picture:
    """The picture of uint8 [3, H, W]."""
    import PIL.Image

    return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())


def data_uri(picture: Picture) -> str:
    """The picture as a small JPEG; shrinks `picture` in place."""
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def video_contract(config: Row) -> VideoConfig:
    """The sampling contract of the run; the default one when config.yaml does not hold a valid one."""
    known = {field.name for field in fields(VideoConfig)}
    try:
        return VideoConfig(**{key: value for key, value in part(config, "video").items() if key in known})
    except (ConfigError, TypeError):
        return VideoConfig()


def checkpoint_folders(run: RunData) -> list[Path]:
    """Folders that may hold the policy's config.json and tokenizer.json, newest checkpoint first."""
    saved = sorted(run.dir.checkpoints.glob("step_*"), reverse=True)
    return [*saved, Path(str(part(run.config, "model").get("path") or "."))]


def merge_factor(run: RunData) -> int:
    """Pixels per merged patch side, from the policy's own config.json."""
    for folder in checkpoint_folders(run):
        vision = part(_json(folder / "config.json"), "vision_config")
        if "patch_size" in vision and "spatial_merge_size" in vision:
            return int(vision["patch_size"]) * int(vision["spatial_merge_size"])
    return DEFAULT_FACTOR


def _json(path: Path) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _label(media: Media) -> str:
    name = Path(media.path).name
    if isinstance(media, Image) or (media.start_seconds is None and media.end_seconds is None):
        return name
    end = "end" if media.end_seconds is None else f"{media.end_seconds:g}"
    return f"{name}, {media.start_seconds or 0:g} to {end} s"


def _sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
