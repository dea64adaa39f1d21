"""TRL's GRPOTrainer and DPOTrainer with these losses, by overriding methods on a subclass; written against TRL 1.16.

    from trl import GRPOConfig, GRPOTrainer
    from veripo_kernels.integrations.trl import use_veripo_losses
    trainer_class = use_veripo_losses(GRPOTrainer)  # or DPOTrainer, or a subclass of either
    trainer = trainer_class(model, reward_funcs, GRPOConfig("run"), train_dataset)
    trainer.train()

Log-probs come from `linear_logprobs`, losses from `grpo_loss` and `dpo_loss` on packed lengths. TRL's options keep
their meaning. Three values, which turn a loss upside down, raise ValueError at construction: a bound of the ratio below
0 (epsilon, epsilon_high, delta), DPO's beta below 0, and label_smoothing outside [0, 0.5). Metrics are TRL's, but for
DPO's mean_token_accuracy (it needs an argmax over the vocabulary) and, under a softcap, its logits/*: not logged.
"""

from __future__ import annotations

import inspect
import warnings

try:
    import trl
    from packaging.version import Version
    from trl import DPOTrainer, GRPOTrainer
except ImportError as error:
    raise ImportError("veripo_kernels.integrations.trl needs TRL 1.16 or later: pip install 'trl>=1.16'") from error

if Version(trl.__version__) < Version("1.16"):
    raise ImportError(f"veripo_kernels.integrations.trl needs TRL 1.16 or later, found {trl.__version__}: "
                      "pip install 'trl>=1.16'")
if Version(trl.__version__) >= Version("1.17"):
    warnings.warn(f"veripo_kernels.integrations.trl was written against TRL 1.16 and knows no newer options; found "
                  f"{trl.__version__}", stacklevel=2)

from veripo_kernels.integrations.trl_dpo import VeripoDPOTrainer
from veripo_kernels.integrations.trl_grpo import VeripoGRPOTrainer

__all__ = ["VeripoDPOTrainer", "VeripoGRPOTrainer", "use_veripo_losses"]


def use_veripo_losses(trainer_class: type) -> type:
    """A subclass of a TRL trainer class that computes log-probs and losses with this package.

    Args:
        trainer_class: GRPOTrainer, DPOTrainer or a subclass, whose methods stay in front: its super() reaches these.

    Raises:
        TypeError: another class. ValueError: a subclass whose `_compute_loss` never calls super().
    """
    for base, ours in ((GRPOTrainer, VeripoGRPOTrainer), (DPOTrainer, VeripoDPOTrainer)):
        if issubclass(trainer_class, ours):
            return trainer_class
        if trainer_class is base:
            return ours
        if issubclass(trainer_class, base):
            _check_overrides(trainer_class, base)
            return type(f"Veripo{trainer_class.__name__}", (trainer_class, ours),
                        {"__module__": trainer_class.__module__})
    raise TypeError(f"trainer_class must be GRPOTrainer, DPOTrainer or a subclass, got {trainer_class.__name__}")


def _check_overrides(trainer_class: type, base: type) -> None:
    for owner in trainer_class.__mro__[:trainer_class.__mro__.index(base)]:
        method = vars(owner).get("_compute_loss")
        if method is not None and "__class__" not in inspect.unwrap(method).__code__.co_freevars:  # what super() reads
            raise ValueError(f"{owner.__name__}._compute_loss replaces TRL's loss without super(): it would run "
                             "instead of these losses")
