"""Tests of files.py and flags.py: run folders, killed runs, bad input, damage, full disks."""
import contextlib
import dataclasses
import gc
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from torch.distributed import run as torchrun
from torch.testing import assert_close

import train
from assets import bench, files, flags, latents, measures
from assets.checkpoints import load_checkpoint
from assets.files import in_one_line
from assets.latents import encode_episodes
from assets.run import FILES, Run, compile_blocks
from dreamer4 import Agent, Dynamics, Tokenizer, frozen
# the fixtures among these work in a file that imports them
from test_dreamer4 import (ALL, README, as_flags, config, contents, copied, differences, error,
                           finished, load, load_run, main, new_batch, only_with_m_slow,
                           read_episodes, seeded, signals, start)
from test_episodes import Ticker, sample, ticker, write_episodes

CHECKPOINTS = ("tokenizer.pt", "dynamics.pt", "agent.pt")


def are_in(episodes, others):
    """Whether all of these episodes {seed: arrays} are among the others, to the bit."""
    return all(np.array_equal(array, others[seed][name])
               for seed, episode in episodes.items() for name, array in episode.items())


# --------------------------------------------------------------------------------------------------
# What a run leaves behind

def test_episode_files_have_the_documented_arrays(finished):
    episodes = read_episodes(finished)
    # six at random, two by the policy
    assert sorted(episodes) == list(range(8))
    for e in episodes.values():
        T = len(e["frames"])
        assert {name: (array.shape, array.dtype.name) for name, array in e.items()} == {
            "frames": ((T, 64, 64, 3), "uint8"), "actions": ((T, 2), "int16"),
            "rewards": ((T,), "float32"), "terminal": ((), "bool")}
        assert 20 < T <= 40 and not e["terminal"]
        assert (e["actions"][0] == -1).all()
        assert (e["actions"][1:] >= 0).all() and e["actions"].max() < 5
        assert e["rewards"][0] == 0 and e["rewards"][1:].any()


def any_moved(weights, others):
    return any((x != others[name]).any() for name, x in weights.items())


def test_checkpoints_are_plain_data_and_self_contained(finished):
    state = load(finished, "agent.pt")
    place = [state[name] for name in ("phase", "round", "step", "seed")]
    assert place == ["imagination", 1, 6, 0]
    assert set(state) >= set("model ema heads tokenizer optimizers config actions format".split())
    # every phase has trained
    world = load(finished, "dynamics.pt")["ema"]
    assert any_moved({f"dynamics.{name}": x for name, x in world.items()}, state["ema"])
    assert any_moved(state["heads"], state["ema"])


def test_a_checkpoint_alone_is_enough_without_optimizer_in_half_precision(
        finished, tmp_path, capsys):
    state = load(finished, "agent.pt")
    del state["optimizers"], state["model"]
    for name in ("tokenizer", "ema", "heads"):
        state[name] = {key: x.half() for key, x in state[name].items()}
    torch.save(state, tmp_path / "small.pt")
    run = ("--checkpoint", tmp_path / "small.pt", "--run", tmp_path / "empty")
    main("--phase", "evaluate", "--episodes", 1, *run)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 1
    main("--phase", "dream", "--length", 12, *run)
    assert len(imageio.imread(tmp_path / "empty/dream.gif", index=None)) == 12


def test_the_same_command_again_retrains_nothing_and_changes_nothing(copied, capsys):
    before, began = contents(copied), time.process_time()
    main(*ALL, "--run", copied)
    assert contents(copied) == before and time.process_time() - began < 3
    assert capsys.readouterr().out.count("finished before") >= 4


def test_after_more_training_the_evaluation_is_made_again(copied, monkeypatch):
    os.utime(copied / "eval.json", (0, 0))
    calls = []
    for name in ("dream", "evaluate"):
        monkeypatch.setattr(train, name, lambda *args, name=name: calls.append(name))
    main(*ALL, "--run", copied)
    assert calls == ["dream", "evaluate"]


def test_data_larger_than_memory_gives_the_same_batches(tmp_path):
    write_episodes(tmp_path, [9, 12, 30, 15])
    batches = []
    # all, some or none of the frames
    for room, in_memory in [(8.0, 4), (3e-6, 1), (0.0, 0)]:
        data = train.Data(ticker(memory_gb=room), tmp_path)
        batches.append(sample(data, 50, 6, ["frames", "actions", "rewards"]))
        assert sum("frames" in e for e in data.episodes) == in_memory
    for batch in batches[1:]:
        assert all(np.array_equal(x, batch[name]) for name, x in batches[0].items())


def test_latents_are_encoded_once_and_again_for_another_tokenizer_a_damaged_file_or_new_episodes(
        tmp_path, monkeypatch):
    folder = write_episodes(tmp_path / "data", [9] * 3)
    encoded, encode = [], latents.encode
    monkeypatch.setattr(
        latents, "encode", lambda tokenizer, frames: encoded.append(0) or encode(tokenizer, frames))

    def count(tokenizer):
        data = train.Data(ticker(), folder)
        encoded.clear()
        encode_episodes(data, tokenizer, tmp_path)
        for e in data.episodes:
            assert np.array_equal(e["latents"], encode(tokenizer, e["frames"]))
            # which would hold a file open for every episode
            assert not isinstance(e["latents"], np.memmap)
        return len(encoded)

    first, second = (frozen(Tokenizer(ticker())) for _ in range(2))
    (tmp_path / "latents-of-mine").mkdir()
    # neither a file nor a link is of an older tokenizer
    (tmp_path / "latents-00000000").touch()
    (tmp_path / "latents-11111111").symlink_to(tmp_path / "latents-of-mine")
    assert [count(tokenizer) for tokenizer in (first, first, second, first)] == [3, 0, 3, 3]
    # those of the tokenizer before are gone
    [file] = tmp_path.glob("latents*/001.npz")
    assert all((tmp_path / f"latents-{end}").exists() for end in ("of-mine", "0" * 8, "1" * 8))
    whole, right = file.read_bytes(), np.load(file)["latents"]
    for wrong in (right[:, :-1], right[..., None], right.astype(np.float32), right * np.nan):
        np.savez(file, latents=wrong)
        assert [count(first), count(first)] == [1, 0]
    # one byte anywhere among the latents is enough
    for damaged in (b"", whole[:-9], flipped(whole), flipped(whole, 400)):
        file.write_bytes(damaged)
        assert [count(first), count(first)] == [1, 0]
    # times of files are not finer than that
    time.sleep(0.02)
    write_episodes(folder, [9] * 2, frames=np.full((9, 8, 8, 3), 50, np.uint8))
    assert count(first) == 2


