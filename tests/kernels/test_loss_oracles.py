"""The losses agree with TRL's trainers and Liger's fused losses, loss and gradient, in float32 to 1e-5.

TRL's losses are methods of its trainers: they run here without a model, on given log-probs. Letters: S completions
padded to C tokens, M tokens without padding, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from veripo_kernels import PolicyLoss, PreferenceLoss, dpo_loss, group_advantages, grpo_loss, reference

from tests.support.loss_cases import DEVICE, batch, cu_seqlens, on_device, policy, rand, run_pairs  # noqa: F401 (a fixture)

LENGTHS = (5, 2, 9, 1)
IMPLS = ("torch", "triton")


def assert_agree(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert want[1].abs().max() > 0.01


def padded(values: torch.Tensor, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """[S, C] of packed [M]."""
    return pad_sequence(list(values.split(list(lengths))), batch_first=True)


def packed(values: torch.Tensor, lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])


# -- TRL, policy losses ----------------------------------------------------------------------------------------------

ACCELERATOR = SimpleNamespace(num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
                              reduce=lambda x, reduction: x, device=DEVICE)


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer without model, data and arguments, with the attributes that its loss reads."""
    made = object.__new__(type("Bare", (trainer,), {}))
    made.__dict__.update({"model": SimpleNamespace(training=True), "accelerator": ACCELERATOR,
                          "aux_loss_enabled": False, "_metrics": {"train": defaultdict(list)}} | attributes)
    return made


def trl_policy_loss(trainer: type, policy_logprobs: torch.Tensor, inputs: dict[str, torch.Tensor], *,
                    entropies: torch.Tensor | None = None, arguments: dict[str, Any] | None = None, **attributes: Any
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient [M] of a TRL trainer's policy loss on log-probs, `inputs` and `entropies` [S, C]."""
    leaf = policy_logprobs.clone().requires_grad_()
    args = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1, "sapo_temperature_pos": 1.0,
            "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0,
            "vespo_lambda_neg": 2.0} | (arguments or {})
    entropies = torch.ones_like(leaf) if entropies is None else entropies
    made = bare(trainer, **{
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "use_vllm": False, "vllm_importance_sampling_correction": True, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "current_gradient_accumulation_steps": 1, "max_completion_length": 16,
        "_entropy_bonus_enabled": False, "use_adaptive_entropy": False, "args": SimpleNamespace(**args),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (leaf, entropies, None)} | attributes)
    mask = padded(torch.ones(sum(LENGTHS)))
    ids = torch.zeros_like(mask, dtype=torch.int64)
    loss = made._compute_loss(None, {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
                                     "completion_mask": mask, "num_items_in_batch": mask.sum(), **inputs})
    return loss.detach(), packed(torch.autograd.grad(loss, leaf)[0])


@pytest.fixture(scope="session")
def trl() -> Any:
    trl = pytest.importorskip("trl")
    from trl.experimental.gmpo import GMPOTrainer

    return SimpleNamespace(GRPOTrainer=trl.GRPOTrainer, DPOTrainer=trl.DPOTrainer, GMPOTrainer=GMPOTrainer)


CASE = batch(LENGTHS, ref=True, rollout=True, entropy=True)


