"""Inputs, definitions and yardsticks for the tests of the linear ops; shapes are small because Triton is interpreted.

The definition takes float64 logits that exist as a whole; an op may err by the roundings that its arithmetic has.

Letters: T rows, M packed tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from veripo_kernels import linear, linear_loss, linear_torch, linear_triton, reference
from veripo_kernels.jit import linear as kernels
from veripo_kernels.linear import linear_logprobs
from veripo_kernels.linear_loss import linear_dpo_loss, linear_policy_loss
from veripo_kernels.options import PolicyLoss, PreferenceLoss

from tests.support.loss_cases import advantages_per, cu_seqlens, rand

Results = dict[str, torch.Tensor]
"""Outputs and gradients by name."""
TRITON_BLOCKS = {"BR": 16, "BV": 32, "BD": 16, "num_warps": 4, "num_stages": 2}


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 in torch and of 32 in Triton, so that a vocabulary of 70 has borders."""
    patch.setattr(linear_torch, "TILE", 16)
    patch.setattr(linear_torch, "ROWS", 8)
    patch.setattr(linear_triton, "_ROWS", 16)
    patch.setattr(linear_triton, "_SLAB", 48)
    patch.setattr(kernels, "tile_shape", lambda dtype: TRITON_BLOCKS)


# -- log-probs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Inputs of linear_logprobs, rounded to `dtype`, and upstream gradients by the log-probs and the entropy."""

    hidden: torch.Tensor
    head: torch.Tensor
    token_ids: torch.Tensor
    bias: torch.Tensor | None
    slopes: torch.Tensor
    entropy_slopes: torch.Tensor | None
    temperature: float = 1.0
    softcap: float | None = None
    frozen: str = ""
    """"hidden", "head" or neither: the one that gets no gradient."""

    def run(self, impl: str) -> Results:
        """The op."""
        return self._backward(lambda hidden, head, bias: linear_logprobs(
            hidden, head, self.token_ids, temperature=self.temperature, bias=bias, softcap=self.softcap,
            entropy=self.entropy_slopes is not None, impl=impl), None)

    def define(self, dtype: torch.dtype | None = None) -> Results:
        """The definition, in `dtype` or as it is."""
        return self._backward(self._definition, dtype)

    def _definition(self, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> Any:
        logits = reference.linear_logits(hidden, head, bias=bias, softcap=self.softcap)
        logprobs = reference.gather_logprobs(logits, self.token_ids, temperature=self.temperature)
        possible = logits.masked_fill(logits == -torch.inf, torch.finfo(logits.dtype).min / 4)
        entropy = reference.entropy(possible, temperature=self.temperature)
        return logprobs if self.entropy_slopes is None else (logprobs, entropy)

    def _backward(self, function: Callable[..., Any], dtype: torch.dtype | None) -> Results:
        leaves = {"dhidden": self.hidden, "dhead": self.head} | ({} if self.bias is None else {"dbias": self.bias})
        leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_(name != f"d{self.frozen}")
                  for name, value in leaves.items()}
        if self.frozen == "head" and self.bias is not None:
            leaves["dbias"].requires_grad_(False)
        out = function(leaves["dhidden"], leaves["dhead"], leaves.get("dbias"))
        logprobs, entropy = out if isinstance(out, tuple) else (out, None)
        total = (logprobs * self.slopes.to(logprobs.dtype)).sum()
        results = {"logprobs": logprobs.detach()}
        if entropy is not None:
            total = total + (entropy * self.entropy_slopes.to(entropy.dtype)).sum()
            results["entropy"] = entropy.detach()
        total.backward()
        return results | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def logits(self) -> torch.Tensor:
        """float64 [T, V] over the temperature."""
        return reference.linear_logits(self.hidden.double(), self.head.double(), bias=None if self.bias is None else
                                       self.bias.double(), softcap=self.softcap) / self.temperature


