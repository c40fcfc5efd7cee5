"""Tests of report.py, ship.py, ablations.py, bench.py: what they leave alone, and what they refuse.

    python -m pytest assets/test_scripts.py
"""
import csv
import functools
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from assets import ablations, bench, recordings, report, ship
from assets.checkpoints import load_checkpoint
from assets.run import Run
from assets.test_recordings import grey_video
# the fixtures among these work in a file that imports them
from test_dreamer4 import contents, copied, error, finished, load_run
from test_episodes import write_episodes


def refused(capsys, script, *arguments, words=()):
    error(capsys, functools.partial(script.main, [*map(str, arguments)]), *words)


@pytest.mark.parametrize("script", [ablations, bench, recordings, report, ship])
def test_a_script_has_a_help_and_names_a_bad_argument_in_one_line(script, capsys):
    refused(capsys, script, "a", "b", "c", "--bogus", words=["argument"])
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert script.__doc__.splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("script", [recordings, report, ship])
def test_output_that_nobody_reads_is_one_line(script, finished, tmp_path):
    grey_video(tmp_path / "source/a.mp4", 3)
    arguments = {recordings: ["video", tmp_path / "source", tmp_path / "data"], report: [],
                 ship: [finished / "agent.pt", tmp_path / "small.pt"]}[script]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, script.__file__, *arguments], stdout=writer, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(writer)
    assert process.returncode == 2
    [line] = process.stderr.splitlines()
    assert line.startswith("error: ") and "Broken pipe" in line


# --------------------------------------------------------------------------------------------------
# report.py

@pytest.fixture
def assets(tmp_path, monkeypatch):
    """The folder that report.py writes to."""
    folder = tmp_path / "assets"
    monkeypatch.setattr(report, "ASSETS", folder)
    monkeypatch.setattr(report, "EPISODES", folder / "episodes.csv")
    return folder


def test_without_matplotlib_the_tables_are_printed_and_nothing_is_written(
        copied, assets, monkeypatch, capsys):
    evaluation = json.loads((copied / "eval.json").read_text())
    evaluation["value_corr"] = None
    (copied / "eval.json").write_text(json.dumps(evaluation))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        report.main([str(copied)])
    output = capsys.readouterr()
    [line] = output.err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: ") and "pip install matplotlib" in line
    # the K that the tiny preset has
    assert "K = 1" in output.out and "K = 4" in output.out and "K_max = 64" not in output.out
    assert "discounted returns, correlation | nan |" in output.out
    assert "the same, real |" in output.out
    assert not assets.exists()


def test_the_figures_and_the_drives_of_six_runs_are_written(
        finished, copied, assets, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    figures = {}

    def write_figure(name, figure, write=report.write_figure, **options):
        figures[name] = figure
        write(name, figure, **options)

    monkeypatch.setattr(report, "write_figure", write_figure)
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings | {"seed": 7}))
    # in another order
    lines = [line.split(",")[::-1] for line in (copied / "episodes.csv").read_text().splitlines()]
    (copied / "episodes.csv").write_text("\n".join(map(",".join, lines)))
    report.main([*[str(finished)] * 5, str(copied)])
    assert "| trained in dreams | 12 |" in capsys.readouterr().out
    assert len(figures["curves.png"].axes[0].lines) == 6
    names = {"curves.png", "episodes.csv", "returns.png"}
    assert {path.name for path in assets.iterdir()} == names
    with open(assets / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(finished / "episodes.csv", newline="") as file:
        drives = [row["return"] for row in csv.DictReader(file)]
    assert [row["return"] for row in rows] == drives * 6
    assert {row["training_seed"] for row in rows} == {"0", "7"}


def test_the_learning_curve_counts_environment_steps(tmp_path):
    (tmp_path / "data").mkdir()
    for i, frames in enumerate((501, 501, 251, 1)):
        np.savez(tmp_path / f"data/{i}.npz", rewards=np.zeros(frames, np.float32))
    settings = {"action_repeat": 4, "collect_episodes": 2, "round_episodes": 1}
    # the second line of a round stands for all of it
    log = [{"phase": "collect", "round": r, "return_mean": x} for r, x in ((0, 9), (0, 1), (1, 2))]
    log.append({"phase": "agent", "round": 1, "reward": 0.5})
    curve = report.learning_curve(report.read_rewards(tmp_path), settings, log, final=3)
    assert curve == ([4.0, 5.0, 5.0], [1, 2, 3])


def test_ppo_is_looked_up_after_as_many_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PPO_TABLE", tmp_path / "ppo.csv")
    rows = ["0,100,while training,1", "0,200,while training,2", "0,300,while training,3",
            "0,300,evaluation,9", "1,100,while training,4"]
    report.PPO_TABLE.write_text("\n".join(["seed,frames,what,return_mean", *rows]))
    assert report.ppo_curves() == [([100, 200, 300], [1, 2, 3]), ([100], [4])]
    # the second seed has not come so far
    assert report.ppo_after(100) == [1, 4] and report.ppo_after(150) == [2]


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]", '{"a": "b"}', '{"seed": "$"}'])
@pytest.mark.parametrize("name", ["config.json", "eval.json", "episodes.csv", "metrics.jsonl"])
def test_a_run_with_a_missing_or_broken_file_is_named(copied, assets, capsys, name, text):
    (copied / name).unlink()
    if text is not None:
        (copied / name).write_text(text)
    refused(capsys, report, copied, words=[copied, "finished run"])
    assert not assets.exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, Path.touch, lambda path: None])
