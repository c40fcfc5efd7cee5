"""Tests of files.py and flags.py: killed runs, bad input, damaged files, full disks, processes."""
import gc
import json
import math
import os
import resource
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train
from dreamer4 import Agent, Dynamics, Tokenizer
from test_dreamer4 import (ALL, Ticker, as_flags, config, contents, copied, differences, error,
                           finished, load, main, new_batch, only_with_m_slow, read_episodes,
                           seeded, signals, start, write_episodes)


def fresh(finished, folder):
    """The finished run at the start of its tokenizer phase: config and first round of episodes."""
    (folder / "data").mkdir(parents=True)
    shutil.copy(finished / "config.json", folder)
    for seed in range(6):
        shutil.copy(finished / f"data/{seed:010d}.npz", folder / "data")
    return folder


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_gives_the_same_bits(finished, tmp_path, kills):
    folder, rng, phases = tmp_path / "run", np.random.default_rng(kills), []
    lines = len((finished / "stdout").read_text().splitlines())
    # a killed run does not get further than its last checkpoint, and every start prints anew: a few lines at a time
    for _ in range(kills):
        process = start("-u", train.__file__, *ALL, "--run", folder, "--save_seconds", 0)
        wanted, printed = rng.integers(1, 2 + 2 * lines // kills), 0
        while printed < wanted and (line := process.stdout.readline()):
            printed += "finished before" not in line
            phases.append(line.split("]")[0])
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        for path in folder.rglob("*.npz"):                                   # no episode is ever half there
            train.load_episode(path, train.TrainConfig(**json.loads((folder / "config.json").read_text())["config"]))
    process = start(train.__file__, *ALL, "--run", folder)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert kills < 20 or {"[collect", "[tokenizer", "[dynamics", "[agent", "[imagination"} <= set(phases)
    for name in ("tokenizer.pt", "dynamics.pt", "agent.pt"):
        assert not differences(load(folder, name), load(finished, name))
    assert {path.name for path in folder.glob("*.*")} == {path.name for path in finished.glob("*.*")}
    assert {path.name for path in folder.glob("data/*")} == {path.name for path in finished.glob("data/*")}
    for seed, episode in read_episodes(finished).items():                    # no episode is lost, changed or there twice
        assert all(np.array_equal(x, read_episodes(folder)[seed][name]) for name, x in episode.items())


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_stopped_in_every_phase_at_its_middle_and_end_a_run_gives_the_same_bits(finished, tmp_path, monkeypatch,
                                                                              one_thread):
    folder, update, stopped = fresh(finished, tmp_path / "run"), train.Loop.update, []

    def update_and_stop(self, *args):
        update(self, *args)
        place = (self.phase, self.run.round, self.step)
        if self.step in (3, self.steps - 1) and place not in stopped:
            stopped.append(place)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Loop, "update", update_and_stop)
    for name in ("dream", "evaluate"):
        monkeypatch.setattr(train, name, lambda *args: None)
    for _ in range(15):
        torch.seed()                                                         # a new process knows nothing
        try:
            main("--run", folder)
        except SystemExit as stop:
            phase, _, step = stopped[-1]
            file = "agent.pt" if phase == "imagination" else f"{phase}.pt"
            assert stop.code == 130 and load(folder, file)["step"] == step + 1
        train.STOP.clear()
    assert len(stopped) == 14 and not list(folder.rglob(".*"))
    for name in ("tokenizer.pt", "dynamics.pt", "agent.pt"):
        assert not differences(load(folder, name), load(finished, name))
    for seed, episode in read_episodes(finished).items():                    # those that the policy collected, too
        assert all(np.array_equal(x, read_episodes(folder)[seed][name]) for name, x in episode.items())
    assert {path.name for path in finished.glob("*.*")} - {path.name for path in folder.glob("*.*")} == {
        "eval.json", "episodes.csv", "dream.gif", "policy.gif"}              # the pictures are not forgotten