def ours(loss: PolicyLoss, impl: Any, *names: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of grpo_loss on CASE, with the tensors that are named."""
    leaf = CASE.policy.float().requires_grad_()
    assert CASE.old is not None
    named: dict[str, Any] = {name: CASE.named[name].float() for name in names}
    value, _ = grpo_loss(leaf, CASE.old.float(), CASE.advantages.float(), CASE.cu_seqlens, loss=loss, impl=impl,
                         **named)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def theirs(trainer: type, *names: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    assert CASE.old is not None
    inputs = {"old_per_token_logps": padded(CASE.old.float()), "advantages": CASE.advantages.float()}
    if "ref_logprobs" in names:
        inputs["ref_per_token_logps"] = padded(CASE.named["ref_logprobs"].float())
    return trl_policy_loss(trainer, padded(CASE.policy.float()), inputs | options.pop("inputs", {}), **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
def test_trl_token_losses(trl: Any, name: str, kl_coef: float, impl: str) -> None:
    names = ("ref_logprobs",) if kl_coef else ()
    high = 0.1
    want = theirs(trl.GRPOTrainer, *names, loss_type=name, beta=kl_coef,
                  epsilon_high=1 + high if name == "cispo" else high)
    assert_agree(ours(policy(name, clip_high=high, kl_coef=kl_coef), impl, *names), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_trl_sequence_level_is_gspo(trl: Any, kl_coef: float, impl: str) -> None:
    names = ("ref_logprobs",) if kl_coef else ()
    want = theirs(trl.GRPOTrainer, *names, importance_sampling_level="sequence", beta=kl_coef, epsilon_low=0.05,
                  epsilon_high=0.05)
    assert_agree(ours(policy("gspo", clip_low=0.05, clip_high=0.05, kl_coef=kl_coef), impl, *names), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["cispo", "sapo", "luspo"])
def test_trl_other_losses_of_the_sequence(trl: Any, name: str, impl: str) -> None:
    want = theirs(trl.GRPOTrainer, importance_sampling_level="sequence", loss_type=name,
                  epsilon_high=1.02 if name == "cispo" else 0.02)
    ours_name = name if name == "luspo" else f"{name}_sequence"
    assert_agree(ours(policy(ours_name, clip_high=0.02), impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_trl_delta_is_the_dual_clip(trl: Any, impl: str) -> None:
    want = theirs(trl.GRPOTrainer, arguments={"delta": 1.25}, epsilon_high=0.1)
    assert not torch.equal(want[1], theirs(trl.GRPOTrainer, epsilon_high=0.1)[1])
    assert_agree(ours(policy("grpo", clip_high=0.1, dual_clip=1.25), impl), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_trl_importance_ratios(trl: Any, name: str, mode: str, impl: str) -> None:
    assert CASE.old is not None
    level, treatment = mode.split("_")
    gap = padded((CASE.old - CASE.named["rollout_logprobs"]).float()).nan_to_num(nan=0.0)
    ratio = (gap.sum(-1, keepdim=True) if level == "sequence" else gap).exp()
    outside = (ratio < 0.7) | (ratio > 1.2)
    ratio = ratio.masked_fill(outside, 0.0) if treatment == "mask" else ratio.clamp(0.7, 1.2)
    want = theirs(trl.GRPOTrainer, "ref_logprobs", inputs={"importance_sampling_ratio": ratio}, use_vllm=True, beta=0.3,
                  loss_type="dapo" if name == "dapo" else "grpo",
                  importance_sampling_level="token" if name == "dapo" else "sequence")
    loss = policy(name, importance=mode, importance_floor=0.7, importance_cap=1.2, kl_coef=0.3)
    assert_agree(ours(loss, impl, "ref_logprobs", "rollout_logprobs"), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_trl_entropy_bonus_under_token_weights(trl: Any, impl: str) -> None:
    entropy = CASE.named["entropy"].float()
    leaf = entropy.clone().requires_grad_()
    want = theirs(trl.GRPOTrainer, loss_type="dapo", entropies=padded(entropy), _entropy_bonus_enabled=True,
                  entropy_coef=0.2)
    assert_agree(ours(policy("dapo", entropy_coef=0.2), impl, "entropy"), want)
    assert CASE.old is not None
    value, _ = grpo_loss(CASE.policy.float(), CASE.old.float(), CASE.advantages.float(), CASE.cu_seqlens, entropy=leaf,
                         loss=policy("dapo", entropy_coef=0.2), impl=impl)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], torch.full_like(leaf, -0.2 / sum(LENGTHS)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_trl_gmpo(trl: Any, kl_coef: float, impl: str) -> None:
    low, high = torch.tensor(0.2).exp().item(), torch.tensor(0.3).exp().item()  # theirs are bounds of the log-ratio
    names = ("ref_logprobs",) if kl_coef else ()
    want = theirs(trl.GMPOTrainer, *names, epsilon_low=0.2, epsilon_high=0.3, beta=kl_coef)
    assert_agree(ours(policy("gmpo", clip_low=1 - 1 / low, clip_high=high - 1, kl_coef=kl_coef), impl, *names), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["std", "no_std", "batch_std"])
def test_advantages_as_trl_documents_them(kind: Any, impl: Any) -> None:
    """scale_rewards "group", "none" and "batch": less the mean of the group, over a deviation plus 1e-4."""
    rewards = rand(12).float()
    groups = rewards.view(3, 4)
    deviation = {"std": groups.std(1, keepdim=True) + 1e-4, "batch_std": rewards.std() + 1e-4, "no_std": torch.ones(())}
    want = ((groups - groups.mean(1, keepdim=True)) / deviation[kind]).flatten()
    got = group_advantages(rewards, torch.arange(3).repeat_interleave(4), kind=kind, eps=1e-4, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# -- TRL, preference losses ------------------------------------------------------------------------------------------

PAIRS = ((3, 6), (4, 2), (5, 5))
PAIR_LENGTHS = tuple(length for pair in PAIRS for length in pair)


DIVERGENCES = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence",
               "alpha": "alpha_divergence"}


def trl_preference_loss(trainer: type, policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, loss_type: str, *,
                        loss: PreferenceLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient [M] of TRL's DPO on packed log-probs [M]; TRL wants all chosen rows, then all rejected ones."""
    order = [*range(0, len(PAIR_LENGTHS), 2), *range(1, len(PAIR_LENGTHS), 2)]
    lengths = [PAIR_LENGTHS[number] for number in order]

    def rows(values: torch.Tensor) -> torch.Tensor:
        parts = values.split(list(PAIR_LENGTHS))
        return pad_sequence([parts[number] for number in order], batch_first=True)

    leaf = policy_logprobs.clone().requires_grad_()
    shape = (len(lengths), max(lengths))
    extras = {name: torch.zeros(shape) for name in ("entropy", "mean_logits")} | {"is_top1": torch.zeros(shape).bool()}
    model = Model(rows(leaf), extras)
    made = bare(trainer, model=model, ref_model=Model(rows(ref_logprobs), extras), ld_alpha=loss.ld_alpha,
                beta=loss.dpo_beta, label_smoothing=loss.label_smoothing, loss_types=[loss_type],
                loss_weights=[1.0], precompute_ref_logps=False, f_divergence_type=DIVERGENCES[loss.divergence],
                f_alpha_divergence_coef=loss.divergence_alpha, use_weighting=False, _total_train_tokens=0, _tp_size=1,
                args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=loss.discopop_tau))
    mask = torch.cat([torch.zeros(len(lengths), 1), rows(torch.ones(sum(lengths)))], 1).long()  # one prompt token
    loss = made._compute_loss(model, {"input_ids": mask * 0, "attention_mask": mask, "completion_mask": mask}, False)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


