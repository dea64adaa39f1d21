"""`veripo bench kernels` on tiny shapes: what is compared, what is refused, what a line says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from veripo_kernels import reference

from bench import measure, recipe
from bench.kernels import bench_kernels, cases, child, peers, rows
from veripo_fast import cli, commands

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results folder; called with a name it gives the lines written there."""
    monkeypatch.setattr(recipe, "RESULTS", tmp_path)
    return lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def here(monkeypatch):
    """Children's tasks are done in this process."""
    monkeypatch.setattr(child, "call", lambda task, interpret=False, **arguments: child.TASKS[task](**arguments))


def turning_clock(seconds: list[float]):
    """A clock that runs the call and tells one given time after the other."""
    left = iter(seconds)

    def clock(run):
        run()
        return next(left)

    return clock


# -- measuring -------------------------------------------------------------------------------------------------------

def test_rounds_are_paired_and_turn():
    order = []
    ways = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = measure.paired(ways, 2, turning_clock([1, 2, 3, 20, 30, 10]), warmups=1)
    assert order == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]
    assert seconds == {"a": [1, 10], "b": [2, 20], "c": [3, 30]}


def test_a_ratio_is_taken_round_by_round():
    ratio = measure.Ratio.of([1.0, 40.0, 3.0], [1.0, 10.0, 2.0])
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 1.0, 4.0)
    assert ratio.fields("r") == {"r_median": 1.5, "r_min": 1.0, "r_max": 4.0}


def test_peak_memory_counts_what_was_freed_again_and_not_what_was_there():
    there = torch.ones(8 << 20)
    torch.ones(48 << 20)  # an earlier, higher peak
    found = measure.peak_bytes(lambda: torch.ones(16 << 20).sum() + there.sum(), CPU)
    assert 60 << 20 < found < 80 << 20


# -- problems --------------------------------------------------------------------------------------------------------

def test_problems_are_peaked_and_half_idle_when_asked():
    case = cases.problem(cases.Shape(2048, 512, 8192), torch.float32, CPU, idle=0.5)
    assert 0.1 < cases.mean_entropy(case) < 1.0
    assert float((case.slopes == 0).float().mean()) == 0.5
    assert case.cu_seqlens.diff().tolist() == [512] * 4
    dense = cases.problem(cases.Shape(2048, 512, 8192), torch.float32, CPU)
    assert (dense.slopes != 0).all() and torch.equal(dense.token_ids, case.token_ids)
    logits = cases.logits(cases.Shape(40, 1, 8192), torch.float32, CPU).logits
    entropy = reference.entropy(logits).mean()
    assert 0.1 < entropy < 1.0


@pytest.mark.parametrize(("tokens", "lengths"), [(7, [3, 4]), (1024, [512, 512]), (3000, [750] * 4)])
def test_completions_cover_all_tokens(tokens, lengths):
    assert cases.completions(tokens, CPU).diff().tolist() == lengths


# -- peers -----------------------------------------------------------------------------------------------------------

COMPILED = {"cut-cross-entropy"}
"""Peers that compile themselves on a CPU: half a minute that only the bench itself spends."""


def test_every_peer_that_runs_here_computes_the_same():
    for op, ways in peers.PEERS.items():
        case = rows.build(op, (96, 16, 300), torch.float32, CPU, idle=0.5)
        naive = ways["naive torch"].run(case)
        truth = ways["naive torch"].run(case.to(torch.float64))
        assert list(ways)[:2] == ["veripo", "naive torch"]
        for name, peer in ways.items():
            if peer.missing(CPU) is None and name not in COMPILED:
                got = peer.run(case)
                assert got.keys() <= truth.keys() and len(got) >= 1
                assert bench_kernels.differences(got, naive, truth) == {}, (op, name)


def test_a_peer_that_cannot_run_says_why():
    missing = {name: peer.missing(CPU) for name, peer in peers.PEERS["linear_nll"].items()}
    assert missing["veripo"] is None
    assert missing["Liger fused linear"] in ("needs a GPU", "liger-kernel is not installed")
    unknown = peers.Peer(print, "no-such-kernels")
    old = peers.Peer(print, torch_function="no_such_function")
    assert unknown.missing(CPU) == "no-such-kernels is not installed"
    assert old.missing(CPU) == f"torch {torch.__version__} has no no_such_function"


