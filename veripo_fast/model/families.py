"""What a family of `config/families.py` asks of a loaded model: options that it takes, layers that are fitted to it."""

from __future__ import annotations

import importlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from veripo_fast.config.families import FAMILIES, Family, names_with
from veripo_fast.config.inputs import ModelConfig
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.model.checkpoint_files import opened
from veripo_fast.model.delta_layers import serve_groups
from veripo_fast.model.replay import instead_of, routers_of, serve_replays
from veripo_fast.run.weight_files import weight_files

log = logging.getLogger(__name__)


def check_options(family: Family, config: ModelConfig) -> None:
    """Whether the options of `model` can be used with a family.

    Raises:
        ConfigError: one cannot, by name, with the families that can.
    """
    if config.router_balance and not family.router_class:
        raise ConfigError(f"model.router_balance weighs the load of experts, and {family.name} has none; "
                          f"{names_with('router_class')} have; set it to 0")


def check_expert_widths(folder: Path, family: Family, config: Any) -> None:
    """CheckpointError where transformers cannot tell how a file lays out the weights of experts.

    Where `transposed_experts`, it turns those whose shape does not fit. A square fits both ways.
    """
    if not family.transposed_experts:
        return
    text = config.get_text_config()
    if text.hidden_size in (text.moe_intermediate_size, 2 * text.moe_intermediate_size):
        raise CheckpointError(
            f"{folder} has experts as wide as its hidden states ({text.hidden_size}, moe_intermediate_size "
            f"{text.moe_intermediate_size}); transformers cannot tell whether the file holds such matrices transposed")


def fit(model: Any, family: Family, folder: Path, adapted: bool = False) -> None:
    """Let a loaded model run packed groups: recurrent layers start where prompts end, routers choose in float32.

    Args:
        adapted: whether adapters are all that is trained; what they cannot reach is said.
    """
    serve_groups(model, family)
    for router in routers_of(model, family).values():
        router.forward = partial(_choose_experts, router)
    serve_replays(model, family)
    if family.router_class and adapted:
        log.warning("model.lora leaves the experts of %s as they are: their matrices are no linear layers; attention, "
                    "and experts that all tokens share, get adapters", folder)
    if family.delta_class and _drafts(folder):
        log.warning("%s has layers that draft several tokens (mtp.*); they are not trained, and checkpoints of the run "
                    "leave them out", folder)


def _drafts(folder: Path) -> bool:
    """Whether a checkpoint has layers for multi-token prediction, which transformers leaves out."""
    for name in weight_files(folder):
        with opened(folder / name) as file:
            if any(key.startswith("mtp.") for key in file.keys()):  # noqa: SIM118 (no dict)
                return True
    return False


def _choose_experts(router: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits float32 [tokens, experts], and of the chosen ones weights and indices [tokens, top_k].

    Transformers' routers multiply in the dtype of the weights: in bfloat16 two experts that differ by less than a
    rounding step tie, and which one wins depends on how many tokens run together. What is replayed (model/replay.py) is
    weighed as if this router had chosen it.
    """
    logits = F.linear(hidden_states.reshape(-1, router.hidden_dim).float(), router.weight.float())
    probabilities = torch.softmax(logits, -1)
    weights, chosen = torch.topk(probabilities, router.top_k, dim=-1)
    if router.replayed is not None:
        chosen = instead_of(chosen, *router.replayed)
        weights = probabilities.gather(-1, chosen)
    weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(hidden_states.dtype), chosen


def balance_loss(model_config: Any, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The load-balancing loss of Switch Transformer (arXiv 2101.03961, equations 4 to 6), as transformers defines it.

    Args:
        router_logits: of each layer [tokens, experts].

    Returns:
        A scalar: 1 is an even load times the number of experts that a token takes.
    """
    text = model_config.get_text_config()
    module = importlib.import_module(FAMILIES[model_config.model_type].module)
    loss: torch.Tensor = module.load_balancing_loss_func(router_logits, text.num_experts, text.num_experts_per_tok)
    return loss