class Model(torch.nn.Module):
    """Returns given log-probs whatever it is asked."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: torch.Tensor, extras: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.outputs = SimpleNamespace(log_probs=logprobs, **extras)

    def forward(self, **_inputs: Any) -> Any:
        return self.outputs


PREFERENCES: list[tuple[str, PreferenceLoss]] = [
    ("sigmoid", PreferenceLoss(dpo_beta=0.3)),
    ("sigmoid", PreferenceLoss(dpo_beta=0.3, ld_alpha=0.4)),
    ("sigmoid_norm", PreferenceLoss(dpo_beta=0.3, length_normalize=True)),
    ("ipo", PreferenceLoss("ipo", dpo_beta=0.3, length_normalize=True)),
    ("hinge", PreferenceLoss("hinge", dpo_beta=0.3)),
    ("robust", PreferenceLoss("robust", dpo_beta=0.3, label_smoothing=0.1)),
    ("exo_pair", PreferenceLoss("exo", dpo_beta=0.3, label_smoothing=0.1)),
    ("nca_pair", PreferenceLoss("nca", dpo_beta=0.3)),
    ("apo_zero", PreferenceLoss("apo_zero", dpo_beta=0.3)),
    ("apo_down", PreferenceLoss("apo_down", dpo_beta=0.3)),
    ("sppo_hard", PreferenceLoss("sppo", dpo_beta=0.3)),
    ("bco_pair", PreferenceLoss("bco", dpo_beta=0.3)),
    ("discopop", PreferenceLoss("discopop", dpo_beta=0.3, discopop_tau=0.5)),
    ("sigmoid", PreferenceLoss(dpo_beta=0.3, divergence="forward_kl")),
    ("ipo", PreferenceLoss("ipo", dpo_beta=0.3, divergence="js", length_normalize=True)),
    ("hinge", PreferenceLoss("hinge", dpo_beta=0.3, divergence="alpha", divergence_alpha=0.3)),
    ("sppo_hard", PreferenceLoss("sppo", dpo_beta=0.3, ld_alpha=0.0))]


def pair_logprobs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bounds = cu_seqlens(PAIR_LENGTHS)
    ref = -rand(int(bounds[-1]), seed=3).abs().float()
    return ref + rand(len(ref), seed=4, scale=0.6).float(), ref, bounds


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "loss"), PREFERENCES, ids=lambda value: value if isinstance(value, str) else "")
def test_trl_preference_losses(trl: Any, name: str, loss: PreferenceLoss, impl: str) -> None:
    inputs = pair_logprobs()
    value, _, (gradient,) = run_pairs(inputs, loss, torch.float32, impl)
    want = trl_preference_loss(trl.DPOTrainer, inputs[0], inputs[1], name, loss=loss)
    assert gradient is not None
    assert_agree((value.detach(), gradient), want)


# -- Liger -----------------------------------------------------------------------------------------------------------


def head_case(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [rows, D] and head [V, D], small enough for ratios near 1."""
    return rand(rows, 6, seed=seed).float(), rand(11, 6, seed=seed + 1).float()


