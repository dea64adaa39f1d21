"""`linear_policy_loss` and `linear_dpo_loss`: hidden states and head to a loss and both gradients in three matrix
products.

The coefficient of a token (d loss / d logprob) is known as soon as the log-probs it depends on are: its own for most
losses, those of its completion or pair for others. So rows are taken in runs that hold whole completions or pairs where
they must; the logits of a run stay in the workspace until its coefficients are known, and both gradients are formed
from them there and then. Backward only scales them. Tokens that can have no gradient (masked, or without an advantage)
cost no gradient products, and masked ones cost nothing.

Letters: M tokens, S completions, B pairs, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import pairwise
from typing import Any, TypeVar

import torch

from veripo_kernels import reference
from veripo_kernels.derivatives import is_batched, refuse_second, refuse_transforms, wants_gradient
from veripo_kernels.dispatch import Impl, choose
from veripo_kernels.grpo import check_bounds, check_cu_seqlens, check_device
from veripo_kernels.linear import check_linear, engine
from veripo_kernels.linear_torch import Gradients, Head
from veripo_kernels.options import (
    AdvantagesPer,
    PolicyLoss,
    PreferenceLoss,
    as_policy_loss,
    as_preference_loss,
    check_counts,
)
from veripo_kernels.scalars import as_tensor, numbers_of

Slopes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""(rows of a run int64 [R], its cu_seqlens, logprobs [R], entropy [R]) -> slopes by logprobs and by entropy [R]."""

_POLICY_METRICS = ("clip_low_share", "clip_high_share", "kl", "entropy", "importance", "ratio_max")
Loss = TypeVar("Loss", PolicyLoss, PreferenceLoss)
_FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind)) for kind in (PolicyLoss, PreferenceLoss)}
_PAIR_METRICS = ("preference_accuracy", "margin", "chosen_logprobs_mean", "rejected_logprobs_mean", "chosen_drift")


def _runs(cu_seqlens: list[int], rows: int, whole: int) -> Iterator[tuple[int, int]]:
    """Token ranges of at most `rows`, cut only at every `whole`-th border (0: anywhere); one longer unit is a run
    alone."""
    if not whole:
        yield from ((start, min(start + rows, cu_seqlens[-1])) for start in range(0, cu_seqlens[-1], rows))
        return
    start = 0
    borders = cu_seqlens[::whole]
    for before, border in pairwise(borders):
        if border - start > rows and before > start:
            yield start, before
            start = before
    if borders[-1] > start:
        yield start, borders[-1]


