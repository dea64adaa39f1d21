"""The slow sibling of a packed group: Hugging Face's own forward on a prompt and one completion, with plain SDPA."""

from __future__ import annotations

import torch

from veripo_fast.model.policy import Policy
from veripo_fast.types import EncodedPrompt


def plain_logits(policy: Policy, prompt: EncodedPrompt, completion: list[int]) -> torch.Tensor:
    """Logits [len(completion) + 1, V] of every next token, the tower included, at our positions."""
    device = policy.device
    positions = torch.cat([prompt.positions, (torch.arange(len(completion)) + prompt.next_position).expand(3, -1)], 1)
    inputs = {}
    if prompt.media is not None:
        assert prompt.media.pixel_values is not None, "media were stripped of their pixels"
        split = prompt.media.pixel_values.split(prompt.media.grid_thw.prod(-1).tolist())
        for kind, pixels, grid in (("image", "pixel_values", "image_grid_thw"),
                                   ("video", "pixel_values_videos", "video_grid_thw")):
            rows = [i for i, name in enumerate(prompt.media.kinds) if name == kind]
            if rows:
                inputs[pixels] = torch.cat([split[i] for i in rows]).to(device)
                inputs[grid] = prompt.media.grid_thw[rows].to(device)
    ids = torch.cat([prompt.token_ids, torch.tensor(completion, dtype=torch.long)])[None].to(device)
    language_model = policy.model.model.language_model
    ours = language_model.config._attn_implementation
    language_model.set_attn_implementation("sdpa")
    try:
        out = policy.model.model(input_ids=ids, position_ids=positions[:, None].to(device),
                                 attention_mask=torch.ones_like(ids), use_cache=False, **inputs)
    finally:
        language_model.set_attn_implementation(ours)
    return policy.head(out.last_hidden_state[0, len(prompt.token_ids) - 1:])


def plain_logprobs(policy: Policy, prompt: EncodedPrompt, completion: list[int], temperature: float = 1.0
                   ) -> torch.Tensor:
    """Log-probabilities [len(completion)] of a completion's tokens."""
    logits = plain_logits(policy, prompt, completion)[:-1] / temperature
    targets = torch.tensor(completion, device=logits.device)
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