def test_a_recipe_names_the_build_of_torch(monkeypatch):
    """PyPI's metadata says 2.13.0 where torch itself says 2.13.0+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu999")
    assert recipe.versions()["torch"] == "2.13.0+cu999"
    assert peers.Peer(print).version() == "torch 2.13.0+cu999"


# -- the comparison --------------------------------------------------------------------------------------------------

@pytest.fixture
def crooked(monkeypatch):
    """Peers of an op: ours, naive, one that is wrong by 1 %, one that raises, and one that is wrong at full size."""
    def without_others(hidden, head, token_ids):
        return 0.99 * peers.naive_logprobs(hidden, head, token_ids)

    def failing(hidden, head, token_ids):
        raise RuntimeError("first line\nno kernel for this device")

    def right_when_small(hidden, head, token_ids):
        return peers.naive_logprobs(hidden, head, token_ids) * (1.5 if len(hidden) > 96 else 1)

    extra = {name: peers.Peer(peers.partial(peers.logprobs_step, run))
             for name, run in (("wrong", without_others), ("failing", failing), ("late", right_when_small))}
    ways = peers.PEERS["linear_logprobs"]
    kept = {name: ways[name] for name in ("veripo", "naive torch")}
    monkeypatch.setitem(peers.PEERS, "linear_logprobs", kept | extra)


@pytest.mark.usefixtures("crooked", "here")
def test_only_peers_that_agree_are_timed():
    shape = cases.Shape(128, 32, 512)
    comparison = bench_kernels.Comparison("linear_logprobs", shape, torch.float32, CPU, 0.0, [])
    rows = {row["peer"]: row for row in comparison.rows(2)}
    timed = {name for name, row in rows.items() if "median_seconds" in row}
    assert timed == {"veripo", "naive torch"}
    assert rows["wrong"]["not_timed"].startswith("another result: ") and "off by 0.01" in rows["wrong"]["not_timed"]
    assert rows["failing"]["not_timed"] == "RuntimeError: no kernel for this device"
    assert rows["late"]["not_timed"].startswith("another result on the whole shape: ")
    ours = rows["veripo"]
    assert ours["baseline"] == "naive torch" and ours["baseline_version"] == f"torch {torch.__version__}"
    assert len(ours["seconds"]) == 2 and ours["time_ratio_min"] <= ours["time_ratio_median"] <= ours["time_ratio_max"]
    assert (ours["tokens"], ours["hidden"], ours["vocabulary"], ours["dtype"]) == (128, 32, 512, "float32")
    assert ours["gradient_bytes"] == 4 * 32 * (128 + 512) and rows["naive torch"]["time_ratio_median"] == 1
    assert all(bench_kernels.told(row) for row in rows.values())


@pytest.mark.usefixtures("crooked", "here")
def test_command_line_writes_lines_with_their_recipe_and_a_plot(results, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--ops", "linear_logprobs", "--shape", "96", "16", "300",
                                      "--device", "cpu", "--rounds", "2", "--peers", "WRONG", "--plot"])
    bench_kernels.main()
    rows = results("kernels")
    assert [row["peer"] for row in rows] == ["veripo", "naive torch", "wrong"]
    assert all({"command", "versions", "device", "date", "commit"} <= row.keys() for row in rows)
    assert rows[0]["command"].startswith("python bench_kernels.py --ops")
    assert (tmp_path / "kernels.png").stat().st_size > 5000
    assert "not timed: another result" in capsys.readouterr().out


def test_a_word_that_no_peer_has_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--ops", "gather_logprobs", "--peers", "Liger"])
    with pytest.raises(SystemExit):
        bench_kernels.main()
    assert ("no peer has 'Liger' in its name; there are torch cross_entropy, TRL selective_log_softmax"
            in capsys.readouterr().err)


@pytest.mark.usefixtures("here")
def test_rows_without_peers():
    rows = {row["row"]: row for row in bench_kernels.own_rows(CPU, 2, 8)}
    assert len(rows) == 4 and rows["accuracy against float64"]["impl"] == "triton"
    accuracy = rows["accuracy against float64"]
    assert accuracy["passed"] and 0 < accuracy["logprob_error_max"] < 2e-4 < accuracy["naive_logprob_error_max"]
    assert all("V reduced" in row["note"] for name, row in rows.items() if "transient" in name)


def test_a_child_measures_and_a_failing_one_says_what_it_said():
    row = child.peak_of("linear_logprobs", "naive torch", (512, 16, 8192), torch.float32, CPU)
    assert row["gradient_bytes"] == 4 * 16 * (512 + 8192) and row["peak_bytes"] > 2 * 4 * 512 * 8192
    with pytest.raises(child.ChildError, match="KeyError: 'nobody'"):
        child.call("peak", op="linear_logprobs", peer="nobody", shape=[4, 4, 4], dtype="float32", idle=0.0,
                   workspace_bytes=1)


# -- rows ------------------------------------------------------------------------------------------------------------

def test_rows_judge_by_their_limits():
    shape = cases.Shape(32, 16, 130)
    over = rows.against_products(shape, CPU, torch.float32, train_head=True, rounds=2,
                                 clock=turning_clock([1.2, 1, 1, 1.2]))
    under = rows.against_products(shape, CPU, torch.float32, train_head=False, rounds=1, clock=turning_clock([1.1, 1]))
    assert (over["value"], over["passed"], over["limit"]) == (1.2, False, 1.15) and under["passed"]
    assert over["products_tflop_per_second"] == pytest.approx(2 * 3 * 32 * 16 * 130 / 1e12, rel=1e-3)
    assert "3 products" in over["row"] and "2 products" in under["row"]
    read = rows.against_read(shape, CPU, torch.float32, rounds=1, clock=turning_clock([1.0, 2.0]))
    assert (read["value"], read["passed"]) == (1.0, True) and read["copy_gb_per_second"] == read["veripo_gb_per_second"]
    half = rows.idle_tokens(shape, CPU, torch.float32, rounds=1, clock=turning_clock([1.0, 0.71]))
    assert (half["value"], half["passed"]) == (0.71, False)


@pytest.mark.parametrize(("seconds", "started", "passed"), [
    ([0.1, 1.0], ["a"] * 3, True), ([0.1, 1.0], ["a"] * 4, False), ([0.2, 1.0], ["a"], False),
    ([0.1, 1.0], None, True)])
def test_losses_are_judged_by_time_and_launches(monkeypatch, seconds, started, passed):
    monkeypatch.setattr(rows, "launches", lambda run, device: started)
    for op in ("grpo_loss", "dpo_loss"):
        row = rows.against_eager(op, 64, CPU, rounds=1, clock=turning_clock(seconds))
        assert row["passed"] is passed and row["launches"] == started


@pytest.mark.parametrize(("name", "plainest"), [("vespo", "grpo"), ("discopop", "sigmoid")])
@pytest.mark.parametrize(("seconds", "started", "passed"), [
    ([1.2, 1.0], None, True), ([1.3, 1.0], None, False), ([1.0, 1.0], ["a"] * 4, False)])
def test_losses_over_the_plainest(monkeypatch, name, plainest, seconds, started, passed):
    monkeypatch.setattr(rows, "launches", lambda run, device: started)
    row = rows.against_plainest(name, 64, CPU, rounds=1, clock=turning_clock(seconds))
    assert row["passed"] is passed and row["value"] == seconds[0] and row["row"] == f"{name} over {plainest}"


def test_memory_rows_leave_out_the_gradients():
    peaks = {("veripo", 64): 300, ("veripo", 128): 340, ("naive torch", 64): 1000}

    def peak(op, peer, shape, dtype, device, workspace_bytes):
        return {"peak_bytes": peaks[peer, shape.tokens], "gradient_bytes": 100 if shape.tokens == 64 else 130}

    shape = cases.Shape(64, 16, 130)
    grown, share = rows.memory(shape, CPU, torch.float32, long_tokens=128, peak=peak)
    assert (grown["value"], grown["passed"]) == (1.05, True) and (share["value"], share["passed"]) == (0.2, True)
    assert share["peak_ratio"] == 0.3


def test_accuracy_sees_a_rounded_head(monkeypatch):
    ours = rows.our_policy_loss

    def rounded(case, impl):
        found = ours(case, "torch")
        return found | {"logprobs": found["logprobs"] + 3e-4}

    assert rows.accuracy([40, 32, 300], rows=16)["passed"]
    monkeypatch.setattr(rows, "our_policy_loss", rounded)
    assert not rows.accuracy([40, 32, 300], rows=16)["passed"]


# -- veripo bench ----------------------------------------------------------------------------------------------------

def test_veripo_bench_hands_its_options_over(tmp_path, monkeypatch, capsys):
    script = tmp_path / "kernels" / "bench_kernels.py"
    script.parent.mkdir()
    script.write_text("import sys, beside\nprint(sys.argv[1:], __name__, beside.here)\n")
    script.with_name("beside.py").write_text("here = True\n")
    monkeypatch.setattr(commands, "BENCH", tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert cli.main(["bench", "kernels", "--shape", "1", "2", "3", "--plot", "--help"]) == 0
    assert capsys.readouterr().out == "['--shape', '1', '2', '3', '--plot', '--help'] __main__ True\n"


def test_veripo_bench_outside_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "BENCH", tmp_path)
    assert cli.main(["bench", "step"]) == 2
    assert "needs a checkout" in capsys.readouterr().err
    assert cli.main(["bench", "kernel"]) == 2 and "kernels" in capsys.readouterr().err


def test_there_is_a_script_for_every_name():
    choices = next(options for flag, options in commands.COMMANDS["bench"].arguments if flag == "name")["choices"]
    assert all((commands.BENCH / commands.BENCHES[name]).exists() for name in choices)
    assert Path(commands.BENCH).name == "bench"