PARALLEL = """
import json, os, sys
import torch
import train
folder, out = sys.argv[1:]
gradients, curves = {}, {}
if "WORLD_SIZE" in os.environ:
    train.dist.init_process_group("gloo")

def update(self, loss, metrics, frames=0, original=train.Loop.update):
    original(self, loss, metrics, frames)
    mean = loss.detach().clone()                               # of all processes: that of the whole batch
    if self.run.world_size > 1:
        train.dist.all_reduce(mean)
    curves.setdefault(self.phase, []).append(float(mean) / self.run.world_size)
    if self.phase not in gradients:                            # of the first step
        gradients[self.phase] = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        train.STOP.append("for the test")

def to_device(self, batch, original=train.Run.to_device):
    batch = original(self, batch)
    if "d" in batch:                       # on every process, the sequences that bootstrap are those paid for
        others = torch.arange(len(batch["d"])) % self.cfg.shortcut_every > 0
        assert (batch["d"][others] == 1 / self.cfg.k_max).all(), "a sequence with d > d_min is not bootstrapped"
    return batch

train.Loop.update, train.Run.to_device = update, to_device
def steps(phase, **changes):
    saved = json.load(open(folder + "/config.json"))
    cfg = train.TrainConfig(**saved["config"] | {"batch_size": 8, "short_length": 12, "tokenizer_batch": 6} | changes)
    run = train.Run(folder, cfg, 0, saved["actions"], "tiny")
    run.dtype, run.device = torch.float32, "cpu"
    run.round = {"tokenizer": 1, "dynamics": 0, "agent": 2}[phase]
    for attempt in range(2):
        try:
            getattr(train, "train_" + phase)(run)
        except SystemExit as stop:
            if stop.code != 130:
                raise
        train.STOP.clear()                                     # stopped after the first step; now it resumes
steps("tokenizer", tokenizer_steps=36)
steps("dynamics", tokenizer_steps=36, dynamics_steps=36)        # step 30: a short batch
steps("agent", tokenizer_steps=36, agent_steps=6)               # step 0: a long one
if train.is_main_process():
    torch.save((gradients, curves), out)
try:
    steps("agent", short_length=18)                             # 12 long sequences, 6 for each process: or refused
except SystemExit:
    pass
"""


def test_two_processes_have_the_gradients_and_the_loss_curve_of_one_with_the_whole_batch_also_resumed(finished, tmp_path):
    (tmp_path / "parallel.py").write_text(PARALLEL)
    one, two = (shutil.copytree(finished, tmp_path / name) for name in ("one", "two"))
    processes = [start(tmp_path / "parallel.py", one, tmp_path / "one.pt"),
                 start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "parallel.py",
                       two, tmp_path / "two.pt")]
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    (gradients, curves), (gradients2, curves2) = (load(tmp_path, name) for name in ("one.pt", "two.pt"))
    assert {name: len(curve) for name, curve in curves.items()} == {"tokenizer": 6, "dynamics": 6, "agent": 6}
    assert set(gradients) == set(curves) and all(gradients.values())
    assert_close(gradients2, gradients, rtol=1e-3, atol=5e-6)
    assert_close(curves2, curves, rtol=2e-3, atol=1e-5)


def test_the_gpu_preset_divides_among_the_eight_processes_of_the_readme_and_other_batches_are_refused(
        tmp_path, monkeypatch, capsys):
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 8)):
        monkeypatch.setattr(train.dist, name, lambda value=value: value)
    create = lambda **changes: train.Run(tmp_path, train.TrainConfig(**train.PRESETS["gpu"] | changes), 0, None)
    create()
    for blamed, changes in [("rollouts", dict(rollouts=100)), ("tokenizer_batch", dict(tokenizer_batch=12)),
                            ("batch_size", dict(batch_size=48)), ("batch_size", dict(long_length=48))]:
        with pytest.raises(SystemExit):
            create(**changes)
        assert f"--{blamed} gives batches" in capsys.readouterr().err


