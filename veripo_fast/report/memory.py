"""The report's memory table: what phases were predicted to hold and what they held, and owners that were summed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veripo_fast.report.run_data import Row, RunData, finite, read_jsonl
from veripo_fast.report.scores import Table
from veripo_fast.text import memory

_TOLD = {"weights": ("weights", "tower"), "masters": ("masters",), "AdamW's moments": ("AdamW's moments",)}
"""Owner whose tensors were summed -> the predicted owners that it is made of."""


def memory_table(run: RunData) -> Table | None:
    """Stage, phase or owner, predicted, measured, and predicted over measured; None where nothing was measured."""
    rows = [cells for line in read_jsonl(run.dir.memory, run.notes) for cells in _lines(line)]
    return Table("Memory", ["stage", "phase", "predicted", "measured", "ratio"], rows) if rows else None


def _lines(line: Row) -> list[list[str]]:
    """Of one stage: its phases in the order in which they came, then its owners."""
    stage, plan = str(line.get("stage", "?")), _mapping(line.get("predicted"))
    cells = []
    for phase, raw in _mapping(line.get("peak_bytes")).items():
        if (measured := finite(raw)) is not None:
            cells.append([stage, str(phase), *_compared(_sum(plan.get(phase)), measured)])
    owners = _mapping(_mapping(plan.get("update")).get("device"))
    for owner, raw in _mapping(line.get("owner_bytes")).items():
        measured = finite(raw)
        known = [value for name in _TOLD.get(owner, ()) if (value := finite(owners.get(name))) is not None]
        if measured is not None:
            cells.append([stage, f"{owner} alone", *_compared(sum(known) if known else None, measured)])
    return cells


def _compared(predicted: float | None, measured: float) -> list[str]:
    if predicted is None or not measured:
        return ["–", memory(measured), "–"]
    return [memory(predicted), memory(measured), f"{predicted / measured:.2f}"]


def _sum(phase: Any) -> float | None:
    owners = _mapping(_mapping(phase).get("device"))
    return sum(value for raw in owners.values() if (value := finite(raw)) is not None) if owners else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
