"""RL and preference losses for large vocabularies: Triton kernels, each beside the plain torch that defines it.

Usable alone, with any trainer: `from veripo_kernels import linear_policy_loss`. Needs torch and nothing else; with
Triton and a GPU the ops run as kernels, and `status()` says which implementation each uses and why. Never imports
veripo_fast.
"""

from veripo_kernels import reference
from veripo_kernels.advantages import group_advantages
from veripo_kernels.dispatch import status
from veripo_kernels.dpo import dpo_loss
from veripo_kernels.frames import frames_to_patches, planes_to_frames, planes_to_patches, resize_frames
from veripo_kernels.gather import gather_logprobs, gather_logprobs_fused
from veripo_kernels.grpo import grpo_loss
from veripo_kernels.linear import linear_logprobs
from veripo_kernels.linear_loss import linear_dpo_loss, linear_policy_loss
from veripo_kernels.options import PolicyLoss, PreferenceLoss

__all__ = ["PolicyLoss", "PreferenceLoss", "dpo_loss", "frames_to_patches", "gather_logprobs", "gather_logprobs_fused",
           "group_advantages", "grpo_loss", "linear_dpo_loss", "linear_logprobs", "linear_policy_loss",
           "planes_to_frames", "planes_to_patches", "reference", "resize_frames", "status"]
