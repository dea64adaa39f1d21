"""Low-rank adapters in a policy: peft's layers in place of linear ones, in the model as transformers has made it.

The weights stay as they are, and the adapters alone are trained, saved and resumed. Nothing is merged while a run
trains: the torch engine samples through the adapters, and an engine of its own weights gets merged copies. The head is
no module call in the fused loss, so its effective weight is made there (`head_weight`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from veripo_fast.config.lora import PARTS, LoraConfig
from veripo_fast.errors import CheckpointError, ConfigError
from veripo_fast.model.adapter_files import BASE, CONFIG, NAME, OUTSIDE, WEIGHTS, check_base, file_name, read_weights
from veripo_fast.run.inputs import base_fingerprints
from veripo_fast.run.seeds import derive_seed
from veripo_fast.run.weight_files import read_json

_LANGUAGE = re.compile(r"model\.language_model\.layers\.\d+\.(?:\w+\.)*(\w+)")
_MERGER = re.compile(r"model\.visual\.(?:merger|deepstack_merger_list\.\d+)\..+")


class Adapters:
    """The adapters of one model.

    Args:
        model: transformers' model; gets peft's layers in place. base: folder of its weights.
        seed: of the matrices A; B is 0, so that new adapters change nothing.

    Raises:
        ConfigError: peft is missing, or a target matches nothing.
    """

    def __init__(self, model: Any, config: LoraConfig, base: Path, seed: int = 0) -> None:
        peft = _import()
        self.config, self.base = config, base
        names = target_names(model, config)
        made = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
                               target_modules=names, base_model_name_or_path=str(base.resolve()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "lora"))
            peft.inject_adapter_in_model(made, model, adapter_name=NAME)
        self.described = made
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        for layer in self.layers.values():
            if config.dropout:
                layer.lora_dropout[NAME] = _Dropout(config.dropout)
        self._drawn = 0
        self._step: tuple[int, int] = (0, 0)
        self.freeze_the_rest(model)

    def freeze_the_rest(self, model: torch.nn.Module) -> None:
        """Nothing but adapters gets a gradient."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Name in the model and parameter of each matrix, A [rank, in] and B [out, rank]."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_A.{NAME}.weight", layer.lora_A[NAME].weight
            yield f"{name}.lora_B.{NAME}.weight", layer.lora_B[NAME].weight

    # -- dropout ------------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, rank: int) -> None:
        """What is dropped follows from the step, the rank and the number of the pass, so a resumed run drops the
        same."""
        self._step, self._drawn = (step, rank), 0

    @contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """A block around a pass: dropout draws numbers of its own."""
        if not self.config.dropout or not torch.is_grad_enabled():
            yield
            return
        seed = derive_seed("lora dropout", *self._step, self._drawn)
        self._drawn += 1
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    # -- the reference ------------------------------------------------------------------------------------------------

    @contextmanager
    def off(self) -> Iterator[None]:
        """A block in which the model is its base."""
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False

    # -- merged weights -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge_into(self, merged: Mapping[str, torch.Tensor]) -> None:
        """Write W + alpha / rank * B A into tensors that `merged_parameters` made; summed in float32."""
        for name, layer in self.layers.items():
            target = merged[f"{name}.weight"]
            weight, a, b = (part.float() for part in (layer.base_layer.weight, layer.lora_A[NAME].weight,
                                                      layer.lora_B[NAME].weight))
            target.copy_(torch.addmm(weight, b, a, alpha=layer.scaling[NAME]))

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write an adapter folder.

        Args:
            weights: by name in the model, whole; None: the model's own.
        """
        from safetensors.torch import save_file

        own = weights if weights is not None else dict(self.parameters())
        self.described.save_pretrained(folder)
        save_file({file_name(name): own[name].detach().contiguous() for name, _ in self.parameters()},
                  folder / WEIGHTS, metadata={"format": "pt"})
        text = {"path": str(self.base.resolve()), "files": base_fingerprints(self.base)}
        (folder / BASE).write_text(json.dumps(text, indent=1) + "\n")

    def load(self, folder: Path) -> None:
        """Take the adapters of a folder, of a model that is whole.

        Raises:
            CheckpointError: as `check`.
        """
        tensors = self.check(folder)
        with torch.no_grad():
            for name, parameter in self.parameters():
                parameter.copy_(tensors[file_name(name)])

    def check(self, folder: Path) -> dict[str, torch.Tensor]:
        """The matrices of an adapter folder, by their names there, if they are of these layers.

        Raises:
            CheckpointError: it holds none, or those of another base, rank, alpha or other targets.
        """
        check_base(folder, self.base)
        stored = read_json(folder / CONFIG)
        for ours, theirs, value in (("rank", "r", self.config.rank), ("alpha", "lora_alpha", self.config.alpha)):
            if stored.get(theirs) != value:
                raise CheckpointError(f"the adapters in {folder} have {ours} {stored.get(theirs)}, and model.lora."
                                      f"{ours} is {value}; set it to {stored.get(theirs)}")
        tensors, shapes = read_weights(folder), self._shapes()
        for name in sorted(tensors.keys() ^ shapes.keys()):
            where = "model.lora.targets does not name it" if name in tensors else "model.lora.targets names it"
            there = "has" if name in tensors else "lacks"
            raise CheckpointError(f"the adapters in {folder} are of other layers: the file {there} "
                                  f"{name.removeprefix(OUTSIDE)}, and {where}")
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise CheckpointError(f"the adapters in {folder} are of another base: {name} has shape "
                                      f"{tuple(tensors[name].shape)}, not {shape}")
        return tensors

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Of each matrix, by its name in a file; known also while ranks hold parts of it."""
        shapes = {}
        for name, layer in self.layers.items():
            for kind, shape in (("A", (self.config.rank, layer.in_features)), ("B", (layer.out_features,
                                                                                      self.config.rank))):
                shapes[file_name(f"{name}.lora_{kind}.{NAME}.weight")] = shape
        return shapes


