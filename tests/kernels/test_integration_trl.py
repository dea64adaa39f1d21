"""TRL's trainers with their own losses and with these: ten steps of training, and many options on one micro-batch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

try:
    import trl
except ImportError:
    pytest.skip("trl is not installed", allow_module_level=True)
from accelerate import Accelerator
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from veripo_kernels.integrations.scoring import ScoringModel, check_model
from veripo_kernels.integrations.trl import VeripoDPOTrainer, VeripoGRPOTrainer, use_veripo_losses

from veripo_fast.demo.tiny_model import build_model, build_tokenizer

WORDS = [f"w{number}" for number in range(60)]
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10 w11 w12"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
         "eos_token_id": 1, "bos_token_id": 2}
STEPS = 10
QUIET = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "bf16": False, "seed": 3,
         "gradient_checkpointing": False, "disable_tqdm": True, "optim": "sgd", "lr_scheduler_type": "constant",
         "max_grad_norm": 100.0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                                   unk_token="<unk>", padding_side="left")


def tiny(kind: str = "Qwen2", **options: Any) -> Any:
    """A model with random weights, wide enough apart that its probabilities are far from uniform."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny(tie_word_embeddings=False).save_pretrained(path)
    return path


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) + 0.1 * text.count("3") for text in completions]


def grpo_trainer(trainer_class: type, model: Any, out: Path, **options: Any) -> Any:
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": STEPS,
               "learning_rate": 0.003, "gradient_accumulation_steps": 1, "steps_per_generation": 1, "num_iterations": 2,
               **options}
    if isinstance(model, Path):
        model, options = str(model), {"model_init_kwargs": {"dtype": "float32"}, **options}
    return trainer_class(model, reward, args=GRPOConfig(str(out), **QUIET, **options), processing_class=tokenizer(),
                         train_dataset=Dataset.from_dict({"prompt": PROMPTS}))


def dpo_trainer(trainer_class: type, model: Any, out: Path, **options: Any) -> Any:
    pairs = Dataset.from_dict({
        "prompt": PROMPTS, "chosen": [" w20 w21 w22", " w23", " w24 w25", " w26 w27 w28 w29"],
        "rejected": [" w30", " w31 w32 w33 w34", " w35 w36", " w37"]})
    options = {"per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 0.0003, "beta": 0.3,
               "model_init_kwargs": {"dtype": "float32"}, **options}
    return trainer_class(str(model), args=DPOConfig(str(out), **QUIET, **options), train_dataset=pairs,
                         processing_class=tokenizer())


def recorded(trainer_class: type) -> type:
    """A user's subclass: writes down every loss, and calls super() for the rest."""

    class Recorded(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.losses: list[float] = []
            super().__init__(*args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    return Recorded


def history(trainer: Any) -> tuple[list[float], list[float], list[dict[str, float]]]:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == STEPS
    return trainer.losses, [float(entry["grad_norm"]) for entry in steps], steps


def check_training(build: Callable[..., Any], base: type, model_path: Path, tmp_path: Path, **options: Any) -> None:
    user_class = recorded(base)
    losses, norms, logs = history(build(user_class, model_path, tmp_path / "trl", **options))
    trainer = build(use_veripo_losses(user_class), model_path, tmp_path / "ours", **options)
    assert isinstance(trainer, user_class)
    our_losses, our_norms, our_logs = history(trainer)
    assert our_losses == pytest.approx(losses, rel=1e-5, abs=2e-6)
    assert our_norms == pytest.approx(norms, rel=5e-5)  # ten updates add up what each side rounds, by the processor
    assert sorted(norms)[STEPS // 2] > 1e-3, "a loss without gradient compares nothing"
    timed = {"step_time", "mean_token_accuracy"}
    for log, our_log in zip(logs, our_logs, strict=True):
        assert our_log.keys() | timed >= log.keys() >= our_log.keys()
        # in the first step of DPO policy and reference are one: which reward is larger is decided by rounding alone
        undecided = {"rewards/accuracies"} if log.get("rewards/margins") == 0 else set()
        for name in our_log.keys() - timed - undecided:
            assert our_log[name] == pytest.approx(log[name], rel=1e-4, abs=1e-5, nan_ok=True), name


# -- ten steps -------------------------------------------------------------------------------------------------------

GRPO_RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "bnpo": {"loss_type": "bnpo", "temperature": 0.7},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
             "num_iterations": 1, "mask_truncated_completions": True, "max_completion_length": 40},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
    "sapo": {"loss_type": "sapo", "entropy_coef": 0.05, "beta": 0.05},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.01, "beta": 0.05},
    "vespo": {"loss_type": "vespo", "vespo_k_neg": 1.5},
    "cispo by sequence, TRL's epsilon_high": {"loss_type": "cispo", "importance_sampling_level": "sequence"},
    "sapo by sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "delta below 1, epsilon above 1": {"loss_type": "dapo", "delta": 0.99, "epsilon": 1.5},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 1e-5, "beta": 0.05},
    "top entropy": {"loss_type": "bnpo", "top_entropy_quantile": 0.4, "entropy_coef": 0.05, "beta": 0.05},
    "adaptive entropy": {"loss_type": "dapo", "use_adaptive_entropy": True, "entropy_target": 2.1,
                         "entropy_coef_delta": 0.02, "gradient_accumulation_steps": 2, "steps_per_generation": 2},
}


