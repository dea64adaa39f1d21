"""The model card of a finished run: README.md in its last checkpoint, with the header that Hugging Face's hub reads.

It is written once, after the last evaluation, and stands in no manifest: the same run gives the same card, and a
checkpoint with a card is the same checkpoint. Files are named without their folders, which are nobody's business.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from veripo_fast.config.describe import to_tree
from veripo_fast.config.schema import Config
from veripo_fast.errors import CheckpointError
from veripo_fast.run.atomic import atomic_write_text
from veripo_fast.run.folder import RunDir
from veripo_fast.run.inputs import read_inputs
from veripo_fast.run.metrics import read_records
from veripo_fast.run.weight_files import read_json
from veripo_fast.text import number, one_line, plural, without_credentials

NAME = "README.md"
_log = logging.getLogger(__name__)
_PATH = re.compile(r"(--[\w.-]+=)?(?:~|\.{0,2}/).*/(.*)", re.DOTALL)
_FOLDERS = re.compile(r"(?<![\w.:/~\\-])(?:~[\w.-]*|\.\.?)?/(?:[^\s/,:'\"=]+/)*(?=[^\s/,:'\"=])")
"""Folders of a path inside of a text, at the root, at home, or here; `s3://` and `configs/recipes/` stay."""
_HOST = re.compile(r"(https?://)[^\s/'\"]+")
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PENALTIES = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0}
"""Settings of generation_config.json that change greedy text, and their values without an effect."""
_SCORES = {"accuracy": "accuracy", "format_rate": "well-formed", "inconsistency_rate": "inconsistent",
           "length_mean": "tokens"}


def write_card(run: RunDir, config: Config, base: Path) -> None:
    """Write the card into the newest checkpoint unless it has one. A file that cannot be written is said in the log.

    Args:
        base: folder of the checkpoint that training began with.
    """
    try:
        folder = run.checkpoints / (run.checkpoints / "latest").read_text("utf-8").strip()
        if not (folder / NAME).exists():
            atomic_write_text(folder / NAME, card(run, config, base, folder))
    except (OSError, CheckpointError) as error:
        _log.warning("the model card of %s could not be written: %s", run.root, getattr(error, "strerror", "") or error)


def card(run: RunDir, config: Config, base: Path, checkpoint: Path) -> str:
    """Text of the card. Raises OSError, or CheckpointError where the model is described in no file."""
    inputs = read_inputs(run.inputs)
    model = checkpoint if (checkpoint / "config.json").is_file() else base  # adapters lie there without their base
    header = _header(config, base, model)
    parts = ["---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True) + "---\n",
             f"# {run.root.absolute().name}\n", *_opening(header, config), *_use(config, model),
             *_recipe(run, config), *_data(config, inputs), *_results(run), *_versions(inputs)]
    return "\n".join(parts)


def without_folders(text: str) -> str:
    """A value with every path of this machine cut to its last part, and the names of servers hidden."""
    whole = _PATH.fullmatch(text)
    return f"{whole[1] or ''}{whole[2]}" if whole else _FOLDERS.sub("", _HOST.sub(r"\1HOST", text))


# -- the header -------------------------------------------------------------------------------------------------------

def _header(config: Config, base: Path, model: Path) -> dict[str, Any]:
    before = _header_of(base / NAME)
    family = read_json(model / "config.json").get("model_type", "")
    adapted = config.model.lora.rank > 0
    kinds = list(dict.fromkeys(stage.kind for stage in config.stages))
    header = {"base_model": before.get("base_model") if "veripo-fast" in _tags(before) else _base_name(base),
              "pipeline_tag": "video-text-to-text", "library_name": "peft" if adapted else "transformers",
              "tags": ["veripo-fast", *(["lora"] if adapted else []), *kinds, "video", family]}
    for name in ("license", "license_name", "license_link"):
        if isinstance(before.get(name), str):
            header[name] = before[name]
    return header


def _header_of(file: Path) -> dict[str, Any]:
    """YAML header of a card, which is a stranger's; empty where there is none."""
    try:
        _, text, _ = file.read_text("utf-8").split("---\n", 2)
        header = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return header if isinstance(header, dict) else {}


def _tags(header: Mapping[str, Any]) -> list[Any]:
    tags = header.get("tags")
    return tags if isinstance(tags, list) else []


def _base_name(base: Path) -> str:
    """Name on the hub where the folder is the hub's cache or config.json tells it, else the folder's own."""
    if cached := _HUB_CACHE.search(base.resolve().as_posix() + "/"):
        return f"{cached[1]}/{cached[2]}"
    try:
        told = read_json(base / "config.json").get("_name_or_path")
    except CheckpointError:
        told = None
    return told if isinstance(told, str) and _HUB_NAME.fullmatch(told) else base.resolve().name


# -- the text ---------------------------------------------------------------------------------------------------------

def _opening(header: Mapping[str, Any], config: Config) -> Iterator[str]:
    kinds = " -> ".join(stage.kind.upper() for stage in config.stages)
    yield f"{header['base_model']}, trained with veripo-fast: {kinds}.\n"
    if "license" not in header:
        yield "The license is that of the base model; its name belongs into the header above as `license`.\n"


