"""How the shipped `tiny_policy` was made: `python -m veripo_fast.demo.pretrain OUT`.

A Qwen3-VL of two million parameters learns to see the synthetic clips (dense descriptions, careful answers), and then
to answer in the mixture of manners that a pretrained model brings: it may look second by second and conclude, look and
state a conclusion that is not its answer, glance and guess, or miss the format. Which manner pays is for the loop to
find. Clips are rendered on the fly and never repeat; those of the demo come from other seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from veripo_kernels import linear_logprobs

from veripo_fast.config.inputs import ModelConfig
from veripo_fast.data.wording import question_text
from veripo_fast.demo import tiny_model
from veripo_fast.demo.questions import Question, describe, questions
from veripo_fast.demo.world import Clip, random_clip, render
from veripo_fast.model.encoding import PromptEncoder
from veripo_fast.model.packing import pack
from veripo_fast.model.policy import Policy, load_policy, save_policy
from veripo_fast.types import EncodedPrompt, MediaInputs, Message, Prompt, Video, VisionFeatures

FRAME_SECONDS = tuple(index / 2 for index in range(8))
FRAME_SIDE = 96
PEAK = 2e-3
FIRST_SEED = 1 << 40
"""Clips from here on; the corpora of `veripo synth` use smaller seeds."""
CAREFUL = {"looks": 1.0}
MANNERS = {"looks": 0.22, "looks_but_misstates": 0.22, "glances": 0.53, "no_format": 0.03}
DESCRIBE = "Describe what is seen each second."


def completion(question: Question, rng: random.Random, manners: dict[str, float]) -> str:
    """One answer to a question, in a manner drawn from `manners`.

    A choice is answered by its text, which scores like its letter: at this size looking the letter up stayed at chance.
    """
    manner = rng.choices(list(manners), list(manners.values()))[0]
    answer = question.answer
    if manner == "looks":
        return f"<think>{question.reasoning(answer)}</think><answer>{answer}</answer>"
    if manner == "looks_but_misstates":
        other = rng.choice([candidate for candidate in question.candidates if candidate != answer])
        return f"<think>{question.reasoning(other)}</think><answer>{answer}</answer>"
    guess = rng.choice(question.candidates)
    if manner == "glances":
        return f"<think>At a glance. so {guess}.</think><answer>{guess}</answer>"
    return f"The answer is {guess}."


def user_prompt(prompt_id: str, text: str) -> Prompt:
    """A prompt with one video and a text, as the data loader builds it."""
    return Prompt(prompt_id, (Message("user", (Video(""), text)),), "text", "")


def worded(question: Question) -> str:
    """The question as the data loader words it."""
    return question_text(question.text, question.options, question.problem_type)


def clip_media(encoder: PromptEncoder, clip: Clip) -> MediaInputs:
    """Tower inputs of a rendered clip: what decoding its mp4 under the demo's contract gives, less the codec."""
    frames = torch.from_numpy(render(clip, list(FRAME_SECONDS))).permute(0, 3, 1, 2)
    frames = F.interpolate(frames, (FRAME_SIDE, FRAME_SIDE), mode="bicubic", antialias=True)
    return encoder.media_inputs([("video", frames, torch.tensor(FRAME_SECONDS, dtype=torch.float64))], "")


def shared_prefix_row(encoder: PromptEncoder, media: MediaInputs, texts: list[tuple[str, str]]
                      ) -> tuple[EncodedPrompt, list[list[int]], list[int]]:
    """One clip with several (question, completion): the video as shared prefix, question and completion as branches.

    Returns:
        the prefix, the branches as token ids, and how many tokens at the end of each enter the loss.
    """
    branches, scored = [], []
    for text, target in texts:
        prompt = encoder.encode(user_prompt("", text), media)
        cut = int((prompt.token_ids == encoder.config.vision_end_token_id).nonzero()[-1]) + 1
        completion_ids = [*encoder.encode_completion(target), encoder.eos_id]
        branches.append(prompt.token_ids[cut:].tolist() + completion_ids)
        scored.append(len(completion_ids))
    prefix = EncodedPrompt(prompt.token_ids[:cut], prompt.positions[:, :cut], int(prompt.positions[0, cut]), media)
    return prefix, branches, scored


