"""TRL's side of the step bench, served by bench/video/worker.py: its GRPOTrainer and DPOTrainer on the same inputs.

TRL trains on images, not on videos: its collator reads none, and its log-prob passes hand none to the model. What is
changed so that a step can run, and so that it is not slower than on a GPU:

- The patches of a video travel in TRL's fields for images, which it cuts and joins batch by batch, and a hook in front
  of the model gives them their names (`pixel_values_videos`, `video_grid_thw`). `generate` gets them by these names.
- `_tokenize_prompts` hands out token ids and patches made before, instead of running the processor once per completion.
  The ids come from Hugging Face's own code for the place-holders of a video, not from ours.
- DPO gets a collator of its own, which TRL offers, and rows that are numbers, which are not tokenized
  (`_prepare_dataset`). The reference runs inside the step, as TRL does it.
- Without a Triton device TRL runs its head at every position of the prompt (`compact = _use_triton(...)`). Cases with
  peer_head `completion` answer that question as a GPU does; the head is then computed by TRL's own torch code.
- Media and end tokens are never written (`suppress_tokens`, `min_new_tokens`), so all completions are equally long.

A step is TRL's own `train()` with one optimizer step, from `on_step_begin` to `on_step_end`; making the trainer and its
loaders is not timed. There is no old-log-prob pass: TRL needs none where a rollout is used for one update. The tower is
frozen. Of veripo nothing is imported but the reading of /proc (bench/step/phases.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

import torch
import trl.trainer.utils
from datasets import Dataset
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from bench.step.cases import Case
from bench.step.phases import Phases
from bench.video.worker import Answer, serve

FPS = 8
"""Of the clips; Hugging Face computes the times of frames from their numbers."""


class Inputs:
    """What ours.py shares, as TRL's methods want it; prompts are known by their number."""

    def __init__(self, folder: Path, case: Case) -> None:
        shared = torch.load(folder / "shared.pt")
        self.case = case
        self.completions, self.banned, self.advantages = (
            shared[name] for name in ("completions", "banned", "advantages"))
        self.media = [(item["pixel_values"], item["grid_thw"]) for item in shared["prompts"]]
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
        self.model = loaded_model(folder)
        self.ids = [token_ids(self.tokenizer, self.model.config, item) for item in shared["prompts"]]

    def of_rows(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and grids of prompts, again for each time that one is named."""
        pixels, grids = zip(*(self.media[number] for number in numbers), strict=True)
        return torch.cat(pixels), torch.cat(grids)

    def types(self, ids: torch.Tensor) -> torch.Tensor:
        """2 where a token stands for a patch of a video, else 0, as Hugging Face's processor says it."""
        return (ids == self.model.config.video_token_id).long() * 2


def loaded_model(folder: Path) -> Any:
    """The checkpoint in float32 with a frozen tower."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    model.register_forward_pre_hook(_as_videos, with_kwargs=True)
    return model


def _as_videos(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    names = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
    return args, {names.get(name, name): value for name, value in kwargs.items()}


def token_ids(tokenizer: Any, config: Any, item: dict[str, Any]) -> list[int]:
    """Ids of a prompt by Hugging Face's chat template and place-holders.

    Qwen3-VL was trained on stamped frames in place of <|vision_start|><|video_pad|><|vision_end|>. Since 5.10
    transformers leaves the outer pair around them (vllm-project/vllm#46817), so all three are replaced here.
    """
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": item["question"]}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pair = config.vision_config.temporal_patch_size
    start, end = tokenizer.convert_ids_to_tokens([config.vision_start_token_id, config.vision_end_token_id])
    pad = tokenizer.convert_ids_to_tokens(config.video_token_id)
    # the processor itself needs torchvision; its text needs these
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=config.vision_config.spatial_merge_size, temporal_patch_size=pair),
        vision_start_token=start, vision_end_token=end, video_token=pad)
    processor._calculate_timestamps = lambda *args: Qwen3VLProcessor._calculate_timestamps(processor, *args)
    # of the two frames behind a place-holder the time in the middle is written, so both may have it
    metadata = SimpleNamespace(fps=2 * FPS, frames_indices=[
        round(2 * FPS * seconds) for seconds in item["grid_seconds"] for _ in range(pair)])
    video = Qwen3VLProcessor.replace_video_token(
        processor, {"video_grid_thw": item["grid_thw"], "video_metadata": [metadata]}, 0)
    return tokenizer(text.replace(f"{start}{pad}{end}", video), add_special_tokens=False)["input_ids"]


# -- trainers --------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Times a step between TRL's own callbacks."""

    def __init__(self) -> None:
        self.phases = Phases()
        self.tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phases = Phases()
        self.phases.switch("training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phases.switch(None)


class VideoGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose prompts are numbers of videos; see the top of the file."""

    def __init__(self, inputs: Inputs, clock: Clock, **options: Any) -> None:
        self.inputs, self.clock = inputs, clock
        super().__init__(**options)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        numbers = [int(prompt) for prompt in prompts]
        pixels, grids = self.inputs.of_rows(numbers)
        ids = [self.inputs.ids[number] for number in numbers]
        return ids, None, {"pixel_values_videos": pixels, "video_grid_thw": grids,
                           "mm_token_type_ids": [self.inputs.types(torch.tensor(row)).tolist() for row in ids]}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.clock.phases.switch("rollout")
        output = super()._generate_and_score_completions(inputs)
        output |= self.videos([int(row["prompt"]) for row in inputs], output)
        self.clock.tokens += int(output["completion_mask"].sum())
        self.clock.phases.switch("training")
        return output

    def videos(self, numbers: Sequence[int], output: dict[str, Any]) -> dict[str, Any]:
        """What TRL's log-prob passes take of images, with a video for each row."""
        pixels, grids = self.inputs.of_rows(numbers)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        return {"pixel_values": pixels, "image_grid_thw": grids, "num_images": [1] * len(numbers),
                "mm_token_type_ids": self.inputs.types(ids)}

    def batch(self, number: int) -> dict[str, Any]:
        """A prompt with the shared completions and advantages, as `_generate_and_score_completions` gives them."""
        completions = torch.tensor(self.inputs.completions[number])
        prompts = torch.tensor(self.inputs.ids[number]).expand(len(completions), -1)
        output = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": completions,
                  "completion_mask": torch.ones_like(completions), "advantages": self.inputs.advantages,
                  "num_items_in_batch": torch.tensor(completions.numel())}
        return output | self.videos([number] * len(completions), output)

    def logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of the completion tokens of a batch, [rows, R]."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        extra = {name: batch[name] for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
        found, _, _ = self._get_per_token_logps_and_entropies(
            self.model, ids, torch.ones_like(ids), batch["completion_ids"].shape[1], **extra)
        return found


class VideoDPOTrainer(DPOTrainer):
    """DPOTrainer that tells the reference's passes apart from those that train."""

    def __init__(self, inputs: Inputs, clock: Clock, **options: Any) -> None:
        self.inputs, self.clock = inputs, clock
        super().__init__(data_collator=self.collated, **options)
        self.ref_model.register_forward_pre_hook(lambda *_: clock.phases.switch("reference"))
        self.ref_model.register_forward_hook(lambda *_: clock.phases.switch("training"))

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def collated(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The rows (chosen, chosen, ..., rejected, rejected, ...) of pairs by number."""
        numbers = [example["prompt_ids"][0] for example in examples]
        pixels, grids = self.inputs.of_rows(numbers * 2)
        completions = torch.tensor([self.inputs.completions[number][side] for side in (0, 1) for number in numbers])
        prompts = torch.tensor([self.inputs.ids[number] for number in numbers * 2])
        ids = torch.cat([prompts, completions], 1)
        mask = torch.cat([torch.zeros_like(prompts), torch.ones_like(completions)], 1)
        self.clock.tokens += completions.numel()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask,
                "pixel_values_videos": pixels, "video_grid_thw": grids, "mm_token_type_ids": self.inputs.types(ids)}

    def batch(self, number: int) -> dict[str, Any]:
        """One pair."""
        return self.collated([{"prompt_ids": [number]}])

    def logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of the completion tokens of a pair, [2, R]."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
        found = self.model(**inputs, use_cache=False, labels=labels, fused_lm_head=True).log_probs
        return found[:, -int(batch["completion_mask"].sum(1)[0]):]


def trainer_of(inputs: Inputs, folder: Path, clock: Clock) -> VideoGRPOTrainer | VideoDPOTrainer:
    """The trainer of a case, with the options that make its step ours: AdamW, clipping at 1, float32."""
    case = inputs.case
    options = {
        "output_dir": mkdtemp(dir=folder), "gradient_accumulation_steps": case.rows // case.peer_batch, "max_steps": 1,
        "learning_rate": 1e-6, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False}
    numbers = [str(number) for number in range(case.prompts)]
    common = {"inputs": inputs, "clock": clock, "model": inputs.model, "processing_class": inputs.tokenizer,
              "callbacks": [clock]}
    if case.kind == "dpo":
        rows = Dataset.from_list([{"prompt_ids": [number], "chosen_ids": [], "rejected_ids": []}
                                  for number in range(case.prompts)])
        return VideoDPOTrainer(**common, ref_model=loaded_model(folder), train_dataset=rows, args=DPOConfig(
            per_device_train_batch_size=case.peer_batch // 2, beta=0.1, max_length=None, **options))
    return VideoGRPOTrainer(
        **common, train_dataset=Dataset.from_dict({"prompt": numbers}), reward_funcs=[half_rewards],
        args=GRPOConfig(
            per_device_train_batch_size=case.peer_batch, num_generations=case.group, temperature=1.0, beta=0.0,
            max_completion_length=case.completion, loss_type="grpo", shuffle_dataset=False,
            generation_kwargs={"suppress_tokens": inputs.banned, "min_new_tokens": case.completion}, **options))


def half_rewards(prompts: Sequence[str], **_: Any) -> list[float]:
    """1 for the first half of each group, 0 for the other."""
    group = len(prompts) // len(set(prompts))
    return [float(number % group < group // 2) for number in range(len(prompts))]


# -- tasks -----------------------------------------------------------------------------------------------------------

_side: dict[str, Any] = {}


def start(folder: str, case: dict[str, Any]) -> Answer:
    """Load the checkpoint of a folder and what ours.py has written there; answers the ids of the prompts."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    wanted = Case.of(case)
    if wanted.peer_head == "completion":
        trl.trainer.utils._use_triton = lambda device: True
    clock = Clock()
    inputs = Inputs(Path(folder), wanted)
    _side.update(folder=Path(folder), clock=clock, trainer=trainer_of(inputs, Path(folder), clock))
    return {"ids": inputs.ids}


def check() -> Answer:
    """Log-probs and gradients of the first prompt with the shared completions, to peer.pt."""
    trainer = _side["trainer"]
    trainer.current_gradient_accumulation_steps = 1  # which its training loop sets
    trainer.model.train()
    batch = trainer.batch(0)
    with torch.no_grad():
        logprobs = trainer.logprobs(batch)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    torch.save({"logprobs": logprobs.flatten(), "gradients": gradients}, _side["folder"] / "peer.pt")
    trainer.model.zero_grad()
    trainer.clock.phases.switch(None)
    return {"loss": float(loss)}


def step() -> Answer:
    """One optimizer step by TRL's training loop."""
    clock: Clock = _side["clock"]
    clock.tokens = 0
    _side["trainer"].train()
    return clock.phases.answer() | {"tokens": clock.tokens}


if __name__ == "__main__":
    serve({task.__name__: task for task in (start, check, step)}, (OSError,))