def _even(cu_seqlens: list[int], rows: int, whole: int, step: int) -> int:
    """The least multiple of `step` rows that needs no more runs than `rows` does, so that they are of about one length;
    `rows` itself where `step` is 0."""
    if not step:
        return rows
    least = len(list(_runs(cu_seqlens, rows, whole)))
    lengths = range(-(-cu_seqlens[-1] // max(least, 1) // step) * step or step, rows, step)
    place = bisect_left(lengths, True, key=lambda length: len(list(_runs(cu_seqlens, length, whole))) <= least)
    return lengths[place] if place < len(lengths) else rows


def _longest(cu_seqlens: list[int], whole: int) -> int:
    """Rows of the most that is taken as a whole: of `whole` sequences, 0 of none."""
    borders = cu_seqlens[::whole] if whole else []
    return max((end - start for start, end in pairwise(borders)), default=0)


def _packed(owner: torch.Tensor, counted: torch.Tensor, sequences: int) -> torch.Tensor:
    """cu_seqlens [sequences + 1] of the tokens whose sequences are `owner` int64 [R] and that `counted` [R] counts;
    empty sequences stay in."""
    counts = torch.zeros(sequences, dtype=torch.int64, device=owner.device).index_add(0, owner, counted.long())
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _run_all(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, owner: torch.Tensor, sequences: int,
             kept: torch.Tensor, live: torch.Tensor, estimate: torch.Tensor | None, slopes: Slopes, *, whole: int,
             entropy: bool, workspace_bytes: int, needs: tuple[bool, bool], impl: str,
             ) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """logprobs and entropy [M] (0 where not `kept`, and of entropies where not asked for), and the gradients by hidden
    and weight (the latter unrounded).

    Tokens in `live` [M] may have a gradient; the other kept ones are only looked at. Sequence `owner` [M], ascending.
    The host waits for the device once, to know how many there are. `workspace_bytes` 0: the implementation's own.
    """
    ops = engine(impl)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, row_entropy = torch.zeros(2, len(hidden), dtype=dtype, device=hidden.device)
    looked_at, live = (kept & ~live, live) if any(needs) else (kept, torch.zeros_like(live))
    idle, *borders = torch.cat([looked_at.sum()[None], _packed(owner, live, sequences)]).tolist()
    limit = ops.Workspace.rows_for(workspace_bytes or ops.WORKSPACE_BYTES, head, hidden)
    if not workspace_bytes:
        limit = min(limit, max(ops.Workspace.rows_for(ops.RUN_BYTES, head, hidden), _longest(borders, whole)))
    for rows in torch.nonzero_static(looked_at, size=idle)[:, 0].split(max(limit, 2048)):
        found = ops.statistics(hidden[rows], head, token_ids[rows], entropy=entropy)
        logprobs[rows], row_entropy[rows] = found.logprobs, found.entropy
    if not any(needs):
        return logprobs, row_entropy, Gradients(None, None, None)
    order = torch.nonzero_static(live, size=borders[-1])[:, 0]
    runs = list(_runs(borders, _even(borders, limit, whole, ops.Workspace.step), whole))
    longest = max((min(end - start, limit) for start, end in runs), default=0)
    space = ops.Workspace(head, hidden, longest, needs_hidden=needs[0], needs_weight=needs[1],
                          every_row=len(order) == len(hidden))
    for start, end in runs:
        rows = order[start:end]
        x, ids = hidden[rows], token_ids[rows]
        cu_seqlens = _packed(owner[rows], torch.ones_like(rows), sequences)
        fits = end - start <= limit
        found = (space.open(x, ids, None if estimate is None else estimate[rows], entropy=entropy) if fits
                 else ops.statistics(x, head, ids, entropy=entropy))
        logprobs[rows], row_entropy[rows] = found.logprobs, found.entropy
        by_logprob, by_entropy = slopes(rows, cu_seqlens, found.logprobs, found.entropy)
        if fits:
            space.close(by_logprob, by_entropy, rows)
        else:  # a completion or pair that the workspace cannot hold: its logits are computed again
            space.add(rows, x, ids, found, by_logprob, by_entropy)
    return logprobs, row_entropy, space.finish()


def _formed(out: Gradients, hidden: torch.Tensor, dtype: torch.dtype
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients as an op returns them: what is not needed is empty, the unit of the weight's is [1]."""
    return (hidden.new_empty(0) if out.hidden is None else out.hidden,
            hidden.new_empty(0) if out.weight is None else out.weight,
            hidden.new_ones(1, dtype=dtype) if out.unit is None else out.unit.clone())


def _indices(cu_seqlens: torch.Tensor, loss_mask: torch.Tensor | None, hidden: torch.Tensor, token_ids: torch.Tensor,
             vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequence of every token, and its mask in the type of the log-probs, both [M]; values that the door of a compiled
    graph does not see are checked."""
    check_bounds(cu_seqlens, len(hidden))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    mask = (torch.ones(len(hidden), dtype=dtype, device=hidden.device) if loss_mask is None else loss_mask.to(dtype))
    _check_ids(token_ids, vocabulary, mask)
    return reference.sequence_index(cu_seqlens, len(hidden)), mask


def _check_ids(token_ids: torch.Tensor, vocabulary: int, mask: torch.Tensor) -> None:
    """Tokens that count lie in the vocabulary. On a GPU, which would have to be waited for, they make the loss NaN."""
    if token_ids.device.type != "cpu":
        return
    outside = ((token_ids < 0) | (token_ids >= vocabulary)) & (mask != 0)
    if outside.any():
        raise ValueError(f"token_ids must be in [0, {vocabulary}) where loss_mask is not 0, "
                         f"got {int(token_ids[outside][0])}")


@torch.library.custom_op("veripo::linear_policy_loss", mutates_args=())
def _policy(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, old_logprobs: torch.Tensor | None,
            advantages: torch.Tensor, cu_seqlens: torch.Tensor, loss_mask: torch.Tensor | None,
            ref_logprobs: torch.Tensor | None, rollout_logprobs: torch.Tensor | None, num_sequences: int,
            num_tokens: int, temperature: torch.Tensor, words: str, numbers: torch.Tensor, workspace_bytes: int,
            needs: list[bool], impl: str,
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [], metrics [6], logprobs [M], dhidden [M, D] and dweight [V, D] (these two empty where not needed), and the
    unit [1] of dweight. `needs`: as `_needs`, and the entropy."""
    loss = _decoded(PolicyLoss, words, numbers)
    owner, mask = _indices(cu_seqlens, loss_mask, hidden, token_ids, len(weight))
    if advantages.shape != token_ids.shape:
        advantages = advantages[owner]
    advantages = advantages.to(mask.dtype)
    weights = reference.token_weights(cu_seqlens, mask, loss, num_sequences=num_sequences or None,
                                      num_tokens=num_tokens or None)
    always = (loss.entropy_coef != 0 or loss.squared_coef != 0
              or (loss.kl_coef != 0 and ref_logprobs is not None))
    live = (mask != 0) if always else (mask != 0) & (advantages != 0)
    if loss.couples_tokens and not always:  # a completion is in as a whole: its tokens share a ratio
        live = reference.sequence_sums(live.to(mask.dtype), cu_seqlens)[owner].bool() & (mask != 0)

    def terms(rows: torch.Tensor | slice, cu: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor
              ) -> reference.PolicyTerms:
        def at(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[rows].to(logprobs.dtype)

        return reference.policy_terms(logprobs, at(old_logprobs), advantages[rows], cu, mask[rows], loss,
                                      ref_logprobs=at(ref_logprobs), rollout_logprobs=at(rollout_logprobs),
                                      entropy=entropy if needs[3] else None)

    def slopes(rows: torch.Tensor, cu: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor
               ) -> tuple[torch.Tensor, torch.Tensor | None]:
        by_logprob = reference.policy_slopes(terms(rows, cu, logprobs, entropy), weights[rows], cu)
        return by_logprob, -loss.entropy_coef * weights[rows] if loss.entropy_coef else None

    logprobs, entropy, gradients = _run_all(
        hidden, Head(weight, temperature=numbers_of(temperature)[0]), token_ids, owner, len(cu_seqlens) - 1,
        mask != 0, live, old_logprobs if old_logprobs is not None else rollout_logprobs, slopes,
        whole=int(loss.couples_tokens), entropy=needs[3], workspace_bytes=workspace_bytes, needs=(needs[0], needs[1]),
        impl=impl)
    whole = terms(slice(None), cu_seqlens, logprobs, entropy)
    metrics = reference.policy_metrics(whole, weights)
    return (reference.weighted_sum(whole.loss, weights), torch.stack([metrics[name] for name in _POLICY_METRICS]),
            logprobs, *_formed(gradients, hidden, logprobs.dtype))


@torch.library.custom_op("veripo::linear_dpo_loss", mutates_args=())
def _dpo(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, ref_logprobs: torch.Tensor,
         cu_seqlens: torch.Tensor, loss_mask: torch.Tensor | None, pair_weights: torch.Tensor | None, num_pairs: int,
         temperature: torch.Tensor,
         words: str, numbers: torch.Tensor, workspace_bytes: int, needs: list[bool], impl: str,
         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [], metrics [5], logprobs [M], dhidden, dweight and its unit as `_policy`'s."""
    loss = _decoded(PreferenceLoss, words, numbers)
    owner, mask = _indices(cu_seqlens, loss_mask, hidden, token_ids, len(weight))
    kept, pairs = mask != 0, num_pairs or max((len(cu_seqlens) - 1) // 2, 1)

    def slopes(rows: torch.Tensor, cu: torch.Tensor, logprobs: torch.Tensor, entropy: torch.Tensor
               ) -> tuple[torch.Tensor, None]:
        ref = ref_logprobs[rows] if ref_logprobs.dim() == 1 else ref_logprobs
        slope = reference.pair_terms(logprobs, ref.to(logprobs.dtype), cu, loss, mask[rows]).slope / pairs
        return slope if pair_weights is None else slope * pair_weights[owner[rows] // 2].to(slope.dtype), None

    logprobs, _, gradients = _run_all(
        hidden, Head(weight, temperature=numbers_of(temperature)[0]), token_ids, owner, len(cu_seqlens) - 1, kept, kept,
        ref_logprobs if ref_logprobs.dim() == 1 else None, slopes, whole=2, entropy=False,
        workspace_bytes=workspace_bytes, needs=(needs[0], needs[1]), impl=impl)
    value, metrics = reference.dpo_loss(logprobs, ref_logprobs.to(logprobs.dtype), cu_seqlens, loss=loss,
                                        loss_mask=mask, weights=pair_weights, num_pairs=num_pairs or None)
    return (value, torch.stack([metrics[name] for name in _PAIR_METRICS]), logprobs,
            *_formed(gradients, hidden, logprobs.dtype))


def _fake(metrics: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    def fake(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        needs, dtype = rest[-2], torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.new_empty((), dtype=dtype), hidden.new_empty(metrics, dtype=dtype),
                hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape if needs[0] else 0),
                weight.new_empty(weight.shape if needs[1] else 0, dtype=dtype if needs[1] else weight.dtype),
                hidden.new_empty(1, dtype=dtype))

    return fake


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-3:])
    ctx.dtypes, ctx.arguments, ctx.needs = (inputs[0].dtype, inputs[1].dtype), len(inputs), inputs[-2]
    ctx.spent = False


def _scaled(ctx: Any, upstream: torch.Tensor | None, *_: object) -> tuple[torch.Tensor | None, ...]:
    refuse_second("linear_policy_loss or linear_dpo_loss")
    by_hidden, by_weight, single_use = ctx.needs[:3]
    if single_use and ctx.spent:
        raise RuntimeError("a second backward pass through a loss of single_use, which gave its gradients away")
    ctx.spent = True
    dhidden, dweight, unit = ctx.saved_tensors
    unused = (None,) * (ctx.arguments - 2)
    if upstream is None:
        return None, None, *unused
    return (_times(dhidden, upstream[None], ctx.dtypes[0], single_use) if by_hidden else None,
            _times(dweight, upstream * unit, ctx.dtypes[1], single_use) if by_weight else None, *unused)


def _times(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, in_place: bool) -> torch.Tensor:
    """values * factor [1], computed in the factor's dtype and rounded to `dtype`: one pass, where a GPU would make
    three of a product and a conversion. What vmap has batched cannot be written into a place that is given."""
    if is_batched(factor):
        return (values.to(factor.dtype) * factor).to(dtype)
    if in_place and values.dtype == factor.dtype == dtype:
        return values.mul_(factor)
    return torch.mul(values, factor, out=torch.empty_like(values, dtype=dtype))


for _op, _metrics in ((_policy, len(_POLICY_METRICS)), (_dpo, len(_PAIR_METRICS))):
    _op.register_fake(_fake(_metrics))
    _op.register_autograd(_scaled, setup_context=_setup)


def linear_policy_loss(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor,
                       old_logprobs: torch.Tensor | None, advantages: torch.Tensor, cu_seqlens: torch.Tensor, *,
                       loss: PolicyLoss | str = "grpo", temperature: float = 1.0, loss_mask: torch.Tensor | None = None,
                       ref_logprobs: torch.Tensor | None = None, rollout_logprobs: torch.Tensor | None = None,
                       num_sequences: int | None = None, num_tokens: int | None = None,
                       advantages_per: AdvantagesPer | None = None, entropy: bool = True,
                       workspace_bytes: int | None = None, single_use: bool = False, impl: Impl = "auto",
                       ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """`grpo_loss` of `linear_logprobs`, both gradients formed on the way: three matrix products, two for a frozen head.

    Args:
        hidden: [M, D] at the positions that predict the packed completion tokens. head: [V, D]. token_ids: int64 [M].
        entropy: measure it; where False, and the loss has no entropy_coef, the metric is 0 and costs nothing.
        workspace_bytes: room for the logits of a run (default: `linear_torch.RUN_BYTES`, 128 MiB, on a GPU
            `linear_triton.WORKSPACE_BYTES`, 1.25 GiB); memory beyond it does not grow with M. A completion that must
            be taken as a whole (gspo, gmpo, sequence importance, squared_coef) gets up to `WORKSPACE_BYTES`, 1 GiB by
            default; one that does not fit costs a fourth product.
        single_use: there is one backward pass at most through this loss, which then hands its gradients on without a
            copy; a second one raises RuntimeError.
        The others: as in `grpo_loss`; advantages_per ("sequence" or "token") is needed where M = S.

    Returns:
        scalar loss, its metrics, and the policy's log-probs [M] (0 where loss_mask is), both detached.

    Raises:
        ValueError: an argument of the wrong shape or type, by name and value.
    """
    check_linear(hidden, head, token_ids, temperature)
    loss = as_policy_loss(loss)
    check_cu_seqlens(cu_seqlens, hidden)
    check_device("advantages", advantages, hidden)
    _check_rows(hidden, {"old_logprobs": old_logprobs, "loss_mask": loss_mask, "ref_logprobs": ref_logprobs,
                         "rollout_logprobs": rollout_logprobs})
    check_counts(num_sequences=num_sequences, num_tokens=num_tokens)
    refuse_transforms("linear_policy_loss", hidden, head)
    advantages = reference.told_apart(advantages, cu_seqlens, len(token_ids), advantages_per)
    if loss.kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef {loss.kl_coef} needs ref_logprobs")
    value, metrics, logprobs, *_ = _policy(
        hidden, head, token_ids, old_logprobs, advantages, cu_seqlens, loss_mask, ref_logprobs, rollout_logprobs,
        num_sequences or 0, num_tokens or 0, as_tensor(temperature), *_encoded(loss), workspace_bytes or 0,
        [*_needs(hidden, head, single_use), entropy or loss.entropy_coef != 0],
        choose("linear_policy_loss", impl, hidden.device))
    return value, dict(zip(_POLICY_METRICS, metrics.unbind(), strict=True)), logprobs


def linear_dpo_loss(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor, ref_logprobs: torch.Tensor,
                    cu_seqlens: torch.Tensor, *, loss: PreferenceLoss | str = "sigmoid", temperature: float = 1.0,
                    loss_mask: torch.Tensor | None = None, weights: torch.Tensor | None = None,
                    num_pairs: int | None = None, workspace_bytes: int | None = None, single_use: bool = False,
                    impl: Impl = "auto",
                    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """`dpo_loss` of `linear_logprobs`, both gradients formed on the way: three matrix products, two for a frozen head.

    Args: as in `dpo_loss` and `linear_policy_loss`; a pair that does not fit the workspace costs a fourth product.

    Returns:
        scalar loss, its metrics, and the policy's log-probs [M] (0 where loss_mask is), both detached.
    """
    check_linear(hidden, head, token_ids, temperature)
    check_cu_seqlens(cu_seqlens, hidden)
    check_device("ref_logprobs", ref_logprobs, hidden)
    pairs = (len(cu_seqlens) - 1) // 2
    if len(cu_seqlens) != 2 * pairs + 1:
        raise ValueError(f"cu_seqlens must have 2 * pairs + 1 entries, got {len(cu_seqlens)}")
    if ref_logprobs.shape not in (token_ids.shape, (pairs, 2)):
        raise ValueError(f"ref_logprobs must have shape [{len(token_ids)}] or [{pairs}, 2], "
                         f"got {list(ref_logprobs.shape)}")
    _check_rows(hidden, {"loss_mask": loss_mask})
    if weights is not None:
        if weights.shape != (pairs,):
            raise ValueError(f"weights must have shape [{pairs}], got {list(weights.shape)}")
        check_device("weights", weights, hidden)
    check_counts(num_pairs=num_pairs)
    refuse_transforms("linear_dpo_loss", hidden, head)
    value, metrics, logprobs, *_ = _dpo(
        hidden, head, token_ids, ref_logprobs, cu_seqlens, loss_mask, weights, num_pairs or 0, as_tensor(temperature),
        *_encoded(as_preference_loss(loss)), workspace_bytes or 0, _needs(hidden, head, single_use),
        choose("linear_dpo_loss", impl, hidden.device))
    return value, dict(zip(_PAIR_METRICS, metrics.unbind(), strict=True)), logprobs


def _encoded(loss: PolicyLoss | PreferenceLoss) -> tuple[str, torch.Tensor]:
    """The words and the numbers of a loss: ops take no types of ours, and torch.compile may make a float a symbol."""
    values = [getattr(loss, name) for name in _FIELDS[type(loss)]]
    return (",".join([value if isinstance(value, str) else "" for value in values]),
            as_tensor(*(None if isinstance(value, str) else value for value in values)))


def _decoded(kind: type[Loss], words: str, numbers: torch.Tensor) -> Loss:
    values = [word or (None if math.isnan(number) else number)
              for word, number in zip(words.split(","), numbers_of(numbers), strict=True)]
    return kind(**dict(zip(_FIELDS[kind], values, strict=True)))  # type: ignore[arg-type]


def _needs(hidden: torch.Tensor, head: torch.Tensor, single_use: bool) -> list[bool]:
    """Gradients by hidden and head, and whether they may be given away."""
    grad = torch.is_grad_enabled()
    return [grad and wants_gradient(hidden), grad and wants_gradient(head), single_use]


def _check_rows(hidden: torch.Tensor, named: dict[str, Any]) -> None:
    for name, values in named.items():
        if values is not None and values.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must have shape [{len(hidden)}], got {list(values.shape)}")
        if values is not None:
            check_device(name, values, hidden)