def gradient_of(loss: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = hidden.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo"])
def test_liger_policy_losses(name: str, impl: Any) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    sequences, tokens = 3, 5
    hidden, head = head_case(sequences * tokens)
    ids = torch.arange(sequences * tokens) * 3 % 11
    lengths = torch.tensor([5, 2, 4])
    mask = (torch.arange(tokens) < lengths[:, None]).float()
    advantages = torch.tensor([1.0, -0.7, 0.4])
    logprobs = reference.linear_logprobs(hidden, head, ids)
    old, ref = (logprobs + rand(len(ids), seed=seed, scale=0.2).float() for seed in (5, 6))
    high = 0.1
    module = chunked.LigerFusedLinearGRPOLoss(
        beta=0.2, compiled=False, use_ref_model=True, epsilon_low=0.2,
        epsilon_high=1 + high if name == "cispo" else high,
        loss_type="grpo" if name == "gspo" else name, max_completion_length=8,
        importance_sampling_level="sequence" if name == "gspo" else "token")
    want = gradient_of(lambda leaf: module(
        leaf.view(sequences, tokens, -1), head, ids.view(sequences, tokens), mask, advantages,
        ref_per_token_logps=ref.view(sequences, tokens), old_per_token_logps=old.view(sequences, tokens))[0], hidden)
    bounds = cu_seqlens([tokens] * sequences)
    got = gradient_of(lambda leaf: grpo_loss(
        reference.linear_logprobs(leaf, head, ids), old, advantages, bounds, ref_logprobs=ref, loss_mask=mask.flatten(),
        loss=policy(name, clip_high=high, kl_coef=0.2, constant_length=8), impl=impl)[0], hidden)
    assert_agree(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "exo", "nca", "apo_zero", "apo_down", "sppo"])
def test_liger_preference_losses(name: str, impl: Any) -> None:
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    tokens, theirs_name = 4, {"exo": "exo_pair", "nca": "nca_pair", "sppo": "sppo_hard"}.get(name, name)
    hidden, head = head_case(4 * tokens)
    ref_hidden = hidden + rand(*hidden.shape, seed=9, scale=0.1).float()
    ids = torch.arange(4 * tokens) * 3 % 11
    labels = ids.clone().view(4, tokens)
    labels[1, 3:] = labels[2, 2:] = -100
    smoothing = {"label_smoothing": 0.1} if name in ("robust", "exo") else {}
    module = chunked.LigerFusedLinearDPOLoss(beta=0.3, compiled=False, loss_type=theirs_name, compute_nll_loss=False,
                                             use_ref_model=True, **smoothing)
    want = gradient_of(lambda leaf: module(head, leaf.view(4, tokens, -1), labels, None,
                                           ref_hidden.view(4, tokens, -1), head)[0], hidden)
    order = torch.tensor([0, 2, 1, 3])  # theirs: chosen rows, then rejected ones

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        logprobs, ref = (reference.linear_logprobs(values, head, ids).view(4, tokens)[order].flatten()
                         for values in (leaf, ref_hidden))
        return dpo_loss(logprobs, ref, cu_seqlens([tokens] * 4), loss_mask=(labels[order] != -100).flatten(), impl=impl,
                        loss=PreferenceLoss(name, dpo_beta=0.3, **smoothing))[0]  # type: ignore[arg-type]

    assert_agree(gradient_of(loss, hidden), want)
