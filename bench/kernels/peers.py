"""Every way of computing an op that the kernel benches know: ours, plain torch, and the libraries that offer it.

A peer takes a problem of `cases.py` and gives the tensors it is compared by. What it needs is imported when it runs,
so that a library that is not installed is only named as missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from veripo_kernels import (
    PolicyLoss,
    dpo_loss,
    gather_logprobs,
    grpo_loss,
    linear_logprobs,
    linear_policy_loss,
    reference,
)

import veripo_fast
from bench import recipe
from bench.kernels.cases import Logits, Problem, Rollouts

Result = dict[str, torch.Tensor]
LogprobsOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [T, D], head [V, D], token_ids [T]) -> log-probs [T] with gradient."""

NAIVE = "naive torch"
OURS = "veripo"
_IGNORE = -100


_MODULES = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "quack-kernels": "quack",
            "veripo-fast": "veripo_kernels"}
"""What a distribution is imported as, where that is another name."""


@dataclass(frozen=True)
class Peer:
    """A way of computing an op, and the distribution whose version it stands for."""

    run: Callable[[Any], Result]
    package: str = "torch"
    needs_cuda: bool = False
    torch_function: str | None = None
    """A function of torch.nn.functional that older releases lack."""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None when it can."""
        if importlib.util.find_spec(_MODULES.get(self.package, self.package)) is None:
            return f"{self.package} is not installed"
        if self.torch_function and not hasattr(F, self.torch_function):
            return f"torch {torch.__version__} has no {self.torch_function}"
        return "needs a GPU" if self.needs_cuda and device.type != "cuda" else None

    def version(self) -> str:
        ours = self.package == "veripo-fast"
        return f"{self.package} {veripo_fast.__version__ if ours else recipe.version_of(self.package)}"


# -- hidden states and head to log-probs -----------------------------------------------------------------------------

def naive_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """What everybody writes first: all logits, in the type of the inputs, their softmax in float32."""
    return _chosen(F.linear(hidden, head), token_ids)


def _chosen(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


def torch_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, head, token_ids, reduction="none", options=options)


def trl_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """As TRL's trainers call it: 32,768 rows of the head at once, no entropy."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, head, None, token_ids, 1.0, 32768, None, 1.0, ())[0]


def liger_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Its Hopper kernel where there is one; elsewhere, as on a CPU, its own fallback of 512 tokens at a time."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, head, token_ids)


def cce_logprobs(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Its kernel on a GPU, its compiled torch on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden, head, token_ids, reduction="none", impl=impl)


def _gradients(case: Problem, value: torch.Tensor, leaves: tuple[torch.Tensor, torch.Tensor],
               upstream: torch.Tensor | None = None) -> Result:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return dict(zip(("dhidden", "dhead"), torch.autograd.grad(value, wanted, upstream), strict=False))


def logprobs_step(logprobs_of: LogprobsOf, case: Problem) -> Result:
    """Log-probs forward and backward under an arbitrary upstream gradient."""
    leaves = case.leaves()
    logprobs = logprobs_of(*leaves, case.token_ids)
    return {"logprobs": logprobs.detach(), **_gradients(case, logprobs, leaves, case.slopes.to(logprobs.dtype))}


# -- hidden states and head to a loss --------------------------------------------------------------------------------

def our_policy_loss(case: Problem, impl: str = "auto") -> Result:
    leaves = case.leaves()
    loss, _, logprobs = linear_policy_loss(*leaves, case.token_ids, case.old_logprobs, case.advantages, case.cu_seqlens,
                                           advantages_per="sequence", workspace_bytes=case.workspace_bytes,
                                           impl=impl)  # type: ignore[arg-type]
    return {"loss": loss.detach(), "logprobs": logprobs, **_gradients(case, loss, leaves)}


def eager_policy_loss(logprobs_of: LogprobsOf, case: Problem) -> Result:
    """A library's log-probs, then the definition of the loss in plain torch."""
    leaves = case.leaves()
    logprobs = logprobs_of(*leaves, case.token_ids)
    loss, _ = reference.grpo_loss(logprobs, case.old_logprobs, case.advantages, case.cu_seqlens,
                                  advantages_per="sequence")
    return {"loss": loss.detach(), "logprobs": logprobs.detach(), **_gradients(case, loss, leaves)}


