"""A user's DeepSpeed configuration: filled, or refused by the name of a key."""

import json
from pathlib import Path

import pytest

from veripo_fast.distributed.zero_config import ZeroOptions, deepspeed_config, read_json
from veripo_fast.errors import ConfigError

HUGGING_FACE = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False}
"""tests/deepspeed/ds_config_zero3.json of transformers, without its optimizer, scheduler and offloading."""


def told(given: dict, stage: int = 2, offload: str = "none", bfloat16: bool = True) -> dict:
    return deepspeed_config(ZeroOptions(stage, offload, given), bfloat16=bfloat16, hidden_size=64)


def test_what_veripo_decides() -> None:
    config = told({}, stage=1, offload="cpu")
    assert config["zero_optimization"] == {
        "stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 1.0}, "memory_efficient_linear": False}
    assert config["gradient_clipping"] == 1.0 and config["managed_gradient_accumulation"] is False
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == 1
    assert config["bf16"] == {"enabled": True} and config["communication_data_type"] == "fp32"


def test_auto_is_filled() -> None:
    config = told(HUGGING_FACE, stage=3, bfloat16=False)
    assert config["bf16"] == {"enabled": False} and config["fp16"]["enabled"] is False
    zero = config["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"],
            zero["stage3_param_persistence_threshold"]) == (4096, 3686, 640)
    assert zero["overlap_comm"] is True and "steps_per_print" not in config and "auto" not in json.dumps(config)


def test_options_of_deepspeed_are_taken_as_given() -> None:
    given = {"zero_optimization": {"reduce_bucket_size": 1000}, "communication_data_type": "bf16"}
    config = told(given)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000 and config["communication_data_type"] == "bf16"


@pytest.mark.parametrize(("given", "sentence"), [
    ({"optimizer": {"type": "AdamW"}}, "optimizer is decided by veripo"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler is decided by veripo"),
    ({"gradient_cliping": 1.0}, r"gradient_cliping is decided by veripo or does nothing here; remove it \(what can"),
    ({"activation_checkpointing": {}}, "activation_checkpointing is decided by veripo or does nothing"),
    ({"gradient_clipping": 0.5}, 'gradient_clipping is 0.5, and veripo decides it; remove it, or write "auto"'),
    ({"train_batch_size": 64}, "train_batch_size is 64, and veripo decides it"),
    ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8, and veripo's own settings make it 1"),
    ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation is True"),
    ({"fp16": {"enabled": True}}, r"fp16\.enabled is True, and veripo's own settings make it False"),
    ({"bf16": {"enabled": False}}, r"bf16\.enabled is False, and veripo's own settings make it True"),
    ({"bf16": True}, "bf16 is True, and should be an object"),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, r"bf16\.bf16_master_weights_and_grads is decided"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, r"data_types\.grad_accum_dtype is 'bf16'"),
    ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage is 3, and veripo's own settings make it 2"),
    ({"zero_optimization": []}, r"zero_optimization is \[\], and should be an object"),
    ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"offload_optimizer\.device is 'nvme'"),
    ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, r"offload_param\.device is 'cpu'.*zero_stage 3"),
    ({"zero_optimization": {"zero_quantized_gradients": True}}, "zero_quantized_gradients rounds gradients"),
    ({"wall_clock_breakdown": True}, "wall_clock_breakdown makes DeepSpeed print"),
])
def test_what_contradicts_or_does_nothing_is_refused(given: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"^distributed\.deepspeed_config: .*{sentence}"):
        told(given)


def test_stage_1_overlaps_nothing() -> None:
    given = {"zero_optimization": {"overlap_comm": True}}
    assert told(given)["zero_optimization"]["overlap_comm"] is True
    with pytest.raises(ConfigError, match="overlap_comm has nothing to overlap at"):
        told(given, stage=1)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"distributed\.deepspeed_config: .*ds\.json"):
        read_json(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path / "none.json")