def test_an_update_clips_gradients_averages_weights_and_follows_the_learning_rate(tmp_path):
    cfg = ticker(warmup=4, cooldown=0.5, tokenizer_steps=100, ema=0.9)
    model, rate = Tokenizer(cfg), 0.01
    loop = train.Loop(Run(tmp_path, cfg, 0, None), "tokenizer", model, rate)
    next(iter(loop))
    before = {name: x.clone() for name, x in loop.ema.state_dict().items()}
    loop.update(1e6 * sum((p ** 2).sum() for p in model.parameters()), {})
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(1, rel=1e-3)
    # over few steps at first: a tenth of what was there
    for name, p in model.named_parameters():
        assert_close(loop.ema.state_dict()[name], 0.1 * before[name] + 0.9 * p.detach())
    # Muon's matrices take twice the rate of AdamW
    assert [o.param_groups[0]["lr"] for o in loop.optimizers] == pytest.approx([rate / 4, rate / 2])
    rates = []
    for loop.step in (1, 3, 50, 75, 99):
        rates.append(loop.learning_rate() / rate)
    assert rates == pytest.approx([0.5, 1, 1, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.02])


# --------------------------------------------------------------------------------------------------
# Killed and stopped runs

def file_names(folder):
    """Names of the files of a run, and of its episodes."""
    return [{path.name for path in folder.glob(pattern)} for pattern in ("*.*", "data/*")]


EVALUATION = {"eval.json", "episodes.csv", "dream.gif", "policy.gif"}
# A kill in the evaluation has a test of its own.
TRAINING_ONLY = """
import sys, train
train.dream = train.evaluate = lambda *args: None
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("kills, script, not_made", [
    (1, ["-c", TRAINING_ONLY], EVALUATION),
    pytest.param(20, [train.__file__], set(), marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_gives_the_same_bits(
        finished, tmp_path, kills, script, not_made):
    folder, rng, phases = tmp_path / "run", np.random.default_rng(kills), []
    lines = len((finished / "stdout").read_text().splitlines())
    # A killed run does not get further than its last checkpoint, and every start prints anew: it
    # lives for a few lines at a time.
    for _ in range(kills):
        process = start("-u", *script, *ALL, "--run", folder, "--save_seconds", 0)
        wanted, printed = rng.integers(1, 2 + 2 * lines // kills), 0
        while printed < wanted and (line := process.stdout.readline()):
            printed += "finished before" not in line
            phases.append(line.split("]")[0])
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        # no episode is ever half there
        for path in folder.glob("data/*.npz"):
            settings = json.loads((folder / "config.json").read_text())["config"]
            train.load_episode(path, train.TrainConfig(**settings))
    process = start(*script, *ALL, "--run", folder)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    if kills == 20:
        assert {"[collect", "[tokenizer", "[dynamics", "[agent", "[imagination"} <= set(phases)
    for name in CHECKPOINTS:
        assert not differences(load(folder, name), load(finished, name))
    files, episodes = file_names(finished)
    assert file_names(folder) == [files - not_made, episodes]
    # no episode is lost, changed or there twice
    assert are_in(read_episodes(finished), read_episodes(folder))


@pytest.fixture
def beginning(finished, tmp_path):
    """The finished run at the start of its tokenizer phase: config and first round of episodes."""
    folder = tmp_path / "run"
    (folder / "data").mkdir(parents=True)
    shutil.copy(finished / "config.json", folder)
    for seed in range(6):
        shutil.copy(finished / f"data/{seed:010d}.npz", folder / "data")
    return folder


def test_stopped_in_every_phase_at_its_middle_and_end_a_run_gives_the_same_bits(
        finished, beginning, monkeypatch):
    folder, update, stopped = beginning, train.Loop.update, []

    def update_and_stop(self, *args):
        update(self, *args)
        place = (self.phase, self.run.round, self.step)
        if self.step in (3, self.steps - 1) and place not in stopped:
            stopped.append(place)
            # a second signal changes nothing
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Loop, "update", update_and_stop)
    for name in ("dream", "evaluate"):
        monkeypatch.setattr(train, name, lambda *args: None)
    for _ in range(15):
        # a new process knows nothing
        torch.seed()
        try:
            main("--run", folder)
        except SystemExit as stop:
            phase, _, step = stopped[-1]
            file = "agent.pt" if phase == "imagination" else f"{phase}.pt"
            assert stop.code == 130 and load(folder, file)["step"] == step + 1
            assert train.STOP == [signal.SIGTERM] * 2
        train.STOP.clear()
    assert len(stopped) == 14 and not list(folder.rglob(".*"))
    for name in CHECKPOINTS:
        assert not differences(load(folder, name), load(finished, name))
    # those that the policy collected, too
    assert are_in(read_episodes(finished), read_episodes(folder))
    # the phases' pictures are not forgotten
    assert file_names(finished)[0] - file_names(folder)[0] == EVALUATION


def kill(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("phase, module, name, picture", [
    ("tokenizer", train, "write_reconstructions", "tokenizer.png"),
    ("agent", train, "write_dream", "agent.gif"),
    ("imagination", measures, "imagination_health", "config.json")])
def test_a_phase_killed_after_its_last_step_draws_and_reports_the_same_later(
        copied, tmp_path, monkeypatch, capsys, phase, module, name, picture):
    whole, killed = load_run(shutil.copytree(copied, tmp_path / "whole")), load_run(copied)
    train_it = getattr(train, f"train_{phase}")
    whole.round = killed.round = 2
    train_it(whole)
    report = capsys.readouterr().out.splitlines()[-1].replace(str(whole.folder), str(killed.folder))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill)
        with pytest.raises(KeyboardInterrupt):
            train_it(killed)
    assert not load(copied, FILES[phase])["finished"]
    # no step is repeated
    monkeypatch.setattr(train.Loop, "update", kill)
    train_it(killed)
    assert capsys.readouterr().out.splitlines()[-1] == report
    assert (copied / picture).read_bytes() == (whole.folder / picture).read_bytes()
    assert not differences(load(copied, FILES[phase]), load(whole.folder, FILES[phase]))
    train_it(killed)
    assert capsys.readouterr().out == f"[{phase}] finished before\n"


def test_an_evaluation_killed_while_it_writes_its_video_is_made_again(copied, monkeypatch):
    made = ["eval.json", "episodes.csv", "policy.gif"]
    for name in made:
        (copied / name).unlink()
    monkeypatch.setattr(train, "dream", lambda *args: None)
    monkeypatch.setattr(measures, "model_measures", lambda *args: ({}, []))
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_video", kill)
        with pytest.raises(SystemExit) as ended:
            main(*ALL, "--run", copied)
    # no error of its own, 2
    assert ended.value.code == 130
    # nor a table that is not of the old result
    assert not any((copied / name).exists() for name in made)
    main(*ALL, "--run", copied)
    assert all((copied / name).exists() for name in made)


def test_an_interrupted_collection_goes_on_with_the_episodes_it_would_have_played(copied):
    whole, run = read_episodes(copied), load_run(copied)
    # they were played together with 0, 3 and 4
    for seed in (1, 2, 5):
        (copied / f"data/{seed:010d}.npz").unlink()
    train.collect(run)
    assert read_episodes(copied).keys() == whole.keys()
    assert are_in(whole, read_episodes(copied))
    tokenizer, agent, _ = run.load_agent(copied / "agent.pt")
    policy = train.AgentPolicy(tokenizer, agent, run.cfg, 0, random_share=0.5)
    four = dict(train.play(run.cfg, policy, range(4)))
    two = dict(train.play(run.cfg, policy, range(4), done={0, 1}))
    assert [*four] == [0, 1, 2, 3] and [*two] == [2, 3] and are_in(two, four)
    assert len({e["actions"].tobytes() for e in four.values()}) == 4


# --------------------------------------------------------------------------------------------------
# Several processes, and compiled blocks

PARALLEL = """
import json, os, sys
import torch
import train
from assets.run import Run