def batch_loss(policy: Policy, seed: int, describe_share: float, manners: dict[str, float], clips: int = 16,
               per_clip: int = 4) -> torch.Tensor:
    """Mean negative log-likelihood of the completions of `per_clip` questions on each of `clips` new clips."""
    rng = random.Random(seed)
    media, groups, scored = [], [], []
    for number in range(clips):
        clip = random_clip(FIRST_SEED + seed * clips + number)
        pool = questions(clip, rng.randrange(1 << 30))
        media.append(clip_media(policy.encoder, clip))
        texts = []
        for _ in range(per_clip):
            question = rng.choice(pool)
            texts.append((DESCRIBE, describe(clip)) if rng.random() < describe_share else
                         (worded(question), completion(question, rng, manners)))
        prefix, branches, tokens = shared_prefix_row(policy.encoder, media[-1], texts)
        groups.append((prefix, branches))
        scored += tokens
    packed = pack(groups)
    ends = packed.cu_seqlens[1:]
    index = torch.cat([torch.arange(end - tokens, end) for end, tokens in zip(ends.tolist(), scored, strict=True)])
    hidden = policy.hidden(packed, policy.vision_features_of(media))[packed.logit_index[index]]
    return -linear_logprobs(hidden, policy.model.lm_head.weight, packed.targets[index]).mean()


@torch.no_grad()
def seeing(policy: Policy, seed: int, clips: int) -> dict[str, float]:
    """Per question kind: share of new questions whose careful answer is right token by token (teacher forced)."""
    encoder, rng = policy.encoder, random.Random(seed)
    right: dict[str, list[float]] = {}
    for number in range(clips):
        clip = random_clip(seed + number)
        media = clip_media(encoder, clip)
        features: list[VisionFeatures | None] = [policy.vision_features(media)]
        for question in questions(clip, rng.randrange(1 << 30)):
            text = completion(question, rng, CAREFUL)
            prompt = encoder.encode(user_prompt("", worded(question)), media)
            packed = pack([(prompt, [encoder.encode_completion(text)])])
            logits = policy.head(policy.hidden(packed, features)[packed.logit_index])
            written = encoder.encode_completion("<think>0s")
            hits = (logits.argmax(-1) == packed.targets)[len(written):]
            right.setdefault(question.kind, []).append(float(hits.all()))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over 50 steps, then cosine to a twentieth."""
    if step < 50:
        return (step + 1) / 50
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 50) / max(steps - 50, 1)))


def curriculum(done: float) -> tuple[float, dict[str, float]]:
    """Share of descriptions among the tasks, and the manners of answering, after a share of the steps.

    Seeing comes first: descriptions and careful answers. The mixture of manners is learned in the last fifth.
    """
    return max(0.7 - 1.4 * done, 0.1), CAREFUL if done < 0.8 else MANNERS


def pretrain(out: Path, steps: int, seed: int, init: Path | None) -> None:
    """Train from scratch, or on from the checkpoint `init`; write the checkpoint (bfloat16) and its log into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if init is None:
        tokenizer = tiny_model.build_tokenizer()
        model = tiny_model.build_model("qwen3_vl", seed, tokenizer)
        tiny_model.save_processor(out, "qwen3_vl", tokenizer)
        model.config.save_pretrained(out)
        policy = Policy(model, PromptEncoder(out), freeze_vision=False)
    else:
        policy = load_policy(ModelConfig(device="cpu", freeze_vision=False), init)
        save_policy(policy, out)
        model = policy.model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    with (out / "pretrain.log").open("w") as log:
        for step in range(steps):
            done = step / steps if init is None else 0.8 + 0.2 * step / steps
            loss = batch_loss(policy, seed * 1_000_000 + step, *curriculum(done))
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = PEAK * rate(step, steps)
            optimizer.step()
            if step % 50 == 0 or step == steps - 1:
                line: dict[str, Any] = {"step": step, "loss": round(loss.item(), 4),
                                        "seconds": round(time.monotonic() - started)}
                if step % 200 == 0 or step == steps - 1:
                    line["seeing"] = {k: round(v, 2) for k, v in seeing(policy, FIRST_SEED // 2, 40).items()}
                print(json.dumps(line), file=log, flush=True)
    model.to(torch.bfloat16).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="go on from this checkpoint, with the mixture of manners")
    args = parser.parse_args()
    pretrain(args.out, args.steps, args.seed, args.init)


if __name__ == "__main__":
    main()
