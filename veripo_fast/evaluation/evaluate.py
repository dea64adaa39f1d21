"""Held-out evaluation: accuracy, MRA, format, think/answer inconsistency and length, greedy and sampled.

One library scores training and evaluation (`reward.py`, `verifier/`). Intervals are bootstrapped over videos.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from veripo_fast.cache.loader import PromptLoader
from veripo_fast.config.schema import Config
from veripo_fast.distributed.shares import gathered, own_numbers
from veripo_fast.distributed.world import ONE, World
from veripo_fast.errors import DataError
from veripo_fast.evaluation.controls import control_lines, control_scores, controlled
from veripo_fast.evaluation.intervals import bootstrap_interval
from veripo_fast.evaluation.items import answers_of, items_of, majority_accuracy
from veripo_fast.evaluation.judging import Judged, judge_fields, judging
from veripo_fast.evaluation.official import task_means, vsi_mra
from veripo_fast.evaluation.progress import Progress
from veripo_fast.recipes.view import side_of
from veripo_fast.reward.groups import reward_groups
from veripo_fast.reward.score import scores_of
from veripo_fast.rollout.parity import ParityGate
from veripo_fast.rollout.protocol import RolloutEngine, Sampling
from veripo_fast.rollout.store import write_groups
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.jsonlines import dump_objects
from veripo_fast.run.seeds import derive_seed
from veripo_fast.text import printable
from veripo_fast.types import Prompt, RolloutGroup
from veripo_fast.verifier.judge_rules import RulesJudge
from veripo_fast.verifier.judges import no_progress


def modes(config: Config) -> dict[str, tuple[int, float]]:
    """Name of each mode -> (completions per prompt, temperature)."""
    sampled = {"sampled": (config.eval.samples, config.rollout.temperature)} if config.eval.samples else {}
    return {"greedy": (1, 0.0), **sampled}


def evaluate(engine: RolloutEngine, loader: PromptLoader, prompts: Sequence[Prompt], config: Config, *, stage: str,
             rows: Callable[[str], Path], check: Callable[[], None] = lambda: None,
             gate: ParityGate | None = None, world: World = ONE, progress: Progress | None = None,
             lines: Callable[[str], Path] | None = None) -> list[dict[str, Any]]:
    """Evaluate a policy in every mode; completions are stored at `rows(mode)`, those of a control at
    `rows(mode_control)`, a line for each prompt at `lines(mode)`. `check` may stop between batches.

    `gate` compares the engine's log-probs with the trainer's in the first batch of each mode that is sampled, before
    anything is stored. `progress`, of the first rank, keeps the batches and gives those of an earlier process.
    Collective.

    Returns:
        one record per mode, as evals.jsonl holds them.

    Raises:
        DataError: no prompt could be loaded, or a control can be made of none.
    """
    prompts = prompts[:config.eval.limit]
    tensor_parallel = config.rollout.tensor_parallel
    judge = judging(config, rows("greedy").parent, world, engine.sleep)
    encoder = loader.tower.encoder
    records = []
    for mode, (samples, temperature) in modes(config).items():
        started = time.perf_counter()
        groups: list[RolloutGroup] = []
        others: dict[str, list[RolloutGroup]] = {control: [] for control in config.eval.controls}
        kept: list[int] = world.broadcast(progress.done(mode) if progress else [])
        checked = False
        with tqdm(total=len(prompts), desc=f"eval {stage} {mode}", unit="prompt") as bar:
            for start in range(0, len(prompts), config.eval.prompts_per_batch):
                batch = prompts[start:start + config.eval.prompts_per_batch]
                if start in kept:
                    groups += world.broadcast(progress.read(mode, start) if progress else [])
                    for control, before in others.items():
                        before += world.broadcast(progress.read(f"{mode}_{control}", start) if progress else [])
                    bar.update(len(batch))
                    continue
                loaded = loader.load_some(batch, own_numbers(len(batch), world, tensor_parallel))
                following = prompts[start + len(batch):][:config.eval.prompts_per_batch]
                loader.prefetch([following[number] for number in own_numbers(len(following), world, tensor_parallel)])
                sampling = Sampling(samples, temperature, config.rollout.max_new_tokens,
                                    derive_seed(config.seed, "eval", mode, start), config.rollout.top_p,
                                    config.rollout.top_k)
                engine.sync()
                found = engine.generate(list(loaded.values()), sampling, partial(_advance, bar), numbers=list(loaded))
                if gate is not None and not checked:
                    gate.check(list(loaded.values()), found, sampling)
                checked = True
                reward_groups(found, config, list(loaded.values()))
                whole = list(gathered(dict(zip(loaded, found, strict=True)), world).values())
                for control, before in others.items():
                    shown_so = controlled(encoder, loaded, control, config.seed)
                    drawn = replace(sampling, seed=derive_seed(config.seed, "eval", mode, control, start))
                    found = engine.generate(list(shown_so.values()), drawn, numbers=list(shown_so))
                    reward_groups(found, config, list(shown_so.values()))
                    controls = list(gathered(dict(zip(shown_so, found, strict=True)), world).values())
                    if progress:
                        progress.keep(f"{mode}_{control}", start, controls)
                    before += controls
                if progress:
                    progress.keep(mode, start, whole)
                groups += whole
                bar.update(start + len(batch) - bar.n)
                check()
        if not groups:
            if progress:
                progress.finish()  # there is nothing to go on from
            raise DataError("no evaluation prompt could be loaded; skipped.jsonl says why for each")
        reward_groups(groups, config)  # the advantages of all, as one process gives them
        if world.main:
            write_groups(rows(mode), groups, stage, 0)
        judged = judge(groups)
        record = {"stage": stage, "mode": mode, **scores(groups, config, judged), **judge_fields(config)}
        for control, before in others.items():
            if not before:
                raise DataError(f"eval.controls {control} can be made of none of the {len(groups)} prompts: none shows "
                                f"{'anything' if control == 'blind' else 'a video of two temporal patches'}")
            if world.main:
                write_groups(rows(f"{mode}_{control}"), before, stage, 0)
            record.setdefault("controls", {})[control] = control_scores(groups, before, config.eval.bootstrap,
                                                                        config.seed)
        if lines and world.main:
            atomic_write_text(lines(mode), dump_objects(items_of(groups, judged, others)))
        records.append({**record, "seconds": time.perf_counter() - started})
    return records


def _advance(bar: Any, number: int, group: RolloutGroup) -> None:
    bar.update(1)


def scores(groups: Sequence[RolloutGroup], config: Config, judged: Judged | None = None) -> dict[str, Any]:
    """Scores over all completions of rewarded groups, with 95 % intervals over prompts; those about one video count as
    one draw.

    A completion without a verdict is neither consistent nor inconsistent. `inconsistency_rate` and `no_verdict_rate`
    are shares of all completions, so the first also falls when fewer reasonings can be read.
    `mra` is our accuracy over prompts of type estimate, `mra_official` what VSI-Bench's own code gives (official.py).
    `accuracy_of_tasks` is the mean of the means of the tasks (`eval.task_key`). `majority_accuracy` is that of the most
    frequent answer of each prompt, `pass_rate` the share of prompts of which at least one completion scores 1 (pass@k
    with k completions; Chen et al. 2021, arXiv 2107.03374, equation 1 at n = k).
    `inconsistency_of_verdicts` is the share of those with a verdict, None when there is none. The accuracy over
    completions is `accurate_and_consistent_rate` + `accurate_without_verdict_rate` + what is accurate and inconsistent.
    `judged` are the judge's verdicts; None: those of the rules.
    """
    judged = judged or RulesJudge().judge(list(groups), no_progress)
    inconsistent = [_mean([float(j.consistent is False) for j in row]) for row in judged]
    accuracy = [_mean(scores_of(group, "accuracy")) for group in groups]
    rows = [c for group in groups for c in group.completions]
    formats = [value for group in groups for value in scores_of(group, "format")]
    accuracies = [value for group in groups for value in scores_of(group, "accuracy")]
    verdicts = [judgement.consistent for row in judged for judgement in row]
    read = [verdict for verdict in verdicts if verdict is not None]
    estimates = [value for value, group in zip(accuracy, groups, strict=True)
                 if group.prompt.problem_type == "estimate"]
    theirs = [_mean([vsi_mra(answer, group.prompt.gold) for answer in answers_of(group)])
              if group.prompt.problem_type == "estimate" else value
              for group, value in zip(groups, accuracy, strict=True)]
    official = [value for value, group in zip(theirs, groups, strict=True) if group.prompt.problem_type == "estimate"]
    about = [shown(group.prompt) for group in groups]
    mean, low, high = bootstrap_interval(accuracy, config.eval.bootstrap, config.seed, clusters=about)
    wrong, wrong_low, wrong_high = bootstrap_interval(inconsistent, config.eval.bootstrap, config.seed, clusters=about)
    return {"accuracy": mean, "accuracy_low": low, "accuracy_high": high,
            "mra": _mean(estimates) if estimates else None,
            "mra_official": _mean(official) if official else None, "format_rate": _mean(formats),
            "inconsistency_rate": wrong, "inconsistency_low": wrong_low, "inconsistency_high": wrong_high,
            "inconsistency_of_verdicts": _mean([float(not verdict) for verdict in read]) if read else None,
            "no_verdict_rate": _mean([float(verdict is None) for verdict in verdicts]),
            "accurate_and_consistent_rate": _accurate(accuracies, verdicts, True),
            "accurate_without_verdict_rate": _accurate(accuracies, verdicts, None),
            "length_mean": _mean([float(len(c.token_ids)) for c in rows]),
            "finished_rate": _mean([float(c.finish_reason == "stop") for c in rows]),
            "majority_accuracy": _mean([majority_accuracy(group) for group in groups]),
            "pass_rate": _mean([float(max(scores_of(group, "accuracy")) == 1) for group in groups]),
            "prompts": len(groups), "completions": len(rows),
            **_by_task(groups, accuracy, theirs, config.eval.task_key),
            "by_type": _means_by(groups, accuracy, "problem_type"),
            "by_source": _means_by(groups, accuracy, "data_source"),
            "inconsistency_by_source": _means_by(groups, inconsistent, "data_source")}


def summary(record: dict[str, Any]) -> str:
    """One line for people, and one for each control."""
    mra = "" if record["mra"] is None else f", MRA {record['mra']:.3f}"
    if "accuracy_of_tasks" in record:
        mra += f", mean of tasks {record['accuracy_of_tasks']:.3f}"
    by = f" by {record['judge']}, which also chose the pairs" if record.get("judge_chose_pairs") else ""
    line = (f"{printable(record['stage']):>8} {record['mode']:>7}: accuracy {record['accuracy']:.3f} "
            f"[{record['accuracy_low']:.3f}, {record['accuracy_high']:.3f}]{mra}, format {record['format_rate']:.3f}, "
            f"inconsistent {record['inconsistency_rate']:.3f}{by}, {record['length_mean']:.0f} tokens")
    return "\n".join([line, *control_lines(record.get("controls", {}))])


def shown(prompt: Prompt) -> tuple[str, ...]:
    """What a prompt is about: its media, or itself."""
    return tuple(medium.path for medium in prompt.media) or (prompt.prompt_id,)


def _by_task(groups: Sequence[RolloutGroup], accuracy: Sequence[float], theirs: Sequence[float], key: str
             ) -> dict[str, Any]:
    """Accuracy by task and its mean over tasks, ours and with VSI-Bench's numbers; nothing without a key."""
    if not key:
        return {}
    tasks = [str(side_of(group.prompt).get(key, "no task")) for group in groups]
    ours, official = task_means(tasks, accuracy), task_means(tasks, theirs)
    return {"by_task": ours, "accuracy_of_tasks": _mean(list(ours.values())),
            "by_task_official": official, "accuracy_of_tasks_official": _mean(list(official.values()))}


def _means_by(groups: Sequence[RolloutGroup], values: Sequence[float], field: str) -> dict[str, float]:
    """Mean over the prompts that have the same in a field."""
    found: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        found[getattr(group.prompt, field)].append(value)
    return {name: _mean(those) for name, those in sorted(found.items())}


def _accurate(accuracies: Sequence[float], verdicts: Sequence[bool | None], wanted: bool | None) -> float:
    """Mean over all completions of the accuracy of those with the wanted verdict."""
    return _mean([value if verdict is wanted else 0.0 for value, verdict in zip(accuracies, verdicts, strict=True)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
