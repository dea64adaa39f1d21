"""Judges on completions of the demo's policy: which contradictions they find, and how often they say anything.

    python bench/bench_judges.py [--policy DIR] [--llm DIR [--llm-items N]]

Truth comes from how the items are made, not from a judge. A real item is a sampled completion whose reasoning ends in
"so X." and whose answer is X to the letter; its twin has the same reasoning and another candidate's answer in the same
form. The positive class is the contradiction. The rules are measured on the shipped calibration set besides, and with
--llm that folder's language model alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # bench/ itself on the path would offer bench/kernels as `kernels`, a Hugging Face package
    sys.path[0] = __file__.rpartition("/bench/")[0]

from bench import recipe
from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.load import apply_overrides
from veripo_fast.config.schema import Config
from veripo_fast.data.prompts import load_prompts
from veripo_fast.demo.corpus import write_corpus
from veripo_fast.demo.run import demo_config
from veripo_fast.model.policy import load_policy
from veripo_fast.model.scorer import answer_scorer
from veripo_fast.report.judge_eval import as_json, as_text, evaluate_judge
from veripo_fast.rollout.engine import make_engine
from veripo_fast.rollout.protocol import Sampling
from veripo_fast.types import Completion, RolloutGroup
from veripo_fast.verifier.calibration import SHIPPED
from veripo_fast.verifier.judges import Judge, no_progress
from veripo_fast.verifier.verify import make_judge

ITEMS, SAMPLES = 40, 8
_SAME = re.compile(r"<think>.*\bso (?P<one>[^.]+)\.</think><answer>(?P<other>[^<]+)</answer>", re.DOTALL)


def sampled(config: Config, policy: Any, loader: PromptLoader, prompts: list[Any]) -> list[RolloutGroup]:
    """SAMPLES completions of each prompt, at the demo's temperature."""
    engine = make_engine(config, policy)
    try:
        groups: list[RolloutGroup] = []
        for start in range(0, len(prompts), 20):
            loaded = loader.load_some(prompts[start:start + 20], range(len(prompts[start:start + 20])))
            engine.sync()
            groups += engine.generate(list(loaded.values()), Sampling(SAMPLES, 1.0, 80, start), lambda *_: None,
                                      numbers=list(loaded))
        return groups
    finally:
        engine.close()


def items(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """Groups of [real, swapped, *all completions], one for each prompt with such a completion that answers it."""
    made = []
    for group in groups:
        texts = [completion.text for completion in group.completions]
        spoken = [match for text in texts if (match := _SAME.fullmatch(text))]
        real = next((match for match in spoken if match["one"] == match["other"]), None)
        others = [*group.prompt.options, *(match["other"] for match in spoken)]
        swap = next((other for other in others if real and other != real["other"]), None)
        if real is None or swap is None or (group.prompt.options and real["other"] not in group.prompt.options):
            continue
        twin = real.string[:real.start("other")] + swap + real.string[real.end("other"):]
        made.append(replace_texts(group, [real.string, twin, *texts]))
    return made[:ITEMS]


def replace_texts(group: RolloutGroup, texts: list[str]) -> RolloutGroup:
    """A group of the same prompt with these texts; a judge reads nothing else."""
    return RolloutGroup(group.prompt, [Completion([], text, [], "stop", 0) for text in texts], group.think_opened)


def scores_of(judge: Judge, groups: list[RolloutGroup]) -> dict[str, Any]:
    """Counts over the real and the swapped completion of each group."""
    began = time.perf_counter()
    rows = judge.judge(groups, no_progress)
    verdicts = [(row[0].consistent, True) for row in rows] + [(row[1].consistent, False) for row in rows]
    flagged = [truth for verdict, truth in verdicts if verdict is False]
    found, contradictions = flagged.count(False), len(rows)
    spoken = sum(verdict is not None for verdict, _ in verdicts)
    return {"real": len(rows), "swapped": contradictions, "flagged": len(flagged), "flagged_rightly": found,
            "precision": found / len(flagged) if flagged else None, "recall": found / contradictions,
            "coverage": spoken / len(verdicts), "seconds": time.perf_counter() - began}


def demo_items(folder: Path, policy_path: str) -> tuple[Config, Any, PromptLoader, list[RolloutGroup]]:
    """The demo's configuration, its policy, and the items made of what it says about held-out clips."""
    config = demo_config(folder, 0, quick=False)
    config = replace(config, model=replace(config.model, path=policy_path))
    write_corpus(folder / "corpus", 2, 150, 0)
    prompts, _ = load_prompts((str(folder / "corpus" / "heldout.jsonl"),), config.data)
    policy = load_policy(config.model)
    loader = PromptLoader(policy, config.video, config.data.max_prompt_tokens, lambda prompt, reason: None,
                          config.cache)
    return config, policy, loader, items(sampled(config, policy, loader, prompts))


def calibrated(config: Config, name: str, limit: int | None) -> dict[str, Any]:
    """What `veripo judge-eval` measures of a judge on the shipped set, and whether a run would refuse it."""
    began = time.perf_counter()
    calibration = evaluate_judge(config, limit=limit)
    print(as_text(config, name, calibration), flush=True)
    record = as_json(config, SHIPPED, calibration)
    kinds = {kind: part.agreement.count for kind, part in calibration.by_kind().items()}
    return {**record, "kinds": kinds, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="tiny", help="checkpoint whose completions are judged (default tiny)")
    parser.add_argument("--llm", type=Path, help="folder of a language model; only it is measured, on the shipped set")
    parser.add_argument("--llm-items", type=int, help="so many items, spread over the kinds (default all)")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.llm:
        config = apply_overrides(Config(), {"verifier.judge": "llm", "verifier.llm_path": str(options.llm),
                                            "model.dtype": "float32"})
        recipe.append("judges", {"bench": "judges", "model": options.llm.name,
                                 **calibrated(config, options.llm.name, options.llm_items)})
        return
    recipe.append("judges", {"bench": "judges", **calibrated(Config(), "rules", None)})
    with tempfile.TemporaryDirectory() as temporary:
        config, policy, loader, groups = demo_items(Path(temporary), options.policy)
        kinds = sorted({group.prompt.data_source for group in groups})
        for name in ("rules", "likelihood"):
            judge = make_judge(apply_overrides(config, {"verifier.judge": name}).verifier, None,
                               lambda: answer_scorer(policy, loader.load_one))
            row = scores_of(judge, groups)
            print(name, row, flush=True)
            recipe.append("judges", {"bench": "judges", "set": "demo", "judge": name,
                                     "policy": Path(options.policy).name, "sources": kinds, **row})
        loader.close()


if __name__ == "__main__":
    main()
