"""One run: its folder, settings, device, processes, seeds, and the models that are stored there.

    runs/NAME/  config.json  metrics.jsonl  data/*.npz  *.pt  *.png  *.gif  eval.json
"""
import contextlib
import copy
import json
import os
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from assets.checkpoints import load_checkpoint
from assets.files import append_to, fail, is_main_process, print0, to_json, write_file
from assets.worlds import action_differences
from dreamer4 import Agent, Block, Config, Tokenizer, frozen

# In the order of time; a checkpoint carries the name of its phase
PHASES = ("collect", "tokenizer", "dynamics", "agent", "imagination",
          "evaluate", "dream", "play", "bench", "all")
# They leave a run's settings and checkpoints as they are; one process is enough for them
READ_ONLY = ("evaluate", "dream", "play", "bench")
FILES = {"tokenizer": "tokenizer.pt", "dynamics": "dynamics.pt", "agent": "agent.pt",
         "imagination": "agent.pt"}
# Fields of Config that may change between phases; the others are the architecture
TUNABLE = {"mask_max", "shortcut_every", "separate_images", "checkpointing", "context_share",
           "unimix", "gamma", "lam", "alpha", "beta"}


def choose_device(name):
    """auto, cpu, cuda or mps -> the device's name in torch, and the precision to train in."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not has.get(name, True):
        fail(f"--device {name}: this PyTorch finds no such device; try --device cpu")
    if name == "cuda" or name == "auto" and has["cuda"]:
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name == "mps":
        bf16 = False
    else:
        name, mkldnn = "cpu", torch.backends.mkldnn.is_available()
        bf16 = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return name, torch.bfloat16 if bf16 else torch.float32


def compile_blocks(model):
    """torch.compile for every transformer block."""
    # Blocks share graphs, one for each kind of layer, model, length and pass: more than the 8
    # after which PyTorch stops compiling.
    torch._dynamo.config.recompile_limit = 64
    # DDP's optimizer would split graphs that are small already
    torch._dynamo.config.optimize_ddp = False
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(dynamic=False)


class Run:
    """runs/NAME: config.json, metrics.jsonl, checkpoints; and which phases have finished there."""

    def __init__(self, folder, cfg, seed, actions, preset="", overrides=(), device="auto"):
        """actions: from describe_actions; overrides: names of the settings given as flags."""
        self.folder, self.cfg, self.seed, self.actions = Path(folder), cfg, seed, actions
        self.preset, self.overrides, self.round = preset, overrides, 0
        # (file, settings) of the last checkpoint that was read
        self.architecture_from = None
        self.device, self.dtype = choose_device(device)
        self.rank, self.world_size = 0, 1
        if dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.check_batches()

    def check_batches(self):
        """Every process must get the same number of sequences, of which every n-th bootstraps."""
        cfg, group = self.cfg, self.world_size * self.cfg.shortcut_every
        for name, count, divisor in [
                ("batch_size", cfg.batch_size, group),
                ("batch_size", cfg.sequence_shapes(0)[0], group),
                ("rollouts", cfg.rollouts, self.world_size),
                ("tokenizer_batch", cfg.tokenizer_batch, self.world_size)]:
            if self.world_size > 1 and count % divisor:
                fail(f"--{name} gives batches of {count} sequences, which do not divide by "
                     f"{divisor} ({self.world_size} processes, the dynamics' also by "
                     "shortcut_every)")

    def save_config(self):
        """config.json: the settings of the last command that made something."""
        settings = {"preset": self.preset, "seed": self.seed, "actions": self.actions,
                    "config": asdict(self.cfg)}
        text = json.dumps(settings, indent=1).encode()
        write_file(self.folder / "config.json", lambda file: file.write(text))

    def load(self, name, phase=None):
        """The checkpoint; None where there is none, unless `phase` must have finished in it.

        The run takes its architecture from there.
        """
        path, state = self.folder / name, None
        if path.exists():
            state = load_checkpoint(path)
            if name != FILES[state["phase"]]:
                fail(f"{path} is a checkpoint of the {state['phase']} phase; it belongs into "
                     f"{FILES[state['phase']]}")
            self.take_architecture(state, path)
            if "model" not in state:
                fail(f"{path} was made for use (assets/ship.py) and cannot be trained on; "
                     "use another --run")
        unfinished = state and state["phase"] == phase and state["step"] < self.steps(phase)
        if phase and (state is None or unfinished):
            fail(f"{path} is {'not finished' if state else 'missing'}; run first: "
                 f"python train.py --phase {phase} --run {self.folder}")
        return state

    def load_tokenizer(self):
        """The tokenizer of tokenizer.pt, frozen; its phase must have finished."""
        state = self.load("tokenizer.pt", "tokenizer")
        tokenizer = Tokenizer(self.cfg)
        tokenizer.load_state_dict(state["ema"])
        return self.for_inference(tokenizer)

    def load_agent(self, path):
        """A checkpoint of phase 2 or 3 -> tokenizer, agent, cloned policy head; all frozen."""
        state = load_checkpoint(path)
        if "tokenizer" not in state:
            fail(f"checkpoint {path} holds no agent; give agent.pt, or run: "
                 "python train.py --phase agent")
        self.take_architecture(state, path)
        tokenizer, agent = Tokenizer(self.cfg), Agent(self.cfg)
        tokenizer.load_state_dict(state["tokenizer"])
        agent.load_state_dict(state["ema"])
        cloned = frozen(agent.policy_head).to(self.device)
        agent.load_state_dict(state.get("heads", {}), strict=False)
        return self.for_inference(tokenizer), self.for_inference(agent), cloned

    def load_policy(self, path):
        """Tokenizer and agent to collect with: the run keeps its own sizes, but for the frames'."""
        other = copy.copy(self)
        other.cfg = copy.copy(self.cfg)
        tokenizer, agent, _ = other.load_agent(path)
        self.cfg.image_size = other.cfg.image_size
        return tokenizer, agent

    def take_architecture(self, state, path):
        """Takes the architecture of a checkpoint; a flag or environment must not contradict it."""
        saved, cfg = state["config"], self.cfg
        architecture = {field.name for field in fields(Config)} - TUNABLE
        given = set(self.overrides)
        if any(self.folder.glob("data/*.npz")):
            # of the episodes
            given.add("image_size")
        for name in architecture & given:
            if saved[name] != getattr(cfg, name):
                fail(f"--{name} {getattr(cfg, name)} contradicts {path}, made with {saved[name]}; "
                     "drop the flag or use another --run")
        actions = json.loads(state["actions"])
        if self.actions and (differences := action_differences(actions, self.actions)):
            fail(f"checkpoint {path} has another action space than {cfg.env or '--action_spec'} "
                 f"({self.folder / 'config.json'}) with --action_bins {cfg.action_bins}: "
                 f"{differences}; use another --run or --env")
        other, before = self.architecture_from or (path, saved)
        for name in architecture:
            if saved[name] != before[name]:
                fail(f"{path} and {other} do not belong together: {name} is {saved[name]} and "
                     f"{before[name]}; delete the one that is wrong, or use another --run")
            setattr(cfg, name, saved[name])
        self.architecture_from = path, saved
        try:
            # other settings may contradict the new ones
            cfg.__post_init__()
        except ValueError as error:
            fail(f"{error} (with the architecture of {path})")

    def steps(self, phase):
        """How many steps a phase trains for."""
        return getattr(self.cfg, f"{phase}_steps")

    def is_finished(self, phase, state):
        """Whether a checkpoint (or None) has this round's phase behind it, picture included."""
        if state is None:
            return False
        here = (self.round, PHASES.index(phase))
        there = (state["round"], PHASES.index(state["phase"]))
        complete = state["step"] >= self.steps(phase) and state["finished"]
        if there > here or there == here and complete:
            print0(f"[{phase}] finished before")
            return True
        return False

    def log(self, phase, **numbers):
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            row = {"phase": phase, "round": self.round, **numbers}
            with append_to(self.folder / "metrics.jsonl") as file:
                file.write(to_json(row) + "\n")

    def compile_and_distribute(self, model):
        """The model as a training step calls it: compiled and in DDP, where the run is."""
        if self.cfg.compile:
            compile_blocks(model)
        if self.world_size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)

    def any_process(self, *votes):
        """For each bool: whether it is true on any process."""
        if self.world_size == 1:
            return votes
        votes = torch.tensor(votes, device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.tolist()

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.split(":")[0], self.dtype)

    def seed_phase(self, phase, *step):
        """Seeds torch for a phase, or one step of it, whatever ran before; returns a NumPy rng.

        The numbers follow from (seed, phase, round, step) and are equal on all processes: so a
        resumed run draws what it would have drawn. Without a step: those of step 0.
        """
        numbers = (self.seed, PHASES.index(phase), self.round, *step)
        sequence = np.random.SeedSequence(numbers)
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        return np.random.default_rng(sequence)

    def to_device(self, batch):
        """This process's share of a batch drawn for all processes -> tensors on the device."""
        tensors = {}
        for name, x in batch.items():
            first, last = (len(x) * rank // self.world_size for rank in (self.rank, self.rank + 1))
            tensors[name] = torch.as_tensor(x[first:last]).to(self.device)
        return tensors

    def for_inference(self, module):
        """A frozen copy, its transformers in this device's precision; heads stay in float32."""
        module = frozen(module).to(self.device)
        getattr(module, "dynamics", module).to(self.dtype)
        return module


class Progress:
    """What a phase says every few seconds, on the screen and in metrics.jsonl.

    Steps are those of training; in collection they are episodes.
    """

    def __init__(self, run, phase, first_step, steps):
        self.run, self.phase, self.first_step, self.steps = run, phase, first_step, steps
        self.start_time = self.log_time = time.time()
        self.frames = 0

    def update(self, step, frames, metrics):
        """frames: the video frames finished with this step; 0: more updates on them follow."""
        self.frames += frames
        is_last = step + 1 == self.steps
        if not frames or time.time() - self.log_time < 5 and not is_last:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        seconds = time.time() - self.start_time
        rate = self.frames / seconds
        minutes = seconds / (step + 1 - self.first_step) * (self.steps - step - 1) / 60
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        print0(f"[{self.phase}] step {step + 1}/{self.steps} {text} | {rate:.0f} frames/s, "
               f"{minutes:.1f} min left")
        self.run.log(self.phase, step=step + 1, seconds=round(seconds, 1),
                     frames_per_s=round(rate, 1), **numbers)
        self.log_time = time.time()
