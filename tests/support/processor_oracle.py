"""Hugging Face's processors and models in a process that knows nothing of veripo.

    python -m tests.support.processor_oracle IN OUT

Needs torchvision, which has no CPU build (tests/video/test_patches.py says where it comes from). IN is a torch file
with a list of (checkpoint folder, chat messages, images, videos, video metadata, whether to run the model); OUT gets
(inputs, logits [P, V] or None) of each.

Qwen3-VL was published with a processor (transformers 4.57) that puts the time-stamped frames in place of the template's
<|vision_start|><|video_pad|><|vision_end|>. Since 5.10 only the pad is replaced, and the outer pair stays around them
all (vllm-project/vllm#46817). We write what the model was trained on, so the oracle is given the bare pad.
"""

import os
import sys
from functools import cache

import torch

from bench.video import torchvision_folder

if side := os.environ["VERIPO_TEST_ORACLE"]:
    torchvision_folder.add(side)

if __name__ == "__main__":
    torch.set_num_threads(1)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor_of, answers = cache(AutoProcessor.from_pretrained), []
    for folder, messages, images, videos, metadata, run in torch.load(sys.argv[1]):
        processor = processor_of(folder)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if type(processor).__name__ == "Qwen3VLProcessor":
            text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
        media = {"images": images} if images else {}
        if videos:
            media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        inputs = processor(text=[text], do_resize=False, return_tensors="pt", **media)
        logits = None
        if run:
            with torch.no_grad():
                logits = AutoModelForImageTextToText.from_pretrained(folder)(**inputs).logits[0]
        answers.append(({name: torch.as_tensor(value) for name, value in inputs.items()}, logits))
    assert not any(name.startswith("veripo") for name in sys.modules)
    torch.save(answers, sys.argv[2])
