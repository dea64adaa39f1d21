"""Tiny checkpoints: ordinary Hugging Face folders of both families, the same for the same seed, small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.support import policies
from veripo_fast.demo import tiny_model
from veripo_fast.demo.questions import questions
from veripo_fast.demo.world import random_clip
from veripo_fast.errors import CheckpointError


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_a_checkpoint_that_transformers_loads(family: str) -> None:
    folder = policies.checkpoint(family)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.model_type == family
    parameters = sum(p.numel() for p in model.parameters())
    assert 1e6 < parameters < 1e7
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", policies.FAMILIES)
def test_special_tokens_mean_the_same_to_model_and_tokenizer(family: str) -> None:
    folder = policies.checkpoint(family)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), policies.policy(family).encoder
    ids = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tiny_model.SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids) and len({one[0] for one in ids}) == len(ids)
    of = {token: one[0] for token, one in zip(tiny_model.SPECIAL_TOKENS, ids, strict=True)}
    assert encoder.pad_ids == {"image": of["<|image_pad|>"], "video": of["<|video_pad|>"]}
    assert encoder.eos_id == tokenizer.eos_token_id == of["<|im_end|>"]
    assert encoder.config.vision_start_token_id == of["<|vision_start|>"]
    assert encoder.config.vision_end_token_id == of["<|vision_end|>"]
    assert tokenizer.pad_token_id == of["<|endoftext|>"] != tokenizer.eos_token_id
    assert len(tokenizer) <= encoder.config.text_config.vocab_size == tiny_model.VOCABULARY
    assert tokenizer.decode(ids[2] + [30], skip_special_tokens=True) == tokenizer.decode([30])


def test_any_text_survives_the_tokenizer_and_the_corpus_is_short_in_it() -> None:
    encoder = policies.policy("qwen3_vl").encoder
    for text in ("plain", " spaces  and\n\nlines\t", "ü 三 🎬", "<think>0s left. so B.</think><answer>B</answer>"):
        assert encoder.decode_completion(encoder.encode_completion(text)) == text
    for seed in range(20):
        for question in questions(random_clip(seed), seed):
            text = f"<think>{question.reasoning(question.answer)}</think><answer>{question.gold}</answer>"
            assert len(encoder.encode_completion(text)) < 79, text  # the demo writes at most 80, end of turn included


def test_the_seed_decides(tmp_path: Path) -> None:
    torch.manual_seed(7)  # a draw of its own: the seed of the model must not show in it
    state = torch.get_rng_state()
    tiny_model.init_model(tmp_path / "again", "qwen3_vl", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again, first = tmp_path / "again", policies.checkpoint("qwen3_vl")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in first.iterdir()}
    tiny_model.init_model(tmp_path / "other", "qwen3_vl", seed=2)
    assert weights(tmp_path / "other") != weights(first)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        tiny_model.init_model(tmp_path, "qwen2_5_vl", seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_the_shipped_policy_reads_by_the_tokenizer_that_is_built() -> None:
    """Its texts are words of other files: an instruction that is added there would make another tokenizer."""
    shipped = AutoTokenizer.from_pretrained(Path(tiny_model.__file__).with_name("tiny_policy"))
    assert tiny_model.build_tokenizer().get_vocab() == shipped.get_vocab()