@pytest.mark.parametrize("name", GRPO_RUNS)
def test_grpo_trains_as_with_trl(name: str, model_path: Path, tmp_path: Path) -> None:
    check_training(grpo_trainer, GRPOTrainer, model_path, tmp_path, **GRPO_RUNS[name])


DPO_RUNS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "mixture": {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [0.8, 0.5, 0.1],
                "gradient_accumulation_steps": 2},
    "precomputed": {"loss_type": ["robust"], "label_smoothing": 0.2, "ld_alpha": 0.4, "precompute_ref_log_probs": True},
    "bco": {"loss_type": ["bco_pair"]},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.3},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1, "per_device_train_batch_size": 4},
    "aot_unpaired": {"loss_type": ["aot_unpaired"], "per_device_train_batch_size": 4, "ld_alpha": 0.5},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence", "loss_type": ["ipo"], "beta": 1.0},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4, "loss_type": ["hinge"]},
    "wpo": {"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"]},
    "beta 0": {"beta": 0.0, "loss_type": ["sigmoid", "sft"]},
    "keep_end": {"truncation_mode": "keep_end", "max_length": 3, "loss_type": ["ipo", "sigmoid_norm"],
                 "ld_alpha": 0.4},
}


@pytest.mark.parametrize("name", DPO_RUNS)
def test_dpo_trains_as_with_trl(name: str, model_path: Path, tmp_path: Path) -> None:
    check_training(dpo_trainer, DPOTrainer, model_path, tmp_path, **DPO_RUNS[name])


# -- one micro-batch, many options -----------------------------------------------------------------------------------


def grpo_inputs(trainer: Any) -> dict[str, torch.Tensor]:
    """Prompts padded left, ragged completions padded right, one of them empty, and log-probs that have drifted."""
    generator = torch.Generator().manual_seed(1)
    rand = lambda: torch.randn(4, 7, generator=generator)
    lengths = torch.tensor([7, 3, 0, 5])
    completion_mask = (torch.arange(7) < lengths[:, None]).long()
    prompt_mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    inputs = {"prompt_ids": torch.randint(4, 64, (4, 3), generator=generator) * prompt_mask, "prompt_mask": prompt_mask,
              "completion_ids": torch.randint(4, 64, (4, 7), generator=generator) * completion_mask,
              "completion_mask": completion_mask, "advantages": torch.tensor([1.3, -0.7, 0.4, -1.0]),
              "num_items_in_batch": torch.tensor(37)}
    with torch.no_grad():
        policy, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([prompt_mask, completion_mask], 1), 7)
    inputs["old_per_token_logps"] = policy + 0.3 * rand() * completion_mask
    inputs["ref_per_token_logps"] = policy + 0.4 * rand() * completion_mask
    return inputs


