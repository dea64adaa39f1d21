"""Where a pass looks at what is resident."""

from __future__ import annotations

import pytest
import torch

from tests.support import policies
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.model import layer_memory
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import load_policy


def test_it_is_looked_at_behind_every_layer_of_a_training_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(ModelConfig(path=str(policies.checkpoint("qwen3_vl")), device="cpu"))
    layer_memory.watch_layers(policy.step.language_model)  # once more: as a second policy of the model does
    batch = pack([(policies.encoded(policy.encoder, []), policies.random_completions([5, 7]))])
    looks: list[int] = []
    monkeypatch.setattr(layer_memory._resident, "look", lambda coming=0: looks.append(coming))
    with torch.no_grad():
        policy.completion_logprobs(batch, [None])
    assert not looks
    logprobs = policy.completion_logprobs(batch, [None])
    assert len(looks) == policy.num_layers
    logprobs.sum().backward()
    assert len(looks) == 2 * policy.num_layers
    assert looks[-1] == policy.step.language_model.get_input_embeddings().weight.nbytes and not any(looks[:-1])
