"""The files of a run, and how the program ends: nothing here is about Dreamer 4.

Files are written as a whole or not at all. What cannot be read ends the program with one line that
says what is wrong, where, and what to do. Ctrl-C and SIGTERM are noted here, and looked at between
two steps.
"""
import contextlib
import json
import os
import sys
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dreamer4 import Config

# In the order of time; a checkpoint carries the name of its phase
PHASES = ("collect", "tokenizer", "dynamics", "agent", "imagination",
          "evaluate", "dream", "play", "bench", "all")
# Fields of Config that may change between phases; the others are the architecture
TUNABLE = {"mask_max", "shortcut_every", "separate_images", "checkpointing", "context_share",
           "unimix", "gamma", "lam", "alpha", "beta"}
# Version of the checkpoint files
FORMAT = 1
# Signals received so far
STOP = []


def fail(message):
    """Ends the program with one line: what is wrong, where, and what to do."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def check_stop(stop=STOP):
    """Ends the program after a signal. stop: what several processes agreed on, in its place."""
    if stop:
        print0("stopped; the same command continues")
        raise SystemExit(130)


def is_main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(text):
    """Prints on the main process only."""
    if is_main_process():
        print(text, flush=True)


def write_file(path, write):
    """write(file) to a temporary name, then rename: a file is there as a whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        fail(f"{path} could not be written ({error}); the file from before, if any, is intact. "
             "Free some space and give the same command again")


class Episode(dict):
    """The arrays of one episode. Frames that memory has no room for are read when asked for."""

    def __missing__(self, name):
        return load_episode(*self["source"])[name]


def load_episode(path, cfg):
    """Reads and checks one episode file; the format is in the README."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("frames", "actions", "rewards", "terminal")}
    except Exception as error:
        fail(f"episode file {path} is damaged or no episode ({error}); delete it or make it again")
    episode = Episode(arrays, source=(path, cfg))
    T, A = episode["rewards"].size, len(cfg.action_spec)
    wanted = {"frames": ((T, *cfg.image_size, 3), np.uint8), "actions": ((T, A), np.int16),
              "rewards": ((T,), np.float32), "terminal": ((), np.bool_)}
    for name, (shape, dtype) in wanted.items():
        array = episode[name]
        if array.shape != shape or array.dtype != dtype:
            fail(f"episode file {path}: {name} is {array.shape} {array.dtype}, this run wants "
                 f"{shape} {np.dtype(dtype)}; use another --run or convert it")
    actions = episode["actions"]
    if (actions < -1).any() or (actions >= np.array(cfg.action_spec)).any():
        fail(f"episode file {path}: actions outside of the action spec {cfg.action_spec}; "
             "use another --run")
    if T == 0 or not np.isfinite(episode["rewards"]).all():
        fail(f"episode file {path}: rewards are missing or not finite; delete it or make it again")
    return episode


def load_checkpoint(path):
    """Reads a checkpoint: tensors and plain values only."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not look at the checksums
            if name := archive.testzip():
                raise ValueError(f"checksum of {name}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"checkpoint {path} does not exist; train it first, or give another --checkpoint")
    except Exception as error:
        # torch raises many kinds of errors on damaged files
        reason = " ".join(str(error).split())[:200]
        fail(f"checkpoint {path} is damaged or no checkpoint ({reason}); restore it from a copy or "
             "delete it and train that phase again")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fail(f"checkpoint {path} is of another version (this code reads format {FORMAT}); "
             "train it again")
    return state


class RunFolder:
    """runs/NAME: config.json, metrics.jsonl, checkpoints; and which phases have finished there."""

    def __init__(self, folder, cfg, seed, actions, preset="", overrides=()):
        """actions: from describe_actions; overrides: names of the settings given as flags."""
        self.folder, self.cfg, self.seed, self.actions = Path(folder), cfg, seed, actions
        self.preset, self.overrides, self.round = preset, overrides, 0

    def save_config(self):
        """config.json: the settings of the last command that made something."""
        settings = {"preset": self.preset, "seed": self.seed, "actions": self.actions,
                    "config": asdict(self.cfg)}
        text = json.dumps(settings, indent=1).encode()
        write_file(self.folder / "config.json", lambda file: file.write(text))

    def load(self, name, phase=None, steps=0):
        """The checkpoint; None where there is none, unless `phase` must have finished in it.

        The run takes its architecture from there.
        """
        path, state = self.folder / name, None
        if path.exists():
            state = load_checkpoint(path)
            self.take_architecture(state, path)
        unfinished = state and state["phase"] == phase and state["step"] < steps
        if phase and (state is None or unfinished):
            fail(f"{path} is {'not finished' if state else 'missing'}; run first: "
                 f"python train.py --phase {phase} --run {self.folder}")
        return state

    def take_architecture(self, state, path):
        """Takes the architecture of a checkpoint; a flag or environment must not contradict it."""
        saved, cfg = state["config"], self.cfg
        architecture = {field.name for field in fields(Config)} - TUNABLE
        for name in architecture & set(self.overrides):
            if saved[name] != getattr(cfg, name):
                fail(f"--{name} {getattr(cfg, name)} contradicts {path}, made with {saved[name]}; "
                     "drop the flag or use another --run")
        if self.actions is not None and json.loads(state["actions"]) != self.actions:
            fail(f"checkpoint {path} has another action space ({saved['action_spec']}) than "
                 f"{cfg.env} ({cfg.action_spec}) with --action_bins {cfg.action_bins}; "
                 "use another --run or --env")
        for name in architecture:
            setattr(cfg, name, saved[name])

    def is_finished(self, phase, state, steps, picture=None):
        """Whether a checkpoint (or None) has this round's phase behind it, picture included."""
        if state is None:
            return False
        here = (self.round, PHASES.index(phase))
        there = (state["round"], PHASES.index(state["phase"]))
        complete = state["step"] >= steps and (picture is None or picture.exists())
        if there > here or there == here and complete:
            print0(f"[{phase}] finished before")
            return True
        return False

    def log(self, phase, **numbers):
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            row = {"phase": phase, "round": self.round, **numbers}
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
