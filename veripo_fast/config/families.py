"""The model families that veripo trains, one entry each: plain data, which every folder may read.

A new family is an entry here and its name in the tests. What it has that others have is said by the fields; what no
family has had so far (another prompt format, another kind of layer) needs a field, and code that reads it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_LAYER, _BLOCK = r"model\.language_model\.layers\.\d+\.", r"model\.visual\.blocks\.\d+\."
_MERGER = r"model\.visual\.(?:merger|deepstack_merger_list\.\d+)\."
_LANGUAGE = {
    r"model\.language_model\.embed_tokens\.weight|lm_head\.weight": "vocabulary",
    _LAYER + r"self_attn\.[qkv]_proj\.(?:weight|bias)": "heads",
    _LAYER + r"mlp\.(?:gate|up)_proj\.weight": "gate_up",
    _LAYER + r"(?:self_attn\.o_proj|mlp\.down_proj)\.weight": "columns",
    _LAYER + r"(?:self_attn\.[qk]_norm|input_layernorm|post_attention_layernorm)\.weight": "whole",
    r"model\.language_model\.norm\.weight": "whole",
}
_TOWER = {
    _BLOCK + r"attn\.qkv\.(?:weight|bias)": "blocks",
    _BLOCK + r"attn\.proj\.(?:weight|bias)": "columns",
    _BLOCK + r"norm[12]\.(?:weight|bias)": "whole",
    r"model\.visual\.patch_embed\.proj\.(?:weight|bias)": "whole",
}
_EXPERTS = {
    _LAYER + r"mlp\.(?:gate|shared_expert_gate)\.weight": "whole",
    _LAYER + r"mlp\.experts\.gate_up_proj": "experts_in",
    _LAYER + r"mlp\.experts\.down_proj": "experts_out",
    _LAYER + r"mlp\.shared_expert\.(?:gate|up)_proj\.weight": "gate_up",
    _LAYER + r"mlp\.shared_expert\.down_proj\.weight": "columns",
}
_RECURRENT = {
    _LAYER + r"linear_attn\.(?:in_proj_(?:qkv|z)|conv1d)\.weight": "recurrent_inputs",
    _LAYER + r"linear_attn\.in_proj_[ab]\.weight": "strengths_decays",
    _LAYER + r"linear_attn\.(?:A_log|dt_bias)": "rows",
    _LAYER + r"linear_attn\.norm\.weight": "whole",
    _LAYER + r"linear_attn\.out_proj\.weight": "columns",
}
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Colours = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Family:
    """What is particular to a family."""

    name: str
    """`model_type` of its config.json, and its module in transformers."""
    title: str
    """As people call it."""
    tower_class: str
    """Of its vision tower in transformers."""
    config_class: str
    model_class: str
    """For conditional generation."""
    colours: Colours
    """Mean and standard deviation of pixel values, where the checkpoint's processor files name none."""
    video_time: Literal["positions", "stamps"]
    """How a video says when its frames were: in the time axis of the positions, with one run of tokens; or as text
    before each pair of frames, with a run for each."""
    query_norm: bool = False
    """Whether queries and keys are normalised."""
    deepstack: bool = False
    """Whether the tower has outputs that are added to the first decoder layers."""
    delta_class: str = ""
    """Of its layers that have a recurrent state (gated delta rule) in place of attention; empty: all attend."""
    router_class: str = ""
    """Of what chooses experts; empty: it has no experts."""
    transposed_experts: bool = False
    """Whether its files hold the matrices of experts transposed, of which transformers turns those that do not fit."""
    shared_expert: bool = False
    """Whether each mixture has an expert that all tokens pass."""
    gated_queries: bool = False
    """Whether query heads come with a gate of what they read."""
    engine_rules: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Names of parameters -> the method of `weights/layouts.py: Rules` that places them in vLLM; empty: their hand-over
    to vLLM is not written."""
    engine_since: str = "0.31"
    """The first version of vLLM that it was tested with."""

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The `layer_types` of a config.json that are run."""
        return ("full_attention", "linear_attention") if self.delta_class else ("full_attention",)

    @property
    def module(self) -> str:
        """That holds its classes."""
        return f"transformers.models.{self.name}.modeling_{self.name}"


_QWEN3_TOWER = {
    r"model\.visual\.pos_embed\.weight": "whole",
    f"(?:{_BLOCK}mlp\\.|{_MERGER})" + r"linear_fc1\.(?:weight|bias)": "rows",
    f"(?:{_BLOCK}mlp\\.|{_MERGER})" + r"linear_fc2\.(?:weight|bias)": "columns",
    _MERGER + r"norm\.(?:weight|bias)": "whole",
}

FAMILIES: dict[str, Family] = {family.name: family for family in (
    Family("qwen2_5_vl", "Qwen2.5-VL", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLConfig",
           "Qwen2_5_VLForConditionalGeneration", _CLIP, "positions",
           engine_rules=_LANGUAGE | _TOWER | {
               _BLOCK + r"mlp\.(?:gate|up)_proj\.(?:weight|bias)": "gate_up",
               _BLOCK + r"mlp\.down_proj\.(?:weight|bias)": "columns",
               r"model\.visual\.merger\.ln_q\.weight": "whole",
               r"model\.visual\.merger\.mlp\.0\.(?:weight|bias)": "rows",
               r"model\.visual\.merger\.mlp\.2\.(?:weight|bias)": "columns",
           }),
    Family("qwen3_vl", "Qwen3-VL", "Qwen3VLVisionModel", "Qwen3VLConfig", "Qwen3VLForConditionalGeneration", _HALF,
           "stamps", query_norm=True, deepstack=True,
           engine_rules=_LANGUAGE | _TOWER | _QWEN3_TOWER),
    Family("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen3VLMoeVisionModel", "Qwen3VLMoeConfig",
           "Qwen3VLMoeForConditionalGeneration", _HALF, "stamps", query_norm=True, deepstack=True,
           router_class="Qwen3VLMoeTextTopKRouter", transposed_experts=True,
           engine_rules=_LANGUAGE | _EXPERTS | _TOWER | _QWEN3_TOWER, engine_since="0.32"),
    Family("qwen3_5", "Qwen3.5", "Qwen3_5VisionModel", "Qwen3_5Config", "Qwen3_5ForConditionalGeneration", _HALF,
           "stamps", query_norm=True, delta_class="Qwen3_5GatedDeltaNet", gated_queries=True,
           engine_rules=_LANGUAGE | _RECURRENT | _TOWER | _QWEN3_TOWER, engine_since="0.32"),
    Family("qwen3_5_moe", "Qwen3.5-MoE", "Qwen3_5MoeVisionModel", "Qwen3_5MoeConfig",
           "Qwen3_5MoeForConditionalGeneration", _HALF, "stamps", query_norm=True,
           delta_class="Qwen3_5MoeGatedDeltaNet", router_class="Qwen3_5MoeTopKRouter", shared_expert=True,
           gated_queries=True, engine_rules=_LANGUAGE | _EXPERTS | _RECURRENT | _TOWER | _QWEN3_TOWER,
           engine_since="0.32"),
)}


def names(families: Mapping[str, Family] = FAMILIES) -> str:
    """`a, b and c`."""
    *first, last = families
    return f"{', '.join(first)} and {last}" if first else last


def names_with(part: str) -> str:
    """`names` of the families that have a part, by its field."""
    return names({name: family for name, family in FAMILIES.items() if getattr(family, part)})


def closest(name: str) -> str:
    """The known family whose name is most like another's; empty where none is."""
    found = difflib.get_close_matches(name, FAMILIES, 1, 0.5)
    return found[0] if found else ""
