"""Activations that are computed again, against transformers' own norms and MLPs, which save them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

from tests.schedule.test_activations import saved_by
from tests.support import policies
from veripo_fast.config.inputs import LoraConfig, ModelConfig
from veripo_fast.model import recomputation, step
from veripo_fast.model.packing import PackedBatch, pack
from veripo_fast.model.policy import Policy, load_policy
from veripo_fast.types import VisionFeatures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def saving_all(policy: Policy) -> Iterator[None]:
    """With transformers' own forward in every norm and MLP, and without hooks."""
    changed = [(module, module.__dict__.pop("forward")) for module in policy.step.language_model.modules()
               if isinstance(module.__dict__.get("forward"), partial)
               and module.forward.func in (recomputation._norm_forward, recomputation._mlp_forward)]
    assert len(changed) >= 3 * policy.num_layers, "two norms and an MLP, or its shared expert, of each layer"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step, "recomputing", nullcontext)
            yield
    finally:
        for module, forward in changed:
            module.forward = forward


def two_groups(policy: Policy) -> tuple[PackedBatch, list[VisionFeatures | None]]:
    """A video with uneven completions, one of a single token, and a text with one."""
    video, text = policies.loaded(policy, [("video", 8, 4, 4)]), policies.loaded(policy, [])
    rows = [(video.encoded, policies.random_completions([9, 1, 30, 14])),
            (text.encoded, policies.random_completions([5]))]
    return pack(rows), [video.features, text.features]


def results(policy: Policy, passes: int = 1) -> list[torch.Tensor]:
    """Log-probs, and all gradients after a weighted sum of them; `passes` backward passes through one forward."""
    policy.model.zero_grad()
    logprobs = policy.completion_logprobs(*two_groups(policy))
    loss = (logprobs * torch.linspace(-1, 1, len(logprobs))).sum()
    for number in range(passes):
        loss.backward(retain_graph=number + 1 < passes)
    found = [logprobs.detach()]
    for _, parameter in policy.all_parameters():
        if parameter.grad is not None:
            found.append(parameter.grad.clone())
    return found


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) > 20 and all(map(torch.equal, left, right))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_the_same_bits(family: str, dtype: str) -> None:
    with policies.typed(family, DTYPES[dtype]) as policy:
        again = results(policy)
        twice = results(policy, passes=2)
        with saving_all(policy):
            assert same_bits(again, results(policy))
            assert same_bits(twice, results(policy, passes=2)), "a graph that is kept computes them once more"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "most"), [("qwen2_5_vl", 0.65), ("qwen3_vl", 0.65), ("qwen3_vl_moe", 0.85),
                                              ("qwen3_5", 0.85), ("qwen3_5_moe", 0.9)])
def test_it_saves_less(family: str, most: float, dtype: str) -> None:
    with policies.typed(family, DTYPES[dtype]) as policy:
        batch, features = two_groups(policy)
        less = saved_by(policy, lambda: policy.hidden(batch, features))
        with saving_all(policy):
            assert less < most * saved_by(policy, lambda: policy.hidden(batch, features))


def test_what_several_save_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three projections read what a norm gives, two those of an MLP: one computation each, and none is kept."""
    policy = policies.policy("qwen3_vl")
    made: list[recomputation._Again] = []
    computed: list[recomputation._Again] = []

    class Counted(recomputation._Again):
        def __init__(self, compute: recomputation.Compute) -> None:
            super().__init__(lambda: computed.append(self) or compute())
            made.append(self)

    monkeypatch.setattr(recomputation, "_Again", Counted)
    results(policy)
    used = [again for again in made if again.savers]
    assert len(computed) == len(used) == len({*map(id, computed)})
    assert {again.savers for again in used} == {1, 2, 3}
    assert all(again._kept is None for again in made)


def test_a_tensor_at_the_place_of_another_is_itself() -> None:
    known = recomputation._Known()
    gone = torch.ones(1000)
    known.add(gone, lambda: torch.zeros(1000))
    assert isinstance(known.pack(gone.view(10, 100)), tuple)
    follower = torch.tensor([]).set_(gone.untyped_storage(), 0, (1000,))  # as the allocator may place one
    del gone
    assert known.pack(follower).data_ptr() == follower.data_ptr()


def test_views_come_back_as_they_were() -> None:
    known = recomputation._Known()
    values = torch.arange(24.0).view(2, 3, 4)
    known.add(values, lambda: torch.arange(24.0).view(2, 3, 4))
    for view in (values, values.view(6, 4), values[1], values.transpose(0, 2), values[:, 1:, ::2]):
        packed = known.pack(view)
        assert isinstance(packed, tuple)
        assert torch.equal(known.unpack(packed), view) and known.unpack(packed).stride() == view.stride()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5_moe"])
def test_adapters(family: str) -> None:
    config = ModelConfig(path=str(policies.checkpoint(family)), device="cpu", freeze_vision=True,
                         lora=LoraConfig(rank=4))
    policy = load_policy(config, seed=3)
    for name, parameter in policy.parameters():  # the second factor begins at zero
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    again = results(policy)
    with saving_all(policy):
        assert same_bits(again, results(policy))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_kept_for_an_output_that_nobody_saved(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient checkpointing saves the inputs of layers alone."""
    policy, sizes = policies.policy("qwen2_5_vl"), []
    plain = recomputation._Known.add

    def add(known: recomputation._Known, output: torch.Tensor, compute: recomputation.Compute) -> None:
        plain(known, output, compute)
        sizes.append(len(known.by_address))

    monkeypatch.setattr(recomputation._Known, "add", add)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.model.train()
    try:
        policy.hidden(*two_groups(policy))
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()
    assert len(sizes) > 3 * policy.num_layers and max(sizes) <= 2, "norm and MLP, or norm and attention"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_gradient_checkpointing_runs_the_same(family: str) -> None:
    policy = policies.policy(family)
    again = results(policy)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    try:
        assert same_bits(again, results(policy))
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()


def test_a_frozen_norm_has_no_gradient() -> None:
    policy = policies.policy("qwen2_5_vl")
    norms = [module.weight for module in policy.step.language_model.modules() if type(module).__name__.endswith("Norm")]
    whole = results(policy)
    for weight in norms:
        weight.requires_grad_(False)
    try:
        assert len(results(policy)) == len(whole) - len(norms)
        assert all(weight.grad is None for weight in norms)
    finally:
        for weight in norms:
            weight.requires_grad_(True)


@pytest.mark.parametrize("family", policies.ALL_FAMILIES)
def test_a_pass_without_a_backward_goes_with_its_output(family: str) -> None:
    """Without the garbage collector: operations that save their own output hold no graph."""
    policy, made = policies.policy(family), []
    hooks = [layer.register_forward_hook(lambda layer, inputs, output: made.append(weakref.ref(output)))
             for layer in policy.step.language_model.layers]
    gc.collect()
    gc.disable()
    try:
        assert policy.hidden(*two_groups(policy)).requires_grad
        assert len(made) == policy.num_layers and all(output() is None for output in made)
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


def test_nothing_is_known_outside_of_a_pass() -> None:
    output = torch.ones(3)
    assert recomputation.computed_by(output, lambda: torch.zeros(3)) is output
    with torch.no_grad(), recomputation.recomputing():
        assert recomputation._known.get() is None
    with recomputation.recomputing():
        assert recomputation._known.get() is not None
    assert recomputation._known.get() is None
