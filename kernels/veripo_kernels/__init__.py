"""RL and preference losses for large vocabularies: Triton kernels, each beside the plain torch that defines it.

Usable alone, with any trainer: `from veripo_kernels import linear_policy_loss`. Needs torch and nothing else; with
Triton and a GPU the ops run as kernels, and `status()` says which implementation each uses and why. Never imports
veripo_fast. Importing the package imports no torch: a name is loaded when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veripo_kernels import reference as reference
    from veripo_kernels.advantages import group_advantages as group_advantages
    from veripo_kernels.dispatch import status as status
    from veripo_kernels.dpo import dpo_loss as dpo_loss
    from veripo_kernels.frames import frames_to_patches as frames_to_patches
    from veripo_kernels.frames import planes_to_frames as planes_to_frames
    from veripo_kernels.frames import planes_to_patches as planes_to_patches
    from veripo_kernels.frames import resize_frames as resize_frames
    from veripo_kernels.gather import gather_logprobs as gather_logprobs
    from veripo_kernels.gather import gather_logprobs_fused as gather_logprobs_fused
    from veripo_kernels.grpo import grpo_loss as grpo_loss
    from veripo_kernels.linear import linear_logprobs as linear_logprobs
    from veripo_kernels.linear_loss import linear_dpo_loss as linear_dpo_loss
    from veripo_kernels.linear_loss import linear_policy_loss as linear_policy_loss
    from veripo_kernels.options import PolicyLoss as PolicyLoss
    from veripo_kernels.options import PreferenceLoss as PreferenceLoss
    from veripo_kernels.slices import copy_slices as copy_slices

_HOME = {"PolicyLoss": "options", "PreferenceLoss": "options", "copy_slices": "slices", "dpo_loss": "dpo",
         "frames_to_patches": "frames", "gather_logprobs": "gather", "gather_logprobs_fused": "gather",
         "group_advantages": "advantages", "grpo_loss": "grpo", "linear_dpo_loss": "linear_loss",
         "linear_logprobs": "linear", "linear_policy_loss": "linear_loss", "planes_to_frames": "frames",
         "planes_to_patches": "frames", "resize_frames": "frames", "status": "dispatch"}
"""Public name -> the module that holds it."""

__all__ = [*_HOME, "reference"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that this function knows

    def __getattr__(name: str) -> Any:
        if name == "reference":
            return import_module("veripo_kernels.reference")
        if name not in _HOME:
            raise AttributeError(f"module 'veripo_kernels' has no attribute {name!r}")
        value = getattr(import_module(f"veripo_kernels.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
