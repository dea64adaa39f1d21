"""vLLM against the trainer on real clips: greedy completions beside the torch engine's, and log-probs of every token.

    make engines && .venv-engines/bin/python bench/bench_parity.py [--prompts 100] [--family qwen3_5 [--dtype bfloat16]]
                                                                   [--router-replay]

The demo's policy, or a tiny one of a family with random weights, on held-out questions about rendered H.264 clips. A
greedy completion that differs is named, with the gap between its two likeliest tokens where both engines part: a tie,
if rounding can turn it. Accuracy over many sampled completions shows whether both draw from the same distribution.
With `--router-replay` the trainer runs the experts that vLLM chose, beside its own choice on the same completions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench import recipe
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import DataConfig, ModelConfig
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import demo_config
from veripo_fast.demo.tiny_model import init_model
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.model.replay import pack_rollouts
from veripo_fast.model.step import LogprobInputs
from veripo_fast.reward.groups import reward_groups
from veripo_fast.reward.score import scores_of
from veripo_fast.rollout.limits import EngineLimits
from veripo_fast.rollout.parity import TOLERANCES, Parity, ParityGate
from veripo_fast.rollout.protocol import RolloutEngine, Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.types import LoadedPrompt, RolloutGroup

GREEDY = Sampling(1, 0.0, 80, 0)
WAYS = {"greedy": GREEDY, "T=1": replace(GREEDY, group_size=4, temperature=1.0),
        "T=0.7, top_p 0.9, top_k 20": replace(GREEDY, group_size=4, temperature=0.7, top_p=0.9, top_k=20)}


def held_out(policy: Policy, folder: Path, count: int) -> list[LoadedPrompt]:
    """The first held-out prompts of a rendered corpus, with the tower's output."""
    write_corpus(folder, 4, count, 0)
    prompts, _ = load_prompts([str(folder / "heldout.jsonl")], DataConfig())
    loader = PromptLoader(policy, demo_config(folder, 0, quick=False).video, 4096, lambda prompt, reason: None)
    loaded = loader.load(prompts[:count])
    loader.close()
    return loaded


def accuracy_of(engine: RolloutEngine, prompts: list[LoadedPrompt], samples: int) -> tuple[float, float]:
    """Accuracy of sampled completions and its standard error over the draws: equal distributions give equal ones."""
    groups = engine.generate(prompts, Sampling(samples, 1.0, 80, 0))
    reward_groups(groups, Config())
    shares = [sum(scores_of(group, "accuracy")) / samples for group in groups]
    spread = sum((value - share) ** 2 for group, share in zip(groups, shares, strict=True)
                 for value in scores_of(group, "accuracy"))
    return sum(shares) / len(shares), (spread / (samples - 1) / samples) ** 0.5 / len(shares)


@torch.no_grad()
def parting(policy: Policy, item: LoadedPrompt, one: list[int], other: list[int]) -> dict[str, Any]:
    """Where two greedy completions part, and how far the two likeliest tokens lie apart there."""
    index = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    batch = pack([(item.encoded, [[*one[:index], one[index]]])])
    logits = policy.head(policy.hidden(batch, [item.features])[batch.logit_index[-1]])
    best = torch.log_softmax(logits.float(), -1).topk(2).values
    return {"prompt": item.prompt.prompt_id, "token": index, "gap": float(best[0] - best[1])}


def own_choice(group: RolloutGroup) -> RolloutGroup:
    """The group without the experts that the engine chose."""
    return replace(group, prompt_experts=None, completions=[replace(row, experts=None) for row in group.completions])


@torch.no_grad()
def mismatch(policy: Policy, prompts: list[LoadedPrompt], groups: list[RolloutGroup]) -> float:
    """Share of (token, layer) in which engine and trainer choose other experts."""
    choices = differing = 0
    for item, group in zip(prompts, groups, strict=True):
        batch = pack_rollouts([(item.encoded, group)], policy.routers)
        counts = policy.forward(batch, [item.features], LogprobInputs()).metrics
        choices += int(counts["router_choices"])
        differing += int(counts["router_differing"])
    return differing / choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--family", choices=FAMILIES, help="a checkpoint of `veripo init-model`, with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--router-replay", action="store_true", help="of a family with experts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32,
                        help="completions per prompt for the accuracy of each engine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        if args.family:
            init_model(Path(folder) / "model", args.family, seed=1)
        policy = load_policy(ModelConfig(path=f"{folder}/model" if args.family else "tiny", device="cpu",
                                         dtype=args.dtype))
        prompts = held_out(policy, Path(folder) / "corpus", args.prompts)
        measure(policy, prompts, args)


def measure(policy: Policy, prompts: list[LoadedPrompt], args: argparse.Namespace) -> None:
    """Both engines on the prompts; prints, and appends a line to the results."""
    engine = VllmEngine(policy, EngineLimits(2048, 8192, 64, 1 << 30), router_replay=args.router_replay)
    gate = ParityGate(policy, engine)
    parities: dict[str, Parity] = {}
    unreplayed: dict[str, Parity] = {}
    replay: dict[str, Any] = {}
    for name, sampling in WAYS.items():
        groups = engine.generate(prompts, sampling)
        parities[name] = gate.measure(list(zip(prompts, groups, strict=True)), sampling)
        if args.router_replay:
            unreplayed[name] = gate.measure(list(zip(prompts, map(own_choice, groups), strict=True)), sampling)
            replay |= {"router_mismatch": replay.get("router_mismatch", {}) | {name: mismatch(policy, prompts, groups)}}
    gaps, means = largest_and_mean(parities)
    if args.router_replay:
        replay["largest_gap_own_choice"], replay["mean_gap_own_choice"] = largest_and_mean(unreplayed)
        print(f"with the trainer's own choice of experts: {replay}")
    theirs, ours = engine.generate(prompts, GREEDY), TorchEngine(policy).generate(prompts, GREEDY)
    pairs = [(group.completions[0].token_ids, other.completions[0].token_ids)
             for group, other in zip(theirs, ours, strict=True)]
    partings = [parting(policy, item, *pair) for item, pair in zip(prompts, pairs, strict=True) if pair[0] != pair[1]]
    accuracy = {name: accuracy_of(each, prompts, args.samples)
                for name, each in (("vllm", engine), ("torch engine", TorchEngine(policy)))}
    equal = len(prompts) - len(partings)
    print(f"{equal} of {len(prompts)} greedy completions are equal; the others: {partings or 'none'}")
    print(f"difference of a log-prob, in nats: largest {gaps}, mean {means}")
    print(f"accuracy at T = 1 and its standard error over {args.samples} completions per prompt: {accuracy}")
    recipe.append("parity", {"bench": "parity", "family": policy.encoder.family.name,
                             "weights": "random" if args.family else "trained",
                             "prompts": len(prompts), "equal": equal, "partings": partings,
                             "largest_gap": gaps, "mean_gap": means, "dtype": args.dtype,
                             "samples": args.samples, "accuracy": accuracy,
                             "tolerance": TOLERANCES[policy.model.dtype],
                             "router_replay": args.router_replay, **replay})
    engine.close()


def largest_and_mean(parities: dict[str, Parity]) -> tuple[dict[str, float], dict[str, float]]:
    """Of the differences of log-probs, in nats."""
    return ({name: parity.largest for name, parity in parities.items()},
            {name: parity.mean for name, parity in parities.items()})


if __name__ == "__main__":
    main()