def test_what_is_no_run_is_named(assets, tmp_path, capsys, make):
    make(tmp_path / "run")
    refused(capsys, report, tmp_path / "run", words=[tmp_path / "run", "missing or no file"])


def test_a_pipe_among_the_episodes_is_not_waited_for(copied, assets, capsys):
    os.mkfifo(copied / "data/pipe.npz")
    refused(capsys, report, copied, words=[copied, "no file"])


def test_episodes_too_short_for_neighbours_have_no_correlation_with_them(tmp_path):
    write_episodes(tmp_path / "data", [9] * 3)
    assert math.isnan(report.neighbour_correlation(report.read_rewards(tmp_path)))


@pytest.mark.parametrize("text", [None, "policy,return\nreturn,1\n"])
def test_missing_or_broken_drives_are_named(assets, capsys, text):
    if text is not None:
        assets.mkdir()
        report.EPISODES.write_text(text)
    refused(capsys, report, words=[report.EPISODES])


# --------------------------------------------------------------------------------------------------
# ship.py

def test_a_shipped_agent_is_a_checkpoint_in_half_precision(finished, tmp_path, capsys):
    ship.main([str(finished / "agent.pt"), str(tmp_path / "small.pt")])
    state = load_checkpoint(tmp_path / "small.pt")
    assert {x.dtype for x in state["ema"].values() if x.is_floating_point()} == {torch.float16}
    assert "optimizers" not in state and "model" not in state


@pytest.mark.parametrize("more", [("--imagination_steps", 9), ("--rounds", 3)])
def test_a_shipped_agent_is_not_trained_on(copied, capsys, more):
    ship.main([str(copied / "agent.pt"), str(copied / "small.pt")])
    (copied / "small.pt").replace(copied / "agent.pt")
    shipped = (copied / "agent.pt").read_bytes()
    again = [str(word) for word in ("--run", copied, *more)]
    error(capsys, lambda: train.main(again), "agent.pt", "cannot be trained on")
    assert (copied / "agent.pt").read_bytes() == shipped


@pytest.mark.parametrize("small", ["", ".", "/", "/proc/x/y.pt", "agent.pt/x", "agent.pt", "data",
                                   "config.json", "tokenizer.pt"])
def test_where_an_agent_cannot_be_shipped_to_is_refused(copied, monkeypatch, capsys, small):
    before = contents(copied)
    monkeypatch.chdir(copied)
    refused(capsys, ship, copied / "agent.pt", small)
    assert contents(copied) == before


def test_weights_too_large_for_half_precision_are_not_shipped(copied, capsys):
    state = load_checkpoint(copied / "agent.pt")
    state["ema"]["reward_head.layers.4.bias"] += 2e5
    torch.save(state, copied / "agent.pt")
    refused(capsys, ship, copied / "agent.pt", copied / "small.pt", words=["half precision"])
    assert not (copied / "small.pt").exists()


@pytest.mark.parametrize("name, change, reason", [
    ("tokenizer.pt", {}, "holds no agent"), ("agent.pt", {"finished": False}, "in the middle")])
def test_a_checkpoint_without_a_finished_agent_is_not_shipped(
        copied, capsys, name, change, reason):
    torch.save(torch.load(copied / name) | change, copied / name)
    refused(capsys, ship, copied / name, copied / "small.pt", words=[reason])
    assert not (copied / "small.pt").exists()


# --------------------------------------------------------------------------------------------------
# ablations.py

def test_ablations_dream_with_the_ks_of_the_model_and_leave_the_run_as_it_was(
        copied, tmp_path, monkeypatch):
    def few_windows(episodes, rng, count, length, original=ablations.random_windows):
        return original(episodes, rng, 4, length)

    # ablations.py replaces it
    monkeypatch.setattr(train, "load_data", train.load_data)
    monkeypatch.setattr(ablations, "random_windows", few_windows)
    before, paths = contents(copied), sorted(copied.rglob("*"))
    out = tmp_path / "out.csv"
    names = ["the same without masking", "diffusion forcing"]
    for name in names:
        if out.exists():
            # as an editor may leave it
            out.write_bytes(out.read_bytes().rstrip())
        ablations.main([str(copied), "--steps", "1", "--only", name, "--out", str(out)])
    assert contents(copied) == before and sorted(copied.rglob("*")) == paths
    with open(out, newline="") as file:
        rows = [(row["variant"], row["K"]) for row in csv.DictReader(file)]
    # k_max of the tiny preset is 4
    assert rows == [(names[0], "4"), (names[1], "1"), (names[1], "2"), (names[1], "4")]


