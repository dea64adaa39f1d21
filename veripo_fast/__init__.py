"""veripo-fast: the GRPO -> verifier -> DPO loop of VerIPO (arXiv 2505.19000) for Video-LLMs.

    import veripo_fast

    config = veripo_fast.load_config("run.yaml", ["--grpo.clip-high", "0.28"])
    veripo_fast.train(config)

Importing this package imports neither torch nor any GPU library: a name is loaded when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veripo_fast.config.load import load_config as load_config
    from veripo_fast.config.schema import Config as Config
    from veripo_fast.evaluation.command import evaluate_policy as evaluate
    from veripo_fast.model.policy import load_policy as load_policy
    from veripo_fast.trainer import train as train

__version__ = "0.1.0"
__all__ = ["Config", "evaluate", "load_config", "load_policy", "train"]

_HOME = {"Config": ("config.schema", "Config"), "evaluate": ("evaluation.command", "evaluate_policy"),
         "load_config": ("config.load", "load_config"), "load_policy": ("model.policy", "load_policy"),
         "train": ("trainer", "train")}
"""Public name -> the module that holds it, and its name there."""


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that this function knows

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'veripo_fast' has no attribute {name!r}")
        module, own_name = _HOME[name]
        return getattr(import_module(f"veripo_fast.{module}"), own_name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
