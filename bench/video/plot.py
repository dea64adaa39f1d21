"""One figure of the video bench, from the newest line of each kind."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS, ALONE, PEERS = "#c44e52", "#7f2a2e", ("#8c9bb0", "#b9c3d0")
RIGHT, WRONG, REFUSED = "#7aa974", "#e08214", "#d9d9d9"
TITLES = {"end_to_end": "file to pixel values", "preprocessing": "decoded frames to pixel values"}


def newest(rows: list[Row]) -> list[Row]:
    """The last line of each kind, in the order of first appearance."""
    keys = ("row", "clip", "peer", "epoch", "tower", "decoder", "prefetch")
    return list({tuple(row.get(key) if key != "decoder" or row["row"] == "wrong_frames" else None for key in keys): row
                 for row in rows if "not_measured" not in row}.values())


def plot(rows: list[Row], path: Path) -> Path:
    """Draw the lines into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = newest(rows)
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.2), layout="constrained")
    for axis, name in zip(axes[0], TITLES, strict=False):
        # clips without noise are in the lines alone: 18 bars in a panel cannot be read
        _speed(axis, [row for row in rows if row["row"] == name and row["noise"]], TITLES[name])
    _step(axes[0][2], [row for row in rows if row["row"] == "grpo_step"])
    frames = [row for row in rows if row["row"] == "wrong_frames"]
    _frames(axes[1][0], frames, "whole", "the frames asked for, whole files")
    _frames(axes[1][1], frames, "damaged", "the frames asked for, damaged files")
    _wait(axes[1][2], [row for row in rows if row["row"] == "prefetch_wait"])
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    device = rows[-1]["device"].split(",")[0] if rows else ""
    figure.suptitle(f"{device}, one core (training: two); bars are medians, whiskers the range", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _bars(axis: Any, entries: list[tuple[str, list[float], str]], unit: str) -> None:
    """Horizontal bars from the top: (label, values of all rounds, colour)."""
    entries = entries[::-1]
    middle = [statistics.median(values) for _, values, _ in entries]
    places = range(len(entries))
    axis.barh(places, middle, color=[colour for _, _, colour in entries])
    spread = [[value - min(values) for value, (_, values, _) in zip(middle, entries, strict=True)],
              [max(values) - value for value, (_, values, _) in zip(middle, entries, strict=True)]]
    axis.errorbar(middle, places, xerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
    for place, value, (_, values, _) in zip(places, middle, entries, strict=True):
        axis.annotate(f"{value:.3g}", (max(values), place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, [label for label, _, _ in entries])
    axis.set_xlabel(unit, fontsize=8)
    axis.margins(x=0.15)


def _speed(axis: Any, rows: list[Row], title: str) -> None:
    entries = []
    for clip in dict.fromkeys(row["clip"] for row in rows):
        members = [row for row in rows if row["clip"] == clip]
        entries.append((f"{clip}  veripo", members[0]["ours_cpu_seconds"], OURS))
        for row, colour in zip(members, PEERS, strict=False):
            gain = f"{row['peer'].split(' + ')[0]}\n({row['cpu_speedup_median']:.2g}x veripo)"
            entries.append((gain, row["peer_cpu_seconds"], colour))
    count = rows[0]["frames"] if rows else 0
    _bars(axis, entries, "CPU seconds")
    _decoding(axis, [next((row for row in rows if label == f"{row['clip']}  veripo"), None) for label, _, _ in entries])
    axis.set_title(f"{title}, {count} frames of {rows[0]['seconds'] if rows else 0} s", fontsize=9)


def _decoding(axis: Any, rows: list[Row | None]) -> None:
    """Over our bars the part that FFmpeg alone takes; `rows` from the top, None where the bar is a peer's."""
    found = [(len(rows) - 1 - place, statistics.median(row["decode_cpu_seconds"]))
             for place, row in enumerate(rows) if row and "decode_cpu_seconds" in row]
    if found:
        axis.barh(*zip(*found, strict=True), height=0.4, color=ALONE, label="of which the decoder alone")
        axis.legend(frameon=False, fontsize=8, loc="lower right")


def _step(axis: Any, rows: list[Row]) -> None:
    frozen = [row for row in rows if row["tower"] == "frozen"]
    entries = [(row["peer"].split(" + ")[0] + "\nper completion", row["peer_cpu_seconds"], PEERS[0])
               for row in frozen if row["epoch"] == "first"]
    names = {"first": "first epoch", "disk": "again, from disk", "memory": "again, from memory"}
    entries += [(f"veripo\n{names[row['epoch']]}", row["ours_cpu_seconds"], OURS) for row in frozen]
    entries += [(f"veripo, tower trains\n{names[row['epoch']]}", row["ours_cpu_seconds"], OURS)
                for row in rows if row["tower"] == "trained" and row["epoch"] == "disk"]
    _bars(axis, entries, "CPU seconds, without the tower")
    axis.set_xscale("log")
    if rows:
        axis.set_title(f"video work of a GRPO step: {rows[0]['prompts']} x {rows[0]['clip']}, G = {rows[0]['group']}",
                       fontsize=9)


def _frames(axis: Any, rows: list[Row], group: str, title: str) -> None:
    rows = rows[::-1]
    names, left = [row["decoder"] for row in rows], [0] * len(rows)
    for kind, colour in (("right", RIGHT), ("wrong", WRONG), ("refused", REFUSED)):
        counts = [row[group][kind] for row in rows]
        axis.barh(names, counts, left=left, color=colour, label=kind)
        for name, count, start in zip(names, counts, left, strict=True):
            if count:
                axis.annotate(str(count), (start + count / 2, name), ha="center", va="center", fontsize=8)
        left = [start + count for start, count in zip(left, counts, strict=True)]
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.22))
    axis.set_title(f"{title} ({len(rows[0][group]['clips']) if rows else 0})", fontsize=9)


def _wait(axis: Any, rows: list[Row]) -> None:
    entries = []
    for row in rows:
        label = f"{'with' if row['prefetch'] else 'without'} prefetch\n({row['wait_share']:.1%} of the time)"
        shares = [100 * wait / step for wait, step in zip(row["wait_seconds"], row["step_seconds"], strict=True)]
        entries.append((label, shares[1:], OURS if row["prefetch"] else PEERS[0]))
    _bars(axis, entries, "% of a step, from the second on")
    axis.set_title("waiting for video in the demo's training", fontsize=9)
