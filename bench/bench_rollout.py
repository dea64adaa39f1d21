"""Tokens per second of a rollout batch: vLLM in this process, the torch engine, and transformers' generate.

    make engines && .venv-engines/bin/python bench/bench_rollout.py [--prompts 32] [--group 8] [--tokens 64]

A Qwen3-VL of 30 million random parameters, one video per prompt, temperature 1. The tower's output is given to both
engines; `generate` gets pixels, as in trainers that use it, and repeats them for each completion. vLLM's log-probs are
compared with the trainer's before anything is timed. Rounds are interleaved; a rate counts the tokens that were
written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
import transformers

from bench import recipe
from bench.measure import Ratio, clock_of, paired
from bench.wide_model import video_prompts, write_checkpoint
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.rollout.limits import EngineLimits
from veripo_fast.rollout.parity import largest_gap
from veripo_fast.rollout.protocol import RolloutEngine, Sampling
from veripo_fast.rollout.torch_engine import TorchEngine
from veripo_fast.rollout.vllm_engine import VllmEngine
from veripo_fast.types import LoadedPrompt, RolloutGroup


class Rollouts:
    """Every way of completing the same prompts; each call returns the number of tokens that it wrote."""

    def __init__(self, policy: Policy, plain: torch.nn.Module, prompts: list[LoadedPrompt], sampling: Sampling,
                 engine: RolloutEngine) -> None:
        self.policy = policy
        self.plain = plain
        self.prompts = prompts
        self.sampling = sampling
        self.engines = {"vllm": engine, "torch engine": TorchEngine(policy)}
        self.written: dict[str, list[int]] = {}

    def ways(self) -> dict[str, Callable[[], object]]:
        """Name -> call."""
        calls: dict[str, Callable[[], object]] = {
            name: lambda name=name: self.by_engine(name) for name in self.engines}  # type: ignore[misc]
        return calls | {"transformers generate": self.by_generate}

    def by_engine(self, name: str) -> list[RolloutGroup]:
        groups = self.engines[name].generate(self.prompts, self.sampling)
        rows = [row for group in groups for row in group.completions]
        self.written.setdefault(name, []).append(sum(len(row.token_ids) for row in rows))
        return groups

    @torch.no_grad()
    def by_generate(self) -> None:
        encoder = self.policy.encoder
        ids = torch.stack([item.encoded.token_ids for item in self.prompts])  # equally long: no padding
        media = [item.encoded.media for item in self.prompts]
        out = self.plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == encoder.pad_ids["video"]) * 2,
            pixel_values_videos=torch.cat([item.pixel_values for item in media]),
            video_grid_thw=torch.cat([item.grid_thw for item in media]), do_sample=True, temperature=1.0, top_k=0,
            num_return_sequences=self.sampling.group_size, max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=list(encoder.end_ids), pad_token_id=encoder.tokenizer.pad_token_id)
        new = out[:, ids.shape[1]:]
        lengths = (new != encoder.tokenizer.pad_token_id).sum(1)
        self.written.setdefault("transformers generate", []).append(int(lengths.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (("prompts", 32), ("group", 8), ("tokens", 64), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), "30m")
        policy = load_policy(ModelConfig(path=folder, device="cpu"))
        plain = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
        engine = VllmEngine(policy, EngineLimits(1024, 8192, 256, 2 << 30))
    prompts = video_prompts(policy, args.prompts)
    sampling = Sampling(args.group, 1.0, args.tokens, 0)
    rollouts = Rollouts(policy, plain, prompts, sampling, engine)
    gap = largest_gap(policy, prompts, rollouts.by_engine("vllm"), sampling.temperature)
    rollouts.written.clear()
    seconds = paired(rollouts.ways(), args.rounds, clock_of(torch.device("cpu")), warmups=0)
    rates = {name: [count / second for count, second in zip(rollouts.written[name], seconds[name], strict=True)]
             for name in seconds}
    for name, values in rates.items():
        ratio = Ratio.of(values, rates["torch engine"])
        print(f"{name}: {statistics.median(values):.0f} tokens/s, {ratio.median:.2f} ({ratio.low:.2f} to "
              f"{ratio.high:.2f}) of the torch engine")
        recipe.append("rollout", {
            "bench": "rollout", "way": name, "parameters": sum(p.numel() for p in policy.model.parameters()),
            "prompts": args.prompts, "prompt_tokens": len(prompts[0].encoded.token_ids), "group": args.group,
            "tokens": args.tokens, "rounds": args.rounds, "tokens_per_second": round(statistics.median(values), 1),
            "over_torch_engine": [round(value, 3) for value in (ratio.median, ratio.low, ratio.high)],
            "vllm_largest_gap": gap})
    engine.close()


if __name__ == "__main__":
    main()