def with_engine(trainer: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Log-probs of the engine, one missing, and the importance ratio that TRL's generation step makes of them."""
    rollout = inputs["old_per_token_logps"] + 0.5 * torch.randn(4, 7, generator=torch.Generator().manual_seed(5))
    rollout[0, 1] = torch.nan
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    gap = torch.nan_to_num((inputs["old_per_token_logps"] - rollout) * mask)
    level, kind = trainer.vllm_importance_sampling_mode.split("_")
    ratio = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
    low, high = trainer.vllm_importance_sampling_clip_min or 0.0, trainer.vllm_importance_sampling_clip_max
    outside = (ratio < low) | (ratio > high)
    ratio = ratio.masked_fill(outside, 0.0) if kind == "mask" else ratio.clamp(low, high)
    return {**inputs, "sampling_per_token_logps": rollout, "importance_sampling_ratio": ratio}


@pytest.fixture(scope="module")
def grpo_pair(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    out = tmp_path_factory.mktemp("pair")
    theirs, ours = (grpo_trainer(kind, model_path, out, temperature=0.8) for kind in (GRPOTrainer, VeripoGRPOTrainer))
    theirs.current_gradient_accumulation_steps = ours.current_gradient_accumulation_steps = 1  # set by train()
    return theirs, ours


def measure(trainer: Any, inputs: dict[str, Any], options: dict[str, Any], *rest: Any, mode: str = "train",
            ) -> tuple[float, list[Any], dict]:
    """Loss, gradients and metrics of a micro-batch under options, which are put back."""
    changed = []
    for name, value in options.items():
        for owner in (trainer, trainer.args):
            if hasattr(owner, name):
                changed.append((owner, name, getattr(owner, name)))
                setattr(owner, name, value)
    trainer._metrics[mode].clear()
    trainer.model.train(mode == "train")
    trainer.model.zero_grad()
    try:
        loss = trainer._compute_loss(trainer.model, inputs, *rest)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics[mode].items()}
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
    return loss.item(), [parameter.grad for parameter in trainer.model.parameters()], metrics


def check_same(ours: tuple[float, list[Any], dict], theirs: tuple[float, list[Any], dict], left: tuple = ()) -> None:
    # the largest difference, 3.4e-5, is vespo's: its weight is an exponential of a sum over a completion, which torch
    # rounds by the processor
    assert ours[0] == pytest.approx(theirs[0], rel=5e-5, abs=1e-6)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert other is not None and mine is not None
        assert (mine - other).norm() <= 5e-5 * other.norm() + 1e-8
    assert ours[2].keys() == theirs[2].keys() - set(left)
    for name, value in ours[2].items():
        assert value == pytest.approx(theirs[2][name], rel=1e-5, abs=1e-6), name


KL = {"beta": 0.2, "use_bias_correction_kl": False}
GRPO_CASES: list[dict[str, Any]] = [
    {"loss_type": name, **options}
    for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
    for options in ({"epsilon_high": 1.05}, {**KL, "epsilon_high": 1.05, "entropy_coef": 0.1},
                    {"beta": 0.2, "use_bias_correction_kl": True, "epsilon_high": 1.05})]
GRPO_CASES += [{"loss_type": name, "importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03,
                "beta": 0.2, "use_bias_correction_kl": bias}
               for name, bias in (("grpo", True), ("bnpo", False), ("dr_grpo", False), ("dapo", True))]
GRPO_CASES += [{"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.1, "delta": 1.3},
               {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0, "epsilon_high": 0.2},
               {"loss_type": "grpo", "epsilon_low": 0.3, "epsilon_high": 0.4, "delta": 1.2},
               {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.4, "delta": 0.8},
               {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 2.0, "delta": 0.98},
               {"loss_type": "cispo", "epsilon_high": 0.2, "importance_sampling_level": "sequence", "beta": 0.2},
               {"loss_type": "sapo", "importance_sampling_level": "sequence", "sapo_temperature_neg": 3.0},
               {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon_low": 0.02, "beta": 0.2},
               {"loss_type": "luspo", "beta": 0.2, "use_bias_correction_kl": False, "entropy_coef": 0.1},
               {"loss_type": "vespo", "beta": 0.2, "use_bias_correction_kl": False, "entropy_coef": 0.1},
               {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.0,
                "importance_sampling_level": "sequence"},
               *({"loss_type": name, "off_policy_mask_threshold": threshold, "top_entropy_quantile": quantile,
                  "entropy_coef": 0.1, "importance_sampling_level": level, **KL}
                 for name, threshold, quantile, level in (
                     ("grpo", 0.02, 1.0, "token"), ("grpo", None, 0.5, "sequence"), ("vespo", 0.02, 0.5, "token"),
                     ("sapo", 0.02, 0.5, "sequence"), ("luspo", 0.02, 0.3, "sequence"))),
               {"loss_type": "dapo", "current_gradient_accumulation_steps": 4, "steps_per_generation": 8},
               {"loss_type": "grpo", "current_gradient_accumulation_steps": 4, "entropy_coef": 0.2}]


@pytest.mark.parametrize("options", GRPO_CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_grpo_micro_batch(grpo_pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    options = {"epsilon_low": 0.2, "epsilon_high": 0.25, **options}
    options["_entropy_bonus_enabled"] = "entropy_coef" in options
    theirs, ours = grpo_pair
    inputs = grpo_inputs(theirs)
    check_same(measure(ours, inputs, options), measure(theirs, inputs, options))


@pytest.mark.parametrize(("loss_type", "threshold"), [("bnpo", None), ("bnpo", 0.02), ("vespo", None)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_tool_tokens_per_token_advantages_and_no_old_logprobs(
        grpo_pair: tuple[Any, Any], level: str, loss_type: str, threshold: float | None) -> None:
    theirs, ours = grpo_pair
    options = {"loss_type": loss_type, "importance_sampling_level": level, "epsilon_low": 0.05, "epsilon_high": 0.05,
               "off_policy_mask_threshold": threshold, "top_entropy_quantile": 1.0 if threshold is None else 0.6}
    inputs = grpo_inputs(theirs)
    inputs["tool_mask"] = torch.ones(4, 7, dtype=torch.int64)
    inputs["tool_mask"][0, 2:4] = inputs["tool_mask"][3, 0] = 0
    check_same(measure(ours, inputs, options), measure(theirs, inputs, options))
    per_token = {**inputs, "advantages": torch.randn(4, 7, generator=torch.Generator().manual_seed(2))}
    check_same(measure(ours, per_token, options), measure(theirs, per_token, options))
    del inputs["old_per_token_logps"]
    check_same(measure(ours, inputs, options), measure(theirs, inputs, options))


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("bounds", [(None, 1.5), (0.8, 3.0)])
def test_grpo_importance_of_the_engine(grpo_pair: tuple[Any, Any], mode: str, bounds: tuple[float | None, float],
                                       ) -> None:
    theirs, ours = grpo_pair
    options = {"loss_type": "dapo", "use_vllm": True, "vllm_importance_sampling_mode": mode, **KL,
               "vllm_importance_sampling_clip_min": bounds[0], "vllm_importance_sampling_clip_max": bounds[1]}
    trainer = SimpleNamespace(**{name: value for name, value in options.items() if name.startswith("vllm")})
    inputs = with_engine(trainer, grpo_inputs(theirs))
    for extra in ({}, {"off_policy_mask_threshold": 0.05}, {"loss_type": "vespo"}):
        if extra.get("loss_type") != "vespo" or mode.startswith("token"):  # TRL's vespo has no other
            check_same(measure(ours, inputs, options | extra), measure(theirs, inputs, options | extra))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
def test_grpo_without_a_token_is_a_zero_with_gradients(grpo_pair: tuple[Any, Any], loss_type: str) -> None:
    _, ours = grpo_pair
    inputs = grpo_inputs(ours)
    inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
    loss, gradients, _ = measure(ours, inputs, {"loss_type": loss_type})
    assert loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_grpo_evaluation_is_not_divided_by_accumulation(grpo_pair: tuple[Any, Any]) -> None:
    options = {"current_gradient_accumulation_steps": 4}
    for loss_type in ("grpo", "dapo"):
        results = [measure(trainer, grpo_inputs(trainer), {**options, "loss_type": loss_type}, mode="eval")
                   for trainer in grpo_pair]
        check_same(results[1], results[0])


@pytest.fixture(scope="module")
def dpo_pair(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """TRL's trainer and ours, their policies the same and away from the reference, and a batch."""
    out = tmp_path_factory.mktemp("pair")
    options = {"per_device_train_batch_size": 4, "use_weighting": True}
    trainers = [dpo_trainer(kind, model_path, out, **options) for kind in (DPOTrainer, VeripoDPOTrainer)]
    for trainer in trainers:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return (*trainers, next(iter(trainers[0].get_train_dataloader())))


DPO_CASES = [([name], {}) for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero",
                                       "apo_down", "sft", "bco_pair", "discopop", "aot", "aot_unpaired")]
DPO_CASES += [([name], {"label_smoothing": 0.1}) for name in ("sigmoid", "robust", "exo_pair")]
DPO_CASES += [([name], {"ld_alpha": 0.3}) for name in ("sigmoid", "ipo")]
DPO_CASES += [([name], {"ld_alpha": 0.3, "label_smoothing": 0.2}) for name in ("aot", "aot_unpaired")]
DPO_CASES += [([name], {"f_divergence_type": kind, "f_alpha_divergence_coef": alpha,
                        "beta": 0.01 if name == "discopop" else 0.3})  # where TRL's exp(-margin) is finite
              for kind, alpha in (("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.3),
                                  ("alpha_divergence", 2.5), ("alpha_divergence", 1.0))
              for name in ("sigmoid", "sigmoid_norm", "ipo", "hinge", "discopop")]
DPO_CASES += [([name], {"use_weighting": True, "ld_alpha": 0.3}) for name in ("sigmoid", "ipo", "bco_pair")]
DPO_CASES += [(["hinge", "sft", "apo_zero"], {"loss_weights": [0.3, 2.0, 0.5], "beta": 0.7})]


@pytest.mark.parametrize(("names", "options"), DPO_CASES, ids=lambda value: str(value).replace(" ", ""))
def test_dpo_micro_batch(dpo_pair: Any, names: list[str], options: dict[str, Any]) -> None:
    theirs, ours, batch = dpo_pair
    options = {"loss_types": names, "loss_weights": [1.0] * len(names), "use_weighting": False, **options}
    check_same(measure(ours, batch, options, False), measure(theirs, batch, options, False), ("mean_token_accuracy",))


def test_dpo_returns_the_outputs_for_compute_metrics(dpo_pair: Any) -> None:
    _, ours, batch = dpo_pair
    loss, outputs = ours._compute_loss(ours.model, batch, True)
    assert loss.isfinite() and outputs.logits.shape == (*batch["input_ids"].shape, 64)


def test_mixture_of_experts_adds_its_balancing_loss(tmp_path: Path) -> None:
    results = []
    for kind in (VeripoGRPOTrainer, GRPOTrainer):
        model = tiny("Mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
        trainer = grpo_trainer(kind, model, tmp_path, loss_type="grpo", router_aux_loss_coef=0.5)
        trainer.current_gradient_accumulation_steps = 1
        results.append(measure(trainer, grpo_inputs(trainer), {"current_gradient_accumulation_steps": 2}))
    check_same(*results)
    assert results[0][2]["aux_loss"] > 0.1


# -- heads -----------------------------------------------------------------------------------------------------------


def score(model: Any, accelerator: Any = None, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[3], [5], [9]]), -100)
    trainer = SimpleNamespace(accelerator=accelerator or Accelerator(cpu=True), args=SimpleNamespace())
    return ScoringModel(trainer, model, **options)(labels=labels, fused_lm_head=True, input_ids=ids), ids, labels


@pytest.mark.parametrize(("kind", "options"), [
    ("Qwen2", {}), ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}), ("Granite", {"logits_scaling": 3.0}),
    ("Cohere", {"logit_scale": 0.3}), ("Phi", {})])  # Phi: a head with bias
def test_scores_follow_the_models_own_logits(kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, **options)
    if kind == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    scores, ids, labels = score(model, temperature=0.7, entropy=True, mean_logits=True)
    logits = model(ids).logits[:, :-1].double()
    logprobs = (logits / 0.7).log_softmax(-1)
    kept = labels[:, 1:] != -100
    assert logprobs[kept].std() > 0.1
    expected = logprobs.gather(-1, ids[:, 1:, None])[..., 0] * kept
    assert (scores.log_probs - expected).abs().max() < 1e-4
    assert (scores.entropy + (logprobs.exp() * logprobs).sum(-1) * kept).abs().max() < 1e-4
    if kind == "Gemma2":
        assert scores.mean_logits is None
    else:
        assert (scores.mean_logits - logits.mean(-1) * kept).abs().max() < 1e-4


def test_a_softcap_after_a_factor() -> None:
    class Capped(transformers.GraniteForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 2.0 * torch.tanh(output.logits / 2.0)
            return output

    model = Capped(tiny("Granite", logits_scaling=3.0, final_logit_softcapping=2.0).config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    scores, ids, labels = score(model, temperature=0.7)
    logprobs = (model(ids).logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (scores.log_probs - logprobs * (labels[:, 1:] != -100)).abs().max() < 1e-4


def test_trls_own_head_does_not_run(grpo_pair: Any, dpo_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", None)
    inputs = grpo_inputs(grpo_pair[1])
    measure(grpo_pair[1], inputs, {})
    measure(dpo_pair[1], dpo_pair[2], {}, False)
    with pytest.raises(AttributeError, match="apply"):
        measure(grpo_pair[0], inputs, {})


def test_a_head_that_is_not_known_is_refused() -> None:
    class Shifted(transformers.Qwen2ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.1
            return output

    with pytest.raises(ValueError, match=r"Shifted changes its logits.*0\.09"):
        score(Shifted(tiny().config))


def test_logits_are_built_for_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = tiny(), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    score(model)
    assert shapes == [(3, 1, 64)]
    assert not model.model._forward_hooks, "the hook outlives the call"


def test_autocast_gives_the_head_its_type() -> None:
    bf16 = lambda: torch.autocast("cpu", torch.bfloat16)
    accelerator = SimpleNamespace(autocast=bf16, unwrap_model=lambda core: core)
    trainer, model = SimpleNamespace(accelerator=accelerator, args=SimpleNamespace()), tiny()
    assert ScoringModel(trainer, model)._head_dtype(torch.ones(1)) == torch.bfloat16
    scores, ids, labels = score(model.bfloat16(), accelerator=accelerator)
    exact = model.double()(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    kept = labels[:, 1:] != -100
    assert scores.log_probs.dtype == torch.float32
    assert 1e-4 < (scores.log_probs - exact)[kept].abs().max() < 0.5
    trainer.args.cast_lm_head_to_fp32 = True
    assert ScoringModel(trainer, model)._head_dtype(torch.ones(1, dtype=torch.bfloat16)) == torch.float32


def test_images_reach_the_model_in_slices(tmp_path: Path) -> None:
    tokens = build_tokenizer()
    tokens.padding_side = "left"
    image, grid = tokens.convert_tokens_to_ids("<|image_pad|>"), torch.tensor([[1, 4, 4], [1, 4, 8]])
    ids = torch.randint(10, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, count in enumerate((4, 8)):  # one token per 2 x 2 patches
        ids[row, 1:1 + count] = image
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    results = []
    for kind in (GRPOTrainer, VeripoGRPOTrainer):
        trainer = kind(build_model("qwen2_5_vl", 0, tokens), reward, processing_class=tokens,
                       args=GRPOConfig(str(tmp_path), **QUIET), train_dataset=Dataset.from_dict({"prompt": PROMPTS}))
        with torch.no_grad():
            results.append([trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, 5, batch_size=1, pixel_values=pixels * brightness, image_grid_thw=grid,
                num_images=[1, 1], mm_token_type_ids=(ids == image).int())[0] for brightness in (1.0, 0.0)])
    (seen, dark), ours = results
    assert (seen - dark).abs().max() > 1e-2
    torch.testing.assert_close(ours[0], seen, rtol=1e-5, atol=1e-5)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"epsilon": -0.1}, {"epsilon_high": -0.1}, {"epsilon_high": -0.1, "loss_type": "cispo"}, {"delta": -0.5}], ids=str)
def test_grpo_refuses_what_it_cannot_honour(options: dict[str, Any], model_path: Path, tmp_path: Path) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} cannot be honoured"):
        grpo_trainer(VeripoGRPOTrainer, model_path, tmp_path, **options)


@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.5, "loss_type": ["robust"]}, {"label_smoothing": 0.5, "loss_type": ["aot"]}, {"beta": -0.1}],
    ids=str)
def test_dpo_refuses_what_it_cannot_honour(options: dict[str, Any], model_path: Path, tmp_path: Path) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} cannot be honoured"):
        dpo_trainer(VeripoDPOTrainer, model_path, tmp_path, **options)


def test_sharded_heads_and_prompt_learning_are_refused(grpo_pair: tuple[Any, Any],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    _, trainer = grpo_pair
    check_model(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_fsdp_enabled", True)
        with pytest.raises(ValueError, match="fsdp"):
            check_model(trainer)
    prefix = SimpleNamespace(peft_type="PREFIX_TUNING", is_prompt_learning=True)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "peft_config", {"default": prefix}, raising=False)
        with pytest.raises(ValueError, match="PREFIX_TUNING"):
            check_model(trainer)


def test_a_subclass_with_its_own_loss_is_refused() -> None:
    class Replaces(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return 0

    class Extends(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return 2 * super()._compute_loss(model, inputs)

    with pytest.raises(ValueError, match=r"Replaces\._compute_loss"):
        use_veripo_losses(type("Later", (Replaces,), {}))
    assert VeripoGRPOTrainer in use_veripo_losses(Extends).__mro__
    assert use_veripo_losses(GRPOTrainer) is use_veripo_losses(VeripoGRPOTrainer) is VeripoGRPOTrainer
    assert use_veripo_losses(DPOTrainer) is VeripoDPOTrainer
    with pytest.raises(TypeError, match="got dict"):
        use_veripo_losses(dict)


def test_an_older_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "veripo_kernels.integrations.trl"
    loaded = sys.modules[name]
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    with pytest.raises(ImportError, match=r"1\.16 or later, found 1\.15\.2"):
        importlib.import_module(name)
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"found 1\.17\.0"):
        importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16'"):
        importlib.import_module(name)
    monkeypatch.undo()
    importlib.import_module("veripo_kernels.integrations").trl = loaded


def test_nothing_in_trl_is_assigned(model_path: Path, tmp_path: Path) -> None:
    def attributes() -> dict[tuple[str, str], int]:
        found = {}
        for name, module in list(sys.modules.items()):
            if name == "trl" or name.startswith("trl."):
                found |= {(name, key): id(value) for key, value in vars(module).items()}
                found |= {(f"{name}.{key}", inner): id(part) for key, value in vars(module).items()
                          if isinstance(value, type) for inner, part in vars(value).items()}
        return found

    before = attributes()
    grpo_trainer(use_veripo_losses(GRPOTrainer), model_path, tmp_path, max_steps=1).train()
    after = attributes()
    assert len(before) > 1000
    assert {key for key in before if not key[1].startswith("_abc") and after.get(key) != before[key]} == set()
