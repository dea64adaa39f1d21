"""Families of models on packed groups: log-probs and gradients against the plain forward, and a step's time and memory.

    python bench/bench_families.py equal [--families qwen3_5 ...]
    python bench/bench_families.py step [--runs 3]

`equal`: tiny random checkpoints, once with transformers' own spread of initial weights (0.02), once with the demo's
(0.08); a video, two videos and an image, an image, a text, each with uneven completions. `step`: `bench_step.py` on a
Qwen3.5 of 30 M weights, whose layers are recurrent but for every fourth.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch

from bench import recipe
from bench.bench_step import Step, build_model, checked_gradients, row_of, timed
from bench.measure import peak_bytes
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.demo import tiny_model
from veripo_fast.demo.check_model import completions_of, prompts
from veripo_fast.model.packing import pack
from veripo_fast.model.plain import plain_logprobs
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.types import EncodedPrompt

SPREADS = (0.02, tiny_model.TEXT_STD)
NEW = [name for name, family in FAMILIES.items() if family.delta_class or family.router_class]


class Group:
    """One prompt with uneven completions, by either way."""

    def __init__(self, policy: Policy, prompt: EncodedPrompt) -> None:
        self.policy, self.prompt = policy, prompt
        self.completions = completions_of(policy)
        tokens = sum(map(len, self.completions))
        self.weights = torch.randn(tokens, generator=torch.Generator().manual_seed(0))

    def packed(self) -> torch.Tensor:
        features = None if self.prompt.media is None else self.policy.vision_features(self.prompt.media)
        return self.policy.completion_logprobs(pack([(self.prompt, self.completions)]), [features])

    def plain(self) -> torch.Tensor:
        return torch.cat([plain_logprobs(self.policy, self.prompt, completion) for completion in self.completions])

    def result(self, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs, and gradients of all weights, the tower's too; float64."""
        self.policy.model.zero_grad()
        logprobs = getattr(self, way)()
        (logprobs * self.weights).sum().backward()
        gradients = [p.grad.double().flatten() for _, p in self.policy.parameters() if p.grad is not None]
        return logprobs.detach().double(), torch.cat(gradients)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`packed` in float64: transformers computes the recurrence in float32, whatever the weights are."""
        model = self.policy.model
        experts = model.get_experts_implementation()[""]
        model.double()
        model.set_experts_implementation("eager")  # torch's grouped product takes no float64
        found = self.result("packed")
        model.float()
        model.set_experts_implementation(experts)
        return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def equal(families: list[str]) -> None:
    """A row for each family, spread and prompt."""
    for family in families:
        for spread in SPREADS:
            with TemporaryDirectory() as folder:
                tiny_model.TEXT_STD = spread
                tiny_model.init_model(Path(folder) / "model", family, seed=1)
                policy = load_policy(ModelConfig(f"{folder}/model", device="cpu", freeze_vision=False))
                for name, prompt in prompts(policy):
                    group = Group(policy, prompt)
                    packed, plain, exact = group.result("packed"), group.result("plain"), group.exact()
                    row = {"bench": "families equal", "family": family, "initial_spread": spread, "prompt": name,
                           "prompt_tokens": len(prompt.token_ids), "completions": list(map(len, group.completions)),
                           "logprob_relative_difference": relative(packed[0], plain[0]),
                           "gradient_relative_difference": relative(packed[1], plain[1]),
                           "plain_gradient_error": relative(plain[1], exact[1]),
                           "packed_gradient_error": relative(packed[1], exact[1])}
                    recipe.append("families", row)
                    print(f"{family}, weights of spread {spread}, {name}: log-probs differ by "
                          f"{row['logprob_relative_difference']:.1e}, gradients by "
                          f"{row['gradient_relative_difference']:.1e} (off float64: packed "
                          f"{row['packed_gradient_error']:.1e}, plain {row['plain_gradient_error']:.1e})", flush=True)


def step(runs: int) -> None:
    """A row: shared prefix against the repeated prompt."""
    made = Step(build_model("qwen3_5"), 1000, 64, 8, train_vision=False)
    ways = {"sdpa": partial(made.shared, "sdpa"), "repeated": made.repeated}
    differences = checked_gradients(made, ways, torch.float32)
    memory = {}
    for name, run in ways.items():
        made.model.zero_grad()
        memory[name] = peak_bytes(run, torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, run in ways.items():
            made.model.zero_grad()
            seconds[name].append(timed(run))
    row = {"bench": "families step", "family": "qwen3_5", "prompt": 1000, "completion": 64, "group": 8,
           "dtype": "float32", "parameters": sum(p.numel() for p in made.model.parameters())}
    row |= row_of("sdpa", seconds, memory, differences)
    recipe.append("families", row)
    print(f"shared prefix against repeated prompt: {row['speedup_median']}x faster ({row['speedup_min']} to "
          f"{row['speedup_max']} over {runs} pairs), {row['peak_memory_ratio']}x less peak memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("equal", "step"))
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=NEW)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if args.what == "equal":
        equal(args.families)
    else:
        step(args.runs)


if __name__ == "__main__":
    main()
