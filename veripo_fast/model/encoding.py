"""Prompt -> token ids, M-RoPE positions and tower inputs, for the checkpoints of `config/families.py`.

Text goes through the checkpoint's own tokenizer and chat template; media through our sampling contract. Hugging Face
processors are the sibling (tests/model/test_encoding.py compares with them) but are not used: they need torchvision,
cannot say which frames they took, and time Qwen2.5-VL videos as 24 fps when no metadata is given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError

from veripo_fast.config.families import FAMILIES
from veripo_fast.config.inputs import VideoConfig
from veripo_fast.errors import CheckpointError, DataError
from veripo_fast.model.checkpoint_files import UNUSABLE, check_files
from veripo_fast.model.control_tokens import check_no_control_tokens, control_pattern
from veripo_fast.model.description import (
    check_family,
    check_token_ids,
    config_of,
    end_ids_of,
    tokenizer_of,
    vision_spec_of,
)
from veripo_fast.model.positions import GridSpan, TextSpan, grid_times, mrope_positions, seconds_per_grid
from veripo_fast.types import EncodedPrompt, Image, Media, MediaInputs, Message, Prompt, Video
from veripo_fast.video.buffers import room
from veripo_fast.video.decode import decode, decode_image
from veripo_fast.video.patches import fingerprint, patchify


class PromptEncoder:
    """Encodes prompts for one checkpoint folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_family(self.path)
        check_files(self.path)
        self.config = config_of(self.path)
        self.family = FAMILIES[self.config.model_type]
        self.tokenizer = tokenizer_of(self.path)
        check_token_ids(self.path, self.config, self.tokenizer)
        self.vision = vision_spec_of(self.path, self.config)
        self.pad_ids = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        self.pads: dict[str, str] = {
            kind: self.tokenizer.convert_ids_to_tokens(value) for kind, value in self.pad_ids.items()}
        self.eos_id: int = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.end_ids = end_ids_of(self.path, self.eos_id)
        """Tokens that end a completion: those of generation_config.json, and the end of turn."""
        media_ids = {*self.pad_ids.values(), self.config.vision_start_token_id, self.config.vision_end_token_id}
        rows = set(range(self.config.get_text_config().vocab_size))
        self.banned_ids = sorted(media_ids | (rows - set(self.tokenizer.get_vocab().values())))
        """Tokens that the policy may never write: they would be read as media, or the tokenizer does not know them."""

        self._control = control_pattern(self.tokenizer, {*media_ids, *self.end_ids})
        try:
            opened = self.chat_text(Prompt("", (Message("user", ("?",)),), "text", "")).rstrip().endswith("<think>")
        except DataError as error:
            raise CheckpointError(f"the chat template of {self.path} cannot ask a question: {error}") from error
        self.opens_think = opened
        """Whether the chat template itself writes `<think>` at the end of a prompt."""

    # -- text ---------------------------------------------------------------------------------------------------

    def chat_text(self, prompt: Prompt) -> str:
        """The prompt in the checkpoint's chat template, one unexpanded pad token per medium, ready to be answered.

        Raises:
            DataError: the template refuses the prompt, or the prompt spells a control token.
        """

        def part(value: str | Video | Image) -> dict[str, Any]:
            if isinstance(value, str):
                return {"type": "text", "text": value}
            return {"type": "video" if isinstance(value, Video) else "image"}

        check_no_control_tokens(prompt, self._control)
        messages = [{"role": m.role, "content": [part(p) for p in m.parts]} for m in prompt.messages]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, *UNUSABLE) as error:
            raise DataError(f"the chat template fails: {str(error) or type(error).__name__}") from error
        return text

    def encode(self, prompt: Prompt, media: MediaInputs | None) -> EncodedPrompt:
        """Token ids and positions; `media` None for a text-only prompt."""
        text = self.chat_text(prompt)
        spans: list[TextSpan | GridSpan] = []
        ids: list[int] = []
        pieces = re.split(self._placeholder(), text)
        found = len(pieces) - 1
        if found != (0 if media is None else len(media.kinds)):
            raise DataError(f"prompt {prompt.prompt_id!r} shows {found} media in the chat template "
                            f"but brings {0 if media is None else len(media.kinds)}")
        for index, before in enumerate(pieces[:-1]):
            assert media is not None
            self._append_medium(ids, spans, media, index, before)
        self._append_text(ids, spans, pieces[-1])
        positions, following = mrope_positions(spans)
        return EncodedPrompt(torch.tensor(ids), positions, following, media)

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion text, without the end of turn; a special token that it spells is plain text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def decode_completion(self, token_ids: list[int]) -> str:
        """Text of a completion, the token that ended it left out, be it one that the tokenizer calls special or not."""
        ended = len(token_ids) > 0 and token_ids[-1] in self.end_ids
        text: str = self.tokenizer.decode(token_ids[:-1] if ended else token_ids, skip_special_tokens=True)
        return text

    def _placeholder(self) -> str:
        start, end = self.tokenizer.convert_ids_to_tokens(
            [self.config.vision_start_token_id, self.config.vision_end_token_id])
        pads = "|".join(re.escape(pad) for pad in self.pads.values())
        return f"{re.escape(start)}(?:{pads}){re.escape(end)}"

    def _append_text(self, ids: list[int], spans: list[TextSpan | GridSpan], text: str) -> None:
        if text:
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            spans.append(TextSpan(len(tokens)))

    def _append_medium(self, ids: list[int], spans: list[TextSpan | GridSpan], media: MediaInputs, index: int,
                       before: str) -> None:
        """A medium and the text `before` it, which a tokenizer may merge with the first time stamp (` <`, `:<`)."""
        kind = media.kinds[index]
        grids, height, width = media.grid_thw[index].tolist()
        height, width = height // self.vision.merge_size, width // self.vision.merge_size
        seconds = media.grid_seconds[index]
        if kind == "image" or self.family.video_time == "positions":
            times = (0,) if kind == "image" else grid_times(
                grids, seconds_per_grid(seconds), self.config.vision_config.tokens_per_second)
            self._append_text(ids, spans, before)
            self._append_grid(ids, spans, GridSpan(times, height, width), kind)
            return
        for second in seconds:
            self._append_text(ids, spans, f"{before}<{second:.1f} seconds>")
            self._append_grid(ids, spans, GridSpan((0,), height, width), kind)
            before = ""

    def _append_grid(self, ids: list[int], spans: list[TextSpan | GridSpan], grid: GridSpan,
                     kind: Literal["image", "video"]) -> None:
        ids += [self.config.vision_start_token_id, *[self.pad_ids[kind]] * grid.length,
                self.config.vision_end_token_id]
        spans += [TextSpan(1), grid, TextSpan(1)]

    # -- media --------------------------------------------------------------------------------------------------

    def media_inputs(self, frames: list[tuple[Literal["image", "video"], torch.Tensor, torch.Tensor]], key: str,
                     dtype: torch.dtype = torch.float32) -> MediaInputs:
        """Tower inputs of decoded media.

        Args:
            frames: per medium its kind, uint8 [T, 3, H, W] pixels and float64 [T] seconds.
            key: content fingerprint.
            dtype: of the pixel values, float32 or bfloat16.
        """
        spec, grids, seconds, done = self.vision, [], [], 0
        values = room((spec.num_patches([images for _, images, _ in frames]), spec.features), dtype)
        for _, images, pts in frames:
            count = spec.num_patches([images])
            _, grid = patchify(images, spec.mean, spec.std, spec.patch_size, spec.merge_size, spec.temporal_patch_size,
                               out=values[done:done + count])
            done += count
            grids.append(grid)
            seconds.append(_grid_seconds(pts, spec.temporal_patch_size))
        return MediaInputs(values, torch.stack(grids), tuple(kind for kind, _, _ in frames), tuple(seconds), key)

    def load_media(self, prompt: Prompt, contract: VideoConfig) -> MediaInputs | None:
        """Decode every medium of the prompt under the sampling contract; None for a text-only prompt.

        Raises:
            MediaError: a file that cannot be decoded.
        """
        if not prompt.media:
            return None
        key = self.media_key(prompt, contract)  # before decoding: a file replaced meanwhile must not be kept as the new
        return self.media_inputs(decode_frames(prompt.media, contract, self.vision.factor), key)

    def tower_bytes_per_token(self, dtype: str) -> int:
        """Bytes of the tower's output per merged token, deepstack levels included; `dtype` is that of the weights."""
        vision = self.config.vision_config
        levels = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        return int(levels * vision.out_hidden_size * {"float32": 4, "bfloat16": 2}[dtype])

    def media_key(self, prompt: Prompt, contract: VideoConfig) -> str:
        """Fingerprint of all media of the prompt, their order, the contract and the patch geometry."""
        spec = self.vision
        return fingerprint(prompt.media, contract, family=self.config.model_type, patch_size=spec.patch_size,
                           merge_size=spec.merge_size, mean=spec.mean, std=spec.std)


def decode_frames(media: Sequence[Media], contract: VideoConfig, factor: int, device: str = "cuda"
                  ) -> list[tuple[Literal["image", "video"], torch.Tensor, torch.Tensor]]:
    """Kind, uint8 frames [T, 3, H, W] and their times in seconds, of every medium; sides are multiples of `factor`.

    `device` is the GPU that decodes where the contract names a GPU decoder.

    Raises:
        MediaError: a file that cannot be decoded.
    """
    frames: list[tuple[Literal["image", "video"], torch.Tensor, torch.Tensor]] = []
    for medium in media:
        if isinstance(medium, Video):
            decoded = decode(medium, contract, factor, device)
            frames.append(("video", decoded.pixels, decoded.pts_seconds))
        else:
            pixels = decode_image(medium, contract, factor)
            frames.append(("image", pixels, torch.zeros(len(pixels), dtype=torch.float64)))
    return frames


def _grid_seconds(pts: torch.Tensor, pair: int) -> tuple[float, ...]:
    """Mean time of each group of `pair` frames; an odd end repeats its last frame, as the patches do."""
    times = pts.double().tolist()
    times += [times[-1]] * (-len(times) % pair)
    return tuple(sum(times[i:i + pair]) / pair for i in range(0, len(times), pair))
