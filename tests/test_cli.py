"""The command line: what each command hands over, and one-sentence errors with their exit codes."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.children import PATIENCE_SECONDS, start
from tests.support.paths import REPOSITORY
from veripo_fast import __version__
from veripo_fast.cli import main
from veripo_fast.commands import COMMANDS
from veripo_fast.config.load import load_config
from veripo_fast.config.schema import Config
from veripo_fast.errors import CheckpointError
from veripo_fast.run.environment import set_environment


@pytest.fixture
def handed_over(monkeypatch):
    """Stands in for the module of a command; `handed_over(module, name)` gives the list its calls are added to."""
    def replace(module: str, name: str, result: object = None) -> list:
        calls: list = []

        def record(*arguments, **options):
            calls.append((*arguments, *options.values()))
            if isinstance(result, BaseException):
                raise result
            return result

        stand_in = ModuleType(module)
        setattr(stand_in, name, record)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return replace


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("stages: [{kind: grpo}]\n")
    return path


def test_demo(handed_over):
    calls = handed_over("veripo_fast.demo.run", "run_demo")
    assert main(["demo"]) == 0
    assert main(["demo", "--out", "x", "--seed", "4", "--quick"]) == 0
    assert main(["demo", "--rollout.engine", "vllm"]) == 0
    assert calls == [(Path("demo"), 0, False, []), (Path("x"), 4, True, []),
                     (Path("demo"), 0, False, ["--rollout.engine", "vllm"])]


def test_timeline(handed_over, capsys):
    calls = handed_over("veripo_fast.report.trace", "timeline_command", "said")
    assert main(["timeline", "runs/one"]) == 0
    assert main(["timeline", "runs/one", "--out", "t.json", "--steps", "3-8"]) == 0
    assert calls == [(Path("runs/one"), None, None), (Path("runs/one"), Path("t.json"), "3-8")]
    assert capsys.readouterr().out == "said\nsaid\n"


def test_train(handed_over, config_file):
    calls = handed_over("veripo_fast.trainer", "train")
    assert main(["train", "--grpo.clip-high", "0.28", "--config", str(config_file), "--resume", "--seed=5"]) == 0
    assert calls == [(load_config(config_file, ["--grpo.clip-high=0.28", "--seed=5"]), True, [])]


def test_eval(handed_over, config_file):
    calls = handed_over("veripo_fast.evaluation.command", "evaluate_command")
    assert main(["eval", f"--config={config_file}", "--out", "o"]) == 0
    assert calls == [(load_config(config_file), Path("o"))]


def test_verify_keeps_files_apart_from_option_values(handed_over):
    calls = handed_over("veripo_fast.verifier.store", "verify_files")
    assert main(["verify", "--verifier.judge", "likelihood", "a.parquet", "--seed", "3", "b.parquet"]) == 0
    [(files, out, config)] = calls
    assert (files, out) == ([Path("a.parquet"), Path("b.parquet")], None)
    assert (config.verifier.judge, config.seed) == ("likelihood", 3)


def test_report_prints_where_it_is(handed_over, capsys):
    calls = handed_over("veripo_fast.report.page", "write_report", Path("runs/a/report.html"))
    assert main(["report", "runs/a"]) == 0
    assert calls == [(Path("runs/a"), None)]
    assert capsys.readouterr().out == "runs/a/report.html\n"


def test_synth_and_init_model(handed_over):
    corpora = handed_over("veripo_fast.demo.corpus", "write_corpus")
    models = handed_over("veripo_fast.demo.tiny_model", "init_model")
    assert main(["synth", "c", "--train", "8", "--heldout", "4", "--seed", "1"]) == 0
    assert main(["init-model", "m", "--family", "qwen2_5_vl"]) == 0
    assert (corpora, models) == ([(Path("c"), 8, 4, 1)], [(Path("m"), "qwen2_5_vl", 0)])


def test_show_config_can_be_used_as_a_file(tmp_path, capsys):
    assert main(["show-config", "--rollout.group-size", "4"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "shown.yaml") == load_config(None, ["--rollout.group-size", "4"]) != Config()


@pytest.mark.parametrize(("arguments", "words"), [
    (["trian"], "unknown command 'trian'; did you mean train?"),
    (["frobnicate"], "unknown command 'frobnicate'; there are demo, train, eval"),
    (["train"], "the following arguments are required: --config (see veripo train --help)"),
    (["train", "--config", "x", "--resum"], "unknown option --resum; did you mean --resume?"),
    (["train", "--config", "x", "--learning-rate", "1"], "did you mean --grpo.learning-rate or "
     "--dpo.learning-rate or --sft.learning-rate?"),
    (["train", "x.yaml", "--config", "y"], "unexpected argument 'x.yaml' (see veripo train --help)"),
    (["train", "--config", "none.yaml"], "cannot read the configuration none.yaml: No such file or directory"),
    (["show-config", "--grpo.clip-hgh", "1"], "unknown option grpo.clip_hgh; did you mean grpo.clip_high?"),
    (["synth", "x", "--tain", "3"], "unknown option --tain; did you mean --train?"),
    (["synth", "x", "--train", "many"], "argument --train: invalid int value: 'many'"),
    (["demo", "--grpo.stps", "3"], "unknown option grpo.stps; did you mean grpo.steps?"),
    (["init-model", "x", "--family", "gpt"], "argument --family: invalid choice: 'gpt'"),
    (["report"], "the following arguments are required: RUN"),
])
def test_usage_errors_are_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("veripo: error: ") and words in lines[0]


@pytest.mark.parametrize(("error", "code", "line"), [
    (CheckpointError("a shard\nis missing"), 2, "veripo: error: a shard is missing"),
    (KeyboardInterrupt(), 130, "veripo: interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "r/a.parquet"), 2,
     "veripo: error: cannot write r/a.parquet: No space left on device"),
])
def test_errors_of_a_command(handed_over, capsys, error, code, line):
    handed_over("veripo_fast.demo.run", "run_demo", error)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_bugs_keep_their_traceback(handed_over, error):
    handed_over("veripo_fast.demo.run", "run_demo", error)
    with pytest.raises(type(error)):
        main(["demo"])


def test_help_and_version(capsys):
    for arguments in ([], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        assert code == 0 and capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"veripo-fast {__version__}\n"


def test_environment_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    set_environment()
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["TOKENIZERS_PARALLELISM"]) == ("0", "false")


def test_exit_codes_of_the_process(veripo, tmp_path):
    assert veripo("show-config", cwd=tmp_path).returncode == 0
    failed = veripo("show-config", "--grpo.steps", "0")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "veripo: error: grpo: steps must be greater than 0, got 0\n"


def test_reader_that_goes_away_gets_no_traceback():
    process = start(sys.executable, "-m", "veripo_fast.cli", "show-config", cwd=REPOSITORY, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(PATIENCE_SECONDS), errors) == (141, "")