@pytest.mark.parametrize("option, value, word", [
    ("--out", "/proc/x/o.csv", "/proc/x/o.csv"), ("--out", "/tmp", "/tmp"),
    ("--out", "/dev/full", "no file"), ("--only", "zzz", "as in the preset"),
    ("--steps", 0, "at least 1"), ("--steps", -5, "at least 1")])
def test_ablations_refuse_bad_options_before_they_train(
        finished, tmp_path, monkeypatch, capsys, option, value, word):
    monkeypatch.setattr(ablations, "measure", None)
    arguments = ["--out", tmp_path / "out.csv", option, value]
    refused(capsys, ablations, finished, *arguments, words=[word])
    assert not (tmp_path / "out.csv").exists()


def test_ablations_name_settings_that_this_version_does_not_know(copied, tmp_path, capsys):
    state = torch.load(copied / "tokenizer.pt")
    state["config"]["bogus"] = 1
    torch.save(state, copied / "tokenizer.pt")
    arguments = [copied, "--out", tmp_path / "out.csv"]
    refused(capsys, ablations, *arguments, words=["tokenizer.pt", "bogus"])


def test_ablations_want_episodes_that_a_dream_can_go_on_from(finished, tmp_path, capsys):
    data = types.SimpleNamespace(held_out=[{"rewards": np.zeros(4)}])
    rows = ablations.measure(load_run(finished), data, "as in the preset", 1, tmp_path)
    error(capsys, lambda: next(rows), finished / "data", "too short")


def test_ablations_compare_variants_within_a_seed(tmp_path, capsys):
    table = tmp_path / "x.csv"
    header = "variant,steps,K,psnr,psnr_other_actions,copy_psnr,std_ratio,minutes,seed\n"
    psnrs = [("as in the preset", 4, 20, 1), ("as in the preset", 4, 30, 2),
             ("no ramp weight", 4, 21, 1), ("no ramp weight", 4, 33, 2),
             ("a tokenizer of one round", 4, 10, 1), ("the same without masking", 4, 8, 1),
             ("diffusion forcing", 8, 25, 1)]
    table.write_text(header + "".join(
        f"{name},300,{k},{psnr},9,7,1,1,{seed}\n" for name, k, psnr, seed in psnrs))
    ablations.main(["--out", str(table)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:6] for row in rows] == [
        ["as in the preset", "300", "4", "2", "+0.00 ± 0.00", "25.00"],
        # 1 and 3 more
        ["no ramp weight", "300", "4", "2", "+2.00 ± 1.00", "27.00"],
        ["a tokenizer of one round", "300", "4", "1", "-10.00 ± nan", "10.00"],
        ["the same without masking", "300", "4", "1", "-2.00 ± nan", "8.00"],
        ["diffusion forcing", "300", "8", "1", "–", "25.00"]]
    for text in (None, "", "a,b\n1,2\n", header + "x,300,4,y,9,7,1,1,1\n"):
        table.unlink(missing_ok=True)
        if text is not None:
            table.write_text(text)
        refused(capsys, ablations, "--out", table, words=[table, "no table"])


def test_ablations_are_not_added_to_another_table(copied, tmp_path, capsys):
    table = tmp_path / "x.csv"
    arguments = (copied, "--steps", 1, "--only", "ramp", "--out", table)
    for text in (b"a,b\n", b"\xff\xfe"):
        table.write_bytes(text)
        refused(capsys, ablations, *arguments, words=[table])
        assert table.read_bytes() == text


# --------------------------------------------------------------------------------------------------
# bench.py

def test_costs_on_paper_are_those_of_the_work_itself(tmp_path, capsys):
    cfg = train.TrainConfig(**train.PRESETS["tiny"])
    bench.costs(cfg)
    costs = json.loads(capsys.readouterr().out)
    for name, frames, work, _ in bench.jobs(Run(tmp_path, cfg, 0, None, device="cpu")):
        if name == "imagination":
            continue
        with FlopCounterMode(display=False) as counter:
            work()
        gflop = counter.get_total_flops() / frames / 1e9
        assert costs[f"{name}_gflop"] == round(gflop, 3) > 0
    # of a frame at least what goes into and out of each layer, float32, of four tokens
    kept = 4 * cfg.depth * 2 * cfg.width * 4
    assert costs["dynamics_training_mb"] * 1e6 > kept
