"""A frozen SigLIP model (arXiv 2303.15343): embeddings of frames and of texts in one space, for rewards.

Letters: T frames, N texts, E dimensions of the space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from veripo_kernels import resize_frames

from veripo_fast.errors import ConfigError
from veripo_fast.model.checkpoint_files import UNUSABLE, load_weights
from veripo_fast.run.weight_files import read_json

FRAMES_AT_ONCE = 32
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json")


def check_vision_text(folder: Path) -> None:
    """ConfigError unless a folder holds a SigLIP model with its tokenizer; weights are not looked at."""
    if not folder.is_dir():
        raise ConfigError(f"reward.vision_text {folder} is not a folder")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "siglip":
        raise ConfigError(f"reward.vision_text {folder} holds a model of type {kind}; take the folder of a SigLIP "
                          "model, such as siglip-so400m-patch14-384")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(f"reward.vision_text {folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")


class VisionText:
    """The model of a folder. Between uses its weights lie in host memory.

    Args:
        dtype: name of the weights' type. device: where it computes.

    Raises:
        ConfigError, CheckpointError: the folder does not hold a SigLIP model that can be loaded.
    """

    def __init__(self, folder: Path, dtype: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, SiglipModel

        check_vision_text(folder)
        self.device = device
        self.model: Any = load_weights(SiglipModel, folder, dtype).eval().requires_grad_(False)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except UNUSABLE as error:
            raise ConfigError(f"the tokenizer of reward.vision_text {folder} cannot be loaded: "
                              f"{str(error).strip() or type(error).__name__}") from error
        config = self.model.config
        self.positions, self.size = config.text_config.max_position_embeddings, config.vision_config.image_size
        settings = folder / "preprocessor_config.json"
        stored = read_json(settings) if settings.is_file() else {}
        self.mean, self.std = (torch.tensor(stored.get(name, [0.5] * 3)).view(3, 1, 1) for name in (
            "image_mean", "image_std"))

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it the model can be used."""
        self.model.to(self.device)
        try:
            yield
        finally:
            if self.device.type != "cpu":
                self.model.to("cpu")

    @torch.no_grad()
    def of_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Embeddings of length 1, float32 [T, E] on the CPU, of frames uint8 [T, 3, H, W], each seen as a picture."""
        return torch.cat([_unit(self.model.get_image_features(pixel_values=self.pixels(some).to(self.model.dtype)))
                          for some in frames.split(FRAMES_AT_ONCE)])

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """What the model sees of frames uint8 [T, 3, H, W]: float32 [T, 3, size, size] on its device, normalised."""
        resized = resize_frames(frames.contiguous(), self.size, self.size).to(self.device)
        return (resized.float() / 255 - self.mean.to(self.device)) / self.std.to(self.device)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings of length 1, float32 [N, E] on the CPU, of as much of each text as the model reads."""
        read = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.positions,
                              return_tensors="pt")
        return _unit(self.model.get_text_features(input_ids=read["input_ids"].to(self.device)))


def _unit(found: Any) -> torch.Tensor:
    """Of what transformers gives: a tensor, or from version 5 on an output that holds it."""
    return F.normalize(getattr(found, "pooler_output", found).float(), dim=-1).cpu()