def _use(config: Config, model: Path) -> Iterator[str]:
    video = config.video
    frames = f"{video.num_frames} frames" if video.num_frames else (
        f"{number(video.fps or 0)} frames per second, {video.min_frames} to {video.max_frames}")
    yield "## Use\n"
    if config.model.lora.rank:
        yield ("```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForImageTextToText, "
               "AutoProcessor\n\nmodel = AutoModelForImageTextToText.from_pretrained(BASE)\n"
               "model = PeftModel.from_pretrained(model, FOLDER)\nprocessor = AutoProcessor.from_pretrained(BASE)\n"
               "```\n")
    else:
        yield ("```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
               "model = AutoModelForImageTextToText.from_pretrained(FOLDER)\n"
               "processor = AutoProcessor.from_pretrained(FOLDER)\n```\n")
    yield (f"Videos were shown as {frames}, of {video.min_pixels:,} to {video.max_pixels:,} pixels each. "
           f"Completions had at most {plural(config.rollout.max_new_tokens, 'token')}.\n")
    if read_json(model / "config.json").get("model_type", "").startswith("qwen3"):
        yield ("Each pair of frames follows its time, with no `<|vision_start|>` before the first. The processor of "
               "transformers 5.10 or newer leaves one there: give it `<|video_pad|>` in place of "
               "`<|vision_start|><|video_pad|><|vision_end|>`.\n")
    file = model / "generation_config.json"
    stored = read_json(file) if file.is_file() else {}
    changed = [f"`{name}={_PENALTIES[name]:g}`" for name in _PENALTIES
               if stored.get(name, _PENALTIES[name]) not in (None, _PENALTIES[name])]
    if changed:
        yield (f"It was trained and evaluated with {' and '.join(changed)}; generation_config.json, which comes from "
               "the base model, says otherwise and changes the text.\n")


def _recipe(run: RunDir, config: Config) -> Iterator[str]:
    steps = Counter(record.get("stage") for record in read_records(run.metrics))
    rows = [[stage.name, stage.kind, f"{steps[stage.name]:,}"] for stage in config.stages]
    yield "## Recipe\n"
    yield _table(["stage", "kind", "steps"], rows)
    yield "What differs from the defaults of this version of veripo-fast:\n"
    tree = _changed(to_tree(config), to_tree(Config()))
    for name in ("run_dir", "cache", "train"):
        tree.pop(name, None)
    tree["stages"] = [{name: value for name, value in stage.items() if value} for stage in tree["stages"]]
    text = yaml.safe_dump(_named(tree), sort_keys=False, allow_unicode=True, width=120)
    yield f"```yaml\n{without_credentials(text)}```\n"


def _changed(tree: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tree that differs from another one."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        before = default.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            value = _changed(value, before)
            if value:
                found[name] = value
        elif value != before:
            found[name] = value
    return found


def _named(value: Any) -> Any:
    """A tree whose texts are `without_folders`."""
    if isinstance(value, dict):
        return {name: _named(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value


def _data(config: Config, inputs: Mapping[str, Any]) -> Iterator[str]:
    held_out = set(config.data.eval)
    yield "## Data\n"
    yield _table(["file", "used for", "bytes and BLAKE2b"],
                 [[without_folders(name), "evaluation" if name in held_out else "training", f"`{mark}`"]
                  for name, mark in inputs.get("data", {}).items()])
    yield "The checkpoint that training began with:\n"
    yield _table(["file", "bytes and BLAKE2b"], [[name, f"`{mark}`"] for name, mark in inputs.get("model", {}).items()])


def _results(run: RunDir) -> Iterator[str]:
    yield "## Results\n"
    records = read_records(run.evals)
    if not records:
        yield "Nothing was evaluated in this run.\n"
        return
    rows = []
    for record in records:
        low, high = record.get("accuracy_low"), record.get("accuracy_high")
        cells = [_cell(record.get(name), name) for name in _SCORES]
        if low is not None and high is not None:
            cells[0] += f" ({_cell(low, 'accuracy')} to {_cell(high, 'accuracy')})"
        rows.append([record["stage"], record["mode"], f"{record.get('prompts', 0):,}", *cells])
    yield _table(["after", "mode", "prompts", *_SCORES.values()], rows)
    judges = " and ".join(dict.fromkeys(str(record.get("judge", "rules")) for record in records))
    curated = any(record.get("judge_chose_pairs") for record in records)
    yield ("Accuracy with its 95 % interval, resampled over videos. Inconsistent: the answer contradicts what its "
           f"reasoning concludes, by the judge {judges}{', which also chose the pairs' if curated else ''}. All are "
           "shares of completions, but the mean number of tokens.\n")


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return number(value) if name == "length_mean" else f"{100 * value:.1f} %"


def _versions(inputs: Mapping[str, Any]) -> Iterator[str]:
    yield "## Versions and commands\n"
    yield _table(["package", "version"], [[name, value] for name, value in inputs.get("versions", {}).items()])
    lines = dict.fromkeys(_command(entry.get("command", [])) for entry in inputs.get("commands", []))
    yield "```sh\n" + "\n".join(lines) + "\n```\n"


def _command(arguments: Sequence[str]) -> str:
    program = Path(arguments[0]).name if arguments else ""
    program = "veripo" if program in ("cli.py", "__main__.py") else program
    return one_line(without_credentials(shlex.join([program, *map(without_folders, arguments[1:])])))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(one_line, line))} |" for line in lines) + "\n"
