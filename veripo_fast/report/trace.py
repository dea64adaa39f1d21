"""A run's timeline as a trace of the Chrome format, which ui.perfetto.dev and chrome://tracing open.

A process per rank, a thread per lane, and on the main lane a step around its phases. Ranks are moved onto the clock of
rank 0 by the median of the offsets of their steps: so what is in order on a rank is in order in the trace.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from veripo_fast.errors import UserError
from veripo_fast.report.timeline import Row, as_text, read_windows, stage_times, step_range
from veripo_fast.run.atomic import atomic_open
from veripo_fast.schedule.timeline import MAIN


def timeline_command(run: Path, out: Path | None, steps: str | None) -> str:
    """`veripo timeline`: what there is to say about a run; with `out` its trace is written too. Raises UserError."""
    chosen = step_range(steps) if steps else None
    offsets: dict[tuple[float, int], list[int]] = {}
    text = as_text(stage_times(_noting(offsets, read_windows(run, chosen))))
    if out is None:
        return text
    medians = {process: round(statistics.median(values)) for process, values in offsets.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(out) as file:
            file.write(b'{"displayTimeUnit": "ms", "traceEvents": [\n')
            for number, event in enumerate(events(read_windows(run, chosen, say=False), medians)):
                file.write((",\n" if number else "").encode() + json.dumps(event).encode())
            file.write(b"\n]}\n")
    except OSError as error:
        raise UserError(f"the trace cannot be written to {out}: {error.strerror or error}") from error
    return f"{text}\n\ntrace: {out} (open it in ui.perfetto.dev)"


def _noting(offsets: dict[tuple[float, int], list[int]], windows: Iterable[Row]) -> Iterator[Row]:
    """The windows as they are; notes of each process, by when its run began and its rank, the offsets of its clock."""
    for row in windows:
        for rank, part in enumerate(row["ranks"]):
            offsets.setdefault((row["began"], rank), []).append(part["offset_us"])
        yield row


def events(windows: Iterable[Row], offsets: dict[tuple[float, int], int]) -> Iterator[dict[str, Any]]:
    """The events of a trace, in microseconds since the first window began.

    Args:
        offsets: of each process, by when its run began and its rank: microseconds to the clock of rank 0.
    """
    lanes: dict[tuple[int, str], int] = {}
    zero: int | None = None
    for row in windows:
        shifts = [round(row["began"] * 1e6) + offsets[row["began"], rank] for rank in range(len(row["ranks"]))]
        if zero is None:
            zero = min(shift + part["start_us"] for shift, part in zip(shifts, row["ranks"], strict=True))
        for rank, part in enumerate(row["ranks"]):
            shift = shifts[rank] - zero
            for lane in dict.fromkeys([MAIN, *(span[1] for span in part["spans"])]):
                if (rank, lane) not in lanes:
                    yield from _names(lanes, rank, lane)
            main, about = lanes[rank, MAIN], {"stage": row["stage"], "global_step": row["global_step"]}
            if row["step"] is not None:
                yield _complete(f"step {row['global_step']}", part["start_us"], part["end_us"], shift, rank, main,
                                {"stage": row["stage"], "step": row["step"], "dropped": part["dropped"]})
            for name, lane, start, end in part["spans"]:
                yield _complete(name, start, end, shift, rank, lanes[rank, lane], about)
            for name, time, value in part["counts"]:
                yield {"ph": "C", "name": name, "pid": rank, "ts": time + shift, "args": {"value": value}}


def _names(lanes: dict[tuple[int, str], int], rank: int, lane: str) -> Iterator[dict[str, Any]]:
    """What a new lane, and with its first one a rank, are called and where they stand."""
    if lane == MAIN:
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    number = lanes[rank, lane] = 1 + sum(other == rank for other, _ in lanes)
    yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": lane}}


def _complete(name: str, start: int, end: int, shift: int, rank: int, lane: int, about: dict[str, Any]
              ) -> dict[str, Any]:
    first = max(start + shift, 0)  # a checkpoint may be in the making when the first window begins
    return {"ph": "X", "name": name, "ts": first, "dur": max(end + shift - first, 0), "pid": rank, "tid": lane,
            "args": about}