def rows(count: int = 13, width: int = 12, vocabulary: int = 70, *, dtype: torch.dtype = torch.float32, seed: int = 0,
         bias: bool = False, entropy: bool = False, scale: float = 1.0, **options: Any) -> Rows:
    """Random rows; the first tokens lie at the borders of the vocabulary and of tiles of 16 and 32."""
    ids = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
    borders = [place for place in (0, vocabulary - 1, 15, 16, 31, 32, 63, 64) if place < vocabulary][:count]
    ids[:len(borders)] = torch.tensor(borders, dtype=torch.int64)
    return Rows((scale * rand(count, width, seed=seed)).to(dtype), rand(vocabulary, width, seed=seed + 1).to(dtype),
                ids, rand(vocabulary, seed=seed + 2).to(dtype) if bias else None, rand(count, seed=seed + 3),
                rand(count, seed=seed + 4) if entropy else None, **options)


def complaints(got: Results, own: Results, truth: Results, largest: float = 1.0, steps: float = 1.0) -> list[str]:
    """Outputs that err by more than 2 + `steps` rounding steps, whatever torch errs by; of `own` only dtypes count.

    A step is that of the output's largest number, plus that of the `largest` logit: no computation in the sums' dtype
    knows a probability better than that. Two are for the product that gives a logit: its D <= 64 roundings of half a
    step walk at random, with a standard deviation of 0.42 sqrt(D / 3) halves, 1.9 at most. An entropy has none of the
    two: there a logit counts by p (log p + H). `steps` are for what comes then: 1 for softcap, temperature, difference,
    exponential, sum and slope, of which few are rounded beside the largest number; 2 for losses, 3 for random shapes.
    The largest error measured is 2.5 steps, where 4 are allowed, and 0.3 of an entropy.
    """
    found = [f"{name} is {'missing' if name in truth else 'too much'}" for name in got.keys() ^ truth.keys()]
    unit = torch.finfo(got["logprobs"].dtype).eps
    for name in got.keys() & truth.keys():
        value, want = got[name], truth[name]
        if value.shape != want.shape or value.dtype != own[name].dtype:
            found.append(f"{name} is {value.dtype} {list(value.shape)}, not {own[name].dtype} {list(want.shape)}")
            continue
        same = (value == want) | want.isnan() & value.isnan()  # -inf and NaN where the truth has them
        size = torch.where(want.isfinite(), want, 0).abs().max().item() if want.numel() else 0.0
        error = torch.where(same, 0, (value.double() - want).abs()).max().item() if want.numel() else 0.0
        relative = size if name.startswith("d") or name == "loss" else 1.0
        step = torch.finfo(value.dtype).eps * size + unit * largest * relative
        allowed = steps + (0 if name == "entropy" else 2)
        if not error <= allowed * step:
            found.append(f"{name}: error {error:.1e}, {allowed:g} steps of {step:.1e} are allowed")
    return found


def check(data: Rows, impl: str, steps: float = 1.0) -> list[str]:
    """`complaints` about the op on some rows."""
    largest = data.logits()
    largest = largest[largest.isfinite()].abs().max().item() if largest.isfinite().any() else 1.0
    if data.hidden.dtype == torch.float64:
        steps *= 16  # the truth errs as much
    return complaints(data.run(impl), data.define(), data.define(torch.float64), largest, steps)


