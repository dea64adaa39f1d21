"""Checkpoints of the real architecture, wider than the demo's, with its tokenizer and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

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
QUESTION = " ".join(["What does the shape do after it has touched the left side?"] * 6)


def write_checkpoint(folder: Path, size: str, dtype: torch.dtype = torch.float32, *, vocabulary: int | None = None,
                     vision: dict[str, Any] | None = None, seed: int = 0) -> None:
    """A Qwen3-VL checkpoint of a size in `TEXT`.

    Args:
        vocabulary: rows of the head; None: as many as the tokenizer knows. vision: what the tower has of its own.
    """
    tokenizer = tiny_model.build_tokenizer()
    config = tiny_model.build_model("qwen3_vl", 0, tokenizer).config
    for name, value in (TEXT[size] | ({"vocab_size": vocabulary} if vocabulary else {})).items():
        setattr(config.text_config, name, value)
    for name, value in (vision or {}).items():
        setattr(config.vision_config, name, value)
    half = TEXT[size]["head_dim"] // 2
    config.text_config.rope_parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    config.text_config.initializer_range = 0.02
    config.vision_config.out_hidden_size = TEXT[size]["hidden_size"]
    torch.manual_seed(seed)
    model = transformers.Qwen3VLForConditionalGeneration(config).to(dtype)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.save_pretrained(folder)
    tiny_model.save_processor(folder, "qwen3_vl", tokenizer)


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
