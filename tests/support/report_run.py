"""A synthetic run folder for the tests of the report: three stages, H.264 clips, hostile text in every place."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa

from veripo_fast.rollout.store import write_groups, write_table
from veripo_fast.run.folder import RunDir
from veripo_fast.types import Completion, Message, PreferencePair, Prompt, RolloutGroup, Verdict, Video

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'"><b>&amp;'
STAGES = (("grpo-1", "grpo", 24), ("dpo-1", "dpo", 8), ("grpo-2", "grpo", 16))
COLOURS = {"red": (208, 68, 58), "blue": (58, 96, 200), "green": (64, 160, 92), "yellow": (226, 190, 70)}
CONFIG = """\
run_dir: {run}
seed: 0
video: {{fps: 2.0, num_frames: null, min_frames: 4, max_frames: 16, min_pixels: 3136, max_pixels: 12544, workers: 2}}
data: {{train: [train.jsonl], eval: [eval.jsonl], media_root: ''}}
grpo: {{steps: 24, prompts_per_step: 4, learning_rate: 1.0e-06, drop_easy: 0.0}}
dpo: {{loss: sigmoid, dpo_beta: 0.1, learning_rate: 5.0e-07}}
verifier: {{judge: rules, max_repetition: 0.3}}
stages:
- {{kind: grpo, name: grpo-1, data: [], rollouts_from: '', set: {{}}}}
- {{kind: dpo, name: dpo-1, data: [], rollouts_from: grpo-1, set: {{}}}}
- {{kind: grpo, name: grpo-2, data: [], rollouts_from: '', set: {{grpo.steps: 16, grpo.learning_rate: 5.0e-07}}}}
"""


def make_clip(path: Path, colour: str, seed: int) -> None:
    """Four seconds of a coloured square that crosses a grey frame, and a second one that appears half-way."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(40):
            picture = np.full((96, 128, 3), 226, np.uint8)
            left, top = 6 + index * 2, 18 + (seed * 13) % 40
            picture[top: top + 22, left: left + 22] = COLOURS[colour]
            if index >= 20:
                picture[66:84, 96:114] = (90, 90, 98)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def make_prompts(folder: Path) -> list[Prompt]:
    folder.mkdir(parents=True)
    prompts = []
    for index, colour in enumerate(COLOURS):
        path = folder / f"clip_{index:03d}.mp4"
        make_clip(path, colour, index)
        question = "Which colour has the square that moves from left to right?"
        prompts.append(Prompt(f"colour-{index:03d}", (Message("user", (Video(str(path)), question)),), "choice",
                              "ABCD"[index], tuple(COLOURS), "synth"))
        prompts.append(Prompt(f"seconds-{index:03d}", (Message("user", (
            Video(str(path), 1.0, 3.0), "After how many seconds does the grey square appear?")),), "number", "1.0"))
    hostile = Message("user", (Video(str(folder / "moved_away.mp4")), f"What is shown? {HOSTILE}"))
    return [*prompts, Prompt(f"hostile-{HOSTILE}", (hostile,), "text", HOSTILE, (HOSTILE, "nothing"))]