# -- losses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Inputs of linear_policy_loss, or of linear_dpo_loss where `loss` is a PreferenceLoss."""

    hidden: torch.Tensor
    head: torch.Tensor
    token_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    loss: PolicyLoss | PreferenceLoss
    old: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    """[M], or [B, 2] for pairs."""
    rollout: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    temperature: float = 1.0
    frozen: str = ""
    upstream: float = 2.5
    counts: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the op and of its definition: counts of the whole step, weights of pairs."""

    def call(self, hidden: torch.Tensor, head: torch.Tensor, **options: Any) -> Any:
        """The op on leaves of the caller's."""
        options |= {"loss": self.loss, "temperature": self.temperature, "loss_mask": self.mask, **self.counts}
        if isinstance(self.loss, PreferenceLoss):
            return linear_dpo_loss(hidden, head, self.token_ids, self.ref, self.cu_seqlens, **options)
        return linear_policy_loss(hidden, head, self.token_ids, self.old, self.advantages, self.cu_seqlens,
                                  ref_logprobs=self.ref, rollout_logprobs=self.rollout, **self._per(), **options)

    def _per(self) -> dict[str, str | None]:
        """What the advantages are, unless `counts` says it: a part of a batch cannot always tell."""
        if "advantages_per" in self.counts:
            return {}
        return {"advantages_per": advantages_per(self.advantages, self.cu_seqlens)}

    def run(self, impl: str, workspace_bytes: int = 1 << 20) -> Results:
        """The op."""
        return self._backward(lambda *leaves: self.call(*leaves, impl=impl, workspace_bytes=workspace_bytes), None)

    def define(self, dtype: torch.dtype | None = None) -> Results:
        """The definition, in `dtype` or as it is."""
        return self._backward(self._definition, dtype)

    def _definition(self, hidden: torch.Tensor, head: torch.Tensor) -> Any:
        logits = reference.linear_logits(hidden, head)
        logprobs = reference.gather_logprobs(logits, self.token_ids, temperature=self.temperature)

        def at(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.to(logprobs.dtype)

        counts = {name: value for name, value in self.counts.items() if name != "entropy"}
        options = {"loss": self.loss, "loss_mask": at(self.mask), **counts}
        if isinstance(self.loss, PreferenceLoss):
            value, metrics = reference.dpo_loss(logprobs, at(self.ref), self.cu_seqlens, **options)
        else:
            entropy = reference.entropy(logits, temperature=self.temperature)
            value, metrics = reference.grpo_loss(
                logprobs, at(self.old), at(self.advantages), self.cu_seqlens, entropy=entropy,
                ref_logprobs=at(self.ref), rollout_logprobs=at(self.rollout), **self._per(),
                **options)
        shown = logprobs if self.mask is None else torch.where(self.mask != 0, logprobs, 0)
        return value, metrics, shown.detach()

    def _backward(self, function: Callable[..., Any], dtype: torch.dtype | None) -> Results:
        leaves = {"dhidden": self.hidden, "dhead": self.head}
        leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_(name != f"d{self.frozen}")
                  for name, value in leaves.items()}
        value, metrics, logprobs = function(*leaves.values())
        (value * self.upstream).backward()
        return {"loss": value.detach(), "logprobs": logprobs, **metrics} | {
            name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def packed(loss: PolicyLoss | PreferenceLoss, lengths: tuple[int, ...] = (3, 1, 0, 5, 2, 3), *, width: int = 12,
           vocabulary: int = 70, dtype: torch.dtype = torch.float32, seed: int = 0, old: bool = True, ref: bool = False,
           rollout: bool = False, mask: bool = False, token_advantages: bool = False, pair_sums: bool = False,
           hidden_scale: float = 1.0, head_scale: float = 0.6, drift: float = 0.4, **options: Any) -> Packed:
    """Completions whose old, reference and engine log-probs lie about `drift` from the policy's; 2 advantages are 0."""
    bounds = cu_seqlens(lengths)
    tokens = int(bounds[-1])
    hidden = rand(tokens, width, seed=seed, scale=hidden_scale).to(dtype)
    head = rand(vocabulary, width, seed=seed + 1, scale=head_scale / hidden_scale).to(dtype)
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    now = reference.linear_logprobs(hidden.double(), head.double(), ids, temperature=options.get("temperature", 1.0))
    others = [(now + rand(tokens, seed=seed + number, scale=drift)).to(kind) for number in (2, 3, 4)]
    advantages = rand(tokens if token_advantages else len(lengths), seed=seed + 5).to(kind)
    advantages[[0, -3]] = 0
    kept = (rand(tokens, seed=seed + 6) > -0.5).to(kind) if mask else None
    if pair_sums:
        others[1] = reference.pair_sums(others[1], bounds, loss=loss, loss_mask=kept)
    return Packed(hidden, head, ids, bounds, loss, others[0] if old else None, advantages,
                  others[1] if ref or pair_sums else None, others[2] if rollout else None, kept, **options)


def check_loss(data: Packed, impl: str, workspace_bytes: int = 1 << 20, steps: float = 1.0) -> list[str]:
    """`complaints` about the op on some completions."""
    largest = reference.linear_logits(data.hidden.double(), data.head.double()).abs()
    steps *= 16 if data.hidden.dtype == torch.float64 else 1
    return complaints(data.run(impl, workspace_bytes), data.define(), data.define(torch.float64),
                      largest.max().item() / data.temperature if largest.numel() else 1.0, steps)


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the error over that of the wanted gradient."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_readme_bounds(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """What README promises for bfloat16 inputs."""
    error = (got["logprobs"] - want["logprobs"]).abs()
    assert error.max() <= 2e-4 and error.mean() <= 2e-5
    assert relative_rms(got["dhead"], want["dhead"]) <= 2e-3


# -- what is done ----------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """Rows that entered matrix products with (a part of) the head: to find logits, and to form gradients."""

    logits: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)


@contextmanager
def counted(impl: str) -> Iterator[Work]:
    """Counts in passes over the whole head; tiles and slabs must be larger than the vocabulary."""
    work = Work()
    with pytest.MonkeyPatch.context() as patch:
        if impl == "torch":
            logits, addmm = linear_torch._logits, torch.Tensor.addmm_

            def torch_logits(hidden: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
                work.logits.append(len(hidden))
                return logits(hidden, *rest, **options)

            def torch_addmm(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
                work.gradients.append(a.shape[0] if a.stride(1) == 1 else a.shape[1])
                return addmm(total, a, b, **options)

            patch.setattr(linear_torch, "_logits", torch_logits)
            patch.setattr(torch.Tensor, "addmm_", torch_addmm)
        else:
            run, product = linear_triton._Tiles.run, linear_triton.add_product

            def triton_run(tiles: Any, *rest: Any, **options: Any) -> None:
                work.logits.append(tiles.rows)
                return run(tiles, *rest, **options)

            def triton_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> None:
                work.gradients.append(a.shape[0] if a.stride(1) == 1 else a.shape[1])
                return product(total, a, b, **options)

            patch.setattr(linear_triton._Tiles, "run", triton_run)
            patch.setattr(linear_triton, "add_product", triton_product)
        yield work


def mutant(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """The module with one expression replaced, loaded under another name."""
    source = Path(str(module.__file__)).read_text("utf-8")
    assert right in source, f"{module.__name__} no longer contains `{right}`"
    file = folder / "mutant.py"
    file.write_text(source.replace(right, wrong), "utf-8")
    specification = importlib.util.spec_from_file_location("mutant", file)
    assert specification is not None and specification.loader is not None
    broken = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mutant", broken)  # dataclasses look their module up
        specification.loader.exec_module(broken)
    return broken


def install(module: ModuleType, broken: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Ops run the broken module instead of `module`, with the small blocks."""
    if module is kernels:
        patch.setattr(broken, "tile_shape", lambda dtype: TRITON_BLOCKS)
        patch.setattr(linear_triton, "jit", broken)
        return
    for name in ("TILE", "ROWS") if module is linear_torch else ("_ROWS", "_SLAB"):
        patch.setattr(broken, name, getattr(module, name))
    for user in (linear, linear_loss):
        patch.setattr(user, "engine", lambda impl: broken)
