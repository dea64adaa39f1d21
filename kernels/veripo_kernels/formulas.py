"""Token and pair formulas of the losses, written once in the part of Python that torch and Triton share.

Here `xp` is torch, and `reference.py` differentiates the values with autograd. `jit/formulas.py` loads this same file
with `xp` bound to triton.language: the kernels run the same lines, and use the slopes that stand beside the values
because nothing differentiates inside a kernel. tests/kernels/test_formulas.py compares every slope with autograd.

Arguments are tensors of one shape or Python numbers; names in capitals are strings known at compile time.
"""

from __future__ import annotations

from typing import Any

if "xp" not in globals():  # the Triton loader has bound it already
    import torch

    xp: Any = torch


def clip_surrogate(log_ratio, advantage, clip_low, clip_high, dual_clip):
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), asymmetric (DAPO, arXiv 2503.14476, eq. 10), and for a
    negative advantage bounded at dual_clip * |A| (arXiv 1912.09729, eq. 5; dual_clip 1e30 is none).

    Returns loss, its slope by log_ratio, and two flags: gradient clipped away below, above.
    """
    ratio = xp.exp(log_ratio)
    plain = ratio * advantage
    from_below = xp.where(ratio < 1.0 - clip_low, 1.0 - clip_low, ratio)
    from_above = xp.where(ratio > 1.0 + clip_high, 1.0 + clip_high, ratio)  # may lie below 1 - clip_low: no clamp
    clipped = xp.where(advantage < 0.0, from_below, from_above) * advantage
    taken = clipped < plain
    bound = dual_clip * advantage
    objective = xp.where(taken, clipped, plain)
    bounded = (advantage < 0.0) & (bound > objective)
    loss = -xp.where(bounded, bound, objective)
    slope = xp.where(taken | bounded, 0.0, -plain)
    return loss, slope, taken & (advantage < 0.0), (taken & (advantage > 0.0)) | bounded


def cispo_surrogate(policy_logprob, log_ratio, advantage, clip_high):
    """CISPO (arXiv 2506.13585, eq. 4): REINFORCE weighted by the ratio cut at 1 + clip_high; the weight has no
    gradient.

    Returns loss, its slope by policy_logprob, and two flags: never, weight cut.
    """
    ratio = xp.exp(log_ratio)
    cut = ratio > 1.0 + clip_high
    slope = -xp.where(cut, 1.0 + clip_high, ratio) * advantage
    never = ratio < 0.0
    return slope * policy_logprob, slope, never, cut & (advantage > 0.0)


def sapo_surrogate(log_ratio, advantage, temperature_pos, temperature_neg):
    """SAPO (arXiv 2511.20347, eq. 5): a sigmoid gate instead of the clip, steeper for negative advantages.

    Returns loss, its slope by log_ratio, and two flags that are never set.
    """
    ratio = xp.exp(log_ratio)
    temperature = xp.where(advantage > 0.0, temperature_pos, temperature_neg)
    gate = xp.sigmoid(temperature * (ratio - 1.0))
    slope = -4.0 * gate * (1.0 - gate) * ratio * advantage
    never = ratio < 0.0
    return -4.0 * gate / temperature * advantage, slope, never, never


def importance_log(log_weight, floor, cap, KIND):
    """Logarithm of `importance_weight`, between those of 1e-8 and e^20 as VESPO takes it."""
    return xp.log(xp.clamp(importance_weight(log_weight, floor, cap, KIND), 1e-8, 485165195.4097903))


def vespo_surrogate(policy_logprob, log_weight, advantage, k_pos, lambda_pos, k_neg, lambda_neg):
    """VESPO (arXiv 2602.10693, algorithm 1): REINFORCE weighted by w^k exp(lambda (1 - w)) of the importance weight w
    of the completion, with its own k and lambda for negative advantages; the weight has no gradient.

    Returns loss, its slope by policy_logprob, and two flags that are never set.
    """
    log_weight = xp.clamp(log_weight, -18.420680743952367, 20.0)  # log(1e-8)
    k = xp.where(advantage >= 0.0, k_pos, k_neg)
    decay = xp.where(advantage >= 0.0, lambda_pos, lambda_neg)
    exponent = decay + k * log_weight - decay * xp.exp(log_weight)
    slope = -xp.where(exponent < 88.0, xp.exp(exponent), 0.0) * advantage
    never = slope != slope
    return slope * policy_logprob, slope, never, never


def reinforce_surrogate(policy_logprob, advantage):
    """The log-prob times the advantage, without a ratio (GPG, arXiv 2504.02546; Kimi k1.5's first term, arXiv
    2501.12599, section 2.3.2).

    Returns loss, its slope by policy_logprob, and two flags that are never set.
    """
    slope = -advantage
    never = slope != slope
    return slope * policy_logprob, slope, never, never


def squared_log_ratio(total, count):
    """Half the square of a completion's log-ratio `total`, divided among its `count` tokens, at least 1 (Kimi k1.5,
    arXiv 2501.12599, section 2.3.2).

    Returns what each token adds to the loss, and the slope of all of it by the log-prob of any.
    """
    divisor = xp.where(count < 1.0, 1.0, count)
    return 0.5 * total * total / divisor, total * count / divisor


def gmpo_log_ratio(log_ratio, advantage, log_low, log_high):
    """GMPO's clip (arXiv 2507.20673, eq. 4): the log-ratio, cut only where going on would raise the objective.

    Returns the cut log-ratio and two flags: cut below, above.
    """
    low = (advantage < 0.0) & (log_ratio < log_low)
    high = (advantage > 0.0) & (log_ratio > log_high)
    return xp.where(low, log_low, xp.where(high, log_high, log_ratio)), low, high


def kl_penalty(policy_logprob, ref_logprob, KIND):
    """Estimate of KL(policy || reference) of one token (Schulman 2020, "Approximating KL divergence").

    With d = ref - policy: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. Returns value and slope by policy_logprob.
    """
    d = ref_logprob - policy_logprob
    if KIND == "k1":
        return -d, 0.0 * d + 1.0
    if KIND == "k2":
        return 0.5 * d * d, -d
    growth = xp.exp(d)
    return growth - 1.0 - d, 1.0 - growth


def importance_weight(log_weight, floor, cap, KIND):
    """Truncated (kept in [floor, cap]) or masked (0 outside) importance weight of the trainer against the engine.

    A NaN log-weight (the engine could not score the token) means 1.
    """
    weight = xp.exp(xp.where(log_weight == log_weight, log_weight, 0.0))
    if KIND == "truncate":
        return xp.clamp(weight, floor, cap)
    return xp.where((weight < floor) | (weight > cap), 0.0, weight)


def logsigmoid(x):
    """log(1 / (1 + exp(-x))), finite for every x; its gradient at 0 is exactly a half."""
    return xp.where(x < -40.0, x, xp.log(xp.sigmoid(xp.clamp(x, -40.0, 1e30))))


def divergence_score(log_ratio, alpha, KIND):
    """f-DPO's score f'(policy / reference) of a completion, from its log-ratio (arXiv 2309.16240, eq. 14 and table 2).

    forward_kl: 1 - exp(-x); js: log(2) + logsigmoid(x); alpha: (exp((alpha - 1) x) - 1) / (alpha - 1), flat where its
    exponent passes 80. Returns value and slope by log_ratio.
    """
    if KIND == "forward_kl":
        slope = xp.exp(-log_ratio)
        return 1.0 - slope, slope
    if KIND == "js":
        return 0.6931471805599453 + logsigmoid(log_ratio), xp.sigmoid(-log_ratio)
    exponent = (alpha - 1.0) * log_ratio
    growth = xp.exp(xp.where(exponent > 80.0, 80.0, exponent))
    return (growth - 1.0) / (alpha - 1.0), xp.where(exponent > 80.0, 0.0, growth)


def preference_loss(chosen, rejected, beta, smoothing, tau, KIND):
    """Loss of a pair from its two log-ratios policy - reference, with h = chosen - rejected.

    sigmoid (arXiv 2305.18290, eq. 7; smoothing: cDPO), ipo (2310.12036, eq. 17), hinge (2305.10425), robust
    (2403.00409, eq. 8), exo (2402.00856, eq. 16), nca (2402.05369, eq. 13 with K = 2), apo_zero and apo_down
    (2408.06266, eq. 7, 8), sppo (2405.00675, eq. 4.7 with hard labels), bco (2404.04656, eq. 11, without its shift),
    discopop (2406.08414, eq. 5, its temperature tau). Returns loss and its slopes by chosen and by rejected.
    """
    h = chosen - rejected
    right, wrong = xp.sigmoid(beta * h), xp.sigmoid(-beta * h)
    if KIND == "sigmoid":
        slope = beta * (smoothing * right - (1.0 - smoothing) * wrong)
        return -(1.0 - smoothing) * logsigmoid(beta * h) - smoothing * logsigmoid(-beta * h), slope, -slope
    if KIND == "robust":
        scale = 1.0 / (1.0 - 2.0 * smoothing)
        slope = -scale * beta * ((1.0 - smoothing) * wrong + smoothing * right)
        return scale * (smoothing * logsigmoid(-beta * h) - (1.0 - smoothing) * logsigmoid(beta * h)), slope, -slope
    if KIND == "ipo":
        gap = h - 0.5 / beta
        return gap * gap, 2.0 * gap, -2.0 * gap
    if KIND == "hinge":
        gap = 1.0 - beta * h
        slope = xp.where(gap > 0.0, -beta, 0.0 * gap)
        return xp.where(gap > 0.0, gap, 0.0), slope, -slope
    if KIND == "exo":
        over_keep = logsigmoid(beta * h) - xp.log(0.0 * h + 1.0 - smoothing)
        over_flip = logsigmoid(-beta * h) - xp.log(0.0 * h + smoothing)
        slope = beta * right * wrong * (over_keep - over_flip)
        return right * over_keep + wrong * over_flip, slope, -slope
    if KIND == "nca":
        up = -beta * xp.sigmoid(-beta * chosen) + 0.5 * beta * xp.sigmoid(beta * chosen)
        loss = -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)
        return loss, up, 0.5 * beta * xp.sigmoid(beta * rejected)
    if KIND == "bco":
        loss = -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)
        return loss, -beta * xp.sigmoid(-beta * chosen), beta * xp.sigmoid(beta * rejected)
    if KIND == "discopop":
        logit = beta * h
        mixed, other = xp.sigmoid(logit / tau), xp.sigmoid(-logit / tau)
        grown = xp.exp(logsigmoid(logit / tau) - logit)  # exp(-logit) * mixed, finite where its factors are not
        slope = (beta * other / tau) * (grown + mixed * logsigmoid(logit)) - beta * (wrong * other + grown)
        return grown - other * logsigmoid(logit), slope, -slope
    if KIND == "sppo":
        win, lose = chosen - 0.5 / beta, rejected + 0.5 / beta
        return win * win + lose * lose, 2.0 * win, 2.0 * lose
    keep = xp.sigmoid(beta * chosen)
    if KIND == "apo_zero":
        drop = xp.sigmoid(beta * rejected)
        return 1.0 - keep + drop, -beta * keep * (1.0 - keep), beta * drop * (1.0 - drop)
    slope = beta * right * wrong  # apo_down
    return keep + wrong, beta * keep * (1.0 - keep) - slope, slope
