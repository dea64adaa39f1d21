"""The kernels against their peers in one run: time and peak memory, each peer checked before it is timed.

    python bench/kernels/bench_kernels.py [--ops linear_logprobs ...] [--peers TRL ...] [--shape T D V] [--rounds N]
        [--plot]

or `veripo bench kernels`. Without options: on a CPU the rows that a CPU can show, on a GPU the project's shapes. Every
line goes to bench/results/kernels.jsonl. A peer that is not installed is named; one with another result is not timed.
Letters: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any, get_args

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
from veripo_kernels import status
from veripo_kernels.options import PolicyLossName, PreferenceLossName

from bench import recipe
from bench.kernels import child
from bench.kernels.cases import Shape, mean_entropy, shapes_of
from bench.kernels.peers import NAIVE, OURS, PEERS, Peer, Result
from bench.kernels.rows import Row, against_plainest, build, idle_tokens, memory, named
from bench.measure import Ratio, clock_of, digits, paired, relative_error

CPU_DEFAULT = ("linear_logprobs", "gather_logprobs", "gather_logprobs_backward")
"""The losses of given log-probs are the definition itself on a CPU."""
OP_OF = {"linear_nll": "linear_policy_loss", "gather_logprobs_backward": "gather_logprobs"}
"""What computes ours, where the comparison has another name."""
LOSSES = (*get_args(PolicyLossName), *get_args(PreferenceLossName))
FAILURES = (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, AssertionError)
"""What a library raises where it cannot run; memory that runs out is a RuntimeError too."""


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, of a scalar relative to at least 1: it is a sum of terms of that size."""
    return float((got - want).abs() / want.abs().clamp(min=1)) if want.dim() == 0 else relative_error(got, want)


def differences(got: Result, naive: Result, truth: Result) -> dict[str, float]:
    """Errors against float64 that are more than four times those of naive torch, plus 16 roundings of float32."""
    found = {}
    for name in truth.keys() & got.keys():
        error, plain = error_of(got[name], truth[name]), error_of(naive[name], truth[name])
        if not error <= 4 * plain + 16 * torch.finfo(torch.float32).eps:
            found[name] = digits(error)
    return found


