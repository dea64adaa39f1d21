"""What the memory ledger predicts of a run against what the run holds: real `veripo train` runs of a 30 M policy.

    python bench/bench_ledger.py [--cases base fsdp ...] [--folder FOLDER]

Each case is a run of its own in child processes, with one thread a rank, in which every completion nearly reaches its
limit: the policy is taught for some minutes to think one sentence and to answer, so that groups carry a signal, make
pairs, and are as long as the ledger expects. `data.max_prompt_tokens` stands just above the longest prompt. Measured is
VmHWM of rank 0 in each phase (run/memory.py), predicted is memory.json, which was written before. Lines go to
bench/results/ledger.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
import transformers

from bench import recipe
from bench.measure import digits
from bench.tied import PATHS, tied
from bench.wide_model import write_checkpoint
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import DataConfig, ModelConfig, VideoConfig
from veripo_fast.data.prompts import load_prompts
from veripo_fast.demo import tiny_model
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import load_policy, save_policy
from veripo_fast.types import Prompt

SENTENCE = ("At first a red circle is seen near the left side, then it moves up, and one blue square stays near the "
            "right")
GRPO, LOOP = "[{kind: grpo}]", "[{kind: grpo}, {kind: dpo}]"
COMMON = {
    "threads": 1, "model.device": "cpu", "video.fps": "null", "video.num-frames": 16, "video.min-pixels": 65536,
    "video.max-pixels": 65536, "data.max-prompt-tokens": 640, "rollout.group-size": 8, "rollout.max-new-tokens": 64,
    "grpo.steps": 2, "grpo.prompts-per-step": 4, "grpo.learning-rate": 1e-6, "dpo.learning-rate": 1e-6,
    "dpo.pairs-per-step": 4, "dpo.max-steps": 2, "optimizer.max-tokens": 1024, "eval.at": "never", "stages": GRPO}
ZERO = {"distributed.backend": "deepspeed"}
EVALUATED = {"eval.at": "stages", "eval.every": 1, "eval.limit": 12}
"""On the twelve prompts that are trained on, which are as long as others."""
CASES: dict[str, tuple[int, dict[str, object]]] = {
    "base": (1, {}),
    "two groups a micro-batch": (1, {"optimizer.max-tokens": 2200}),
    "group of 16": (1, {"rollout.group-size": 16}),
    "KL reference": (1, {"grpo.kl-coef": 0.05}),
    "tower trained": (1, {"model.freeze-vision": "false"}),
    "bfloat16": (1, {"model.dtype": "bfloat16"}),
    "gradient checkpointing": (1, {"model.gradient-checkpointing": "true"}),
    "one step": (1, {"grpo.steps": 1}),
    "dpo": (1, {"stages": LOOP, "dpo.pairs-per-step": 2}),
    "fsdp": (2, {}),
    "fsdp, KL reference": (2, {"grpo.kl-coef": 0.05}),
    "fsdp, bfloat16": (2, {"model.dtype": "bfloat16"}),
    "zero 1": (2, {**ZERO, "distributed.zero-stage": 1}),
    "zero 2": (2, {**ZERO, "distributed.zero-stage": 2}),
    "zero 3, vllm": (2, {**ZERO, "distributed.zero-stage": 3, "rollout.engine": "vllm", "rollout.kv-cache-gb": 0.25}),
    "evaluation": (1, {**EVALUATED, "eval.every-limit": 8}),
    "evaluation, judge llm": (1, {"eval.every": 2, "eval.every-limit": 12, "eval.judge": "llm"}),
    "qwen3_vl_moe": (1, {}),
    "qwen3_5": (1, {}),
    "qwen3_5_moe": (1, {}),
    "qwen3_vl_moe, bfloat16": (1, {"model.dtype": "bfloat16"}),
    "qwen3_5, bfloat16": (1, {"model.dtype": "bfloat16"}),
    "qwen3_5, gradient checkpointing": (1, {"model.gradient-checkpointing": "true"}),
    "qwen3_5, two groups a micro-batch": (1, {"optimizer.max-tokens": 2200}),
    "qwen3_5_moe, fsdp": (2, {}),
}
"""Name -> ranks, and options beside `COMMON`. One that begins with a family trains that, others Qwen3-VL."""


def family_of(name: str) -> str:
    """The family that a case trains."""
    first = name.partition(",")[0]
    return first if first in FAMILIES else "qwen3_vl"


def prepared(folder: Path, family: str) -> None:
    """A corpus and the policy, unless they are there: taught on questions alone, which is quick, then on videos."""
    own = folder / family
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus", 12, 4, 0)
    if not (folder / "judge").exists():
        write_judge(folder / "judge")
    if not (own / "start").exists():
        write_checkpoint(own / "start", "30m", family=family)
    if not (own / "text").exists():
        teach(own, "start", "text", videos=False, steps=25)
    if not (own / "model").exists():
        teach(own, "text", "model", videos=True, steps=12)


def write_judge(folder: Path) -> None:
    """A language model of 27 million random weights, which writes no verdict but takes the memory of one that does."""
    tokenizer = tiny_model.build_tokenizer()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(folder: Path, start: str, out: str, *, videos: bool, steps: int) -> None:
    """Teacher forcing."""
    rng = random.Random(0)
    policy = load_policy(ModelConfig(path=str(folder / start), device="cpu"))
    encoder = policy.encoder
    prompts, _ = load_prompts([str(folder.parent / "corpus" / "train.jsonl")], DataConfig())
    contract = VideoConfig(fps=None, num_frames=16, min_pixels=65536, max_pixels=65536)
    loader = PromptLoader(policy, contract, 1000, lambda prompt, reason: None)
    loaded = loader.load(prompts if videos else [without_media(prompt) for prompt in prompts])
    loader.close()
    optimizer = torch.optim.AdamW([parameter for _, parameter in policy.parameters()], lr=1e-4, betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 8)
        chosen = rng.sample(range(len(prompts)), 2 if videos else 4)
        groups = [(loaded[i].encoded, [[*encoder.encode_completion(answer(prompts[i], rng)), encoder.eos_id]
                                       for _ in range(2)]) for i in chosen]
        logprobs = policy.completion_logprobs(pack(groups), [loaded[i].features for i in chosen])
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        print(f"teaching {out}: step {step}, loss {-logprobs.mean():.3f}", flush=True)
    policy.model.to(torch.bfloat16)  # as shipped checkpoints are
    save_policy(policy, folder / out)


def without_media(prompt: Prompt) -> Prompt:
    """The prompt as text alone."""
    return replace(prompt, messages=tuple(
        replace(message, parts=tuple(part for part in message.parts if isinstance(part, str)))
        for message in prompt.messages))


def answer(prompt: Prompt, rng: random.Random) -> str:
    """One sentence of about 60 tokens with its conclusion, and an answer that is right in two of five."""
    names = ["A", "B", "C", "D"][:len(prompt.options)] or ["1", "2", "3", "40"]
    given = prompt.gold if rng.random() < 0.4 else rng.choice(names)
    thought = given if rng.random() < 0.7 else rng.choice(names)
    return f"<think>{SENTENCE} so {thought}.</think><answer>{given}</answer>"


def folder_of(folder: Path, name: str) -> Path:
    """The run folder of a case."""
    return folder / "runs" / name.replace(" ", "-").replace(",", "")


def run(folder: Path, name: str, python: str) -> Path:
    """Train; returns the run folder."""
    ranks, changes = CASES[name]
    out = folder_of(folder, name)
    if out.exists():
        sys.exit(f"{out} exists already; remove it or name another --folder")
    (folder / "empty.yaml").write_text("{}\n")
    options = {**COMMON, "run-dir": out, "model.path": folder / family_of(name) / "model",
               "data.train": folder / "corpus" / "train.jsonl", **changes}
    if "eval.every" in options:
        options["data.eval"] = folder / "corpus" / "train.jsonl"
    if options.get("eval.judge") == "llm":
        options["eval.judge-options"] = f"{{llm_path: {folder / 'judge'}, llm_max_failures: 1.0}}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    done = subprocess.run(
        tied(python, *launch, "-m", "veripo_fast", "train", "--config", folder / "empty.yaml", *words),
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the run {name} ended with {done.returncode}: {done.stderr[-3000:]}")
    return out


def row_of(name: str, stage: dict[str, object]) -> dict[str, object]:
    """Predicted and measured peaks of a stage, in MiB, and their ratio."""
    measured: dict[str, int] = stage["peak_bytes"]  # type: ignore[assignment]
    plan: dict[str, dict[str, dict[str, int]]] = stage["predicted"]  # type: ignore[assignment]
    predicted = {phase: sum(owners["device"].values()) for phase, owners in plan.items() if phase in measured}
    if "update" not in predicted and "evaluation" not in predicted:
        sys.exit(f"the case {name} trained on nothing in {stage['stage']}")
    peak = max(measured.values())
    return {"bench": "ledger", "case": name, "family": family_of(name), "ranks": CASES[name][0],
            "stage": stage["stage"],
            "predicted_mib": {phase: count >> 20 for phase, count in predicted.items()},
            "measured_mib": {phase: measured[phase] >> 20 for phase in predicted},
            "ratios": {phase: digits(count / measured[phase]) for phase, count in predicted.items()},
            "peak_predicted_mib": max(predicted.values()) >> 20, "peak_measured_mib": peak >> 20,
            "peak_ratio": digits(max(predicted.values()) / peak),
            "owners_mib": {owner: count >> 20 for owner, count in
                           plan[max(predicted, key=lambda phase: predicted[phase])]["device"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if "vllm" not in name])
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "veripo-ledger")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the runs, such as one that has vLLM")
    args = parser.parse_args()
    for name in args.cases:
        prepared(args.folder, family_of(name))
        out = run(args.folder, name, args.python)
        for line in (out / "memory.jsonl").read_text().splitlines():
            row = row_of(name, json.loads(line))
            path = recipe.append("ledger", row)
            print(name, row["stage"], row["ratios"], "peak", row["peak_ratio"], path, flush=True)


if __name__ == "__main__":
    main()
