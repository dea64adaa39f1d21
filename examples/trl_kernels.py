"""The kernels in TRL: GRPOTrainer as it is, with log-probs and losses of veripo_kernels (TRL 1.16).

    pip install "veripo-fast[trl]"
    python examples/trl_kernels.py /checkpoints/Qwen2.5-0.5B-Instruct runs/trl

The logits of [tokens, vocabulary] are never whole in memory. TRL's options keep their meaning; DPOTrainer likewise.
"""

import sys

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from veripo_kernels import status
from veripo_kernels.integrations.trl import use_veripo_losses

PROMPTS = ["Name a colour.", "Name a fruit.", "Name a city.", "Name a bird."]


def short(completions, **_):
    """A reward: the shorter the better."""
    return [-float(len(text)) for text in completions]


def main(model: str, out: str, *, steps: int = 5) -> None:
    options = GRPOConfig(out, max_steps=steps, per_device_train_batch_size=4, num_generations=4, logging_steps=1,
                         max_completion_length=16, loss_type="dapo", report_to="none", save_strategy="no",
                         use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available())
    trainer = use_veripo_losses(GRPOTrainer)(model, short, options, Dataset.from_dict({"prompt": PROMPTS}))
    trainer.train()
    print(status())  # which implementation each op used here, and why


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
