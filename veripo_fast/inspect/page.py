"""The HTML page of `veripo inspect`: one file without script or network, in the report's style.

Everything shown is counted from the rows of media.parquet, so whoever wants another table makes it from those. Text of
file names and of FFmpeg reaches the page escaped by Jinja only.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from veripo_fast.config.inputs import VideoConfig
from veripo_fast.config.schema import Config
from veripo_fast.inspect.corpus import MAX_SHOWN, SAMPLES, Corpus, PolicySizes, skipped_media
from veripo_fast.report.axes import tick_labels, ticks
from veripo_fast.report.frames import spread
from veripo_fast.report.page import MAX_SKIPPED, page_environment
from veripo_fast.text import duration, memory, number, plural
from veripo_fast.video.decoders import GPU_DECODERS

Row = dict[str, Any]
BARS = 10
_HISTOGRAMS = (("seconds", "Duration", "seconds"), ("fps", "Frame rate", "frames per second, average"),
               ("height", "Height", "pixels, as stored"), ("gop_median", "Key frames", "one in so many frames, median"),
               ("taken_frames", "Frames taken", "per medium"), ("tokens", "Tokens", "per medium"),
               ("decode_frames", "Frames decoded", "for the frames taken"))
_STREAMS = (("container", "Container"), ("codec", "Codec"), ("profile", "Profile"), ("pixel_format", "Pixel format"),
            ("color_matrix", "Colour matrix"), ("color_primaries", "Primaries"), ("color_transfer", "Transfer"),
            ("color_range", "Range"), ("rotation", "Rotation"), ("mirrored", "Mirrored"),
            ("decoder", "Decoder"), ("kind", "Medium"))


def render(table: pa.Table, thumbnails: Mapping[int, Sequence[str]], corpus: Corpus, config: Config,
           sizes: PolicySizes, workers: int, data: Sequence[str]) -> str:
    """The page as text.

    Args:
        table: rows as in media.parquet.
        thumbnails: row number -> data URIs of its pictures.
        data: what was inspected, as typed.
    """
    skipped = [*skipped_media(table), *corpus.records]
    ok = table.filter(pc.equal(table["status"], "ok"))
    return page_environment().get_template("inspect.html").render(
        name=", ".join(data), written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        figures=_figures(table, ok, len(corpus.records)), notes=_notes(table, corpus, config, sizes),
        reasons=_reasons([(item.path, item.reason) for item in skipped]), skipped_total=len(skipped),
        skipped_rows=[(item.record, item.reason.removeprefix(item.path).strip()) for item in skipped[:MAX_SKIPPED]],
        contract=_contract(config.video), estimates=_estimates(ok, workers),
        histograms=[chart for column, title, note in _HISTOGRAMS
                    if (chart := histogram(_values(ok, column), title, note))],
        streams=[_marks(table), _gpu_decoders(table), *(_count(table, column, title) for column, title in _STREAMS)],
        media=[_shown(table, row, thumbnails.get(row, ())) for row in spread(list(range(len(table))), MAX_SHOWN)],
        total=f"{len(table):,}")


def histogram(values: Sequence[float], title: str, note: str) -> Row | None:
    """Counts of the values over about ten round intervals; None without values.

    Values above the 99th percentile share the last bar, so that one outlier does not flatten the others.
    """
    if not values:
        return None
    low, high = min(values), sorted(values)[math.ceil(0.99 * len(values)) - 1]
    if high == low:
        marks = [low]
    else:
        whole = all(float(value).is_integer() for value in values)
        step = max(_step(ticks(low, high, BARS)), 1.0 if whole else 0.0)
        marks = [step * i for i in range(math.floor(low / step), math.floor(high / step) + 1)]
    counts = Counter(min(max(sum(value >= mark - 1e-9 for mark in marks) - 1, 0), len(marks) - 1) for value in values)
    labels = [number(marks[0])] if len(marks) == 1 else tick_labels(marks)
    last = "" if max(values) < 2 * marks[-1] - marks[max(len(marks) - 2, 0)] or len(marks) == 1 else " and more"
    most = max(counts.values())
    bars = [(label + (last if i == len(marks) - 1 else ""), counts[i], 100 * counts[i] / most)
            for i, label in enumerate(labels)]
    return {"title": title, "note": note, "bars": bars}


def _step(marks: Sequence[float]) -> float:
    return marks[1] - marks[0] if len(marks) > 1 else marks[0] or 1.0


def _values(table: pa.Table, column: str) -> list[Any]:
    return [value for value in table[column].to_pylist() if value is not None]


def _total(table: pa.Table, column: str) -> float:
    return sum(_values(table, column))


def _figures(table: pa.Table, ok: pa.Table, records: int) -> list[Row]:
    tokens = _values(ok, "tokens")
    skipped = len(table) - len(ok)
    said = [f"{skipped:,} would be skipped"] + ([f"{plural(records, 'record')} as well"] if records else [])
    return [{"label": "Media that can be used", "value": f"{len(ok):,} of {len(table):,}", "detail": said},
            {"label": "Video", "value": duration(_total(ok, "seconds")),
             "detail": [f"{_total(ok, 'frames'):,.0f} frames", f"{memory(_total(table, 'bytes'))} of files"]},
            {"label": "Tokens per medium", "value": f"{statistics.median(tokens):,.0f}" if tokens else "–",
             "detail": [f"median; largest {max(tokens):,}", f"{sum(tokens):,} over all"] if tokens else []}]


def _notes(table: pa.Table, corpus: Corpus, config: Config, sizes: PolicySizes) -> list[str]:
    said = [f"Of each video {SAMPLES} frames were decoded: the first and last wanted one and one half way. Damage "
            "between them shows only where it breaks the packets; such a video was decoded at every wanted frame.",
            f"Tokens and tower output are those of model.path {config.model.path} (patches of {sizes.patch_size} "
            f"pixels, merged {sizes.merge_size} x {sizes.merge_size}) in {config.model.dtype}."]
    if len(table) < corpus.total:
        said.append(f"{len(table):,} of {corpus.total:,} media were inspected, evenly spread; all totals are theirs.")
    if corpus.other_files:
        said.append(f"{plural(corpus.other_files, 'file')} without the name of a video left out.")
    return said


def _contract(video: VideoConfig) -> str:
    taken = (f"{video.num_frames} frames" if video.num_frames else
             f"{number(video.fps or 0)} frames per second, {video.min_frames} to {video.max_frames} of them")
    return f"The contract: {taken}, {video.min_pixels:,} to {video.max_pixels:,} pixels each."


def _estimates(ok: pa.Table, workers: int) -> Row:
    """What one pass over the media costs; seconds from the rate at which the samples were decoded here."""
    sampled_pixels = sum(_pixels(ok, "sampled_decode_frames"))
    seconds = _total(ok, "sampled_seconds")
    pixels = sum(_pixels(ok, "decode_frames"))
    rate = sampled_pixels / seconds if seconds else 0.0
    rows = [("frames taken", f"{_total(ok, 'taken_frames'):,.0f}"), ("tokens", f"{_total(ok, 'tokens'):,.0f}"),
            ("frames decoded to take them", f"{_total(ok, 'decode_frames'):,.0f}"),
            ("pixels decoded", f"{pixels / 1e9:,.2f} G")]
    if rate:
        measured = f"{rate / 1e6:,.0f} Mpixel/s per worker measured here, opening included; {plural(workers, 'worker')}"
        rows.append((f"time to decode once ({measured})", duration(pixels / rate / workers)))
    rows += [("proxy, frames as uint8", memory(_total(ok, "proxy_bytes"))),
             ("proxy, frames as JPEG of quality 95", memory(_total(ok, "proxy_jpeg_bytes"))),
             ("tower output, once per medium", memory(_total(ok, "tower_bytes")))]
    return {"title": "One pass over the media that can be used", "header": ("", "estimate"), "rows": rows}


def _pixels(table: pa.Table, frames: str) -> Iterable[int]:
    """Source pixels behind a count of frames, per video."""
    columns = (table[name].to_pylist() for name in (frames, "width", "height"))
    return (count * width * height for count, width, height in zip(*columns, strict=True)
            if None not in (count, width, height))


def _reasons(skipped: Sequence[tuple[str, str]]) -> Row:
    """Reasons without path and numbers, the most frequent first."""
    counts = Counter(re.sub(r"\b\d[\d.]*", "…", reason.removeprefix(path).strip()) for path, reason in skipped)
    return {"title": "Reasons", "header": ("reason", "count"),
            "rows": [(reason, f"{count:,}") for reason, count in counts.most_common(20)]}


def _count(table: pa.Table, column: str, title: str) -> Row:
    values = Counter(_values(table, column))
    unknown = len(table) - sum(values.values())
    rows = [(str(value), f"{count:,}") for value, count in values.most_common(12)]
    return {"title": title, "header": ("", "media"),
            "rows": rows + ([("not known", f"{unknown:,}")] if unknown else [])}


def _marks(table: pa.Table) -> Row:
    """How many media have a property that decoders or budgets trip over."""
    known = table.filter(pc.is_valid(table["frames"])).select(
        ["variable", "hidden_frames", "header_frames", "frames", "damaged_packets", "open_gop", "audio", "nvdec_hopper",
         "bit_depth", "color_matrix", "width", "height"]).to_pylist()
    tests = (("variable frame rate", lambda row: row["variable"]),
             ("frames hidden by an edit list", lambda row: row["hidden_frames"]),
             ("frame count differs from the header's", lambda row: row["header_frames"] not in (None, row["frames"])),
             ("packets damaged", lambda row: row["damaged_packets"]),
             ("open groups of pictures", lambda row: row["open_gop"]),
             ("more than 8 bits", lambda row: (row["bit_depth"] or 8) > 8),
             ("720 lines or more without a colour matrix",
              lambda row: row["color_matrix"] == "untagged" and min(row["width"], row["height"]) >= 720),
             ("sound", lambda row: row["audio"]),
             ("decoded by NVDEC of H100 and H200", lambda row: row["nvdec_hopper"]))
    return {"title": f"Of {len(known):,} videos that could be read", "header": ("", "media"),
            "rows": [(name, f"{sum(bool(holds(row)) for row in known):,}") for name, holds in tests]}


def _gpu_decoders(table: pa.Table) -> Row:
    """Who would decode: where auto begins, and what the decoders of a GPU are given and refuse."""
    rows = [(f"auto begins with {name}", f"{count:,}")
            for name, count in Counter(_values(table, "auto_decoder")).most_common()]
    known = table.filter(pc.is_valid(table["auto_decoder"]))
    for decoder in GPU_DECODERS:
        refusals = known[f"{decoder}_refusal"].to_pylist()
        rows.append((f"{decoder} is given", f"{refusals.count(None):,}"))
        counts = Counter(re.sub(r"\b\d[\d.]*", "…", reason) for reason in refusals if reason is not None)
        rows += [(f"{decoder} is not: {reason}", f"{count:,}") for reason, count in counts.most_common()]
    return {"title": "Decoders: auto on the CPU; nvdec and dali on an H100 or H200, where video.decoder names them",
            "header": ("", "media"), "rows": rows}


def _shown(table: pa.Table, row: int, pictures: Sequence[str]) -> Row:
    facts = {name: table[name][row].as_py() for name in ("path", "reason", "codec", "width", "height", "fps", "seconds",
                                                         "taken_frames", "tokens", "gop_median", "variable")}
    said = []
    if facts["codec"]:
        rate = f"{number(facts['fps'])} fps{', variable' if facts['variable'] else ''}"
        said = [facts["codec"], f"{facts['width']} x {facts['height']}", rate, duration(facts["seconds"]),
                f"key frame every {number(facts['gop_median'])}"]
    if facts["tokens"] is not None:
        said.append(f"{facts['taken_frames']} frames taken, {facts['tokens']:,} tokens")
    return {"path": facts["path"], "reason": facts["reason"], "pictures": pictures, "facts": ", ".join(said)}
