"""`veripo init-model`: tiny Qwen-VL checkpoints made offline, with their own tokenizer and full processor files.

The architecture is the real one (transformers' Qwen3-VL or Qwen2.5-VL classes), a few million parameters wide. Initial
weights are wider than transformers' default of 0.02: at this size nothing was learned from that in 500 steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veripo_fast.config.families import FAMILIES
from veripo_fast.errors import CheckpointError
from veripo_fast.types import ProblemType

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>"]
VOCABULARY = 512
TEXT_STD, VISION_STD = 0.08, 0.1
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def _patch(family: str) -> int:
    """Side of a patch, in pixels."""
    return 14 if FAMILIES[family].video_time == "positions" else 16


def init_model(out: Path, family: str, seed: int) -> None:
    """Write a randomly initialised checkpoint folder that `from_pretrained` loads.

    Raises:
        CheckpointError: `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} exists and is not empty; name another folder")
    from veripo_fast.model.drop_in import write_weights

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    write_weights(build_model(family, seed, tokenizer), FAMILIES[family], out)
    save_processor(out, family, tokenizer)


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the synthetic corpus' own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(_texts(), trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[*SPECIAL_TOKENS[3:], "<|im_start|>"], model_max_length=4096)


_TAUGHT: tuple[ProblemType, ...] = ("choice", "number", "estimate", "math", "text")
"""Types of answers whose instructions the tokenizer was made for; with others it would be another one."""


def _texts() -> list[str]:
    """Everything the demo's policy reads and writes, a few hundred times over."""
    from veripo_fast.data.wording import INSTRUCTIONS
    from veripo_fast.demo.questions import describe, questions
    from veripo_fast.demo.world import random_clip

    texts = [INSTRUCTIONS[kind] for kind in _TAUGHT] * 20
    for seed in range(150):
        clip = random_clip(seed)
        texts.append(describe(clip))
        for question in questions(clip, seed):
            options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", question.options, strict=False))
            texts.append(f"user\n{question.text}\n{options}\nassistant\n<0.3 seconds><2.2 seconds>")
            texts.append(f"<think>{question.reasoning(question.answer)}</think><answer>{question.gold}</answer>")
    return texts


def build_model(family: str, seed: int, tokenizer: Any) -> Any:
    """The model with random weights, float32."""
    import torch
    import transformers

    ids = tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = {
            "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "initializer_range": TEXT_STD, "tie_word_embeddings": True, "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"), "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "mrope_section": [6, 5, 5], "rope_theta": 10000.0}}
    vision: dict[str, Any] = {
              "depth": 4, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128,
              "patch_size": _patch(family), "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
              "initializer_range": VISION_STD}
    media = {"image_token_id": ids("<|image_pad|>"), "video_token_id": ids("<|video_pad|>"),
             "vision_start_token_id": ids("<|vision_start|>"), "vision_end_token_id": ids("<|vision_end|>"),
             "tie_word_embeddings": True}
    entry = FAMILIES[family]
    if entry.video_time == "positions":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
    else:
        text["head_dim"] = 32
        text["rope_parameters"] |= {"mrope_interleaved": True}
        vision |= {"num_position_embeddings": 36}
    if entry.deepstack:
        vision |= {"deepstack_visual_indexes": [1]}
    if entry.router_class:
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
                 "norm_topk_prob": True}  # in released files, and what vLLM looks for; transformers does it anyway
    if entry.shared_expert:
        text |= {"shared_expert_intermediate_size": 128}
        del text["intermediate_size"]
    if entry.delta_class:
        text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
        text["layer_types"] = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                 "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4, "tie_word_embeddings": True}
    config: Any = getattr(transformers, entry.config_class)(text_config=text, vision_config=vision, **media)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, entry.model_class)(config)
    model.generation_config.eos_token_id = ids("<|im_end|>")
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    return model


def save_processor(out: Path, family: str, tokenizer: Any) -> None:
    """Tokenizer, chat template, image and video processor files, so that Hugging Face's AutoProcessor loads too."""
    tokenizer.save_pretrained(out)
    qwen3 = FAMILIES[family].video_time == "stamps"
    geometry: dict[str, Any] = {"patch_size": _patch(family), "merge_size": 2, "temporal_patch_size": 2,
                                "size": {"shortest_edge": 1024, "longest_edge": 10_000 * (8 if qwen3 else 1)}}
    if qwen3:
        geometry |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = "Qwen3VLProcessor" if qwen3 else "Qwen2_5_VLProcessor"
    video = "Qwen3VLVideoProcessor" if qwen3 else "Qwen2VLVideoProcessor"
    for file, kind in (("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
                       ("video_preprocessor_config.json", {"video_processor_type": video})):
        stored = geometry | kind | {"processor_class": processor}
        (out / file).write_text(json.dumps(stored, indent=2) + "\n")