folder, out = sys.argv[1:]
gradients, curves = {}, {}
if "WORLD_SIZE" in os.environ:
    train.dist.init_process_group("gloo")

def update(self, loss, metrics, frames=0, original=train.Loop.update):
    original(self, loss, metrics, frames)
    # the loss of the whole batch is the mean over the processes
    mean = loss.detach().clone()
    if self.run.world_size > 1:
        train.dist.all_reduce(mean)
    curves.setdefault(self.phase, []).append(float(mean) / self.run.world_size)
    # of the first step
    if self.phase not in gradients:
        gradients[self.phase] = {name: p.grad.clone() for name, p in self.model.named_parameters()
                                 if p.grad is not None}
        train.STOP.append("for the test")

def to_device(self, batch, original=Run.to_device):
    batch = original(self, batch)
    if "d" in batch:
        # on every process, the sequences that bootstrap are those paid for
        others = torch.arange(len(batch["d"])) % self.cfg.shortcut_every > 0
        assert (batch["d"][others] == 1 / self.cfg.k_max).all(), "d > d_min without bootstrap"
    return batch

train.Loop.update, Run.to_device = update, to_device
train.write_dream = lambda *args: None
train.write_reconstructions = lambda *args: [(torch.zeros(1, 8, 8, 3).byte().numpy(),) * 2]

def steps(phase, **changes):
    saved = json.load(open(folder + "/config.json"))
    sizes = {"batch_size": 8, "short_length": 12, "tokenizer_batch": 6}
    cfg = train.TrainConfig(**saved["config"] | sizes | changes)
    run = Run(folder, cfg, 0, saved["actions"], "tiny")
    run.dtype, run.device = torch.float32, "cpu"
    run.round = {"tokenizer": 1, "dynamics": 0, "agent": 2}[phase]
    # it is stopped after the first step, and resumes
    for attempt in range(2):
        try:
            getattr(train, "train_" + phase)(run)
        except SystemExit as stop:
            if stop.code != 130:
                raise
        train.STOP.clear()

# the dynamics' step 30 has a short batch, the agent's step 0 a long one
steps("tokenizer", tokenizer_steps=36)
steps("dynamics", tokenizer_steps=36, dynamics_steps=36)
steps("agent", tokenizer_steps=36, agent_steps=6)
if train.is_main_process():
    torch.save((gradients, curves), out)
# 12 long sequences would be 6 for each process: refused, or they bootstrap as paid for
try:
    steps("agent", short_length=18)
except SystemExit:
    pass
"""


def test_two_processes_have_the_gradients_and_losses_of_one_with_the_whole_batch_also_resumed(
        finished, tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    one, two = (shutil.copytree(finished, tmp_path / name) for name in ("one", "two"))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    processes = [start(script, one, tmp_path / "one.pt"),
                 start(*launch, script, two, tmp_path / "two.pt")]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    gradients, curves = load(tmp_path, "one.pt")
    gradients_of_two, curves_of_two = load(tmp_path, "two.pt")
    counts = {phase: len(curve) for phase, curve in curves.items()}
    assert counts == {"tokenizer": 6, "dynamics": 6, "agent": 6}
    assert set(gradients) == set(curves) and all(gradients.values())
    assert_close(gradients_of_two, gradients, rtol=1e-3, atol=5e-6)
    assert_close(curves_of_two, curves, rtol=2e-3, atol=1e-5)


def test_numbers_follow_from_seed_phase_round_and_step(tmp_path):
    def numbers(seed=0, round=0, phase="agent", step=0):
        run = Run(tmp_path, ticker(), seed, None)
        run.round = round
        drawn = run.seed_phase(phase, step).integers(2 ** 60)
        return drawn, torch.rand(()).item()

    first = numbers()
    assert numbers() == first
    for other in ({"seed": 1}, {"round": 1}, {"phase": "dynamics"}, {"step": 1}):
        assert not set(numbers(**other)) & set(first)


def test_the_gpu_preset_divides_among_eight_processes_and_other_batches_are_refused(
        tmp_path, monkeypatch, capsys):
    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 8}.items():
        monkeypatch.setattr(train.dist, name, lambda value=value: value)

    def create(**changes):
        Run(tmp_path, train.TrainConfig(**train.PRESETS["gpu"] | changes), 0, None)

    create()
    for blamed, changes in [
            ("rollouts", {"rollouts": 100}), ("tokenizer_batch", {"tokenizer_batch": 12}),
            ("batch_size", {"batch_size": 48}), ("batch_size", {"long_length": 48})]:
        error(capsys, lambda: create(**changes), f"--{blamed} gives batches")


def test_compiled_blocks_stay_compiled_in_every_phase_and_round(monkeypatch):
    """Past a limit of graphs for one function PyTorch goes on without compiling, and only warns."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile",
        lambda self, **options: compile_(self, backend="eager", **options))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    # compile_blocks changes it: put it back at the end
    limit = torch._dynamo.config.recompile_limit
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", limit)
    torch._dynamo.reset()
    for _ in range(2):
        for model in (Tokenizer(config()), Dynamics(config()), Agent(config())):
            compile_blocks(model)
            for B, T in [(8, 6), (4, 12)]:
                z, actions, *signals = new_batch(B, T)
                if isinstance(model, Tokenizer):
                    images = torch.rand(2, 4, 3, *model.config.image_size)
                    loss, _ = model(images, model.draw(2, 4))
                elif isinstance(model, Dynamics):
                    loss, _ = model(z, actions, model.draw(B, T))
                else:
                    loss, _ = model(z, actions, *signals, model.dynamics.draw(B, T))
                loss.backward()
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------
# Flags

