"""What tests of updates share."""

from __future__ import annotations

import pytest

from tests.support import policies
from veripo_fast.model.policy import Policy


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    """The shared frozen-tower policy; `Gradients` keeps its weights, and its version is put back."""
    shared = policies.policy("qwen3_vl", freeze_vision=True)
    shared.model.zero_grad()
    monkeypatch.setattr(shared, "version", 0)
    return shared
