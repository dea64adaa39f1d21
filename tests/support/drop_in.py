"""A checkpoint as its users load it: transformers or vLLM, in a process that knows nothing of veripo.

    python -m tests.support.drop_in transformers|vllm IN OUT

IN is a torch file: checkpoint folder, most tokens, and per prompt (chat messages, videos, their metadata). OUT gets the
greedy text of each. Frames are sampled and resized already, so the processors must not do it again.

A Qwen3-VL prompt is given with the bare video pad, as `processor_oracle` says.
"""

import os
import sys
from typing import Any

import torch

from bench.video import torchvision_folder

PLAIN = {"do_resize": False, "do_sample_frames": False}


def prompt_text(processor: Any, messages: list[dict[str, Any]]) -> str:
    text: str = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if type(processor).__name__ == "Qwen3VLProcessor":
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    return text


def by_transformers(folder: str, most_tokens: int, prompts: list[Any]) -> list[str]:
    """With `AutoModelForImageTextToText` and `AutoProcessor`; the end tokens are those of generation_config.json."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    texts = []
    for messages, videos, metadata in prompts:
        inputs = processor(text=[prompt_text(processor, messages)], videos=videos, video_metadata=metadata,
                           return_tensors="pt", **PLAIN)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=most_tokens)
        texts += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    return texts


def by_vllm(folder: str, most_tokens: int, prompts: list[Any]) -> list[str]:
    """With `vllm.LLM`, which reads generation_config.json too."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from transformers import AutoProcessor
    from vllm import LLM

    torch._dynamo.config.disable = True  # the sampler's helpers would be compiled: half a minute for nothing
    processor = AutoProcessor.from_pretrained(folder)
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8,
                 limit_mm_per_prompt={"video": 1, "image": 0}, mm_processor_kwargs=PLAIN, skip_mm_profiling=True)
    sampling = engine.get_default_sampling_params()
    sampling.temperature, sampling.max_tokens = 0.0, most_tokens
    asked = []
    for messages, videos, metadata in prompts:
        video = [(frames.permute(0, 2, 3, 1).numpy(), known | {"do_sample_frames": False, "duration": 0.0,
                                                               "video_backend": "opencv"})
                 for frames, known in zip(videos, metadata, strict=True)]
        asked.append({"prompt": prompt_text(processor, messages), "multi_modal_data": {"video": video}})
    return [done.outputs[0].text for done in engine.generate(asked, sampling, use_tqdm=False)]


if __name__ == "__main__":
    if side := os.environ.get("VERIPO_TEST_ORACLE"):
        torchvision_folder.add(side)
    torch.set_num_threads(1)
    write = {"transformers": by_transformers, "vllm": by_vllm}[sys.argv[1]]
    texts = write(*torch.load(sys.argv[2]))
    assert not any(name.startswith("veripo") for name in sys.modules)
    torch.save(texts, sys.argv[3])