def parse(arguments):
    return flags.parse(arguments, train.__doc__, train.PRESETS, train.TrainConfig)


def test_every_setting_is_a_flag_with_an_explanation(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    settings = dataclasses.asdict(train.TrainConfig())
    for name in settings:
        assert re.search(rf"\n  --{name} X\s+[^\s-].{{8,}}", text), name
    given = vars(parse(as_flags(settings)))
    assert {name: given[name] for name in settings} == settings


def test_torchrun_takes_the_commands_of_the_readme():
    """It looks for flags of its own, abbreviated too, in what follows the script, as in --run."""
    text = README.replace("\\\n", "") + train.__doc__
    commands = re.findall(r"(?:    |srun )torchrun (.*)", text)
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(re.sub(r"\$\(.*?\)", "host", command), comments=True)
        arguments = torchrun.parse_args(words)
        assert arguments.training_script == "train.py"
        parse(arguments.training_script_args)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())["config"]


def test_episodes_are_counted_for_one_phase_and_a_policy_adds_them(copied, capsys):
    before, played = read_config(copied), len(read_episodes(copied))
    collect = ("--phase", "collect", "--run", copied, "--episodes")
    by_hand = ("--policy", copied / "agent.pt")
    main(*collect, 3, *by_hand)
    # the rounds keep their episodes and their number
    assert sorted(read_episodes(copied))[played:] == [50_000, 50_001, 50_002]
    assert read_config(copied) == before
    # the same command continues, a larger number adds
    (copied / "data/0000050001.npz").unlink()
    for number in (3, 3, 4):
        main(*collect, number, *by_hand)
        assert len(read_episodes(copied)) == played + number
    assert capsys.readouterr().out.count("finished before") == 1
    main(*collect, played + 4)
    assert len(read_episodes(copied)) == 2 * 4 + played
    assert read_config(copied) == before | {"collect_episodes": played + 4}


def test_imagination_dreams_with_the_latents_of_its_agent(copied):
    run = load_run(copied)
    run.round, run.cfg.tokenizer_steps = 1, 33
    train.train_tokenizer(run)
    trained_on = load(copied, "tokenizer.pt")["ema"]
    main("--phase", "imagination", "--run", copied, "--imagination_steps", 8)
    own = load(copied, "agent.pt")["tokenizer"]
    assert any_moved(trained_on, own)
    # of whose latents those are that were written last
    tokenizer = Tokenizer(run.cfg)
    tokenizer.load_state_dict(own)
    [folder] = copied.glob("latents-*")
    with np.load(folder / "0000000003.npz") as file:
        latents = file["latents"]
    frames = read_episodes(copied)[3]["frames"]
    # in the precision of this machine
    assert np.array_equal(latents, train.encode(run.for_inference(tokenizer), frames))


def test_in_a_round_beyond_the_last_dreams_are_as_noisy_as_in_the_last(copied, monkeypatch):
    """One of a run whose --rounds were made fewer."""
    def imagine(*_, temperature):
        temperatures.append(temperature)
        train.check_stop([signal.SIGTERM])

    temperatures, run = [], load_run(copied)
    monkeypatch.setattr(train, "imagine", imagine)
    run.round, run.cfg.rounds, run.cfg.temperature = 3, 2, 1.6
    with pytest.raises(SystemExit):
        train.train_imagination(run)
    assert temperatures == [1.6]


def test_a_link_to_itself_in_the_place_of_a_run_is_named(finished, tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    error(capsys, lambda: main("--phase", "tokenizer", "--checkpoint", finished / "agent.pt",
                               "--run", loop), loop, "episodes")


def test_a_shipped_checkpoint_leaves_the_default_run_alone(finished, tmp_path, monkeypatch):
    shutil.copy(finished / "agent.pt", tmp_path / "shipped.pt")
    folders = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "dream", lambda run, *_: folders.append(run.folder))
    main("--phase", "dream", "--checkpoint", "shipped.pt")
    main("--phase", "dream", "--checkpoint", finished / "agent.pt")
    main("--phase", "dream", "--preset", "tiny")
    assert folders == [Path("runs/shipped"), finished, Path("runs/default")]


def test_recorded_data_is_learned_from_without_an_environment(tmp_path, capsys):
    run = tmp_path / "run"
    before = contents(write_episodes(run / "data", [30] * 11))
    recorded = ("--image_size", "8x8", "--action_spec", 9)
    main("--preset", "tiny", "--run", run, *recorded, "--rounds", 2)
    assert contents(run / "data") == before
    assert (run / "dream.gif").exists() and not (run / "eval.json").exists()
    # one round: the last, with the temperature of the last
    state = load(run, "agent.pt")
    assert state["round"] == 0 and state["config"]["rounds"] == 1
    for phase in ("collect", "evaluate"):
        error(capsys, lambda: main("--phase", phase, "--run", run), "recorded data", "--env")


class Wide(Ticker):
    """Draws pictures twice as wide as high, and all alike."""
    observation_space = Discrete(1)

    def __init__(self, render_mode=None):
        super().__init__(render_mode, image=False)
        self.observation_space = Discrete(1)

    def look(self):
        return 0

    def render(self):
        return np.zeros((100, 200, 3), np.uint8)


gym.register("Wide-v0", Wide, max_episode_steps=40)