def test_compiled_blocks_stay_compiled_in_every_phase_and_round(monkeypatch):
    """Past a limit of graphs for one function PyTorch goes on without compiling, and says so only in a warning."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(self, backend="eager", **options))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", torch._dynamo.config.recompile_limit)    # restored
    torch._dynamo.reset()
    for _ in range(2):
        for model in (Tokenizer(config()), Dynamics(config()), Agent(config())):
            train.compile_blocks(model)
            for B, T in [(8, 6), (4, 12)]:
                batch = new_batch(B, T)
                if isinstance(model, Tokenizer):
                    loss, _ = model(torch.rand(2, 4, 3, *model.config.image_size), model.draw(2, 4))
                elif isinstance(model, Dynamics):
                    loss, _ = model(*batch[:2], model.draw(B, T))
                else:
                    loss, _ = model(*batch, model.dynamics.draw(B, T))
                loss.backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("words, flags", [
    ("--bogus", "--bogus 3"), ("--phase", "--phase train"), ("--preset", "--preset huge"), ("k must", "--k 3"),
    ("k must", "--k 16"), ("k", "--k 0"), ("--batch_size", "--batch_size many"), ("--compile", "--compile maybe"),
    ("--image_size", "--image_size wide"), ("image_size", "--image_size 64"), ("width", "--width 30"),
    ("patch", "--patch 0"), ("k_max", "--k_max 6"), ("episodes", "--episodes 0"), ("hold", "--hold 0"),
    ("action_bins", "--action_bins 1"), ("action_repeat", "--action_repeat 0"), ("long_every", "--long_every 0"),
    ("updates", "--updates 0"), ("batch_size", "--batch_size 0"), ("horizon", "--horizon 0"), ("envs", "--envs 0"),
    ("seed", "--seed -1"), ("recent_share", "--recent_share 2"), ("tokenizer_lr", "--tokenizer_lr -1"),
    ("--env", "--env Nothing-v0"),
    ("--env", "--env CarRacing-v99"), ("--phase collect", "--phase tokenizer"),
    ("--phase tokenizer", "--phase dynamics"), ("--phase tokenizer", "--phase agent"),
    ("--phase agent", "--phase imagination"), ("agent.pt", "--phase evaluate"), ("agent.pt", "--phase dream"),
    ("no.pt", "--phase evaluate --checkpoint no.pt"), ("no.pt", "--phase collect --policy no.pt"),
    ("--record", "--phase dream --record dream.avi")])
def test_bad_flags_and_missing_phases_end_in_one_line(tmp_path, capsys, words, flags):
    error(capsys, lambda: main("--preset", "tiny", "--run", tmp_path / "run", *flags.split()), words)


@pytest.mark.parametrize("word, flags", [
    ("--width", "--phase agent --agent_steps 30 --width 64"), ("--latents", "--phase dynamics --latents 4"),
    ("--image_size", "--phase evaluate --image_size 32x32"), ("action space", "--phase dynamics --action_bins 3"),
    ("action space", "--phase evaluate --env Ticker-v0"), ("--preset", "--preset cpu"),
    ("length", "--phase dream --length 4"), ("--port", "--phase play --port 70000"),
    ("--long_length", "--phase dynamics --dynamics_steps 40 --long_length 99")])
def test_flags_that_contradict_a_run_are_refused_and_leave_it_as_it_was(copied, capsys, word, flags):
    before = contents(copied)
    error(capsys, lambda: main("--run", copied, *flags.split()), word)
    assert contents(copied) == before
    main(*ALL, "--run", copied)                                              # and it still goes on
    assert contents(copied) == before


def flip(path, offset=None):
    """Inverts one byte: in the middle, unless said otherwise."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 0xFF
    path.write_bytes(content)


def change(path, **changes):
    np.savez(path, **dict(np.load(path)) | changes)