def make_completion(rng: random.Random, prompt: Prompt, skill: float) -> Completion:
    right = rng.random() < skill
    answer = prompt.gold if right else rng.choice(["A", "B", "C", "D", "2.5"])
    right = answer == prompt.gold
    think = rng.choice([
        "In the first frame the square stands near the left edge. In the last frame it has reached the right edge, "
        "and its colour stays the same throughout.",
        "I compare the frames one by one. The moving square keeps its colour; the grey one only appears in the second "
        "half, so it cannot be the one that is asked for.",
        "The square moves. The square moves. The square moves. The square moves. The square moves. The square moves."])
    if rng.random() < 0.08:
        think = " ".join([think] * 8)
    finished = rng.random() < 0.93
    text = f"<think>{think}</think>\n<answer>{answer}</answer>" if finished else f"<think>{think} And then"
    if prompt.problem_type == "text":
        text = f"<think>{HOSTILE}</think><answer>{HOSTILE}</answer>"
    tokens = [rng.randrange(50, 4000) for _ in range(len(text) // 5)]
    accuracy = float(right and finished)
    return Completion(tokens, text, [-0.4] * len(tokens), "stop" if finished else "length", 3, accuracy,
                      float(finished), accuracy + 0.5 * finished)


def make_group(rng: random.Random, prompt: Prompt, skill: float, size: int = 6) -> RolloutGroup:
    group = RolloutGroup(prompt, [make_completion(rng, prompt, skill) for _ in range(size)])
    rewards = np.array([completion.reward for completion in group.completions])
    for completion in group.completions:
        completion.advantage = float((completion.reward - rewards.mean()) / (rewards.std() + 1e-6))
    return group


def make_verdict(prompt: Prompt, index: int, completion: Completion) -> Verdict:
    repetitive = completion.text.count("The square moves.") > 3
    consistent = None if completion.finish_reason == "length" else index != 2
    failed = {"unfinished": completion.finish_reason == "length", "repetition": repetitive,
              "inconsistent": consistent is False, "wrong": not completion.accuracy}
    flags = [name for name, yes in failed.items() if yes]
    answer = completion.text.split("<answer>")[-1].split("</answer>")[0]
    return Verdict(prompt.prompt_id, index, completion.accuracy, completion.format > 0,
                   completion.finish_reason == "stop", len(completion.token_ids) - 8, 0.72 if repetitive else 0.02,
                   consistent, answer if consistent else None if consistent is None else "B", None, tuple(flags))


def make_pairs(group: RolloutGroup) -> list[PreferencePair]:
    right = [i for i, c in enumerate(group.completions) if c.accuracy == 1]
    wrong = [i for i, c in enumerate(group.completions) if c.accuracy == 0]
    if not right or not wrong:
        return []
    chosen, rejected = group.completions[right[0]], group.completions[wrong[0]]
    good, bad, name = tuple(chosen.token_ids), tuple(rejected.token_ids), group.prompt.prompt_id
    used, tail = (1,) * len(good), (0,) * (len(good) - 3) + (1, 1, 1)
    return [PreferencePair(name, "accuracy", good, bad, used, (1,) * len(bad), chosen.text, rejected.text, right[0],
                           wrong[0], "The chosen completion is right and the rejected one is wrong."),
            PreferencePair(name, "consistency", good, good, tail, tail, chosen.text, f"{chosen.text} (wrong answer)",
                           right[0], -1, "Same reasoning, but the rejected answer is not what it supports.")]


def metrics_row(stage: str, kind: str, step: int, global_step: int, rng: random.Random) -> dict[str, Any]:
    up = 1 - math.exp(-global_step / 14)
    row: dict[str, Any] = {"global_step": global_step, "stage": stage, "kind": kind, "step": step}
    if kind == "grpo":
        accuracy = min(1.0, 0.28 + 0.42 * up + rng.gauss(0, 0.04))
        row |= {"reward_mean": accuracy + 0.48, "accuracy_mean": accuracy, "format_mean": min(1.0, 0.86 + 0.13 * up),
                "length_mean": 44 + 9 * up + rng.gauss(0, 2), "zero_variance_share": 0.1 + 0.3 * up * rng.random(),
                "loss": rng.gauss(0, 0.01), "grad_norm": math.exp(rng.gauss(-0.4, 0.3)),
                "clip_share": 0.002 * rng.random(), "kl": 0.0, "ratio_max": 1 + rng.random() * 0.4,
                "learning_rate": 1e-6 if stage == "grpo-1" else 5e-7}
        row["seconds"] = {"decode": 0.4, "rollout": 5 + rng.random(), "reward": 0.03, "forward": 2.1, "update": 0.6,
                          "checkpoint": 1.4 if step % 8 == 7 else 0.0}
    else:
        row |= {"loss": 0.69 - 0.03 * step, "preference_accuracy": min(1.0, 0.5 + 0.05 * step), "margin": 0.06 * step,
                "chosen_logprobs_mean": -38 + 0.2 * step, "rejected_logprobs_mean": -41 - 0.6 * step,
                "chosen_drift": 0.2 * step, "grad_norm": 0.9, "learning_rate": 5e-7, "own_metric": float(step)}
        row["seconds"] = {"reference": 0.8, "forward": 3.0, "update": 0.7}
    return row


def eval_row(stage: str, mode: str, accuracy: float, inconsistency: float) -> dict[str, Any]:
    count = 240 if mode == "greedy" else 960
    reach = 1.96 * math.sqrt(0.25 / count)
    return {"stage": stage, "mode": mode, "accuracy": accuracy, "accuracy_low": accuracy - reach,
            "accuracy_high": accuracy + reach, "no_verdict_rate": 0.021, "mra": None if stage == "start" else 0.412,
            "format_rate": 0.96, "inconsistency_rate": inconsistency, "inconsistency_high": inconsistency + 0.03,
            "inconsistency_low": inconsistency - 0.03, "length_mean": 48.3, "prompts": 240, "completions": count,
            "by_type": {"choice": accuracy + 0.05, "number": accuracy - 0.1}}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(root: Path) -> Path:
    """A finished run of three stages."""
    rng, run = random.Random(7), RunDir(root / "run-7b & <tiny>")
    prompts = make_prompts(root / "media")
    run.root.mkdir()
    run.config.write_text(CONFIG.format(run=run.root.name.replace("&", "and")))
    metrics: list[dict[str, Any]] = []
    verified: list[RolloutGroup] = []
    for stage, kind, steps in STAGES:
        for step in range(steps):
            metrics.append(metrics_row(stage, kind, step, len(metrics) + 1, rng))
            if kind == "grpo":
                chosen = [prompts[-1], *(prompts[(step * 3 + i) % 8] for i in range(3))]
                groups = [make_group(rng, prompt, 0.2 + 0.6 * len(metrics) / 48) for prompt in chosen]
                write_groups(run.rollouts(stage, step), groups, stage, step)
                verified += groups if step == 23 else []
    write_lines(run.metrics, metrics)
    write_lines(run.evals, [eval_row(stage, mode, accuracy - 0.02 * (mode == "sampled"), inconsistency)
                            for stage, accuracy, inconsistency in (("start", 0.312, 0.224), ("grpo-1", 0.533, 0.241),
                                                                   ("dpo-1", 0.558, 0.083), ("grpo-2", 0.646, 0.096))
                            for mode in ("greedy", "sampled")])
    for stage, skill in (("start", 0.3), ("grpo-2", 0.8)):
        write_groups(run.eval_rows(stage, "greedy"), [make_group(rng, p, skill, 1) for p in prompts], stage, 0)
    write_lines(run.skipped, [{"path": "media/broken_017.mp4", "reason": "moov atom not found", "record": 17},
                              {"path": "media/<b>page</b>.mp4", "reason": "it is HTML, not a video", "record": 203}])
    write_verifier(run.verifier("dpo-1"), verified)
    return run.root


def write_verifier(folder: Path, groups: list[RolloutGroup]) -> None:
    verdicts = [asdict(make_verdict(g.prompt, i, c)) for g in groups for i, c in enumerate(g.completions)]
    pairs = [asdict(pair) for group in groups for pair in make_pairs(group)]
    write_table(pa.Table.from_pylist(verdicts), folder / "verdicts.parquet")
    write_table(pa.Table.from_pylist(pairs), folder / "pairs.parquet")
    (folder / "account.json").write_text(json.dumps({
        "groups": 96, "completions": 576, "pairs": 141, "used": 230,
        "flags": {"format": 31, "unfinished": 22, "length": 14, "repetition": 58, "inconsistent": 97, "wrong": 243},
        "flag_rates": {"format": 0.054}, "verdicts": {"consistent": 391, "inconsistent": 97, "unknown": 88},
        "candidates": {"accuracy": 402, "consistency": 118, "repetition": 61},
        "kept": {"accuracy": 88, "consistency": 37, "repetition": 16},
        "groups_without": {"accuracy: all right": 21, "accuracy: all wrong": 14, "repetition: none repetitive": 63},
        "dropped": {"accuracy: lengths differ": 120, "accuracy: over the cap of the prompt": 194,
                    "consistency: over the cap of the prompt": 81, "repetition: same as another pair": 45},
        "unused": {"wrong": 166, "no partner, or over a limit": 119, "no verdict": 61}}))


def half_done(run: Path, folder: Path) -> Path:
    """The same run, killed in the third step of its DPO stage in the middle of a line, with damaged files."""
    half = RunDir(folder)
    half.root.mkdir()
    shutil.copy(run / "config.yaml", half.config)
    lines = (run / "metrics.jsonl").read_text().splitlines()[:27]
    broken = json.dumps(json.loads(lines[-1]) | {"loss": None, "margin": float("nan")})
    half.metrics.write_text("\n".join([*lines[:-1], broken, lines[0][:40]]))
    half.rollouts("grpo-1", 0).parent.mkdir(parents=True)
    shutil.copy(RunDir(run).rollouts("grpo-1", 23), half.rollouts("grpo-1", 23))
    half.rollouts("grpo-1", 0).write_bytes(b"PAR1 torn")
    half.verifier("dpo-1").mkdir(parents=True)
    (half.verifier("dpo-1") / "account.json").write_text("{")
    return half.root