def test_a_new_run_asks_its_environment_unless_flags_say_otherwise(tmp_path, monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(train, "collect", lambda run, *_: runs.append(run))

    def open_run(folder, *flags):
        main("--phase", "collect", "--preset", "tiny", "--run", tmp_path / folder, *flags)
        return runs[-1].cfg.image_size, runs[-1].cfg.action_repeat

    wide = ("--env", "Wide-v0")
    assert open_run("a", *wide) == ((48, 88), 1)
    assert "resized from 100x200 to 48x88" in capsys.readouterr().out
    assert open_run("a", *wide, "--image_size", "32x32", "--action_repeat", 3) == ((32, 32), 3)
    assert open_run("a") == ((64, 64), 4)
    # what a run was made with, it keeps
    runs[-1].save_config()
    assert open_run("a", "--env", "CarRacing-v3", "--action_repeat", 2) == ((64, 64), 2)


def test_frames_that_are_all_alike_are_not_collected(tmp_path, capsys):
    collect = ("--phase", "collect", "--env", "Wide-v0", "--run", tmp_path / "run")
    error(capsys, lambda: main("--preset", "tiny", *collect), "Wide-v0", "same picture")
    assert not (tmp_path / "run").exists()


def test_recorded_data_meets_the_environment_that_it_is_from(tmp_path, capsys):
    recorded = ("--image_size", "8x8", "--action_spec", 5)
    run = ("--run", tmp_path)
    write_episodes(tmp_path / "data", [30] * 11)
    main("--preset", "tiny", *run, *recorded)
    # rewards of actions 0 ... 4
    main("--phase", "evaluate", *run, "--env", "Ticker-v0", "--episodes", 2)
    assert json.loads((tmp_path / "eval.json").read_text())["random_mean"] > 15
    words = ("agent.pt", "sizes", "[5]", "[5, 5]")
    error(capsys, lambda: main("--phase", "evaluate", *run, "--env", "CarRacing-v3"), *words)


# --------------------------------------------------------------------------------------------------
# Bad input: one line that names the file or the flag, exit code 2, nothing lost

def refused(capsys, folder, text, *words):
    error(capsys, lambda: main("--preset", "tiny", "--run", folder, *text.split()), *words)


@pytest.mark.parametrize("flag", re.split(r",\s+", """--bogus 3, --phase train, --preset huge,
    --batch_size many, --compile maybe, --image_size wide, --image_size 64, --width 30, --patch 0,
    --k_max 6, --episodes 0, --hold 0, --action_bins 1, --action_repeat 0, --long_every 0,
    --updates 0, --batch_size 0, --horizon 0, --envs 0, --seed -1, --seed 9999, --recent_share 2,
    --gamma nan, --weight_decay -1, --temperature inf, --device cuda, --device gpu,
    --tokenizer_lr -1, --env Nothing-v0, --env CarRacing-v99, --policy no.pt,
    --run=, --checkpoint="""))
def test_a_bad_flag_is_named(tmp_path, capsys, flag):
    refused(capsys, tmp_path / "run", flag, re.match("--(.*?)[ =]", flag)[1])


def outside(field):
    """Values that a field of the settings must not have."""
    bounds = train.TrainConfig.range_of(field)
    if not bounds:
        return [3]
    low, high = bounds
    fraction = [] if field.type is float else [low + 0.5]
    return [low - 1, high * 2 + 1, math.nan, math.inf, -math.inf, "1", None, True, *fraction]


@pytest.mark.parametrize("field", dataclasses.fields(train.TrainConfig), ids=lambda f: f.name)
def test_every_setting_has_a_type_and_a_range(field):
    good = getattr(train.TrainConfig(), field.name)
    for value in outside(field):
        value = (value, 8) if isinstance(good, tuple) else value
        with pytest.raises(ValueError, match=f"{field.name} is .* but must be "):
            train.TrainConfig(**{field.name: value})


def test_the_help_shows_every_range(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    for name, bounds in {"gamma": "[0 ... 1]", "registers": "[0 ... 100]",
                         "seed": "[0 ... 9998]"}.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"  --{name} ")]
        assert line.endswith(bounds)


@pytest.mark.parametrize("text", [
    "--image_size 1000000x1000000", "--depth 1000000", "--tokenizer_depth 1000000",
    "--shortcut_every 1000000", "--collect_episodes 1000000000", "--envs 1000000000",
    "--batch_size 1000000000",
    "--rollouts 1000000000", "--k_max 1099511627776", "--hold 100000000000000000000"])
def test_what_memory_cannot_hold_ends_in_one_line_and_leaves_nothing(tmp_path, capsys, text):
    name = text.split()[0].strip("-")
    refused(capsys, tmp_path / "run", text, name)
    assert not (tmp_path / "run").exists()


def out_of_memory_of_numpy():
    np.empty((10 ** 6, 10 ** 6, 10 ** 3))


def out_of_memory_of_torch():
    torch.empty(10 ** 6, 10 ** 6, 10 ** 3)


def too_large_for_numpy():
    np.empty((10 ** 9, 10 ** 9, 10 ** 9))


def too_large_for_torch():
    torch.empty(10 ** 9, 10 ** 9, 10 ** 9)


def out_of_memory_of_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("work", [
    out_of_memory_of_numpy, out_of_memory_of_torch, too_large_for_numpy, too_large_for_torch,
    out_of_memory_of_cuda])
def test_full_memory_ends_in_one_line_and_other_errors_stay_what_they_are(capsys, work):
    error(capsys, in_one_line()(work), "not enough memory", "--batch_size")

    def broken():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        in_one_line()(broken)()


@in_one_line()
def without_a_compiler():
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")


def test_a_missing_compiler_and_a_path_with_a_line_break_are_one_line(capsys):
    error(capsys, without_a_compiler, "--compile", "C++ compiler")
    error(capsys, lambda: files.fail("a\nb is missing"), "a b is missing")


def test_files_do_not_take_the_place_of_closed_streams(tmp_path):
    code = ("import sys; from assets.files import in_one_line\n"
            "with in_one_line(): open(sys.argv[1], 'w').write(str(open(sys.argv[1]).fileno()))")
    (tmp_path / "x").touch()
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command],
                   cwd=Path(train.__file__).parent, check=True)
    assert int((tmp_path / "x").read_text()) > 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_script_and_the_bench_on_paper_without_a_traceback(monkeypatch, number):
    def interrupted(*_):
        try:
            signal.raise_signal(number)
        finally:
            cleared.append(number)

    cleared = []
    # in the background a shell has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(bench, "costs", interrupted)
    for script in (in_one_line()(interrupted),
                   lambda: main("--phase", "bench", "--preset", "paper")):
        with pytest.raises(SystemExit) as ended:
            script()
        assert ended.value.code == 130
    assert cleared == [number] * 2


def test_seeds_of_collection_and_evaluation_never_meet():
    last = flags.MAX_SEED * train.SEEDS_PER_RUN + train.SEEDS_PER_RUN - 1
    # four are played for contexts
    assert last < train.EVALUATION_SEEDS - 4 and len(str(last)) <= 10
    with pytest.raises(ValueError, match="collect_episodes and round_episodes"):
        train.TrainConfig(collect_episodes=60_000, round_episodes=40_000, rounds=2)


@pytest.mark.parametrize("text, word", [
    ("--k 0", "k is 0"), ("--k 3", "k must"), ("--k 16", "k must"),
    ("--phase dream --record dream.avi", "--record"),
    ("--phase tokenizer", "--phase collect"), ("--phase dynamics", "--phase tokenizer"),
    ("--phase agent", "--phase tokenizer"), ("--phase imagination", "--phase agent"),
    ("--phase evaluate", "agent.pt"), ("--phase dream", "agent.pt"),
    ("--phase evaluate --checkpoint no.pt", "no.pt"), ("--phase collect --policy no.pt", "no.pt"),
    ("--phase collect --policy no.pt --episodes -3", "--episodes"),
    ("--phase collect --policy no.pt --episodes 0", "--episodes"),
    ("--phase collect --policy no.pt --episodes 50001", "--episodes")])
