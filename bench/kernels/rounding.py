"""How far the compiled gather_logprobs (csrc/gather_logprobs.cpp, csrc/rows.h) may be from float64, from its roundings.

A float32 operation errs by U = 2^-24 of its result at most; bounds are to first order in U. They hold for every clone:
baseline has no fused multiply-add and four lanes, so it rounds most. Float64 steps (whatever a row has one of) count as
exact, and what a 16-bit logit holds is read exactly.

Letters: T rows, V vocabulary; z = (x - largest x) / temperature, l = log p, H entropy, A what a running sum adds.

- e = exp(z) errs by U e (2 |z| + 3): x - anchor and its product with log2(e) / temperature are rounded, each U |z|;
  what is left for the polynomial, at most 1/2, is rounded twice, U ln(2); the polynomial adds 2 U (its last product and
  sum are rounded, what comes before is damped by 1/2 each time, the fit itself is 0.03 U).
- A running sum of n terms errs by A U of itself: n at worst, but roundings of unlike terms walk at random: 2 sqrt(n).
  With mantissas spread evenly the standard deviation is 0.42 sqrt(n / 3) where terms are of one size, so that is eight.
  A row made of one number repeated would round the same way each time; the bound is not for that. Blocks of 2048 are
  summed in float32, in no fewer than 4 lanes: n = 512, and 19 for the ragged end and for joining the lanes.
- Logits equal to the largest are counted, so the sum of e is off by its other terms only, and log sum e by
  R = U sum_{z < 0} p (2 |z| + 3 + A).
- The moment sum p |z| errs by M = U sum p |z| (2 |z| + 5 + A): its z and its product are rounded too.
- H = log sum e + moment, so it is off by R + M + R sum p |z|.
- dlogits = p (s + c l), s = -(w + v H) / temperature, c = -v / temperature. In p two differences and a product are
  rounded, U (3 |l| + 3), and l is off by R; in c l six things (two differences, 1 / temperature, c, two products); two
  sums and the product with p are 3 U. The token's own is float64 until its last rounding.
- Each result is rounded to float32, and dlogits then to its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from veripo_kernels import cpp

U = 2.0**-24
_UNDERFLOW = 1e-30
"""Exponentials below 2^-126 count as that, or as nothing: 1e-38 each."""
_OF_FLOAT64 = 2.0**-50
"""What `plain` in float64 errs by, beside 1 and the largest of logits / temperature: log p of a sure token is less."""

Results = dict[str, torch.Tensor]
"""logprobs, entropy and lse [T]; dlogits [T, V]."""


class Case(NamedTuple):
    """Inputs of the op: logits [T, V] in the dtype under test, the others [T]."""

    logits: torch.Tensor
    token_ids: torch.Tensor
    dlogprobs: torch.Tensor
    dentropy: torch.Tensor
    temperature: float


def compiled(logits: torch.Tensor, token_ids: torch.Tensor, dlogprobs: torch.Tensor, dentropy: torch.Tensor,
             temperature: float) -> Results:
    """What the compiled op gives, forward and backward; takes the fields of a Case."""
    logprobs, entropy, lse = cpp.forward(logits, token_ids, temperature)
    dlogits = cpp.backward(logits, token_ids, lse, entropy, dlogprobs, dentropy, temperature)
    return {"logprobs": logprobs, "entropy": entropy, "lse": lse, "dlogits": dlogits}


def plain(case: Case, dtype: torch.dtype) -> Results:
    """The same by log_softmax and autograd in one dtype; -inf logits have p log p = 0."""
    leaf = case.logits.detach().to(dtype).requires_grad_()
    log_p = torch.log_softmax(leaf / case.temperature, -1)
    logprobs = log_p.gather(-1, case.token_ids[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    [dlogits] = torch.autograd.grad((logprobs, entropy), leaf, (case.dlogprobs.to(dtype), case.dentropy.to(dtype)))
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(),
            "lse": (leaf.detach() / case.temperature).logsumexp(-1), "dlogits": dlogits}


def running_sum(vocabulary: int) -> float:
    """A: roundings of a running sum over a row, in U of the sum."""
    terms = min(vocabulary, min(vocabulary, 2048) / 4 + 19)
    return min(terms, 2 * math.sqrt(terms))


def bounds(case: Case, exact: Results) -> Results:
    """The largest error that the roundings above allow, for each number of `exact`, which is `plain` in float64."""
    z = case.logits.double() / case.temperature
    z = (z - z.amax(-1, keepdim=True)).clamp(min=-88)
    log_p = (z - z.logsumexp(-1, keepdim=True))
    p, distance, running = log_p.exp(), -z, running_sum(case.logits.shape[1])
    log_total = U * torch.where(z < 0, p * (2 * distance + 3 + running), 0).sum(-1)
    mean_distance = (p * distance).sum(-1)
    moment = U * (p * distance * (2 * distance + 5 + running)).sum(-1)
    entropy = log_total * (1 + mean_distance) + moment
    found = {"logprobs": log_total, "entropy": entropy, "lse": log_total}
    found = {name: bound + U * exact[name].abs() for name, bound in found.items()}
    found["dlogits"] = _of_gradient(case, exact, log_p, log_total[:, None], entropy[:, None])
    largest = case.logits.masked_fill(case.logits == -torch.inf, 0).double().abs().amax(-1) / case.temperature
    noise = _UNDERFLOW + _OF_FLOAT64 * (1 + largest)
    return {name: bound + (noise[:, None] if name == "dlogits" else noise) for name, bound in found.items()}


def _of_gradient(case: Case, exact: Results, log_p: torch.Tensor, log_total: torch.Tensor, entropy: torch.Tensor
                 ) -> torch.Tensor:
    weight, curve = (values.double()[:, None] / case.temperature for values in (case.dlogprobs, case.dentropy))
    slope = (weight + curve * (exact["entropy"][:, None] + log_p)).abs()
    bent = (curve * log_p).abs()
    error = log_p.exp() * (slope * (U * (3 * log_p.abs() + 6) + log_total) + 6 * U * bent
                           + curve.abs() * (log_total + entropy))
    limits = torch.finfo(case.logits.dtype)
    last = U if case.logits.dtype == torch.float32 else U + limits.eps / 2
    return error + last * (exact["dlogits"].abs() + error) + limits.smallest_normal * limits.eps / 2


def float32_bounds(case: Case, exact: Results, *, scaled_first: bool) -> Results:
    """`bounds` for arithmetic that is float32 throughout: Triton kernels, and plain torch.

    z is rounded four times at most; torch scales first, so both logits of the difference are rounded too. exp errs by
    4 U (a GPU's ex2), what a row has one of (log sum e, H, log p) is rounded too, and the token's own gradient is a
    difference of p times a slope and that slope.
    """
    z = case.logits.double() / case.temperature
    largest = 2 * scaled_first * z.masked_fill(z == -torch.inf, 0).abs().amax(-1, keepdim=True)
    z = (z - z.amax(-1, keepdim=True)).clamp(min=-88)
    log_total = z.logsumexp(-1, keepdim=True)
    p, log_p, running = (z - log_total).exp(), z - log_total, running_sum(case.logits.shape[1])
    of_z, of_row = U * (largest - 4 * z), 4 * U * (1 + log_total)
    total = (p * (of_z + U * (4 + running))).sum(-1, keepdim=True)
    moment = (p * (-z * (of_z + U * (5 + running)) + of_z)).sum(-1, keepdim=True)
    distance = -(p * z).sum(-1, keepdim=True)
    entropy = total * (1 + distance) + moment + of_row + 4 * U * distance
    of_log_p = of_z + total + of_row - U * log_p
    chosen = case.token_ids[:, None]
    weight, curve = (values.double()[:, None] / case.temperature for values in (case.dlogprobs, case.dentropy))
    slope = (weight + curve * (exact["entropy"][:, None] + log_p)).abs()
    dlogits = p * (slope * (of_log_p + 8 * U) + 6 * U * (curve * log_p).abs()
                   + curve.abs() * (of_log_p + entropy) + 4 * U * weight.abs())
    dlogits.scatter_add_(-1, chosen, 4 * U * weight.abs())
    dlogits += _UNDERFLOW + torch.finfo(case.logits.dtype).eps / 2 * (exact["dlogits"].abs() + dlogits)
    dlogits += torch.finfo(case.logits.dtype).smallest_normal * torch.finfo(case.logits.dtype).eps / 2
    logprobs = (U * largest + total + of_row)[:, 0] + 5 * U * exact["logprobs"].abs()  # z is 88 at most above
    return {"logprobs": logprobs, "entropy": entropy[:, 0], "dlogits": dlogits}


def ratios(got: Results, exact: Results, allowed: Results) -> dict[str, torch.Tensor]:
    """Error over bound for each row [T], the row's largest in a gradient; infinite where a NaN or -inf differs."""
    found = {}
    for name, value in got.items():
        finite = exact[name].isfinite()
        ratio = ((value.double() - exact[name]).abs() / allowed[name]).where(finite, 0)
        same = (value == exact[name]) | value.isnan() & exact[name].isnan()
        ratio = ratio.where(finite | same, torch.inf).nan_to_num(torch.inf, torch.inf)
        found[name] = ratio.reshape(len(ratio), -1).amax(-1)
    return found


def random_cases(rows: int, seed: int = 0) -> Iterator[Case]:
    """`rows` random rows, up to 50 to a case: each dtype, V of 1 to 10,000, flat to peaked, temperature 0.3 to 2."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    while rows > 0:
        count = min(rows, 50)
        vocabulary, scale = int(math.exp(uniform(0, math.log(10_000)))), math.exp(uniform(-2, 2.5))
        logits = scale * torch.randn(count, vocabulary, generator=generator) + uniform(-20, 20)
        yield Case(logits.to(dtypes[rows // 50 % 3]), torch.randint(vocabulary, (count,), generator=generator),
                   torch.randn(count, generator=generator), torch.randn(count, generator=generator), uniform(0.3, 2))
        rows -= count
