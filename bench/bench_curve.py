"""Losses, gradient norms and weights of every backend over 20 updates, two ranks against one process, in float32.

    python bench/bench_curve.py [--updates 20] [--family qwen3_5_moe]

A tiny checkpoint of a family, tied and untied, with a frozen and with a trained tower; groups of text, image and video;
as many micro-batches as a rank happens to have, in some updates none. Rank 0 runs the single process too. The
difference of a loss is relative to the largest loss of the curve, which crosses zero. Lines go to
bench/results/curve.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
from veripo_kernels import PolicyLoss

from bench import recipe
from bench.measure import digits
from bench.tied import PATHS, tied
from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.config.schema import DistributedConfig, OptimizerConfig
from veripo_fast.demo.tiny_model import init_model
from veripo_fast.distributed.choice import distribute
from veripo_fast.distributed.world import ONE, World, joined
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, in_own_memory, load_policy
from veripo_fast.model.step import PolicyLossInputs
from veripo_fast.stages.optimizer import Optimizer
from veripo_fast.types import Image, LoadedPrompt, Message, Prompt, Video

BACKENDS = [DistributedConfig(backend="fsdp"),
            *(DistributedConfig(backend="deepspeed", zero_stage=stage) for stage in (1, 2, 3))]
LENGTHS = [[13, 25, 14], [26, 12, 31], [12, 37, 25], [14, 11, 24]]
DEALT = [([0, 1, 2], [3]), ([3], []), ([2], [0, 1])]
"""Groups of rank 0 and of rank 1 in each update, repeated."""


def prompts_of(policy: Policy) -> list[LoadedPrompt]:
    """A video, a text, an image, a video."""
    loaded = []
    for number, media in enumerate((Video(""), None, Image(""), Video(""))):
        parts = ("What moves?",) if media is None else (media, "What moves?")
        prompt = Prompt(str(number), (Message("user", parts),), "text", "yes")
        inputs = None
        if media is not None:
            side, frames = 2 * policy.encoder.vision.factor, 4 if isinstance(media, Video) else 1
            pixels = torch.randint(0, 256, (frames, 3, side, side), dtype=torch.uint8,
                                   generator=torch.Generator().manual_seed(number))
            kind = "video" if isinstance(media, Video) else "image"
            inputs = policy.encoder.media_inputs([(kind, pixels, torch.arange(frames).double() / 2)], str(number))
        features = policy.vision_features(inputs) if inputs is not None and policy.frozen_vision else None
        loaded.append(LoadedPrompt(prompt, policy.encoder.encode(prompt, inputs), features))
    return loaded


def curve(policy: Policy, updates: int, world: World) -> list[tuple[float, float]]:
    """Loss and gradient norm of each update."""
    prompts = prompts_of(policy)
    generator = torch.Generator().manual_seed(0)
    allowed = sorted(set(range(400)) - set(policy.encoder.banned_ids))
    completions = [[[allowed[index] for index in torch.randint(0, len(allowed), (length,), generator=generator)]
                    for length in lengths] for lengths in LENGTHS]
    optimizer = Optimizer(policy.backend, OptimizerConfig(weight_decay=0.01), 1e-4, updates, world)
    points = []
    for number in range(updates):
        dealt = DEALT[number % len(DEALT)]
        mine = [*dealt[0], *dealt[1]] if world.size == 1 else dealt[world.rank]
        tokens = sum(sum(LENGTHS[group]) for group in (*dealt[0], *dealt[1]))
        passes, loss = int(world.most(len(mine))), 0.0
        for index in range(passes):
            if index >= len(mine):
                optimizer.backward(policy.idle())
                continue
            group = mine[index]
            batch = pack([(prompts[group].encoded, completions[group])])
            old = torch.full((len(batch.targets),), -6.2)
            advantages = torch.linspace(-1, 2, 3) * (1 + group)
            loss += optimizer.backward(policy.forward(batch, policy.features_of([prompts[group]]), PolicyLossInputs(
                PolicyLoss("grpo", kl_coef=0.1), advantages, old, old - 0.1, 1.0, 3 * len(dealt[0] + dealt[1]),
                tokens)).loss)
        total = world.total([loss])[0]
        points.append((total, optimizer.step() or float("nan")))
    return points


def compared(folder: Path, frozen: bool, backend: DistributedConfig, updates: int, world: World) -> dict[str, Any]:
    """The differences of a backend, on rank 0."""
    config = ModelConfig(path=str(folder), device="cpu", freeze_vision=frozen)
    policy = in_own_memory(load_policy(config))
    distribute(policy, backend, world)
    points = curve(policy, updates, world)
    weights = {name: value.detach().clone() for name, value in policy.backend.weights()}
    if not world.main:
        return {}
    alone = in_own_memory(load_policy(config))
    wanted = curve(alone, updates, ONE)
    largest = [max(abs(point[i]) for point in wanted) for i in (0, 1)]
    loss, norm = (max(abs(a[i] - b[i]) for a, b in zip(points, wanted, strict=True)) / largest[i] for i in (0, 1))
    return {"loss_relative_difference": digits(loss), "norm_relative_difference": digits(norm),
            "largest_weight_difference": digits(max(float((weights[name] - parameter.detach()).abs().max())
                                                    for name, parameter in alone.model.named_parameters())),
            "largest_weight_change": digits(_change(alone, folder))}


def _change(policy: Policy, folder: Path) -> float:
    before = dict(load_policy(ModelConfig(path=str(folder), device="cpu")).model.named_parameters())
    return max(float((parameter.detach() - before[name].detach()).abs().max())
               for name, parameter in policy.model.named_parameters())


def untie(folder: Path, out: Path) -> None:
    """A copy of a checkpoint whose head is not the embedding."""
    policy = load_policy(ModelConfig(path=str(folder), device="cpu"))
    head = torch.nn.Parameter(policy.model.lm_head.weight.detach().flip(0).clone())
    policy.model.config.tie_word_embeddings = policy.model.config.text_config.tie_word_embeddings = False
    policy.model.lm_head.weight = head
    policy.model.save_pretrained(out)
    for file in folder.iterdir():
        if not (out / file.name).exists():
            (out / file.name).write_bytes(file.read_bytes())


def ranks(folder: Path, updates: int) -> None:
    torch.set_num_threads(1)
    with joined(600, "cpu") as world:
        for name in ("tied", "untied"):
            for frozen in (True, False):
                for backend in BACKENDS:
                    row = compared(folder / name, frozen, backend, updates, world)
                    if world.main:
                        stage = backend.zero_stage if backend.backend == "deepspeed" else None
                        print(json.dumps({"backend": backend.backend, "zero_stage": stage, "head": name,
                                          "tower": "frozen" if frozen else "trained", **row}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--family", default="qwen3_vl", choices=FAMILIES)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is not None:
        ranks(args.folder, args.updates)
        return
    with TemporaryDirectory(prefix="veripo-curve-") as name:
        folder = Path(name)
        init_model(folder / "tied", args.family, 0)
        untie(folder / "tied", folder / "untied")
        done = subprocess.run(
            tied(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
                 "--updates", str(args.updates), "--folder", folder),
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(PATHS)},
            stdout=subprocess.PIPE, text=True, check=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            path = recipe.append("curve", {"bench": "curve", "family": args.family, "ranks": 2,
                                           "updates": args.updates, **row})
            print(row, path)


if __name__ == "__main__":
    main()