def test_a_missing_phase_or_file_is_named(tmp_path, capsys, text, word):
    refused(capsys, tmp_path / "run", text, word)


@pytest.mark.parametrize("word, text", [
    ("--width", "--phase agent --agent_steps 30 --width 64"),
    ("--latents", "--phase dynamics --latents 4"),
    ("--image_size", "--phase evaluate --image_size 32x32"),
    ("--action_bins", "--phase dynamics --action_bins 3"),
    ("action space", "--phase evaluate --env Ticker-v0"), ("--preset", "--preset cpu"),
    ("--seed", "--phase collect --seed 5"), ("long_length is 1", "--long_length 1"),
    ("length", "--phase dream --length 4"), ("--port", "--phase play --port 70000"),
    ("--image_size", "--phase collect --collect_episodes 10 --image_size 32x32"),
    ("--env", "--phase collect --collect_episodes 10 --env Ticker-v0"),
    ("--action_repeat", "--rounds 3 --action_repeat 8"),
    ("--action_repeat", "--phase tokenizer --tokenizer_steps 40 --action_repeat 8"),
    ("not finished", "--phase dynamics --dynamics_steps 40 --tokenizer_steps 99"),
    ("--long_length", "--phase dynamics --dynamics_steps 40 --long_length 99")])
def test_flags_that_contradict_a_run_are_refused_and_leave_it_as_it_was(
        copied, capsys, word, text):
    before = contents(copied)
    error(capsys, lambda: main("--run", copied, *text.split()), word)
    assert contents(copied) == before
    # and it still goes on
    main(*ALL, "--run", copied)
    assert contents(copied) == before


def agent_with(finished, path, **changes):
    """Writes the finished agent's checkpoint as one of a model with other settings."""
    state = load(finished, "agent.pt")
    small = train.TrainConfig(**state["config"] | changes)
    agent = Agent(small)
    state |= {"config": dataclasses.asdict(small), "tokenizer": Tokenizer(small).state_dict(),
              "model": agent.state_dict(), "ema": agent.state_dict(), "prior": {},
              "heads": train.Imagination(agent).state_dict()}
    torch.save(state, path)


def test_a_run_collects_with_a_policy_of_another_architecture_and_keeps_its_own(
        finished, tmp_path):
    agent_with(finished, tmp_path / "other.pt", width=64, image_size=(32, 32))
    run = ("--run", tmp_path / "run", "--preset", "tiny")
    main("--phase", "collect", *run, "--policy", tmp_path / "other.pt", "--episodes", 2)
    saved = read_config(tmp_path / "run")
    # the episodes are what the policy saw
    assert saved["width"] == 32 and saved["image_size"] == [32, 32]
    assert read_episodes(tmp_path / "run")[50_000]["frames"].shape[1:] == (32, 32, 3)


@pytest.mark.parametrize("config, word", [
    ({"image_size": (32, 32)}, "image_size"), ({"k_max": 2, "k": 2}, "k must be")])
def test_a_policy_of_another_architecture_does_not_spoil_a_run(copied, capsys, config, word):
    """One that its episodes or settings contradict."""
    run, other = load_run(copied), copied / "other.pt"
    agent_with(copied, other, **config)
    before = contents(copied)
    error(capsys, lambda: train.collect(run, other, 500, 2), word, "other.pt")
    assert contents(copied) == before


def test_a_run_keeps_its_settings_when_it_is_given_a_checkpoint_of_another(
        finished, copied, capsys):
    settings = json.loads((copied / "config.json").read_text())
    settings["config"]["env"] = "Other-v0"
    (copied / "config.json").write_text(json.dumps(settings))
    before = contents(copied)
    for phase in ("collect", "tokenizer"):
        error(capsys, lambda: main("--phase", phase, "--run", copied, "--episodes", 8,
                                   "--checkpoint", finished / "tokenizer.pt"), "another --run")
    assert contents(copied) == before


def test_checkpoints_of_two_architectures_are_named(copied, capsys):
    state = load(copied, "tokenizer.pt")
    state["config"]["latents"] = 4
    weights = Tokenizer(train.TrainConfig(**state["config"])).state_dict()
    torch.save(state | {"model": weights, "ema": weights}, copied / "tokenizer.pt")
    (copied / "agent.pt").unlink()
    error(capsys, lambda: main("--phase", "agent", "--run", copied), "tokenizer.pt", "dynamics.pt",
          "latents is 8 and 4")


def test_a_run_takes_the_architecture_of_its_checkpoints(copied):
    run = load_run(copied)
    # as in a run whose config.json is of another preset
    run.cfg.width, run.cfg.gamma = 64, 0.5
    state = run.load("agent.pt")
    assert run.cfg.width == state["config"]["width"] != 64
    # what may change later is not of the architecture
    assert run.cfg.gamma == 0.5


SETTINGS = {"config": dataclasses.asdict(train.TrainConfig()), "actions": {"sizes": [5]}, "seed": 0,
            "preset": "cpu"}


@pytest.mark.parametrize("text", [
    "[]", '{"config": 3}', "{}", "{", "[" * 10 ** 5, *(
        json.dumps(SETTINGS | wrong)
        for wrong in ({"actions": True}, {"seed": "x"}, {"preset": 5}, {"config": {}}))])
def test_a_damaged_config_is_named(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    error(capsys, lambda: main("--phase", "tokenizer", "--run", tmp_path), "config.json", "damaged")


def test_a_config_with_a_setting_that_is_no_number_is_named(copied, capsys):
    settings = json.loads((copied / "config.json").read_text())
    settings["config"]["action_repeat"] = math.nan
    (copied / "config.json").write_text(json.dumps(settings))
    error(capsys, lambda: main("--phase", "tokenizer", "--run", copied), "config.json", "NaN")


@pytest.mark.parametrize("wrong", [
    {"low": [[1], [1, 2]]}, {"low": [10 ** 400, 0]}, {"low": [10 ** 30, 0], "dtype": "int64"},
    {"dtype": "i4,(2f4"}, {"low": [2 ** 63, 0], "dtype": "int64"}])
def test_actions_of_a_config_that_cannot_be_read_are_named(tmp_path, capsys, wrong):
    actions = {"sizes": [2, 2], "low": [0, 0], "step": [1, 1], "dtype": "float32"} | wrong
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"actions": actions}))
    error(capsys, lambda: main("--phase", "collect", "--run", tmp_path), "config.json", "damaged")