class _Dropout(torch.nn.Module):
    """Drops in passes with a gradient, whatever mode the model is in: a recomputed pass of gradient checkpointing too,
    and no pass that samples or compares."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(inputs, self.share, training=torch.is_grad_enabled())


def target_names(model: Any, config: LoraConfig) -> list[str]:
    """Names of the linear layers that get adapters.

    Raises:
        ConfigError: a target matches nothing, or is a head that is the embedding.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = {name: match[1] for name in linear if (match := _LANGUAGE.fullmatch(name))}
    found: list[str] = []
    for target in config.targets:
        if target == "language":
            own = list(layers)
        elif target == "merger":
            own = [name for name in linear if _MERGER.fullmatch(name)]
        elif target == "head":
            own = ["lm_head"]
            if model.lm_head.weight is model.get_input_embeddings().weight:
                raise ConfigError("model.lora.targets has head, and the head of this model is its embedding "
                                  "(tie_word_embeddings), which adapters would part from it; leave head out")
        else:
            own = [name for name, last in layers.items() if last == target]
        if not own:
            known = ", ".join(sorted(set(layers.values())))
            raise ConfigError(f"model.lora.targets has {target}, which matches no linear layer of this model; there "
                              f"are {', '.join(PARTS)}, {known}")
        found += [name for name in own if name not in found]
    return found


def head_weight(head: Any) -> torch.Tensor:
    """[V, D]: the weight that a head multiplies with, with its adapters where it has any."""
    base = getattr(head, "base_layer", None)
    if base is None:
        weight: torch.Tensor = head.weight
        return weight
    if head.disable_adapters:
        whole: torch.Tensor = base.weight
        return whole
    return torch.addmm(base.weight, head.lora_B[NAME].weight, head.lora_A[NAME].weight, alpha=head.scaling[NAME])


def is_adapter(name: str) -> bool:
    """Whether a parameter of the model is a matrix of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """The name of a weight in the checkpoint of its base: peft puts what it wraps one level lower."""
    return name.replace(".base_layer.", ".")


def _import() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.lora.rank is set, and peft is not installed ({error}); "
                          "pip install 'veripo-fast[lora]'") from error
    return peft
