"""vLLM as its users start it, on the last checkpoint of a run: it writes what our engine writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import policies
from tests.support.drop_in_prompts import our_texts, texts_of_others, trained
from veripo_fast.model.encoding import PromptEncoder


@pytest.mark.parametrize("family", [*policies.FAMILIES, "qwen3_vl_moe"])
def test_vllm_writes_the_same(family: str, tmp_path: Path) -> None:
    """Pixels go through vLLM's own processor, and its tower; it normalises them with the mean of the checkpoint."""
    folder = trained(family, tmp_path)
    ours = our_texts(folder)
    ended = [text.endswith("</answer>") for text in ours]
    assert len(set(ours)) > 2 and (any(ended) if family == "qwen3_vl_moe" else all(ended))
    assert texts_of_others("vllm", folder, PromptEncoder(folder).vision.factor, tmp_path) == ours