PICKLED = np.array([{}] * 9, dtype=object)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:300]), lambda path: path.write_bytes(b""), flip,
    lambda path: path.write_bytes(b"PK not a zip"), lambda path: np.savez(path, frames=np.zeros((9, 8, 8, 3), np.uint8)),
    lambda path: change(path, actions=PICKLED), lambda path: change(path, frames=np.zeros((9, 8, 9, 3), np.uint8)),
    lambda path: change(path, frames=np.zeros((9, 8, 8, 3), np.float32)), lambda path: change(path, frames=np.uint8(3)),
    lambda path: change(path, rewards=np.zeros(8, np.float32)), lambda path: change(path, rewards=np.zeros(9)),
    lambda path: change(path, actions=np.zeros((9, 2), np.int16)), lambda path: change(path, terminal=np.zeros(9, bool)),
    lambda path: change(path, actions=np.full((9, 1), 5, np.int16)),
    lambda path: change(path, actions=np.full((9, 1), -2, np.int16)),
    lambda path: change(path, rewards=np.full(9, np.nan, np.float32)),
    lambda path: change(path, **{name: np.load(path)[name][:0] for name in ("frames", "actions", "rewards")}),
    lambda path: flip(path, path.read_bytes().rfind(b"PK\1\2") + 10)], ids=range(18))        # compression method
def test_a_bad_episode_file_is_named(tmp_path, capsys, damage):
    folder = write_episodes(tmp_path / "run/data", [9, 9, 9])
    damage(folder / "001.npz")
    before = contents(folder)
    flags = as_flags({"env": "Ticker-v0", "image_size": (8, 8), "tokenizer_context": 2, "tokenizer_length": 4})
    error(capsys, lambda: main("--preset", "tiny", "--phase", "tokenizer", "--run", tmp_path / "run", *flags), "001.npz")
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["[]", '{"config": 3}', "{}", "{"])
def test_a_damaged_config_is_named(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    error(capsys, lambda: main("--phase", "tokenizer", "--run", tmp_path), "config.json", "damaged")


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:1000]), lambda path: path.write_bytes(b""), flip,
    lambda path: path.write_text("no checkpoint"), lambda path: torch.save([1, 2], path),
    lambda path: torch.save(torch.load(path) | {"format": 99}, path),
    lambda path: torch.save(torch.load(path) | {"step": Ticker()}, path)], ids=range(7))
@pytest.mark.parametrize("name, phase", [("tokenizer.pt", "tokenizer"), ("agent.pt", "all"), ("agent.pt", "evaluate")])
def test_a_bad_checkpoint_is_named_and_left_alone(copied, capsys, name, phase, damage):
    damage(copied / name)
    before = contents(copied)
    error(capsys, lambda: main("--phase", phase, "--run", copied), name)
    assert contents(copied) == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(copied, capsys, monkeypatch):
    forward, calls = Dynamics.forward, []

    def broken(self, *args):
        loss, metrics = forward(self, *args)
        calls.append(0)
        return loss * (math.nan if len(calls) == 4 else 1), metrics

    monkeypatch.setattr(Dynamics, "forward", broken)
    flags = ("--phase", "dynamics", "--run", copied, "--dynamics_steps", 40, "--save_seconds", 0)
    error(capsys, lambda: main(*flags), "dynamics", "not finite", "dynamics.pt", "--dynamics_lr")
    state = load(copied, "dynamics.pt")
    assert state["step"] == 33 and all(x.isfinite().all() for x in (state["model"] | state["ema"]).values())


@pytest.fixture
def full_disk():
    """Files cannot grow beyond some kilobytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name, flags", [
    ("dynamics.pt", "--phase dynamics --dynamics_steps 31"), ("agent.pt", "--phase imagination --imagination_steps 7"),
    ("0000000008.npz", "--phase collect --episodes 9"), ("dream.gif", "--phase dream --length 20")])
def test_a_full_disk_costs_nothing_that_was_there(copied, capsys, monkeypatch, full_disk, name, flags):
    before, noise = contents(copied), []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    full_disk()
    error(capsys, lambda: main("--run", copied, *flags.split()), name, "could not be written")
    gc.collect()                                                             # nothing tries again when it dies
    after = contents(copied)
    changed = {str(path) for path in after.keys() | before.keys() if after.get(path) != before.get(path)}
    assert changed <= {"config.json", "metrics.jsonl"} and not noise
