"""One training step (forward, backward) of a GRPO group: shared prefix against the repeated prompt, same model and run.

    python bench/bench_step.py [--prompt 1000] [--completion 64] [--group 8] [--family qwen2_5_vl] [--backends sdpa]

The sibling is Hugging Face's forward on G copies of the prompt (SDPA attention, logits at completion positions only).
Every attention backend that can run here gets a row against it. The vision tower is frozen: its output is given to all,
so the ratio is that of the language model; `--train-vision` runs the tower too, once per group against once per copy;
`--liger` puts Liger's layers into the model of all. Gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
import transformers
from veripo_kernels import reference

from bench import recipe
from bench.measure import peak_bytes
from veripo_fast.config.families import FAMILIES
from veripo_fast.model import attention
from veripo_fast.model.attention import PREFERENCE, AttentionShape
from veripo_fast.model.delta_layers import serve_groups
from veripo_fast.model.last_layer import trim_last_layer
from veripo_fast.model.liger import apply_liger
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.positions import GridSpan, TextSpan, mrope_positions
from veripo_fast.types import EncodedPrompt

VOCABULARY, HIDDEN, VIDEO_PAD = 2048, 512, 11


def build_model(family: str) -> torch.nn.Module:
    """About 30 million parameters, random weights."""
    torch.manual_seed(0)
    text = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 1408, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 1e4}}
    vision = {"depth": 6, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4, "out_hidden_size": HIDDEN,
              "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    media = {"image_token_id": 10, "video_token_id": VIDEO_PAD, "vision_start_token_id": 12, "vision_end_token_id": 13,
             "tie_word_embeddings": True}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 112, "fullatt_block_indexes": [2, 5], "tokens_per_second": 2}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **media)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    text |= {"head_dim": 64}
    vision |= {"num_position_embeddings": 256}
    if family == "qwen3_5":  # heads and states in the proportions of the 9B
        text |= {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
                 "linear_value_head_dim": 64, "tie_word_embeddings": True}
        text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [3, 3, 2],
                                    "partial_rotary_factor": 0.25}
        hybrid = transformers.Qwen3_5ForConditionalGeneration(
            transformers.Qwen3_5Config(text_config=text, vision_config=vision, **media))
        serve_groups(hybrid, FAMILIES[family])
        return hybrid
    vision |= {"deepstack_visual_indexes": []}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **media)
    return transformers.Qwen3VLForConditionalGeneration(config)


def video_prompt(tokens: int) -> tuple[EncodedPrompt, torch.Tensor, torch.Tensor]:
    """A prompt of `tokens` tokens, a video of 8 x 8 merged patches per grid and a question; with pixels and grid."""
    grids = (tokens - 40) // 64
    question = tokens - grids * 64 - 2
    ids = torch.cat([torch.tensor([12]), torch.full((grids * 64,), VIDEO_PAD), torch.tensor([13]),
                     torch.randint(20, VOCABULARY, (question,))])
    positions, following = mrope_positions([TextSpan(1), GridSpan(tuple(range(0, 2 * grids, 2)), 8, 8),
                                            TextSpan(1 + question)])
    pixels = torch.randn(grids * 256, 3 * 2 * 14 * 14)
    return EncodedPrompt(ids, positions, following), pixels, torch.tensor([[grids, 16, 16]])


class Step:
    """All ways of one step on the same group."""

    def __init__(self, model: torch.nn.Module, prompt: int, completion: int, group: int, train_vision: bool) -> None:
        self.model = model
        self.train_vision = train_vision
        model.model.visual.requires_grad_(train_vision)
        trim_last_layer(model.model.language_model)
        self.prompt, self.pixels, self.grid = video_prompt(prompt)
        self.completions = torch.randint(20, VOCABULARY, (group, completion))
        self.weights = torch.randn(group * completion) / (group * completion)
        self.cast(torch.float32)

    def cast(self, dtype: torch.dtype) -> None:
        """Go on in another data type."""
        self.model.to(dtype)
        self.pixels = self.pixels.to(dtype)
        with torch.no_grad():
            self.features = self.tower(1)

    def tower(self, copies: int) -> torch.Tensor:
        return self.model.model.visual(self.pixels.repeat(copies, 1), grid_thw=self.grid.repeat(copies, 1),
                                       return_dict=True).pooler_output

    def embeddings(self, ids: torch.Tensor, copies: int) -> torch.Tensor:
        features = self.tower(copies) if self.train_vision else self.features.repeat(copies, 1)
        return self.model.get_input_embeddings()(ids).masked_scatter((ids == VIDEO_PAD)[..., None], features)

    def packed(self) -> PackedBatch:
        return pack([(self.prompt, self.completions.tolist())])

    def shared(self, backend: str) -> torch.Tensor:
        """Shared prefix: the prompt once."""
        self.model.model.language_model.set_attn_implementation(attention.implementation(backend))
        batch = self.packed()
        hidden = self.model.model.language_model(
            inputs_embeds=self.embeddings(batch.token_ids[None], 1), position_ids=batch.positions[:, None],
            attention_mask=None, use_cache=False, groups=batch.groups, trim=True).last_hidden_state[0]
        return self.backward(hidden[batch.logit_index])

    def repeated(self) -> torch.Tensor:
        """The sibling: G copies of the prompt."""
        self.model.model.language_model.set_attn_implementation("sdpa")
        group, length = self.completions.shape
        ids = torch.cat([self.prompt.token_ids.expand(group, -1), self.completions], 1)
        tail = (torch.arange(length) + self.prompt.next_position).expand(3, -1)
        positions = torch.cat([self.prompt.positions, tail], 1)[:, None].expand(-1, group, -1)
        hidden = self.model.model.language_model(
            inputs_embeds=self.embeddings(ids, group), position_ids=positions, attention_mask=torch.ones_like(ids),
            use_cache=False).last_hidden_state
        return self.backward(hidden[:, len(self.prompt.token_ids) - 1:-1].flatten(0, 1))

    def backward(self, hidden: torch.Tensor) -> torch.Tensor:
        logprobs = reference.linear_logprobs(hidden, self.model.lm_head.weight, self.completions.flatten())
        loss = -(self.weights * logprobs).sum()
        loss.backward()
        return loss.detach()

    def gradients(self, run: Callable[[], object]) -> torch.Tensor:
        """Gradients float32 of all trained parameters, by one way."""
        self.model.zero_grad()
        run()
        return torch.cat([p.grad.float().flatten() for p in self.model.parameters() if p.grad is not None])


def timed(run: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def checked_gradients(step: Step, ways: dict[str, Callable[[], object]], dtype: torch.dtype) -> dict[str, float]:
    """Relative difference of each way's gradients from the repeated prompt's, in `dtype`, in which `step` is left.

    A way may be off the float32 gradients by twice what the repeated prompt itself is in `dtype`, or by 1e-4.
    """
    exact = repeated = step.gradients(ways["repeated"])
    if dtype != torch.float32:
        step.cast(dtype)
        repeated = step.gradients(ways["repeated"])
    allowed = max(1e-4, 2 * float((repeated - exact).norm() / exact.norm()))
    differences = {}
    for name, run in ways.items():
        found = repeated if name == "repeated" else step.gradients(run)
        error = float((found - exact).norm() / exact.norm())
        assert error <= allowed, f"{name} is wrong: relative gradient error {error}, allowed {allowed}"
        differences[name] = float((found - repeated).norm() / repeated.norm())
    return differences


def backends_to_run(names: list[str] | None, shape: AttentionShape) -> list[str]:
    """The named backends, or all that can run here; one that is named and cannot is a ConfigError."""
    if names:
        return [attention.select(name, shape) for name in names]
    return [name for name in PREFERENCE if attention.unusable(name, shape) is None]


def row_of(backend: str, seconds: dict[str, list[float]], memory: dict[str, int],
           differences: dict[str, float]) -> dict[str, object]:
    """What one backend took, against the repeated prompt; the runs of both are pairs."""
    ratios = [b / a for a, b in zip(seconds[backend], seconds["repeated"], strict=True)]
    return {"backend": backend, "speedup_median": round(statistics.median(ratios), 2),
            "speedup_min": round(min(ratios), 2), "speedup_max": round(max(ratios), 2),
            "shared_seconds": [round(s, 3) for s in seconds[backend]],
            "repeated_seconds": [round(s, 3) for s in seconds["repeated"]],
            "shared_peak_mib": memory[backend] >> 20, "repeated_peak_mib": memory["repeated"] >> 20,
            "peak_memory_ratio": round(memory["repeated"] / memory[backend], 2),
            "gradient_relative_difference": differences[backend]}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--family", choices=("qwen2_5_vl", "qwen3_vl", "qwen3_5"), default="qwen2_5_vl")
    parser.add_argument("--train-vision", action="store_true")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--backends", nargs="+", choices=PREFERENCE, help="default: all that can run here")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    model, dtype = build_model(args.family), getattr(torch, args.dtype)
    if args.liger:
        apply_liger(model)
    backends = backends_to_run(args.backends, replace(AttentionShape.of(model), dtype=dtype))
    step = Step(model, args.prompt, args.completion, args.group, args.train_vision)
    ways: dict[str, Callable[[], object]] = {name: partial(step.shared, name) for name in backends}
    ways["repeated"] = step.repeated
    differences = checked_gradients(step, ways, dtype)
    memory = {}
    for name, run in ways.items():
        step.model.zero_grad()
        memory[name] = peak_bytes(run, torch.get_default_device())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, run in ways.items():
            step.model.zero_grad()
            seconds[name].append(timed(run))
    common = {"bench": "step", "family": args.family, "prompt": args.prompt, "completion": args.completion,
              "group": args.group, "train_vision": args.train_vision, "liger": args.liger, "dtype": args.dtype,
              "parameters": sum(p.numel() for p in step.model.parameters())}
    for backend in backends:
        row = row_of(backend, seconds, memory, differences)
        path = recipe.append("step", common | row)
        print(f"shared prefix ({backend}) against repeated prompt: {row['speedup_median']}x faster "
              f"({row['speedup_min']} to {row['speedup_max']} over {args.runs} pairs), "
              f"{row['peak_memory_ratio']}x less peak memory, gradients differ by {differences[backend]:.1e}; {path}")


if __name__ == "__main__":
    main()