def small(op: str, shape: Shape) -> Shape:
    """A shape for the check in float64 that keeps the vocabulary, by which implementations cut their work."""
    if op.startswith("gather"):
        return Shape(min(shape.tokens, 8), 1, shape.vocabulary)
    return Shape(min(shape.tokens, 96 if op.startswith("linear") else 4096), min(shape.hidden, 64), shape.vocabulary)


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a peer gives, or why it gives nothing."""
    try:
        return run(), None
    except FAILURES as error:
        return None, f"{type(error).__name__}: {child.last_line(str(error))[:200]}"


class Comparison:
    """The peers of one op on one shape."""

    def __init__(self, op: str, shape: Shape, dtype: torch.dtype, device: torch.device, idle: float,
                 wanted: list[str]) -> None:
        self.op, self.shape, self.dtype, self.device, self.idle = op, shape, dtype, device, idle
        self.unusable: dict[str, str] = {}
        self.peers: dict[str, Peer] = {}
        for name, peer in PEERS[op].items():
            if wanted and name not in (OURS, NAIVE) and not any(word.lower() in name.lower() for word in wanted):
                continue
            reason = peer.missing(device)
            if reason is None:
                self.peers[name] = peer
            else:
                self.unusable[name] = reason

    def drop(self, name: str, reason: str) -> None:
        del self.peers[name]
        self.unusable[name] = reason

    def check(self) -> None:
        """Leave out the peers that compute something else, on a small shape against float64."""
        case = build(self.op, small(self.op, self.shape), self.dtype, self.device, idle=self.idle)
        naive = self.peers[NAIVE].run(case)
        truth = self.peers[NAIVE].run(case.to(torch.float64))
        for name in list(self.peers):
            got, reason = attempt(lambda name=name: self.peers[name].run(case))
            if reason is None and (wrong := differences(got, naive, truth)):
                reason = "another result: " + ", ".join(f"{key} off by {error}" for key, error in wrong.items())
            if reason is not None:
                self.drop(name, reason)

    def memory(self) -> dict[str, Row]:
        """Peaks; also leaves out the peers whose results have other norms on the whole shape."""
        found: dict[str, Row] = {}
        allowed = 1e-3 if self.dtype == torch.float32 else 3e-2
        for name in sorted(self.peers, key=lambda name: name != NAIVE):
            row, reason = attempt(lambda name=name: child.peak_of(self.op, name, self.shape, self.dtype, self.device,
                                                                  idle=self.idle))
            if reason is None:
                like = found.get(NAIVE, row)["norms"]
                wrong = [key for key in row["norms"].keys() & like.keys()
                         if not abs(row["norms"][key] - like[key]) <= allowed * like[key] + 1e-6]
                reason = f"another result on the whole shape: {', '.join(wrong)}" if wrong else None
            if reason is None:
                found[name] = row
            else:
                self.drop(name, reason)
        return found

    def times(self, rounds: int) -> dict[str, list[float]]:
        case = build(self.op, self.shape, self.dtype, self.device, idle=self.idle)
        self.entropy = digits(mean_entropy(case)) if self.op.startswith("linear") else None
        ways: dict[str, Callable[[], object]] = {
            name: lambda peer=peer: peer.run(case) for name, peer in self.peers.items()}
        calls = 20 if self.op in ("grpo_loss", "dpo_loss") else 1
        return paired(ways, rounds, clock_of(self.device, calls), warmups=2 if self.device.type == "cuda" else 0)

    def rows(self, rounds: int) -> list[Row]:
        """A line per peer, with its ratios to the baseline: naive torch, or ours where that does not fit."""
        self.check()
        peaks, seconds = self.memory(), self.times(rounds)
        base = NAIVE if NAIVE in seconds else OURS
        common = {"bench": "kernels", "op": self.op, **named(self.shape, self.dtype), "idle_share": self.idle,
                  "entropy_mean": self.entropy, "baseline": base, "baseline_version": PEERS[self.op][base].version(),
                  "implementation": status()[OP_OF.get(self.op, self.op)][self.device.type]}
        lines = []
        for name, values in seconds.items():
            ratio = Ratio.of(values, seconds[base])
            lines.append(common | {
                "peer": name, "peer_version": PEERS[self.op][name].version(), "seconds": [digits(v) for v in values],
                "median_seconds": digits(statistics.median(values)), **ratio.fields("time_ratio"),
                "peak_bytes": peaks[name]["peak_bytes"],
                "peak_ratio": digits(peaks[name]["peak_bytes"] / max(peaks[base]["peak_bytes"], 1)),
                "gradient_bytes": peaks[name]["gradient_bytes"]})
        return lines + [common | {"peer": name, "not_timed": reason} for name, reason in self.unusable.items()]


def told(row: Row) -> str:
    """A line as one sentence."""
    shape = f"{row['op']} T={row['tokens']} D={row['hidden']} V={row['vocabulary']}"
    if "not_timed" in row:
        return f"{shape}: {row['peer']} not timed: {row['not_timed']}"
    return (f"{shape}: {row['peer']} {row['median_seconds']} s, {row['time_ratio_median']}x the time of "
            f"{row['baseline']} ({row['time_ratio_min']} to {row['time_ratio_max']}), "
            f"{row['peak_bytes'] / 2**20:.0f} MiB ({row['peak_ratio']}x)")


def write(row: Row) -> None:
    recipe.append("kernels", row)


def compare(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Row]:
    lines = []
    for op in args.ops:
        for shape in [Shape(*shape) for shape in args.shape] or shapes_of(op, device, args.trial):
            for row in Comparison(op, shape, dtype, device, args.idle, args.peers).rows(args.rounds):
                write(row)
                print(told(row), flush=True)
                lines.append(row)
    return lines


def own_rows(device: torch.device, rounds: int, scale: int) -> list[Row]:
    """What has no peer, on a CPU: accuracy, idle tokens and memory; `scale` divides every size, for a trial."""
    accuracies = [child.call("accuracy", shape=[512 // scale, 256 // scale, 32768 // scale]),
                  child.call("accuracy", shape=[64 // scale, 128 // scale, 4096 // scale], impl="triton",
                                    interpret=True)
                  | {"note": "Triton kernels in the interpreter"}]
    workspace = (1 << 30) * 16384 // 151936 // scale // scale
    reduced = {"note": "V reduced from 151,936 so that naive torch fits in memory, the workspace in proportion"}
    sizes = Shape(8192 // scale, 1024 // scale, 16384 // scale)
    rows = [*accuracies,
            idle_tokens(Shape(2048 // scale, 1024 // scale, 32768 // scale), device, torch.float32, rounds=rounds,
                        workspace_bytes=workspace),
            *(row | reduced for row in memory(sizes, device, torch.float32, long_tokens=2 * sizes.tokens,
                                              peak=child.peak_of, workspace_bytes=workspace))]
    return [{"bench": "kernels", "op": "linear_policy_loss", **row} for row in rows]


def plot(rows: list[Row]) -> str:
    """bench/results/kernels.png: time and peak memory of every timed peer over the baseline's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if "time_ratio_median" in row]
    groups = list(dict.fromkeys((row["op"], row["tokens"], row["hidden"], row["vocabulary"]) for row in timed))
    figure, axes = pyplot.subplots(len(groups), 2, squeeze=False, layout="constrained",
                                   figsize=(11, 0.6 + sum(0.9 + 0.32 * len(PEERS[group[0]]) for group in groups)))
    for line, group in zip(axes, groups, strict=True):
        members = [row for row in timed if (row["op"], row["tokens"], row["hidden"], row["vocabulary"]) == group][::-1]
        names = [row["peer"] for row in members]
        for axis, key, label in zip(line, ("time_ratio", "peak_ratio"), ("time", "peak memory"), strict=True):
            values = [row.get(f"{key}_median", row.get(key)) for row in members]
            axis.barh(names, values, color=["#c44e52" if name == OURS else "#8c9bb0" for name in names])
            if key == "time_ratio":
                spread = [[value - row[f"{key}_min"] for value, row in zip(values, members, strict=True)],
                          [row[f"{key}_max"] - value for value, row in zip(values, members, strict=True)]]
                axis.errorbar(values, names, xerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
            ends = [row.get(f"{key}_max", value) for row, value in zip(members, values, strict=True)]
            for name, value, end in zip(names, values, ends, strict=True):
                axis.annotate(f"{value:.2f}", (end, name), (4, 0), textcoords="offset points", va="center", fontsize=8)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.margins(x=0.2)
            axis.set_title(f"{group[0]}: {label} over {members[0]['baseline']}, "
                           f"T={group[1]:,} D={group[2]:,} V={group[3]:,}",
                           fontsize=8)
            axis.tick_params(labelsize=8)
            if axis is line[1]:
                axis.set_yticklabels([])
    figure.suptitle(f"{recipe.device_name()}; less is better", fontsize=9)
    path = recipe.RESULTS / "kernels.png"
    figure.savefig(path, dpi=130)
    return str(path)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="veripo bench kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=PEERS, help="default: on a CPU those that differ from torch there")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME",
                        help="only peers whose name has one of these words; naive torch and ours always run")
    parser.add_argument("--shape", nargs=3, type=int, action="append", default=[], metavar=("T", "D", "V"))
    parser.add_argument("--idle", type=float, default=0.0, metavar="SHARE",
                        help="completions without an advantage (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 3 on a CPU")
    parser.add_argument("--trial", type=int, default=1, metavar="N",
                        help="divide the default sizes by N: to see that everything runs")
    parser.add_argument("--losses", nargs="+", metavar="NAME", choices=LOSSES,
                        help="only these losses of given log-probs, T=65,536, over grpo or sigmoid")
    parser.add_argument("--plot", action="store_true", help="also write bench/results/kernels.png")
    args = parser.parse_args()
    names = {name: None for op in args.ops or PEERS for name in PEERS[op] if name not in (OURS, NAIVE)}
    for word in args.peers:
        if not any(word.lower() in name.lower() for name in names):
            parser.error(f"no peer has {word!r} in its name; there are {', '.join(names) or 'none for these ops'}")
    return args


def main() -> None:
    args = parsed()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    everything = args.ops is None
    args.ops = args.ops or list(PEERS if on_gpu else CPU_DEFAULT)
    args.rounds = args.rounds or (20 if on_gpu else 3)
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    if args.losses:
        for name in args.losses:
            row = {"bench": "kernels", "op": "losses",
                   **against_plainest(name, 65536 // args.trial, device, rounds=args.rounds)}
            write(row)
            print(f"{row['row']}: {row['ratio_median']} ({row['ratio_min']} to {row['ratio_max']})", flush=True)
        return
    rows = compare(args, device, dtype)
    if everything and not on_gpu:
        for row in own_rows(device, args.rounds, args.trial):
            write(row)
            print(f"{row['row']}: {row.get('value', '')} {'reached' if row['passed'] else 'missed'}; {row}", flush=True)
    if args.plot:
        print(plot(rows))


if __name__ == "__main__":
    main()