@pytest.mark.parametrize("sizes", [["a", "b"], [0, 5], [2.5, 5], [10 ** 30, 5], None, [],
                                   [3, 2], [5]])
def test_actions_of_a_config_that_are_none_are_named(tmp_path, capsys, sizes):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"actions": {"sizes": sizes}}))
    error(capsys, lambda: main("--phase", "collect", "--run", tmp_path), "action_spec")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(copied, capsys):
    for path in (copied / "data/0000000001.npz", copied / "config.json"):
        path.unlink()
        os.mkfifo(path)
        error(capsys, lambda: main("--phase", "dream", "--run", copied), path.name, "no file")


def test_nor_in_the_place_of_a_file_to_write(tmp_path, capsys):
    for name in ("metrics.jsonl", ".x.part"):
        os.mkfifo(tmp_path / name)
    log = in_one_line()(Run(tmp_path, ticker(), 0, None).log)
    error(capsys, lambda: log("agent"), "metrics.jsonl", "no file")
    files.write_file(tmp_path / "x", lambda file: file.write(b"x"))
    assert contents(tmp_path) == {Path("x"): b"x"}


def test_a_file_whose_writing_ctrl_c_breaks_off_leaves_nothing(tmp_path):
    def write(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(tmp_path / "x", write)
    assert not contents(tmp_path)


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x", "RANK": "nobody"}, {"RANK": "1"},
    {"TORCHELASTIC_RUN_ID": "x"}])
def test_variables_of_other_launchers_mean_nothing(
        finished, tmp_path, monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for phase in ("tokenizer", "dream"):
        main("--phase", phase, "--run", finished, "--length", 9, "--record", tmp_path / "x.gif")
        assert f"[{phase}]" in capsys.readouterr().out


def test_a_terminal_that_cannot_show_a_sign_stops_nothing(finished):
    process = start("-X", "utf8=0", train.__file__, "--help", env={"PYTHONIOENCODING": "ascii"})
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and "\\u03bb" in stdout and not stderr


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        copied, capsys, monkeypatch):
    forward, calls = Dynamics.forward, []

    def broken(self, *args):
        loss, metrics = forward(self, *args)
        calls.append(0)
        return loss * (math.nan if len(calls) == 4 else 1), metrics

    monkeypatch.setattr(Dynamics, "forward", broken)
    dynamics = ("--phase", "dynamics", "--run", copied, "--dynamics_steps", 40)
    words = ("dynamics", "not finite", "dynamics.pt", "--dynamics_lr")
    error(capsys, lambda: main(*dynamics, "--save_seconds", 0), *words)
    state = load(copied, "dynamics.pt")
    assert state["step"] == 33
    assert all(x.isfinite().all() for x in (state["model"] | state["ema"]).values())


# --------------------------------------------------------------------------------------------------
# Damaged files and full disks

def cut(content):
    return content[:300]


def emptied(content):
    return b""


def no_archive(content):
    return b"PK not a zip"


