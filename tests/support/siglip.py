"""A tiny random SigLIP model with a tokenizer, made on the spot."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from tests.support import policies

SIZE, POSITIONS = 24, 16
"""Sides of the pictures that it sees, and tokens of a text that it reads."""


@cache
def folder(seed: int = 0) -> Path:
    """A checkpoint folder, made once per test process."""
    from transformers import AutoTokenizer, SiglipConfig, SiglipModel

    path = Path(mkdtemp(prefix="veripo-siglip-"))
    tokenizer = AutoTokenizer.from_pretrained(policies.checkpoint("qwen3_vl"))
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    SiglipModel(SiglipConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS,
                     "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**sizes, "image_size": SIZE, "patch_size": 8})).save_pretrained(path)
    return path
