"""Which tokens end a completion, and which are never sampled."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.support import policies
from veripo_fast.errors import CheckpointError
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.rollout.torch_engine import TorchEngine


def checkpoint_with(folder, family, eos_token_id):
    shutil.copytree(policies.checkpoint(family), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    return folder


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
@pytest.mark.parametrize(("named", "ends"), [([2, 0], (0, 2)), (0, (0, 2)), (None, (2,))])
def test_every_end_token_of_the_generation_config(family, named, ends, tmp_path):
    assert PromptEncoder(checkpoint_with(tmp_path / "model", family, named)).end_ids == ends


@pytest.mark.parametrize("named", ["</s>", [2, "x"], True])
def test_an_end_token_that_is_no_id_is_refused(named, tmp_path):
    with pytest.raises(CheckpointError, match="eos_token_id"):
        PromptEncoder(checkpoint_with(tmp_path / "model", "qwen3_vl", named))


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_any_end_token_stops(family, monkeypatch):
    policy = policies.policy(family)
    plain, end = policy.head, 0
    monkeypatch.setattr(policy.encoder, "end_ids", (end, policy.encoder.eos_id))
    monkeypatch.setattr(policy, "head", lambda hidden: plain(hidden).index_fill(-1, torch.tensor([end]), 40.0))
    groups = TorchEngine(policy).generate([policies.loaded(policy, [])], Sampling(2, 1.0, 6, 0))
    assert [(item.token_ids, item.finish_reason) for item in groups[0].completions] == [([end], "stop")] * 2


def test_an_end_token_is_no_part_of_the_text(tmp_path):
    """Also one that the tokenizer does not call special, so that a pattern sees what was written before it."""
    encoder = PromptEncoder(checkpoint_with(tmp_path / "model", "qwen3_vl", [300, 2]))
    written = encoder.encode_completion("<answer>5</answer>")
    assert encoder.tokenizer.decode([300], skip_special_tokens=True) != ""
    for end in encoder.end_ids:
        assert encoder.decode_completion([*written, end]) == "<answer>5</answer>"
    assert encoder.decode_completion([300, *written]) != "<answer>5</answer>"
    assert encoder.decode_completion([]) == ""


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_ids_beyond_the_tokenizer_are_never_sampled(family, monkeypatch):
    policy = policies.policy(family)
    plain = policy.head
    rows = set(range(policy.model.lm_head.out_features))
    unknown = rows - set(policy.encoder.tokenizer.get_vocab().values())
    assert unknown and unknown <= set(policy.encoder.banned_ids)
    beyond = torch.tensor(sorted(unknown))
    monkeypatch.setattr(policy, "head", lambda hidden: plain(hidden).index_fill(-1, beyond, 40.0))
    groups = TorchEngine(policy).generate([policies.loaded(policy, [])], Sampling(4, 1.0, 8, 0))
    assert not unknown & {token for item in groups[0].completions for token in item.token_ids}
