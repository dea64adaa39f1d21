"""Checkpoints of the real architectures, wider than the demo's, with its tokenizer and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from veripo_fast.config.families import FAMILIES
from veripo_fast.demo import tiny_model
from veripo_fast.model.policy import Policy
from veripo_fast.types import LoadedPrompt, Message, Prompt, Video

TEXT = {
    "2m": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 32},
    "23m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 64},
    "30m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 64},
    "400m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 34, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 64},
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "head_dim": 128},
}
"""Parameters of the language model -> its shapes; the last are those of Qwen2.5-3B but for the vocabulary."""
STATES = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
          "linear_value_head_dim": 64}
"""Of recurrent layers, three of four, in the proportions of Qwen3.5-9B."""
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
"""As many weights in all experts as a dense MLP of 1,536 has; a token passes a quarter of them."""
QUESTION = " ".join(["What does the shape do after it has touched the left side?"] * 6)


def write_checkpoint(folder: Path, size: str, dtype: torch.dtype = torch.float32, *, vocabulary: int | None = None,
                     vision: dict[str, Any] | None = None, seed: int = 0, family: str = "qwen3_vl") -> None:
    """A checkpoint of a size in `TEXT`, with `STATES` and `MIXTURE` where its family has them.

    Args:
        vocabulary: rows of the head; None: as many as the tokenizer knows. vision: what the tower has of its own.
    """
    tokenizer = tiny_model.build_tokenizer()
    entry = FAMILIES[family]
    config = tiny_model.build_model(family, 0, tokenizer).config
    text: dict[str, Any] = TEXT[size] | ({"vocab_size": vocabulary} if vocabulary else {})
    if entry.router_class:
        text |= MIXTURE
    if entry.shared_expert:
        text |= {"shared_expert_intermediate_size": MIXTURE["moe_intermediate_size"]}
    if entry.delta_class:
        kinds = ["linear_attention"] * 3 + ["full_attention"]
        text |= STATES | {"layer_types": (kinds * text["num_hidden_layers"])[:text["num_hidden_layers"]]}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    for name, value in (vision or {}).items():
        setattr(config.vision_config, name, value)
    half = TEXT[size]["head_dim"] // (8 if entry.delta_class else 2)  # Qwen3.5 rotates a quarter of a head
    config.text_config.rope_parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    config.text_config.initializer_range = 0.02
    config.vision_config.out_hidden_size = TEXT[size]["hidden_size"]
    torch.manual_seed(seed)
    model = getattr(transformers, entry.model_class)(config).to(dtype)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(folder)
    tiny_model.save_processor(folder, family, tokenizer)


@torch.no_grad()
def video_prompts(policy: Policy, count: int) -> list[LoadedPrompt]:
    """Questions about eight random frames each, equally long."""
    generator = torch.Generator().manual_seed(1)
    side = 4 * policy.encoder.vision.factor
    prompts = []
    for number in range(count):
        pixels = torch.randint(0, 256, (8, 3, side, side), generator=generator, dtype=torch.uint8)
        media = policy.encoder.media_inputs([("video", pixels, torch.arange(8).double() / 2)], f"video-{number}")
        prompt = Prompt(f"p{number}", (Message("user", (Video(""), QUESTION)),), "text", "")
        prompts.append(LoadedPrompt(prompt, policy.encoder.encode(prompt, media), policy.vision_features(media)))
    return prompts