def shadowed(content):
    """An archive with something else under the name of an array."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("frames", "x")
    return file.getvalue()


def flipped(content, place=None):
    """One byte is inverted: in the middle, unless said otherwise."""
    changed = bytearray(content)
    changed[len(content) // 2 if place is None else place] ^= 0xFF
    return bytes(changed)


def of_unknown_compression(content):
    return flipped(content, content.rfind(b"PK\1\2") + 10)


# what becomes of the file's bytes, or of some of its arrays; None: not there
@pytest.mark.parametrize("damage", [
    cut, emptied, no_archive, flipped, of_unknown_compression, shadowed,
    {"actions": None, "rewards": None, "terminal": None},
    {"actions": np.array([{}] * 9, dtype=object)}, {"actions": np.zeros((9, 2), np.int16)},
    {"actions": np.full((9, 1), 5, np.int16)}, {"actions": np.full((9, 1), -2, np.int16)},
    {"frames": np.uint8(3)}, {"frames": np.zeros((9, 8, 9, 3), np.uint8)},
    {"frames": np.zeros((9, 8, 8, 3), np.float32)}, {"terminal": np.zeros(9, bool)},
    {"rewards": np.zeros(8, np.float32)}, {"rewards": np.zeros(9)},
    {"rewards": np.full(9, np.nan, np.float32)}, {"rewards": np.full(9, 1e38, np.float32)},
    {"frames": np.zeros((0, 8, 8, 3), np.uint8), "actions": np.zeros((0, 1), np.int16),
     "rewards": np.zeros(0, np.float32)}])
def test_a_bad_episode_file_is_named(tmp_path, capsys, damage):
    folder = write_episodes(tmp_path / "run/data", [9, 9, 9])
    path = folder / "001.npz"
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        arrays = dict(np.load(path)) | damage
        np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    before = contents(folder)
    settings = {"phase": "tokenizer", "env": "Ticker-v0", "image_size": (8, 8),
                "tokenizer_context": 2, "tokenizer_length": 4}
    refused(capsys, tmp_path / "run", " ".join(as_flags(settings)), "001.npz")
    assert contents(folder) == before


# what becomes of the file's bytes, of some of its entries, or of all it holds
@pytest.mark.parametrize("damage", [
    cut, emptied, no_archive, flipped, {"format": 99}, {"step": Ticker()}, [1, 2]])
@pytest.mark.parametrize("name, phase", [
    ("tokenizer.pt", "tokenizer"), ("agent.pt", "all"), ("agent.pt", "evaluate")])
def test_a_bad_checkpoint_is_named_and_left_alone(copied, capsys, name, phase, damage):
    path = copied / name
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        torch.save(load(copied, name) | damage if isinstance(damage, dict) else damage, path)
    before = contents(copied)
    error(capsys, lambda: main("--phase", phase, "--run", copied), name)
    assert contents(copied) == before


def edit_config(**changes):
    def edit(state):
        state["config"] |= changes
    return edit


def edit_entry(name, value):
    def edit(state):
        state[name] = value
    return edit


def remove(name):
    def edit(state):
        del state[name]
    return edit


def spoil_a_weight(spoil):
    """A checkpoint with one weight replaced by spoil(of it)."""
    def edit(state):
        name, x = state["ema"].popitem()
        state["ema"][name] = spoil(x)
    return edit


def lose_a_weight(state):
    state["ema"].popitem()


def lose_the_metrics(state):
    state["finished"], state["metrics"] = False, {}


def change_a_shape(state):
    name, x = state["ema"].popitem()
    state["ema"][name] = x[None]


@pytest.mark.parametrize("edit", [
    remove("config"), remove("ema"), remove("seed"), remove("actions"), remove("phase"),
    edit_config(width=64, tokenizer_width=64), edit_config(width="wide"), edit_config(latents=16),
    edit_config(action_spec=(5, 6)), edit_config(gamma=float("nan")), edit_entry("config", [1]),
    edit_entry("ema", {}), edit_entry("ema", 3), edit_entry("ema", {"x": 3}),
    edit_entry("actions", "{}"), edit_entry("actions", "{"), edit_entry("round", -1),
    edit_entry("step", "many"), edit_entry("phase", "sleep"), lose_a_weight, change_a_shape,
    lose_the_metrics,
    edit_entry("round", 10 ** 30), edit_entry("metrics", [1]), edit_entry("metrics", {"x": "y"}),
    edit_entry("actions", "[" * 10 ** 5), edit_config(depth=10 ** 6),
    spoil_a_weight(lambda x: x * math.nan), spoil_a_weight(lambda x: x + 3e38),
    spoil_a_weight(torch.Tensor.to_sparse), spoil_a_weight(lambda x: x.to("meta")),
    spoil_a_weight(lambda x: torch.nested.nested_tensor([x]))])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_whose_contents_do_not_fit_together_is_named(
        finished, tmp_path, capsys, name, edit):
    state = load(finished, name)
    edit(state)
    torch.save(state, tmp_path / name)
    error(capsys, lambda: load_checkpoint(tmp_path / name), name, "do not fit together")


@pytest.mark.parametrize("change", [{"prior": None}, {"metrics": {"x": 1.0}}])
def test_an_unfinished_imagination_has_a_prior_and_its_metrics(finished, tmp_path, capsys, change):
    state = load(finished, "agent.pt") | {"finished": False} | change
    state = {name: x for name, x in state.items() if x is not None}
    torch.save(state, tmp_path / "agent.pt")
    error(capsys, lambda: load_checkpoint(tmp_path / "agent.pt"), "do not fit together")


def test_an_agent_whose_heads_are_incomplete_is_named(finished, tmp_path, capsys):
    for name in ("heads", "prior"):
        state = load(finished, "agent.pt")
        state[name] = {"policy_head.layers.1.bias": state["heads"]["policy_head.layers.1.bias"]}
        torch.save(state, tmp_path / "agent.pt")
        error(capsys, lambda: load_checkpoint(tmp_path / "agent.pt"), name)


@pytest.mark.parametrize("entry", ["heads", "tokenizer"])
def test_an_agent_without_its_parts_is_named(finished, tmp_path, capsys, entry):
    state = load(finished, "agent.pt")
    del state[entry]
    torch.save(state, tmp_path / "agent.pt")
    dream = ("--phase", "dream", "--checkpoint", tmp_path / "agent.pt")
    error(capsys, lambda: main(*dream), "agent.pt", "do not fit together", entry)


@pytest.mark.parametrize("optimizers", [None, [], [{}], [{"state": {}}], [{"state": {}}] * 2])
def test_a_checkpoint_without_its_optimizers_is_not_trained_on(copied, capsys, optimizers):
    state = load(copied, "agent.pt")
    state["optimizers"] = optimizers
    if optimizers is None:
        # as assets/ship.py leaves it
        del state["optimizers"]
    torch.save(state, copied / "agent.pt")
    more = ("--phase", "imagination", "--run", copied, "--imagination_steps", 9)
    error(capsys, lambda: main(*more), "agent.pt", "optimizers")


def one_number_for_all(entry):
    return {"exp_avg": torch.zeros(()).expand(entry["exp_avg"].shape)}


@pytest.mark.parametrize("entries", [
    {"exp_avg": torch.zeros(3)}, {"exp_avg": None}, {"step": torch.zeros(2)}, {"more": 1},
    {"exp_avg": torch.full((), math.nan)}, {"step": torch.tensor(-1.0)}, {},
    one_number_for_all])
def test_momenta_that_are_not_of_the_weights_are_refused(copied, capsys, entries):
    state = load(copied, "tokenizer.pt")
    momenta = state["optimizers"][0]["state"]
    for i in momenta:
        momenta[i] |= entries(momenta[i]) if callable(entries) else entries
    if not entries:
        del momenta[1]
    torch.save(state, copied / "tokenizer.pt")
    run = load_run(copied)
    run.round, run.cfg.tokenizer_steps = 1, 31
    error(capsys, lambda: train.train_tokenizer(run), "tokenizer.pt", "optimizers")


def test_rates_of_a_checkpoint_are_not_taken(copied):
    state = load(copied, "tokenizer.pt")
    for optimizer in state["optimizers"]:
        optimizer["param_groups"] = [{"lr": "high", "betas": 7}]
    torch.save(state, copied / "tokenizer.pt")
    run = load_run(copied)
    run.round, run.cfg.tokenizer_steps = 1, 31
    train.train_tokenizer(run)
    assert load(copied, "tokenizer.pt")["step"] == 31


@pytest.mark.parametrize("name, other", [("tokenizer.pt", "dynamics.pt"),
                                         ("dynamics.pt", "tokenizer.pt"),
                                         ("agent.pt", "tokenizer.pt")])
def test_a_checkpoint_in_the_place_of_another_is_named(copied, capsys, name, other):
    shutil.copy(copied / other, copied / name)
    phase = name.removesuffix(".pt")
    error(capsys, lambda: main("--phase", phase, "--run", copied), name, other[:-3])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_no_checkpoint(tmp_path, capsys, make):
    make(tmp_path / "agent.pt")
    for flag in ("--checkpoint", "--policy"):
        collect = ("--phase", "collect", "--preset", "tiny", "--run", tmp_path / "run")
        error(capsys, lambda: main(*collect, flag, tmp_path / "agent.pt"), "agent.pt", "no file")


@contextlib.contextmanager
def full_disk():
    """Within it files cannot grow beyond some kilobytes; not even pytest's log, if it is one."""
    # the memory that environments share is a file, too: from here on there is one
    multiprocessing.Array("b", 2 ** 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # metrics.jsonl, which has more lines on a slow machine, stays below that
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name, text", [
    ("dynamics.pt", "--phase dynamics --dynamics_steps 31"),
    ("agent.pt", "--phase imagination --imagination_steps 7"),
    ("0000000008.npz", "--phase collect --episodes 9"), ("dream.gif", "--phase dream --length 20")])
def test_a_full_disk_costs_nothing_that_was_there(copied, capsys, monkeypatch, name, text):
    before, noise = contents(copied), []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    with full_disk():
        work = ("--run", copied, *text.split())
        error(capsys, lambda: main(*work), name, "could not be written")
        # nothing tries again when it dies
        gc.collect()
    after = contents(copied)
    changed = {str(path) for path in after.keys() | before.keys()
               if after.get(path) != before.get(path)}
    assert changed <= {"config.json", "metrics.jsonl"} and not noise
