"""Four ways to train for right answers with reasonings that agree with them, at equal compute on the demo's corpus.

    python bench/bench_algorithms.py --out /tmp/algorithms [--seeds 0 1 2] [--steps 24 12 12]

`grpo`: GRPO alone. `veripo`: GRPO, verifier and DPO, GRPO. `agreement`: GRPO with a reward for reasonings that agree
with the answer. `online`: GRPO with a preference term on pairs of the step's own rollouts (grpo.dpo_rate). Per seed
`veripo` runs first; the others get as many GRPO steps as cost its FLOPs, two thirds of them at the first learning rate.
What a step of each costs is measured by a pilot of a few steps. Corpus, policy, video contract and both learning rates
are the same. Inconsistency is reported by the rules, which also chose the pairs of `veripo` and `online`.

One line per way and seed in bench/results/algorithms.jsonl; a line that is there is not measured again, and a run that
was stopped goes on. `--table` prints the means over seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from bench.bench_demo import rounded
from veripo_fast.config.load import apply_overrides, check_stages
from veripo_fast.config.schema import Config, StageConfig
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import demo_config
from veripo_fast.run.folder import RunDir
from veripo_fast.run.jsonlines import read_objects
from veripo_fast.run.metrics import read_records
from veripo_fast.trainer import train

TRAIN, HELDOUT = 240, 180
PILOT, PILOT_ONLINE = 3, 8
"""Steps of a pilot; pairs become fewer in the first steps, so that of `online` is longer."""
RATE, AGREEMENT = 0.05, 0.3
"""Weight of the preference term, and of the reward for agreement; neither is tuned. At 0.5 the preference term, which
sums log-probs over tokens where the policy loss takes their mean, kept the demo's accuracy from rising."""
WAYS: dict[str, dict[str, object]] = {
    "veripo": {}, "grpo": {},
    "agreement": {"reward.terms": [{"use": "accuracy"}, {"use": "format", "weight": 0.5},
                                   {"use": "agreement", "weight": AGREEMENT, "on": "accuracy > 0"}]},
    "online": {"grpo.dpo_rate": RATE}}
KEPT = ("accuracy", "accuracy_low", "accuracy_high", "inconsistency_rate", "inconsistency_low", "inconsistency_high",
        "no_verdict_rate", "accurate_and_consistent_rate", "length_mean")


def config_of(way: str, seed: int, folder: Path, run: str, steps: tuple[int, int, int]) -> Config:
    """A way with so many steps of GRPO, DPO (of `veripo` alone) and GRPO again; 0 leaves a stage out."""
    first, pairs, second = steps
    base = replace(demo_config(folder, seed, quick=False), run_dir=str(folder / run), stages=())
    base = apply_overrides(base, {**WAYS[way], "eval.at": "ends", "checkpoint.every": 10,
                                  "optimizer.max_tokens": 8192})
    stages = [StageConfig("grpo", set={"grpo.steps": first})]
    if way == "veripo":
        stages.append(StageConfig("dpo", set={"dpo.max_steps": pairs}))
    if second:
        stages.append(StageConfig("grpo", set={"grpo.steps": second, "grpo.learning_rate": 1.5e-4}))
    return check_stages(replace(base, stages=tuple(stages)))


def trained(config: Config) -> RunDir:
    """The run, begun or gone on with."""
    run = RunDir(config.run_dir)
    train(config, resume=run.config.is_file())
    return run


def flops_of(run: RunDir, kind: str) -> list[float]:
    """FLOPs of each step of the stages of a kind."""
    return [row["speed"]["flops"] for row in read_records(run.metrics) if row["kind"] == kind]


def whole_flops(run: RunDir) -> float:
    """FLOPs of all steps, and of the reference's forward over all pairs, which comes before the first step of DPO: a
    third of what a forward and backward over as many cost."""
    steps = [row for row in read_records(run.metrics) if row["kind"] == "dpo"]
    reference = 0.0
    if steps:
        import pyarrow.parquet as pq

        pairs = pq.read_metadata(run.verifier("dpo-1") / "pairs.parquet").num_rows
        reference = sum(flops_of(run, "dpo")) / 3 * pairs / sum(row.get("pairs", 0) for row in steps)
    return sum(flops_of(run, "grpo")) + sum(flops_of(run, "dpo")) + reference


def pilot_flops(way: str, seed: int, folder: Path) -> float:
    """Mean FLOPs of the first steps of a way."""
    steps = PILOT_ONLINE if way == "online" else PILOT
    config = replace(config_of(way, seed, folder, f"pilot-{way}-{steps}", (steps, 0, 0)), eval=replace(
        demo_config(folder, seed, quick=False).eval, at="never"))
    return statistics.fmean(flops_of(trained(config), "grpo"))


def measure(way: str, seed: int, folder: Path, steps: tuple[int, int, int]) -> dict[str, Any]:
    """Train, and read scores and cost."""
    if way != "veripo":
        leader = RunDir(folder / "veripo")
        step = statistics.fmean(flops_of(leader, "grpo")) * pilot_flops(way, seed, folder) / pilot_flops(
            "grpo", seed, folder)
        total = round(whole_flops(leader) / step)
        steps = (round(total * 2 / 3), 0, total - round(total * 2 / 3))
    started = time.monotonic()
    run = trained(config_of(way, seed, folder, way, steps))
    seconds = time.monotonic() - started
    records = read_records(run.evals)
    scores = {mode: {moment: {key: rounded(record[key]) for key in KEPT} for moment, record in zip(
        ("start", "end"), [record for record in records if record["mode"] == mode], strict=True)}
        for mode in ("greedy", "sampled")}
    flops = whole_flops(run)
    return {"bench": "algorithms", "way": way, "seed": seed, "steps": steps, "seconds_of_last_go": round(seconds),
           "flops_over_veripo": round(flops / whole_flops(RunDir(folder / "veripo")), 3), **scores}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds of sampled completions, the lowest and highest seed in brackets."""
    lines = ["| way | seeds | accuracy | inconsistent | accurate and consistent | tokens | FLOPs |", "|" + "---|" * 7]
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        cells = []
        for key in ("accuracy", "inconsistency_rate", "accurate_and_consistent_rate", "length_mean"):
            scale = 1 if key == "length_mean" else 100
            values = [row["sampled"]["end"][key] * scale for row in own]
            cells.append(f"{statistics.fmean(values):.1f} [{min(values):.1f}, {max(values):.1f}]" if values else "-")
        cost = f"{statistics.fmean(row['flops_over_veripo'] for row in own):.2f}" if own else "-"
        lines.append(f"| {way} | {len(own)} | {' | '.join(cells)} | {cost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of corpora and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=3, default=[24, 12, 12], help="of veripo: GRPO, DPO, GRPO")
    parser.add_argument("--table", action="store_true", help="print what is measured, and stop")
    args = parser.parse_args()
    path = recipe.RESULTS / "algorithms.jsonl"
    if args.table:
        print(table(read_objects(path)[0]))
        return
    for seed in args.seeds:
        folder = args.out / f"seed_{seed}"
        if not (folder / "corpus" / "heldout.jsonl").is_file():
            shutil.rmtree(folder / "corpus", ignore_errors=True)
            write_corpus(folder / "corpus", TRAIN, HELDOUT, seed)
        for way in WAYS:
            done = [row for row in read_objects(path)[0] if (row["way"], row["seed"]) == (way, seed)]
            if not done:
                row = measure(way, seed, folder, tuple(args.steps))
                recipe.append("algorithms", row)
                print(json.dumps(row))


if __name__ == "__main__":
    main()