def liger_policy_loss(case: Problem) -> Result:
    """Its chunked GRPO; completions of one length need no padding. Compiled on a GPU, as by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    leaves, sequences = case.leaves(), len(case.advantages)
    if len(case.hidden) % sequences:
        raise ValueError(f"chunked GRPO takes completions of one length, {len(case.hidden)} tokens are not "
                         f"{sequences} of them")
    loss_of = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="grpo", use_ref_model=False, compiled=case.hidden.is_cuda)
    ids = case.token_ids.view(sequences, -1)
    loss, _ = loss_of(leaves[0].view(*ids.shape, -1), leaves[1], ids, torch.ones_like(ids), case.advantages,
                      old_per_token_logps=case.old_logprobs.view(sequences, -1))
    return {"loss": loss.detach(), **_gradients(case, loss, leaves)}


# -- mean cross entropy, which peers with a scalar result can do too -------------------------------------------------

def our_nll(case: Problem) -> Result:
    """`linear_policy_loss` with advantages of 1 and no ratio has the gradient of the mean negative log-prob."""
    leaves = case.leaves()
    loss, _, logprobs = linear_policy_loss(
        *leaves, case.token_ids, None, torch.ones_like(case.advantages), case.cu_seqlens, loss=PolicyLoss("bnpo"),
        advantages_per="sequence", workspace_bytes=case.workspace_bytes)
    return {"nll": -logprobs.mean(), **_gradients(case, loss, leaves)}


def scalar_nll(nll_of: LogprobsOf, case: Problem) -> Result:
    leaves = case.leaves()
    nll = nll_of(*leaves, case.token_ids)
    return {"nll": nll.detach(), **_gradients(case, nll, leaves)}


def naive_nll(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return -naive_logprobs(hidden, head, token_ids).mean()


def torch_nll(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return F.linear_cross_entropy(hidden, head, token_ids, options=torch.nn.LinearCrossEntropyOptions())


def liger_nll(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(head, hidden, token_ids)


def cce_nll(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, head, token_ids, impl="cce" if hidden.is_cuda else "torch_compile")


def quack_nll(hidden: torch.Tensor, head: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, head, token_ids, ignore_index=_IGNORE, reduction="mean")


# -- logits in memory ------------------------------------------------------------------------------------------------

def gather_step(logprobs_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], case: Logits, *, backward: bool
                ) -> Result:
    """Log-probs of logits, without gradient or forward and backward."""
    if not backward:
        with torch.no_grad():
            return {"logprobs": logprobs_of(case.logits, case.token_ids)}
    leaf = case.logits.detach().requires_grad_()
    logprobs = logprobs_of(leaf, case.token_ids)
    dlogits, = torch.autograd.grad(logprobs, leaf, case.slopes.to(logprobs.dtype))
    return {"logprobs": logprobs.detach(), "dlogits": dlogits}


def torch_gather(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), token_ids, reduction="none")


def trl_gather(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """What its trainers call: a Triton kernel on a GPU, torch on a CPU."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, token_ids)


# -- losses of given log-probs ---------------------------------------------------------------------------------------

def grpo_step(loss_of: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]], case: Rollouts) -> Result:
    return _loss_step(loss_of, case, (case.old_logprobs, case.advantages))


def dpo_step(loss_of: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]], case: Rollouts) -> Result:
    return _loss_step(loss_of, case, (case.ref_logprobs,))


def _loss_step(loss_of: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]], case: Rollouts,
               given: tuple[torch.Tensor, ...]) -> Result:
    leaf = case.policy_logprobs.detach().requires_grad_()
    loss, _ = loss_of(leaf, *given, case.cu_seqlens)
    return {"loss": loss.detach(), "dlogprobs": torch.autograd.grad(loss, leaf)[0]}


def _linear(step: Callable[[LogprobsOf, Problem], Result]) -> dict[str, Peer]:
    return {"torch linear_cross_entropy": Peer(partial(step, torch_logprobs), torch_function="linear_cross_entropy"),
            "TRL chunked log-probs": Peer(partial(step, trl_logprobs), "trl"),
            "Liger scaled cross entropy": Peer(partial(step, liger_logprobs), "liger-kernel"),
            "cut-cross-entropy": Peer(partial(step, cce_logprobs), "cut-cross-entropy")}


def _gather(backward: bool) -> dict[str, Peer]:
    step = partial(gather_step, backward=backward)
    return {OURS: Peer(partial(step, gather_logprobs), "veripo-fast"), NAIVE: Peer(partial(step, _chosen)),
            "torch cross_entropy": Peer(partial(step, torch_gather)),
            "TRL selective_log_softmax": Peer(partial(step, trl_gather), "trl")}


PEERS: dict[str, dict[str, Peer]] = {
    "linear_logprobs": {OURS: Peer(partial(logprobs_step, linear_logprobs), "veripo-fast"),
                        NAIVE: Peer(partial(logprobs_step, naive_logprobs)), **_linear(logprobs_step)},
    "linear_policy_loss": {OURS: Peer(our_policy_loss, "veripo-fast"),
                           NAIVE: Peer(partial(eager_policy_loss, naive_logprobs)), **_linear(eager_policy_loss),
                           "Liger chunked GRPO": Peer(liger_policy_loss, "liger-kernel")},
    "linear_nll": {OURS: Peer(our_nll, "veripo-fast"), NAIVE: Peer(partial(scalar_nll, naive_nll)),
                   "torch linear_cross_entropy": Peer(partial(scalar_nll, torch_nll),
                                                  torch_function="linear_cross_entropy"),
                   "Liger fused linear": Peer(partial(scalar_nll, liger_nll), "liger-kernel", needs_cuda=True),
                   "cut-cross-entropy": Peer(partial(scalar_nll, cce_nll), "cut-cross-entropy"),
                   "QuACK": Peer(partial(scalar_nll, quack_nll), "quack-kernels", needs_cuda=True)},
    "gather_logprobs": _gather(backward=False),
    "gather_logprobs_backward": _gather(backward=True),
    "grpo_loss": {OURS: Peer(partial(grpo_step, grpo_loss), "veripo-fast"),
                  NAIVE: Peer(partial(grpo_step, reference.grpo_loss))},
    "dpo_loss": {OURS: Peer(partial(dpo_step, dpo_loss), "veripo-fast"),
                 NAIVE: Peer(partial(dpo_step, reference.dpo_loss))},
}
"""Peers of each op by name; the first is ours, the second the baseline of the others."""
