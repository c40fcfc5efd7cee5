"""Train Dreamer 4 on pixels, from random interaction to a policy that learned in its own dreams.

    python train.py --preset cpu                     # all phases, on a laptop; --run runs/NAME to keep several
    python train.py --phase collect                  # random driving -> runs/default/data/*.npz
    python train.py --phase tokenizer                # masked autoencoder: frames -> latents
    python train.py --phase dynamics                 # shortcut forcing: the world model
    python train.py --phase agent                    # agent token: behaviour cloning, reward, continuation
    python train.py --phase imagination              # PMPO inside the dreams
    python train.py --phase evaluate --checkpoint runs/default/agent.pt
    python train.py --phase dream --record dream.mp4 # truth above, dream below, same actions
    python train.py --phase play                     # drive in the dream, in a browser
    python train.py --phase bench                    # speed on this machine
    torchrun --nproc_per_node 2 -- train.py          # several GPUs or processes

A phase that is interrupted (Ctrl-C, SIGTERM, SIGKILL) continues when the same command is given again.
Every field of the two configs (dreamer4.Config and TrainConfig below) is a flag.
"""
import argparse
import base64
import contextlib
import datetime
import inspect
import json
import multiprocessing
import os
import platform
import re
import secrets
import signal
import sys
import threading
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from dreamer4 import Agent, Block, Cache, Config, Dream, Dynamics, Tokenizer, frozen, imagine, lambda_returns

PHASES = ("collect", "tokenizer", "dynamics", "agent", "imagination", "evaluate", "dream", "play", "bench", "all")


@dataclass
class TrainConfig(Config):
    """Data, environment and optimization, on top of the model's Config."""
    env: str = "CarRacing-v3"       # Gymnasium id with image observations, or one that renders rgb_array
    env_kwargs: str = "{}"          # JSON: arguments of the environment, such as '{"continuous": false}'
    action_bins: int = 5            # bins of a continuous action dimension, both ends included
    action_repeat: int = 4          # environment steps per agent step
    episode_frames: int = 1000      # longest episode in agent steps
    envs: int = 8                   # environments played side by side, each in its own process
    collect_episodes: int = 240     # episodes of random interaction
    hold: int = 4                   # random actions are held for 1 ... hold agent steps, per component
    uniform_share: float = 0.25     # share of random episodes with a new uniform action in every step
    rounds: int = 1                 # rounds of collect -> agent -> imagination; later ones collect by policy
    round_episodes: int = 80        # episodes that the policy collects in every later round
    policy_random: float = 0.1      # share of random actions when the policy collects
    batch_size: int = 32            # sequences per training step, over all processes
    short_length: int = 16          # frames of a short training sequence, T1
    long_length: int = 32           # frames of a long one, T2: longer than the context C
    long_every: int = 4             # every n-th batch is long (and smaller: the same number of frames)
    rewarded_share: float = 0.3     # share of sequences drawn around a rewarded frame (agent phase, contexts)
    recent_share: float = 0.5       # later rounds: share of sequences from the episodes of the newest round
    memory_gb: float = 8.0          # frames a process holds in memory; those of further episodes are read when needed
    tokenizer_batch: int = 8        # sequences per tokenizer step
    tokenizer_length: int = 8       # frames of a tokenizer sequence: more than tokenizer_context
    tokenizer_steps: int = 3000     # training steps of the tokenizer, in every round
    mask_ramp: float = 0.5          # share of the first round's steps over which masking ramps up from none
    dynamics_steps: int = 1200      # training steps of the dynamics
    agent_steps: int = 500          # training steps of agent finetuning, in every round
    imagination_steps: int = 250    # rollouts of imagination training, in every round
    rollouts: int = 64              # imagined sequences per step
    rollout_context: int = 8        # real frames an imagined sequence starts from
    horizon: int = 16               # imagined frames, H
    updates: int = 4                # gradient steps on every batch of rollouts
    value_steps: int = 30           # rollouts that train only the value head, at first
    k: int = 4                      # denoising steps of a dreamed frame, K
    temperature: float = 1.0        # spread of the noise that dreams start from, last round; it rises over the rounds
    tokenizer_lr: float = 1e-3      # peak learning rate: AdamW; the blocks' matrices get Muon with twice as much
    dynamics_lr: float = 1e-3       # the same for the dynamics, and in agent finetuning
    policy_lr: float = 3e-4         # AdamW, for policy and value head in imagination
    warmup: int = 50                # steps over which the learning rate rises
    cooldown: float = 0.3           # share of the steps over which it falls to a tenth, at the end
    weight_decay: float = 0.01      # weight decay of the blocks' matrices
    ema: float = 0.99               # decay of the averaged weights that everything is used with
    eval_episodes: int = 20         # real episodes per policy in evaluation
    compile: bool = False           # torch.compile every transformer block (needs a C++ compiler)
    save_seconds: float = 120.0     # time between checkpoints
    least = Config.least | {"action_bins": 2, "warmup": 0, "value_steps": 0}

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1 or self.k & (self.k - 1) or self.k > self.k_max:
            raise ValueError(f"config: k must be a power of two up to k_max = {self.k_max}")
        for name in ("uniform_share", "policy_random", "rewarded_share", "recent_share", "tokenizer_lr", "dynamics_lr",
                     "policy_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"config: {name} must lie in [0, 1]")


# CarRacing, small and large; the README says why, under Lessons and Deviations
RECIPE = dict(gamma=0.98, beta=0.05, rounds=4, k_max=64, separate_images=0.1, temperature=1.6)
PRESETS = {
    "tiny": dict(tokenizer_width=32, tokenizer_depth=2, tokenizer_heads=2, latents=8, latent_channels=8, width=32,
                 depth=4, heads=2, kv_heads=1, registers=1, context=8, head_width=32, pack=2, k_max=4,
                 episode_frames=40, envs=2, collect_episodes=6, batch_size=4, short_length=6, long_length=12,
                 tokenizer_batch=4, tokenizer_steps=30, dynamics_steps=30, agent_steps=20, imagination_steps=6,
                 rollouts=4, rollout_context=4, horizon=4, value_steps=2, warmup=10, eval_episodes=2),
    "cpu": RECIPE | dict(patch=16, tokenizer_width=128, tokenizer_heads=4, width=192, head_width=128, pack=4, k=2,
                         collect_episodes=160, round_episodes=60, tokenizer_steps=1500, agent_steps=400,
                         imagination_steps=300),
    "gpu": RECIPE | dict(image_size=(96, 96), tokenizer_width=384, tokenizer_depth=6, latents=32, width=512, depth=12,
                         heads=8, kv_heads=2, registers=4, context=24, batch_size=64, short_length=16, long_length=32,
                         tokenizer_batch=16, tokenizer_steps=5000, dynamics_steps=40000, agent_steps=5000,
                         imagination_steps=1000, rollouts=256, head_width=512, collect_episodes=1000, envs=16,
                         round_episodes=200, tokenizer_lr=5e-4, dynamics_lr=5e-4, ema=0.999, compile=True,
                         memory_gb=12.0),
    "minerl": dict(latent_channels=32, tokenizer_width=256, tokenizer_depth=6, tokenizer_heads=8, depth=6, heads=8,
                   kv_heads=2, registers=4, pack=1, batch_size=8, short_length=16, long_length=32,
                   tokenizer_batch=8, tokenizer_length=16),
    "paper": dict(image_size=(360, 640), patch=16, latents=512, latent_channels=16, tokenizer_width=1024,
                  tokenizer_depth=16, tokenizer_heads=16, pack=2, width=2048, depth=36, heads=32, kv_heads=8,
                  registers=8, context=192, k_max=64, head_width=2048, short_length=64, long_length=256,
                  action_spec=(2,) * 23 + (121,)),
}
# Config fields that may change between phases; the others are the architecture, which a checkpoint fixes
TUNABLE = {"mask_max", "shortcut_every", "separate_images", "checkpointing", "context_share", "unimix",
           "gamma", "lam", "alpha", "beta"}
FORMAT = 1                                                          # version of the checkpoint files
EVALUATION_SEEDS = 1_000_000_000                                    # collection uses smaller ones


def fail(message):
    """Ends the program with one line: what is wrong, where, and what to do."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------
# Actions: every space becomes a tuple of category counts. A space is described by plain JSON, which goes into
# the checkpoint; the other functions need only that. A leaf is an array of low + index * step.

CAMERA_BINS, CAMERA_MAX, CAMERA_MU = 11, 10.0, 10.0             # VPT: degrees per step, fine near 0 (μ-law)


def camera_angle(index):
    """Bin of a camera axis in 0 ... 10 -> degrees in [-10, 10]."""
    x = np.asarray(index) / (CAMERA_BINS - 1) * 2 - 1
    return np.sign(x) * ((1 + CAMERA_MU) ** np.abs(x) - 1) / CAMERA_MU * CAMERA_MAX


def camera_bin(angle):
    """Degrees -> bin; what exceeds 10 degrees goes to the outer bins."""
    return np.searchsorted(camera_angle(np.arange(CAMERA_BINS - 1) + 0.5), angle)         # the ends of the bins


def describe(space, bins):
    """Gymnasium action space -> nested dict; Box dimensions become `bins` values with both ends included."""
    if isinstance(space, (gym.spaces.Tuple, gym.spaces.Dict)):
        named = isinstance(space, gym.spaces.Dict)
        keys = list(space.spaces if named else range(len(space.spaces)))
        return {"keys": keys, "named": named, "parts": [describe(space[key], bins) for key in keys]}
    if isinstance(space, gym.spaces.Box) and space.is_bounded():
        low, step, sizes = space.low, (space.high.astype(float) - space.low) / (bins - 1), np.full(space.shape, bins)
        while (far := low + (bins - 1) * step > space.high).any():              # rounding: not an ulp too far
            step = np.where(far, np.nextafter(step, 0), step)
    elif isinstance(space, gym.spaces.Discrete):
        low, step, sizes = space.start, 1, space.n
    elif isinstance(space, gym.spaces.MultiDiscrete):
        low, step, sizes = space.start, np.ones_like(space.nvec), space.nvec
    elif isinstance(space, gym.spaces.MultiBinary):
        low, step, sizes = np.zeros(space.shape, int), np.ones(space.shape, int), np.full(space.shape, 2)
    else:
        fail(f"action space {space} is not supported; bounded Box, Discrete, MultiDiscrete, MultiBinary, Tuple and "
             "Dict are")
    plain = lambda x: np.asarray(x).tolist()
    return {"low": plain(low), "step": plain(step), "sizes": plain(sizes), "dtype": str(space.dtype)}


def action_sizes(description):
    """Description -> tuple of category counts, in the order of the action's components."""
    if "parts" in description:
        return tuple(n for part in description["parts"] for n in action_sizes(part))
    return tuple(np.ravel(description["sizes"]).tolist())


def to_action(description, indices):
    """Category indices (A,) -> an action of the space."""
    if "parts" in description:
        ends = np.cumsum([len(action_sizes(part)) for part in description["parts"]])
        actions = [to_action(part, piece) for part, piece in zip(description["parts"], np.split(indices, ends[:-1]))]
        return dict(zip(description["keys"], actions)) if description["named"] else tuple(actions)
    low, step, sizes = (np.array(description[name]) for name in ("low", "step", "sizes"))
    action = (low + np.reshape(indices, sizes.shape) * step).astype(description["dtype"])
    return action if sizes.shape else action[()]


def to_indices(description, action):
    """An action of the space -> category indices (A,) int16; continuous values go to the nearest bin."""
    if "parts" in description:
        return np.concatenate([to_indices(part, action[key])
                               for key, part in zip(description["keys"], description["parts"])])
    low, step, sizes = (np.array(description[name]) for name in ("low", "step", "sizes"))
    index = (np.asarray(action, float) - low) / np.where(step == 0, 1, step)
    return index.round().clip(0, sizes - 1).astype(np.int16).ravel()


# ---------------------------------------------------------------------------------------------------------
# Environment

class OldGym(gym.Env):
    """An environment from before Gymnasium (MineRL, Crafter): reset() gives the observation, step() four values.

    MineRL's camera, two angles, becomes one component of 11 * 11 categories; names of items become their numbers.
    """

    def __init__(self, env):
        self.env, self.action_space = env, self.modern(env.action_space)
        picture = getattr(env.observation_space, "spaces", {}).get("pov", env.observation_space)
        self.observation_space = gym.spaces.Box(0, 255, tuple(picture.shape), np.uint8)

    def modern(self, space, name=None):
        """The action space in Gymnasium's classes; only names tell what the old one is."""
        kind = type(space).__name__.removesuffix("Space")
        if kind == "Dict":
            return gym.spaces.Dict({name: self.modern(part, name) for name, part in space.spaces.items()})
        if name == "camera":
            return gym.spaces.Discrete(CAMERA_BINS ** 2)
        if kind == "Box":
            return gym.spaces.Box(space.low, space.high, space.shape, space.dtype)
        if kind not in ("Discrete", "Enum"):
            fail(f"action space {space} is not supported for environments of the old interface")
        return gym.spaces.Discrete(int(space.n))

    def old(self, space, action, name=None):
        """An action of the modern space -> the same one of the old space."""
        if isinstance(action, dict):
            return {name: self.old(space.spaces[name], part, name) for name, part in action.items()}
        if name == "camera":
            return camera_angle(divmod(action, CAMERA_BINS)).astype(np.float32)
        return str(space.values[action]) if hasattr(space, "values") else action

    def reset(self, seed=None, options=None):
        if seed is not None and hasattr(self.env, "_episode"):
            self.env._seed, self.env._episode = seed, 0                       # Crafter has no other way
        elif seed is not None:
            self.env.seed(seed)
        observation = self.env.reset()
        return observation["pov"] if isinstance(observation, dict) else observation, {}

    def step(self, action):
        observation, reward, done, info = self.env.step(self.old(self.env.action_space, action))
        cut = done and (info.get("TimeLimit.truncated", False) or info.get("discount", 0) > 0)
        frame = observation["pov"] if isinstance(observation, dict) else observation
        return frame, reward, done and not cut, cut, info

    def close(self):
        getattr(self.env, "close", lambda: None)()


def make_env(cfg):
    """The bare environment of --env. CarRacing gets gas and brake on one axis: action (steer, pedal) in [-1, 1]."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):    # headless
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("MUJOCO_GL", "egl")
    if not cfg.env:
        fail("this run learns from recorded data and has no environment; give --env")
    family = next((name for name in ("MineRL", "Crafter", "ALE/") if cfg.env.startswith(name)), None)
    try:
        kwargs = json.loads(cfg.env_kwargs)
        if family == "MineRL":
            import gym as old_gym
            import minerl                                                     # registers its environments
            env = OldGym(old_gym.make(cfg.env, **kwargs))
        elif family == "Crafter":
            import crafter
            env = OldGym(crafter.Env(**({"reward": False} if "NoReward" in cfg.env else {}) | kwargs))
        else:
            name = f"ale_py:{cfg.env}" if family == "ALE/" else cfg.env       # registered by importing ale_py
            env = gym.make(name, render_mode="rgb_array", disable_env_checker=True, **kwargs)
    except ImportError as error:
        package = {"MineRL": "minerl (it needs Java 8)", "Crafter": "crafter", "ALE/": "ale-py"}.get(family, error.name)
        fail(f"--env {cfg.env} is not installed ({error}); run: pip install {package}")
    except gym.error.Error as error:
        fail(f"--env {cfg.env}: {error}")
    except (TypeError, ValueError) as error:
        fail(f"--env_kwargs {cfg.env_kwargs} does not fit {cfg.env}: {error}")
    if cfg.env.startswith("CarRacing") and isinstance(env.action_space, gym.spaces.Box):
        pedals = lambda a: np.array([a[0], max(a[1], 0), max(-a[1], 0)], np.float32)
        env = gym.wrappers.TransformAction(env, pedals, gym.spaces.Box(-1, 1, (2,), np.float32))
    return env


class PixelEnv(gym.Wrapper):
    """Frames (H, W, 3) uint8 of cfg.image_size, actions as category indices, actions repeated.

    After the end of an episode it stands still, so that a vector of environments can run on.
    """

    def __init__(self, cfg):
        super().__init__(make_env(cfg))
        if multiprocessing.parent_process():            # in a worker: threads of OpenMP do not survive a fork
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)                           # the main process ends the worker
        self.cfg = cfg
        self.description = describe(self.env.action_space, cfg.action_bins)
        space, inner = self.env.observation_space, self.env.unwrapped
        image = isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[2:] == (3,)
        self.draw = None if image else self.env.render
        if cfg.env.startswith("CarRacing"):    # it draws in every step, which takes nearly all of the time: draw only
            render, inner._render = inner._render, lambda mode: None             # the frames that are looked at
            self.draw = lambda: render("state_pixels")
        self.action_space = gym.spaces.MultiDiscrete(action_sizes(self.description))
        self.observation_space = gym.spaces.Box(0, 255, (*cfg.image_size, 3), np.uint8)

    def frame(self, observation):
        self.last = resize(np.asarray(self.draw() if self.draw else observation)[..., :3], self.cfg.image_size)
        return self.last

    def reset(self, seed=None, options=None):
        self.steps, self.ended = 0, None
        return self.frame(self.env.reset(seed=seed)[0]), {}

    def step(self, indices):
        if self.ended:
            return self.last, 0.0, *self.ended, {}
        action, total = to_action(self.description, indices), 0.0
        for _ in range(self.cfg.action_repeat):
            observation, reward, terminated, truncated, _ = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        self.steps += 1
        truncated = truncated or self.steps >= self.cfg.episode_frames - 1
        self.ended = (terminated, truncated) if terminated or truncated else None
        return self.frame(observation), total, terminated, truncated, {}


def resize(frames, size):
    """uint8 frames (..., H, W, 3) -> (..., *size, 3), antialiased."""
    if frames.shape[-3:-1] == tuple(size):
        return frames
    x = torch.from_numpy(np.ascontiguousarray(frames)).reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to(torch.uint8).numpy().reshape(*frames.shape[:-3], *size, 3)


class RandomPolicy:
    """Random but useful: every action component is held for a while; some episodes change it in every step."""

    def __init__(self, cfg, seed):
        self.cfg, self.seed = cfg, seed

    def reset(self, seeds):
        """Episodes begin. Their random numbers follow from the environments' seeds, whatever was played before."""
        self.rng, count, A = np.random.default_rng((self.seed, seeds[0])), len(seeds), len(self.cfg.action_spec)
        self.left, self.action = np.zeros((count, A), int), np.zeros((count, A), np.int16)
        self.longest = np.where(self.rng.random((count, 1)) < self.cfg.uniform_share, 1, self.cfg.hold)

    def act(self, frames, actions):
        """frames (n, H, W, 3), the actions (n, A) that led to them -> the next actions (n, A)."""
        new = self.left == 0
        self.action = np.where(new, self.rng.integers(0, self.cfg.action_spec, new.shape), self.action).astype(np.int16)
        self.left = np.where(new, self.rng.integers(1, self.longest + 1, new.shape), self.left) - 1
        return self.action


class AgentPolicy:
    """Tokenizer, world model and policy head as a policy for the real environment, through the Dream stream."""

    def __init__(self, tokenizer, agent, cfg, seed, random_share=0.0):
        self.tokenizer, self.agent, self.random_share = tokenizer, agent, random_share
        self.device = next(agent.parameters()).device
        self.random = RandomPolicy(cfg, seed)

    def reset(self, seeds):
        self.random.reset(seeds)
        self.generator = torch.Generator(self.device).manual_seed(int(self.random.rng.integers(2**31)))
        self.cache, self.dream = Cache(), self.agent.dream(generator=self.generator, k=1)
        self.values = []                                                    # v_t of every step, for evaluation

    @torch.no_grad()
    def act(self, frames, actions):
        z = self.tokenizer.encode(to_images(frames[:, None], self.device), cache=self.cache)
        h = self.dream.observe(z, torch.as_tensor(actions[:, None], device=self.device))[:, 0]
        self.values.append(self.agent.value(h).cpu().numpy())
        action = self.agent.sample(self.agent.policy(h), self.generator).cpu().numpy()
        explore = self.random.rng.random((len(action), 1)) < self.random_share
        return np.where(explore, self.random.act(frames, actions), action).astype(np.int16)


def play(cfg, policy, seeds, done=lambda seed: False):
    """Plays one episode per seed, cfg.envs at a time; yields (seed, episode) with the arrays of an episode file.

    Where all of those that are played together are done already, they are left out. Episodes of agents also carry
    "values" (T,), what the value head expected at every frame.
    """
    seeds, count = list(seeds), min(cfg.envs, len(seeds))
    envs = gym.vector.AsyncVectorEnv([lambda: PixelEnv(cfg)] * count, autoreset_mode="Disabled")
    with contextlib.closing(envs):
        for start in range(0, len(seeds), count):
            wave = (seeds[start:] + [seeds[-1]] * count)[:count]              # the last wave may repeat a seed
            if all(map(done, wave)):
                continue
            frames = [envs.reset(seed=wave)[0]]
            actions, rewards = [np.full((count, len(cfg.action_spec)), -1, np.int16)], [np.zeros(count)]
            ended, terminal = np.zeros(count, int), np.zeros(count, bool)
            policy.reset(wave)
            while not ended.all():
                check_stop()
                actions.append(policy.act(frames[-1], actions[-1]))
                frame, reward, over, cut, _ = envs.step(actions[-1])
                frames.append(frame)
                rewards.append(reward)
                terminal |= over
                ended[(over | cut) & (ended == 0)] = len(frames)
            for i, seed in enumerate(seeds[start:start + count]):
                T = ended[i]
                cut_off = lambda rows, dtype: np.stack([row[i] for row in rows[:T]]).astype(dtype)
                episode = {"frames": cut_off(frames, np.uint8), "actions": cut_off(actions, np.int16),
                           "rewards": cut_off(rewards, np.float32), "terminal": np.array(terminal[i])}
                if hasattr(policy, "values"):
                    episode["values"] = cut_off(policy.values + policy.values[-1:], np.float32)
                yield seed, episode


# ---------------------------------------------------------------------------------------------------------
# Files: episodes, checkpoints

def write_file(path, write):
    """Writes to a temporary name, then renames: a file is there as a whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")                 # of a killed run: the next one writes over it
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                              # torch.save wraps a full disk so
        with contextlib.suppress(OSError):
            temporary.unlink()
        fail(f"{path} could not be written ({error}); the file from before, if any, is intact. "
             "Free some space and give the same command again")


class Episode(dict):
    """The arrays of one episode; frames that memory has no room for are deleted here, and read when asked for."""

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
    for name, shape, dtype in [("frames", (T, *cfg.image_size, 3), np.uint8), ("actions", (T, A), np.int16),
                               ("rewards", (T,), np.float32), ("terminal", (), np.bool_)]:
        if episode[name].shape != shape or episode[name].dtype != dtype:
            fail(f"episode file {path}: {name} is {episode[name].shape} {episode[name].dtype}, "
                 f"this run wants {shape} {np.dtype(dtype)}; use another --run or convert it")
    if (episode["actions"] < -1).any() or (episode["actions"] >= np.array(cfg.action_spec)).any():
        fail(f"episode file {path}: actions outside of the action spec {cfg.action_spec}; use another --run")
    if T == 0 or not np.isfinite(episode["rewards"]).all():
        fail(f"episode file {path}: rewards are missing or not finite; delete it or make it again")
    return episode


class Data:
    """All episodes of a run. Every tenth is held out and never trains anything.

    The last `recent` ones, in the order of their names, are those of the newest round.
    """

    def __init__(self, cfg, folder, recent=0):
        self.cfg, self.paths = cfg, sorted(Path(folder).glob("*.npz"))
        if len(self.paths) < 2:
            fail(f"{folder} holds {len(self.paths)} episodes, at least 2 are needed; "
                 "run: python train.py --phase collect (with the same --run)")
        self.episodes, room = [], cfg.memory_gb * 1e9
        for path in self.paths:
            check_stop()
            episode = load_episode(path, cfg)
            room -= episode["frames"].nbytes
            if room < 0:
                del episode["frames"]
            self.episodes.append(episode)
        self.held_out = self.episodes[::10]
        self.train = [e for i, e in enumerate(self.episodes) if i % 10]
        self.recent = {id(e) for e in self.episodes[len(self.episodes) - recent:]}
        rewards = np.concatenate([e["rewards"][1:] for e in self.train])
        self.usual_reward = float(np.median(rewards))             # in many tasks every step costs a little
        self.reward_share = float((np.abs(rewards - self.usual_reward) > 1e-3).mean())
        self.reward_std, self.nonzero_share = float(rewards.std()), float((rewards != 0).mean())

    def encode(self, tokenizer, folder):
        """Gives every episode its latents (T, N, Z) float16: streamed once, then read from the folder.

        tokenizer: the frozen one. The folder's name carries a checksum of its weights.
        """
        weights = b"".join(p.float().cpu().numpy().tobytes() for p in tokenizer.parameters())
        folder = Path(folder) / f"latents-{zlib.crc32(weights):08x}"
        started, count = time.time(), 0
        for path, episode in zip(self.paths, self.episodes):
            check_stop()
            cached = folder / f"{path.stem}.npy"
            try:
                episode["latents"] = np.load(cached, allow_pickle=False)     # mapped, it would keep its file open
                if (len(episode["latents"]) != len(episode["rewards"])
                        or cached.stat().st_mtime < path.stat().st_mtime):
                    raise ValueError("of another episode")
            except (OSError, ValueError, EOFError):                                  # not there, or damaged
                episode["latents"] = encode(tokenizer, episode["frames"])
                count += len(episode["rewards"])
                if main_process():
                    write_file(cached, lambda file: np.save(file, episode["latents"]))
        if count:
            say(f"encoded {count} frames at {count / (time.time() - started):.0f} frames/s")

    def sample(self, rng, B, T, names, rewarded_share=0.0):
        """B random windows of T frames from training episodes -> arrays (B, T, ...), continues included.

        A rewarded_share of the windows contains a frame whose reward is unusual; in later rounds recent_share of
        them come from the newest episodes, besides those that chance takes from there.
        """
        long = [e for e in self.train if len(e["rewards"]) >= T]
        if not long:
            fail(f"no training episode has {T} frames; use shorter sequences (--long_length, --tokenizer_length) "
                 "or collect more")
        chances = np.array([len(e["rewards"]) - T + 1 for e in long], float)
        recent = chances * [id(e) in self.recent for e in long]
        if recent.any():
            share = self.cfg.recent_share
            chances = (1 - share) * chances / chances.sum() + share * recent / recent.sum()
        windows = []
        for index in rng.choice(len(long), B, p=chances / chances.sum()):
            episode = long[index]
            start = rng.integers(len(episode["rewards"]) - T + 1)
            special = np.flatnonzero(np.abs(episode["rewards"][1:] - self.usual_reward) > 1e-3) + 1
            if rng.random() < rewarded_share and len(special):
                start = np.clip(rng.choice(special) - rng.integers(T), 0, len(episode["rewards"]) - T)
            windows.append((episode, slice(start, start + T)))
        batch = {name: np.stack([e[name][window] for e, window in windows]) for name in names}
        continues = np.ones((B, T), np.float32)
        continues[:, -1] = [not (e["terminal"] and window.stop == len(e["rewards"])) for e, window in windows]
        return batch | {"continues": continues}


def to_images(frames, device):
    """uint8 frames (B, T, H, W, 3) -> float images (B, T, 3, H, W) in [0, 1]."""
    return torch.as_tensor(frames, device=device).permute(0, 1, 4, 2, 3).float() / 255


@torch.no_grad()
def encode(tokenizer, frames, chunk=32):
    """Streams frames (T, H, W, 3) through the tokenizer -> latents (T, N, Z) float16."""
    cache, device = Cache(), next(tokenizer.parameters()).device
    pieces = [tokenizer.encode(to_images(frames[None, t:t + chunk], device), cache=cache)[0]
              for t in range(0, len(frames), chunk)]
    return torch.cat(pieces).half().cpu().numpy()


@torch.no_grad()
def decode(tokenizer, latents, chunk=32, cache=None):
    """Streams latents (B, T, N, Z) through the decoder -> frames (B, T, H, W, 3) uint8. cache: of a stream to go on."""
    cache, latents = cache or Cache(), torch.as_tensor(latents).to(next(tokenizer.parameters()).device).float()
    pieces = [tokenizer.decode(latents[:, t:t + chunk], cache) for t in range(0, latents.shape[1], chunk)]
    return (torch.cat(pieces, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()


def load_checkpoint(path):
    """Reads a checkpoint (tensors and plain values only)."""
    try:
        with zipfile.ZipFile(path) as archive:              # torch does not look at the checksums
            if name := archive.testzip():
                raise ValueError(f"checksum of {name}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"checkpoint {path} does not exist; train it first, or give another --checkpoint")
    except Exception as error:                                         # torch raises many kinds on damaged files
        fail(f"checkpoint {path} is damaged or no checkpoint ({' '.join(str(error).split())[:200]}); restore it from a "
             "copy or delete it and train that phase again")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fail(f"checkpoint {path} is of another version (this code reads format {FORMAT}); train it again")
    return state


# ---------------------------------------------------------------------------------------------------------
# The run: device, folder, logging, checkpoints. Loop: what all training loops share

STOP = []                                                              # signals received


def check_stop(stop=STOP):
    """Ends the program after a signal; stop: what several processes agreed on, in place of the own signals."""
    if stop:
        say("stopped; the same command continues")
        raise SystemExit(130)


def main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    if main_process():
        print(text, flush=True)


class Run:
    """One run folder and the device it trains on."""

    def __init__(self, folder, cfg, seed, actions, overrides=()):
        self.folder, self.cfg, self.seed, self.actions, self.round = Path(folder), cfg, seed, actions, 0
        self.overrides = overrides
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        long_batch = sequence_shapes(cfg, 0)[0]
        for name, count in [("batch_size", cfg.batch_size), ("batch_size", long_batch), ("rollouts", cfg.rollouts),
                            ("tokenizer_batch", cfg.tokenizer_batch)]:
            share = self.world * (cfg.shortcut_every if name == "batch_size" else 1)
            if self.world > 1 and count % share:
                fail(f"--{name} gives batches of {count} sequences, which do not divide by {share} "
                     f"({self.world} processes, the dynamics' also by shortcut_every)")
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        on_cpu = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if self.device != "cpu" else on_cpu
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], self.dtype, enabled=self.dtype != torch.float32)

    def seeded(self, phase, *step):
        """From here on the random numbers of a phase, or of one step in it, whatever ran before; equal on all
        processes. Returns a NumPy generator; torch is seeded too."""
        sequence = np.random.SeedSequence((self.seed, PHASES.index(phase), self.round, *step))
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        return np.random.default_rng(sequence)

    def remember(self):
        """config.json: the settings of the last command that made something."""
        text = json.dumps({"preset": self.preset, "seed": self.seed, "actions": self.actions,
                           "config": asdict(self.cfg)}, indent=1)
        write_file(self.folder / "config.json", lambda file: file.write(text.encode()))

    def rows(self, batch):
        """This process's share of a batch drawn for all (numpy or torch, equal on all processes) -> device."""
        shard = lambda x: x[self.rank * len(x) // self.world:(self.rank + 1) * len(x) // self.world]
        return {name: torch.as_tensor(shard(x)).to(self.device) for name, x in batch.items()}

    def load(self, name, phase=None, steps=0):
        """The checkpoint, checked against this run; None where there is none, unless it must hold a finished phase."""
        path, state = self.folder / name, None
        if path.exists():
            state = load_checkpoint(path)
            adopt(self, state, path)
        if phase and (state is None or state["phase"] == phase and state["step"] < steps):
            fail(f"{path} is {'not finished' if state else 'missing'}; run first: python train.py --phase {phase} "
                 f"--run {self.folder}")
        return state

    def use(self, module):
        """A frozen copy for everything but training: transformers in the precision of this device."""
        module = frozen(module).to(self.device)
        getattr(module, "dynamics", module).to(self.dtype)                          # heads stay in float32
        return module

    def log(self, phase, **numbers):
        if main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"phase": phase, "round": self.round, **numbers}) + "\n")

    def data(self):
        return Data(self.cfg, self.folder / "data", self.cfg.round_episodes if self.round else 0)


def adopt(run, state, path):
    """Takes the architecture from a checkpoint; refuses flags and action spaces that contradict it."""
    names = {field.name for field in fields(Config)} - TUNABLE
    saved = state["config"]
    for name in names & set(run.overrides):
        if saved[name] != getattr(run.cfg, name):
            fail(f"--{name} {getattr(run.cfg, name)} contradicts {path}, made with {saved[name]}; "
                 "drop the flag or use another --run")
    if run.actions is not None and json.loads(state["actions"]) != run.actions:
        fail(f"checkpoint {path} has another action space ({saved['action_spec']}) than {run.cfg.env} "
             f"({run.cfg.action_spec}) with --action_bins {run.cfg.action_bins}; use another --run or --env")
    for name in names:
        setattr(run.cfg, name, saved[name])


def compile_blocks(model):
    """torch.compile for every transformer block. Blocks share graphs, one for each kind of layer, model, length and
    pass; at PyTorch's limit of 8 the others would run uncompiled."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False                      # would split graphs that are small already
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(dynamic=False)


class Loop:
    """A resumable training loop: for step in loop: loss = loop.train(...); loop.update(loss, metrics, frames).

    It holds what the phases share: optimizer, learning rate, averaged weights, log, checkpoints, DDP. The
    random state of step n follows from (seed, phase, round, n), so that a resumed run draws the same numbers.
    """

    def __init__(self, run, phase, file, model, steps, lr, state=None, names=("model", "ema"), kept={}):
        """state: a checkpoint whose weights go on, its optimizer and step too if it is of this phase and round; names:
        the entries of weights and averaged weights (left out: no averaging); kept: other entries to store."""
        self.run, self.phase, self.file, self.model, self.names = run, phase, file, model.to(run.device), names
        self.steps, self.lr, self.kept, cfg = steps, lr, kept, run.cfg
        self.ema = frozen(model) if len(names) > 1 else None
        for name, module in zip(names, (model, self.ema)):
            if state and name in state:
                module.load_state_dict(state[name])
        trained = [p for p in model.parameters() if p.requires_grad]
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
        others = [p for p in trained if id(p) not in set(map(id, matrices))]
        self.optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr, cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
        self.first = 0
        if state and (state["round"], state["phase"]) == (run.round, phase):
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            self.first = state["step"]
        if cfg.compile:
            compile_blocks(model)
        self.train = model
        if run.world > 1:
            self.train = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
        say(f"[{phase}] round {run.round} on {run.device} in {str(run.dtype)[6:]}, {run.world} process(es), "
            f"{sum(p.numel() for p in trained) / 1e6:.2f} M trained parameters, "
            f"steps {self.first} ... {steps}")

    def __iter__(self):
        self.began = self.told = self.saved = time.time()
        self.frames = 0
        self.step = self.first - 1
        for self.step in range(self.first, self.steps):
            self.rng = self.run.seeded(self.phase, self.step)
            yield self.step
            stop, due = bool(STOP), time.time() - self.saved > self.run.cfg.save_seconds
            if self.run.world > 1:                                           # all processes stop and save together
                flags = torch.tensor([stop, due], device=self.run.device)
                dist.all_reduce(flags, dist.ReduceOp.MAX)
                stop, due = flags.tolist()
            stop = stop and self.step + 1 < self.steps                      # else the phase writes its picture first
            if stop or due:
                self.save()
            check_stop(stop)
        self.save()

    def save(self):
        run = self.run
        if main_process():         # the random state of a step follows from seed, phase, round and step: see __iter__
            state = {"format": FORMAT, "phase": self.phase, "round": run.round, "step": self.step + 1, "seed": run.seed,
                     "config": asdict(run.cfg), "actions": json.dumps(run.actions), **self.kept,
                     **{name: module.state_dict() for name, module in zip(self.names, (self.model, self.ema))},
                     "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
            write_file(run.folder / self.file, lambda file: torch.save(state, file))
            run.remember()
        wait()                                      # no process reads the checkpoint before it is there
        self.saved = time.time()

    def update(self, loss, metrics, frames=0):
        """One optimizer step on the loss, then averaged weights. frames: video frames that this finishes, to log."""
        cfg, done = self.run.cfg, self.step / self.steps
        rise = min(1.0, (self.step + 1) / max(cfg.warmup, 1))
        fall = min(1.0, 0.1 + 0.9 * (1 - done) / max(cfg.cooldown, 1e-9))
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm + loss):                                   # one look at the device, not two
            fail(f"{self.phase}, step {self.step}: the loss is not finite (loss {loss.item()}, gradient norm "
                 f"{norm.item()}); {self.run.folder / self.file} from before, if any, is intact; try a smaller "
                 "learning rate (--tokenizer_lr, --dynamics_lr, --policy_lr)")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rise * fall * (2 if isinstance(optimizer, torch.optim.Muon) else 1)
            optimizer.step()
        if self.ema is not None:
            decay = min(cfg.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.frames += frames
        now, last = time.time(), self.step + 1 == self.steps
        if frames and (now - self.told > 5 or last):
            numbers = {name: float(value) for name, value in metrics.items()}
            spent = now - self.began
            left = spent / (self.step + 1 - self.first) * (self.steps - self.step - 1)
            say(f"[{self.phase}] step {self.step + 1}/{self.steps} "
                + " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                + f" | {self.frames / spent:.0f} frames/s, {left / 60:.1f} min left")
            self.run.log(self.phase, step=self.step + 1, seconds=round(spent, 1),
                         frames_per_s=round(self.frames / spent, 1), **numbers)
            self.told = now


# ---------------------------------------------------------------------------------------------------------
# Phases

def collect(run, policy_file=None):
    """Real episodes -> data/*.npz. Round 0 acts randomly, later rounds (or --policy) by a trained policy."""
    cfg = run.cfg
    first = 0 if run.round == 0 else cfg.collect_episodes + (run.round - 1) * cfg.round_episodes
    wanted = cfg.round_episodes if policy_file else cfg.collect_episodes
    name = lambda seed: run.folder / "data" / f"{seed:010d}.npz"
    if policy_file and run.round == 0:                # by hand: append after whatever is there
        first = len(list(run.folder.glob("data/*.npz")))
    seeds = [run.seed * 100_000 + i for i in range(first, first + wanted)]
    done = lambda seed: name(seed).exists()
    missing = wanted - sum(map(done, seeds))
    if not missing or not main_process():                     # one process collects, the others wait
        say(f"[collect] finished before: the {wanted} episodes of round {run.round} are there")
        return
    seed = run.seed * 1000 + run.round
    policy = RandomPolicy(cfg, seed)
    if policy_file:
        tokenizer, agent, _ = load_agent(run, policy_file)
        policy = AgentPolicy(tokenizer, agent, cfg, seed, cfg.policy_random)
    began, frames, returns = time.time(), 0, []
    for seed, episode in play(cfg, policy, seeds, done):
        if done(seed):
            continue
        episode.pop("values", None)
        if not returns:
            run.remember()
        write_file(name(seed), lambda file: np.savez_compressed(file, **episode))
        frames += len(episode["frames"])
        returns.append(float(episode["rewards"].sum()))
        if len(returns) % cfg.envs == 0 or len(returns) == missing:
            rate = frames / (time.time() - began)
            say(f"[collect] {len(returns)}/{missing} episodes, {frames} frames at {rate:.0f} frames/s, "
                f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}")
            run.log("collect", episodes=len(returns), frames=frames, frames_per_s=round(rate, 1),
                    return_mean=float(np.mean(returns)))


def finished(run, phase, state, steps, picture=None):
    """Whether a checkpoint (or None) is from a later phase or round, or has all steps and the phase its picture."""
    if state is None:
        return False
    here, there = (run.round, PHASES.index(phase)), (state["round"], PHASES.index(state["phase"]))
    done = there > here or there == here and state["step"] >= steps and (picture is None or picture.exists())
    if done:
        say(f"[{phase}] finished before")
    return done


def train_tokenizer(run):
    cfg, state = run.cfg, run.load("tokenizer.pt")
    if finished(run, "tokenizer", state, cfg.tokenizer_steps, run.folder / "tokenizer.png"):
        return
    data = run.data()
    run.seeded("tokenizer")
    model = Tokenizer(cfg)
    loop = Loop(run, "tokenizer", "tokenizer.pt", model, cfg.tokenizer_steps, cfg.tokenizer_lr, state)
    B, T = cfg.tokenizer_batch, cfg.tokenizer_length
    for step in loop:
        ramp = 1.0 if run.round else min(1.0, step / max(cfg.mask_ramp * cfg.tokenizer_steps, 1))
        batch = run.rows({"frames": data.sample(loop.rng, B, T, ["frames"])["frames"],
                          "mask": model.draw(B, T, cfg.mask_max * ramp)})
        with run.autocast():
            loss, metrics = loop.train(to_images(batch["frames"], run.device), batch["mask"])
        loop.update(loss, metrics, B * T)
    tokenizer, scores, columns = run.use(loop.ema), [], []
    for episode in data.held_out[::max(1, len(data.held_out) // 8)][:8]:                  # of all rounds
        truth, t = episode["frames"], len(episode["frames"]) // 2
        output = decode(tokenizer, encode(tokenizer, truth)[None])[0]
        scores.append(psnr(truth, output))
        columns.append(np.concatenate((truth[t], output[t]), 0))
    picture = np.concatenate(columns, 1).repeat(3, 0).repeat(3, 1)               # truth above, reconstruction below
    if main_process():
        write_file(run.folder / "tokenizer.png", lambda file: imageio.imwrite(file, picture, extension=".png"))
    run.log("tokenizer", psnr=float(np.mean(scores)))
    say(f"[tokenizer] PSNR on held-out episodes {np.mean(scores):.2f} dB; see {run.folder / 'tokenizer.png'}")


def sequence_shapes(cfg, step):
    """Alternating batch lengths: mostly short sequences, every n-th batch long, the same number of frames."""
    if step % cfg.long_every:
        return cfg.batch_size, cfg.short_length
    count = cfg.batch_size * cfg.short_length // cfg.long_length
    return max(1, count // cfg.shortcut_every) * cfg.shortcut_every, cfg.long_length     # whole groups of sequences


def train_dynamics(run):
    cfg, state = run.cfg, run.load("dynamics.pt")
    if finished(run, "dynamics", state, cfg.dynamics_steps, run.folder / "dynamics.gif"):
        return
    tokenizer, data = load_tokenizer(run), run.data()
    data.encode(tokenizer, run.folder)
    run.seeded("dynamics")
    model = Dynamics(cfg)
    loop = Loop(run, "dynamics", "dynamics.pt", model, cfg.dynamics_steps, cfg.dynamics_lr, state)
    for step in loop:
        B, T = sequence_shapes(cfg, step)
        batch = data.sample(loop.rng, B, T, ["latents", "actions"])
        batch = run.rows(batch | model.draw(B, T))
        with run.autocast():
            loss, metrics = loop.train(batch["latents"].float(), batch["actions"], batch)
        loop.update(loss, metrics, B * T)
    write_dream(run, tokenizer, Dream(run.use(loop.ema), k=cfg.k), data.held_out, run.folder / "dynamics.gif")
    say(f"[dynamics] dream beside the truth: {run.folder / 'dynamics.gif'}")


def train_agent(run):
    """Phase 2. Continues from dynamics.pt in round 0, from the round before later."""
    cfg, state = run.cfg, run.load("agent.pt")
    if finished(run, "agent", state, cfg.agent_steps, run.folder / "agent.gif"):
        return
    tokenizer, data = load_tokenizer(run), run.data()
    data.encode(tokenizer, run.folder)
    run.seeded("agent")
    model = Agent(cfg)
    model.value_head.requires_grad_(False)                              # learns in imagination
    if not state:                              # the first round starts from the dynamics, later ones from the last
        model.dynamics.load_state_dict(run.load("dynamics.pt", "dynamics", cfg.dynamics_steps)["ema"])
    kept = {"tokenizer": tokenizer.state_dict()}
    if state and "heads" in state:                                      # policy and value go on in imagination
        kept["heads"] = state["heads"]
    loop = Loop(run, "agent", "agent.pt", model, cfg.agent_steps, cfg.dynamics_lr, state, kept=kept)
    for step in loop:
        B, T = sequence_shapes(cfg, step)
        batch = data.sample(loop.rng, B, T, ["latents", "actions", "rewards"], cfg.rewarded_share)
        batch = run.rows(batch | model.dynamics.draw(B, T))
        with run.autocast():
            loss, metrics = loop.train(batch["latents"].float(), batch["actions"], batch["rewards"],
                                       batch["continues"], batch)
        loop.update(loss, metrics, B * T)
    agent = run.use(loop.ema)
    predicted, real = predict_rewards(agent, data.held_out)
    corr = correlation(predicted, real)
    say(f"[agent] health: {data.nonzero_share:.1%} of the rewards are not zero, {data.reward_share:.1%} differ from "
        f"the usual {data.usual_reward:.3g}, spread {data.reward_std:.3g}; predicted rewards on held-out episodes: "
        f"spread {predicted.std():.3g}, correlation {corr:.3f}")
    if data.reward_std < 1e-6:
        say("[agent] WARNING: all rewards are equal: the reward head has nothing to learn, and imagination will "
            "have no good or bad actions. Phases 2 and 3 then only clone behaviour; bring data with rewards")
    elif predicted.std() < 0.1 * max(real.std(), 1e-6):
        say("[agent] WARNING: the reward head has collapsed to a constant; try more --agent_steps or a larger "
            "--rewarded_share")
    run.log("agent", reward_corr=corr, reward_share=data.reward_share)
    write_dream(run, tokenizer, agent.dream(cfg.k), data.held_out, run.folder / "agent.gif")


class Imagination(nn.Module):
    """The loss of phase 3 as the forward of a module that holds just what it trains, as DDP needs it."""

    def __init__(self, agent):
        super().__init__()
        self.frozen = (agent, frozen(agent.policy_head))               # in a tuple: not trained, not saved
        self.policy_head = agent.policy_head.requires_grad_(True)
        self.value_head = agent.value_head.requires_grad_(True)

    def forward(self, rollout, policy_weight):
        agent, prior = self.frozen
        return agent.imagination_loss(rollout, prior, policy_weight)


def train_imagination(run):
    """Phase 3: the transformer is frozen; policy and value head learn on what model and policy dream up."""
    cfg = run.cfg
    if finished(run, "imagination", run.load("agent.pt"), cfg.imagination_steps):
        return
    state = run.load("agent.pt", "agent", cfg.agent_steps)
    data = run.data()
    data.encode(load_tokenizer(run), run.folder)
    agent = Agent(cfg)
    agent.load_state_dict(state["ema"])
    begin = state.get("prior", state.get("heads", {}))       # in later rounds policy and value go on from before, and
    agent.load_state_dict(begin, strict=False)               # the prior is that policy: each round trusts its own data
    agent = run.use(agent)
    model = Imagination(agent)
    kept = {"prior": begin} | {name: state[name] for name in ("tokenizer", "model", "ema")}
    loop = Loop(run, "imagination", "agent.pt", model, cfg.imagination_steps, cfg.policy_lr, state, ("heads",), kept)
    temperature = 1 + (cfg.temperature - 1) * (run.round + 1) / cfg.rounds     # a beginner learns from easier dreams
    for step in loop:
        batch = run.rows(data.sample(loop.rng, cfg.rollouts, cfg.rollout_context, ["latents", "actions"],
                                     cfg.rewarded_share))
        torch.manual_seed(int(loop.rng.integers(2**31)) + run.rank)    # every process dreams its own dreams
        rollout = imagine(agent, batch["latents"].float(), batch["actions"], cfg.horizon, cfg.k,
                          temperature=temperature)
        for i in range(cfg.updates):
            loss, metrics = loop.train(rollout, float(step >= cfg.value_steps))
            loop.update(loss, metrics, cfg.rollouts * cfg.horizon * (i + 1 == cfg.updates))
    say(f"[imagination] health: D+ holds {metrics['good']:.0%} of the steps, advantages spread "
        f"{metrics['advantage_std']:.3g}, KL to the prior {metrics['kl']:.3g}, imagined reward per step "
        f"{metrics['reward']:.3g}")
    if not 0.02 < metrics["good"] < 0.98 or metrics["advantage_std"] < 1e-4:
        say("[imagination] WARNING: D+ or D- is (nearly) empty: no learning signal. Look at the reward head's "
            "correlation; try a larger --rewarded_share, more --value_steps or a longer --horizon")


# --- measuring

def load_tokenizer(run):
    tokenizer = Tokenizer(run.cfg)
    tokenizer.load_state_dict(run.load("tokenizer.pt", "tokenizer", run.cfg.tokenizer_steps)["ema"])
    return run.use(tokenizer)


def load_agent(run, path):
    """A checkpoint of phase 2 or 3 -> tokenizer, agent, cloned policy head; all frozen, for use."""
    state = load_checkpoint(path)
    if "tokenizer" not in state:
        fail(f"checkpoint {path} holds no agent; give agent.pt, or run: python train.py --phase agent")
    adopt(run, state, path)
    tokenizer, agent = Tokenizer(run.cfg), Agent(run.cfg)
    tokenizer.load_state_dict(state["tokenizer"])
    agent.load_state_dict(state["ema"])
    cloned = frozen(agent.policy_head).to(run.device)
    agent.load_state_dict(state.get("heads", {}), strict=False)
    return run.use(tokenizer), run.use(agent), cloned


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of uint8 frames (..., H, W, 3), averaged over the frames."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((-3, -2, -1)) / 255 ** 2
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))


def correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1]) if min(np.std(a), np.std(b)) > 1e-8 else 0.0


@torch.no_grad()
def predict_rewards(agent, episodes, chunk=32):
    """Streams whole episodes -> predicted and real rewards of all frames but the first, two flat arrays."""
    predicted, real = [], []
    device = next(agent.parameters()).device
    for episode in episodes:
        dream = agent.dream(k=1)
        pieces = []
        for t in range(0, len(episode["rewards"]), chunk):
            z, actions = (torch.as_tensor(episode[name][None, t:t + chunk], device=device)
                          for name in ("latents", "actions"))
            pieces.append(agent.reward(dream.observe(z.float(), actions))[0].cpu().numpy())
        predicted.append(np.concatenate(pieces)[1:])
        real.append(episode["rewards"][1:])
    return np.concatenate(predicted), np.concatenate(real)


@torch.no_grad()
def open_loop(dream, z, actions, context, agent=None, length=0):
    """Dreams on from the first `context` frames of z (B, T, N, Z) with the actions (B, T, A) -> (B, T, N, Z).

    With an agent the dream has at least `length` frames: it acts where the actions end.
    """
    device = next(dream.dynamics.parameters()).device
    z, actions = torch.as_tensor(z, device=device).float(), torch.as_tensor(actions, device=device)
    h, frames = dream.reset(z[:, :context], actions[:, :context]), list(z[:, :context].unbind(1))
    for t in range(context, max(length if agent else 0, actions.shape[1])):
        check_stop()
        z, h = dream.step(actions[:, t] if t < actions.shape[1] else agent.sample(agent.policy(h)))
        frames.append(z)
    return torch.stack(frames, 1)


def windows(episodes, rng, count, length):
    """Random windows of the episodes in turn -> dict of arrays (count, length, ...); shorter if all episodes are."""
    length = min(length, max(len(e["rewards"]) for e in episodes))
    long = [e for e in episodes if len(e["rewards"]) >= length]
    chosen = [(e, int(rng.integers(len(e["rewards"]) - length + 1))) for e in (long * count)[:count]]
    return {name: np.stack([e[name][start:start + length] for e, start in chosen])
            for name in ("frames", "latents", "actions", "rewards")}


def write_dream(run, tokenizer, dream, episodes, path, length=32, agent=None, context=4, count=4):
    """Video: truth above, dream below, same actions; a bar marks the frames that were given as context.

    Where the truth ends the agent goes on, below a black picture.
    """
    if not main_process():
        return
    torch.manual_seed(run.seed)
    episodes = episodes[::max(1, len(episodes) // count)]                         # of all rounds
    batch = windows(episodes, np.random.default_rng(run.seed), count, length)
    dreamed = decode(tokenizer, open_loop(dream, batch["latents"], batch["actions"], context, agent, length))
    dreamed[:, :context, :2] = (255, 255, 255)
    truth = np.zeros_like(dreamed)
    truth[:, :batch["frames"].shape[1]] = batch["frames"]
    write_video(path, np.concatenate([np.concatenate(list(part), 2) for part in (truth, dreamed)], 1))


def write_video(path, frames, scale=2, fps=12):
    """frames (T, H, W, 3) uint8 -> an endless GIF, or an MP4, by the name of the file."""
    kind, frames = Path(path).suffix, frames.repeat(scale, 1).repeat(scale, 2)
    options = dict(duration=1000 / fps, loop=0) if kind == ".gif" else dict(fps=fps, macro_block_size=2)
    write_file(path, lambda file: file.write(imageio.imwrite("<bytes>", frames, extension=kind, **options)))


def held_out_episodes(run, tokenizer, agent):
    """Held-out episodes with latents; where the run has no data, a few fresh ones that the policy plays."""
    if len(list(run.folder.glob("data/*.npz"))) >= 2:
        data = run.data()
        data.encode(tokenizer, run.folder)
        return data.held_out
    say(f"{run.folder / 'data'} holds no episodes: the policy plays 4 for contexts")
    seeds = [EVALUATION_SEEDS - 1 - i for i in range(4)]
    policy = AgentPolicy(tokenizer, agent, run.cfg, run.seed, run.cfg.policy_random)
    episodes = [e for _, e in play(run.cfg, policy, seeds)]
    for episode in episodes:
        episode["latents"] = encode(tokenizer, episode["frames"])
    return episodes


def dream_metrics(run, tokenizer, agent, episodes, context=4, ahead=16, count=32, far=200):
    """Open-loop dreams from `context` frames on against held-out truth: `ahead` frames with the actions taken in every
    number of steps K, and with another episode's; and whether the latents keep their mean and spread `far` ahead.
    """
    rng, cfg = np.random.default_rng(run.seed), run.cfg
    batch, long = windows(episodes, rng, count, context + ahead), windows(episodes, rng, count // 4, context + far)
    truth = batch["frames"][:, context:]
    dream = lambda part, actions, k=cfg.k: open_loop(Dream(agent.dynamics, k=k), part["latents"], actions, context)
    score = lambda *choice: psnr(decode(tokenizer, dream(batch, *choice))[:, context:], truth)
    other = np.roll(batch["actions"], 1, 0)                               # another episode's actions, same contexts
    other[:, :context] = batch["actions"][:, :context]
    real, z = long["latents"].astype(np.float32), dream(long, long["actions"])[:, context:][:, -50:]
    scores = {f"dream_psnr_k{2 ** i}": score(batch["actions"], 2 ** i) for i in range(cfg.k_max.bit_length())}
    return scores | {
        "dream_psnr": scores[f"dream_psnr_k{cfg.k}"], "dream_psnr_shuffled": score(other),
        "copy_psnr": psnr(np.broadcast_to(batch["frames"][:, context - 1:context], truth.shape), truth),
        "latent_std_real": float(real.std()), "latent_std_dream": float(z.std()),
        "latent_mean_real": float(real.mean()), "latent_mean_dream": float(z.mean())}


def values_and_returns(episode, cfg):
    """What the value head expected and the discounted return that came, at every frame whose return is known.

    A time limit cuts returns off, which the value cannot see coming: two horizons 1 / (1 - γ) before it, at most
    half of the episode, are left out.
    """
    T = len(episode["rewards"])
    known = T if episode["terminal"] else T - min(round(2 / max(1 - cfg.gamma, 1e-6)), T // 2)
    rewards = torch.as_tensor(episode["rewards"][None, 1:])
    returns = lambda_returns(rewards, torch.zeros(1, T), torch.ones(1, T - 1), cfg.gamma, lam=1.0)[0].numpy()
    return episode["values"][:known], np.append(returns, np.float32(0))[:known]


def evaluate(run, path, video):
    """Policy, cloned policy and random policy on the same unseen seeds; the model on held-out episodes."""
    began, cfg = time.time(), run.cfg
    tokenizer, agent, cloned = load_agent(run, path)
    seeds = [EVALUATION_SEEDS + run.seed * 1000 + i for i in range(cfg.eval_episodes)]
    clone = frozen(agent)
    clone.policy_head = cloned
    policies = {"random": RandomPolicy(cfg, run.seed), "bc": AgentPolicy(tokenizer, clone, cfg, run.seed),
                "return": AgentPolicy(tokenizer, agent, cfg, run.seed)}
    results, played = {}, {}
    for name, policy in policies.items():
        played[name] = list(play(cfg, policy, seeds))
        returns = np.array([e["rewards"].sum() for _, e in played[name]])
        results |= {f"{name}_mean": float(returns.mean()),
                    f"{name}_se": float(returns.std(ddof=min(1, len(returns) - 1)) / len(returns) ** 0.5)}
        say(f"[evaluate] {name}: {returns.mean():.1f} ± {results[f'{name}_se']:.1f} over {len(returns)} episodes")
    episodes = [e for _, e in played["return"]]
    torch.manual_seed(run.seed)
    for e in episodes:
        e["latents"] = encode(tokenizer, e["frames"])
    held_out = held_out_episodes(run, tokenizer, agent)
    results |= {"episodes": len(episodes),
                "tokenizer_psnr": float(np.mean([psnr(e["frames"], decode(tokenizer, e["latents"][None])[0])
                                                 for e in held_out])),
                **dream_metrics(run, tokenizer, agent, held_out),
                "reward_corr": correlation(*predict_rewards(agent, held_out)),
                "value_corr": correlation(*map(np.concatenate, zip(*[values_and_returns(e, cfg) for e in episodes])))}
    batch = windows(episodes, np.random.default_rng(run.seed), 64, cfg.rollout_context + cfg.horizon)
    length = batch["rewards"].shape[1]
    context = min(cfg.rollout_context, length - 1)
    start = [torch.as_tensor(batch[name][:, :context], device=run.device) for name in ("latents", "actions")]
    rollout = imagine(agent, start[0].float(), start[1], length - context, cfg.k, temperature=cfg.temperature)
    results |= {"imagined_reward": float(rollout["rewards"].sum(1).mean()),
                "real_reward": float(batch["rewards"][:, context:].sum(1).mean()),
                "wall_s": round(time.time() - began, 1)}
    say(f"[evaluate] health: over {length - context} steps from the same frames the policy imagines "
        f"{results['imagined_reward']:.2f} and really gets {results['real_reward']:.2f}")
    results = {name: round(value, 4) for name, value in results.items()}
    write_file(run.folder / "eval.json", lambda file: file.write((json.dumps(results) + "\n").encode()))
    rows = [(name, seed, float(e["rewards"].sum()), len(e["frames"]) - 1)
            for name, pairs in played.items() for seed, e in pairs]
    text = "policy,seed,return,length\n" + "".join(f"{n},{s},{r:.3f},{t}\n" for n, s, r, t in rows)
    write_file(run.folder / "episodes.csv", lambda file: file.write(text.encode()))
    shown = episodes[0]
    write_video(video, np.concatenate((shown["frames"], decode(tokenizer, shown["latents"][None])[0]), 2), fps=20)
    say(json.dumps(results))


def dream(run, path, length, video):
    tokenizer, agent, _ = load_agent(run, path)
    episodes = held_out_episodes(run, tokenizer, agent)
    write_dream(run, tokenizer, agent.dream(run.cfg.k), episodes, video, length, agent)
    say(f"[dream] {video}: truth above, dream below, same actions; the policy goes on where the truth ends")


class Player:
    """The dreams of the browser tabs: start, step and stop one; a tab that falls silent is forgotten."""

    def __init__(self, run, path):
        self.tokenizer, self.agent, _ = load_agent(run, path)
        self.episodes, self.device = held_out_episodes(run, self.tokenizer, self.agent), run.device
        self.cfg, self.open, self.rng = run.cfg, {}, np.random.default_rng()

    def start(self, session=None):
        """A new dream from a random context, in the place of the session's old one."""
        self.open = {name: tab for name, tab in self.open.items()
                     if name != session and time.time() - tab["seen"] < 60}
        if len(self.open) >= 8:
            raise ValueError("8 tabs are dreaming already; close one")
        batch = windows([self.episodes[self.rng.integers(len(self.episodes))]], self.rng, 1, 8)
        z, actions = (torch.as_tensor(batch[name], device=self.device) for name in ("latents", "actions"))
        tab = {"dream": self.agent.dream(1), "cache": Cache(), "frame": 0}
        tab["h"], name = tab["dream"].reset(z.float(), actions), secrets.token_urlsafe(16)
        self.open[name] = tab
        return self.show(tab, z) | {"session": name, "steps": [k for k in (1, 2, 4, 8) if k <= self.cfg.k_max]}

    def step(self, session, k, policy, x, y, digit=None):
        """The next frame. x, y in {-1, 0, 1}: keys for the first two action components; digit: a category."""
        tab = self.open[session]
        if k not in (1, 2, 4, 8) or k > self.cfg.k_max or x not in (-1, 0, 1) or y not in (-1, 0, 1):
            raise ValueError("k, x or y is out of range")
        action = self.agent.sample(self.agent.policy(tab["h"]))
        if not policy:
            action[0] = 0
            for i, (key, count) in enumerate(zip((x, y), self.cfg.action_spec)):
                action[0, i] = round((key + 1) / 2 * (count - 1))
            if digit is not None:
                action[0, 0] = min(max(int(digit), 0), self.cfg.action_spec[0] - 1)
        tab["dream"].k, tab["frame"] = k, tab["frame"] + 1
        z, tab["h"] = tab["dream"].step(action)
        return self.show(tab, z[:, None])

    def stop(self, session):
        if session in self.open:
            del self.open[session]
        return {}

    def show(self, tab, z):
        """Decodes the frames z, with which the tab's video goes on; the last of them, and what the heads say of it."""
        tab["seen"], pixels = time.time(), decode(self.tokenizer, z, cache=tab["cache"])[0, -1]
        return {"pixels": base64.b64encode(pixels.tobytes()).decode(), "size": pixels.shape[:2], "frame": tab["frame"],
                **{name: float(getattr(self.agent, name)(tab["h"])) for name in ("reward", "continuation", "value")}}


def serve(run, path, port):
    """One page on 127.0.0.1. Only pages of this server may talk to it: foreign hosts and origins are refused."""
    player, one_at_a_time = Player(run, path), threading.Lock()
    page = (Path(__file__).parent / "assets" / "play.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version, timeout = "HTTP/1.1", 60
        disable_nagle_algorithm = True                     # else the body waits 40 ms for the headers' acknowledgement

        def handle(self):
            with contextlib.suppress(ConnectionError):                      # a tab that is closed while it waits
                super().handle()

        def answer(self):
            """Status, body and its type. The host may carry another port: the server works through an SSH forward."""
            host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
            if re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost", "[::1]") or (
                    origin not in (None, f"http://{host}")):
                return 403, b"foreign host or origin", "text/plain"
            if self.command == "GET" and self.path == "/":
                return 200, page, "text/html; charset=utf-8"
            if self.command == "GET" or self.path not in ("/start", "/step", "/stop"):
                return 404, b"not found", "text/plain"
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > 1000:
                return 400, b"the body must be a small JSON object", "text/plain"
            body, self.close_connection = self.rfile.read(int(length)), False
            try:
                with one_at_a_time:
                    state = getattr(player, self.path[1:])(**json.loads(body))
                return 200, json.dumps(state).encode(), "application/json"
            except KeyError:
                return 410, b"this dream was forgotten; it starts again", "text/plain"
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                return 400, f"bad request: {error}".encode(), "text/plain; charset=utf-8"

        def do_GET(self):
            status, body, kind = self.answer()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.close_connection = True                                     # unless the body is read
            self.do_GET()

        def log_message(self, *_):
            pass

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        fail(f"--port {port}: {error}; choose another one")
    server.timeout = 0.2
    say(f"[play] open http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)")
    while not STOP:
        server.handle_request()


def bench(run):
    """Speed of everything on this machine, in one run."""
    from torch.utils.benchmark import Timer
    from torch.utils.flop_counter import FlopCounterMode

    cfg, results = run.cfg, {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}

    def seconds(work):
        """Median time of one call, after a few to warm up (and compile)."""
        work(), work()
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=3).median

    def memory():
        if run.device != "cpu":
            return torch.cuda.max_memory_allocated() / 1e9
        if sys.platform == "win32":
            return float("nan")
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048, device=run.device, dtype=dtype)
        results[f"matmul_{str(dtype)[6:]}_gflops"] = round(2 * 2048 ** 3 / seconds(lambda: a @ a) / 1e9)
    peak = results[f"matmul_{str(run.dtype)[6:]}_gflops"] * 1e9
    say(f"[bench] matmul: {results['matmul_float32_gflops']} GFLOP/s in float32, "
        f"{results['matmul_bfloat16_gflops']} in bfloat16")

    tokenizer, agent = Tokenizer(cfg).to(run.device), Agent(cfg).to(run.device)
    dynamics = agent.dynamics
    results |= {f"{name}_parameters": sum(p.numel() for p in module.parameters())
                for name, module in (("tokenizer", tokenizer), ("dynamics", dynamics))}
    play_tokenizer, play_agent = run.use(tokenizer), run.use(agent)

    def step(module, *inputs):
        with run.autocast():
            loss, _ = module(*inputs)
        loss.backward()
        module.zero_grad(set_to_none=True)

    B, T = cfg.tokenizer_batch, cfg.tokenizer_length
    images = torch.rand(B, T, 3, *cfg.image_size, device=run.device)
    B2, T2 = cfg.batch_size, cfg.short_length
    z = torch.rand(16, max(T2, 8), cfg.latents, cfg.latent_channels, device=run.device) * 2 - 1
    actions = torch.zeros(16, max(T2, 8), len(cfg.action_spec), dtype=torch.int64, device=run.device)
    batch = (z[:1, :T2].expand(B2, -1, -1, -1), actions[:1, :T2].expand(B2, -1, -1))
    k, stream, cache = min(4, cfg.k_max), play_agent.dream(min(4, cfg.k_max)), Cache()
    stream.reset(z[:1, :8], actions[:1, :8])
    jobs = [("tokenizer_training", B * T, lambda: step(tokenizer, images, tokenizer.draw(B, T, device=run.device))),
            ("dynamics_training", B2 * T2, lambda: step(dynamics, *batch, dynamics.draw(B2, T2, device=run.device))),
            ("imagination", 256, lambda: imagine(play_agent, z[:, :8], actions[:, :8], 16, k)),
            ("play", 1, lambda: play_tokenizer.decode(stream.step(actions[:1, 0])[0][:, None], cache))]
    for name, frames, work in jobs:
        with FlopCounterMode(display=False) as counter:
            work()
        if cfg.compile and "training" in name:          # after the count, which compiled code would hide
            compile_blocks(tokenizer if name.startswith("tokenizer") else dynamics)
        if run.device != "cpu":
            torch.cuda.reset_peak_memory_stats()        # the count ran uncompiled
        spent = seconds(work)
        results[name], results[f"{name}_share"] = frames / spent, counter.get_total_flops() / spent / peak
        results["peak_memory_gb"] = max(memory(), results.get("peak_memory_gb", 0))
        say(f"[bench] {name}: {results[name]:.0f} frames/s, {results[f'{name}_share']:.0%} of the matmul rate, "
            f"peak memory so far {results['peak_memory_gb']:.2f} GB")
    if cfg.env:
        began = time.time()
        cfg.episode_frames = min(cfg.episode_frames, 100)
        frames = sum(len(e["frames"]) for _, e in play(cfg, RandomPolicy(cfg, 0), range(cfg.envs)))
        results["collect"] = frames / (time.time() - began)
        say(f"[bench] collect: {results['collect']:.0f} frames/s with {cfg.envs} environments, start included")
    say(json.dumps({name: round(x, 3) if isinstance(x, float) else x for name, x in results.items()}))


def run_all(run):
    cfg = run.cfg
    for run.round in range(cfg.rounds):
        if cfg.env:
            collect(run, run.folder / "agent.pt" if run.round else None)
        wait()
        train_tokenizer(run)
        if run.round == 0:
            train_dynamics(run)                     # in later rounds it goes on learning within the agent
        train_agent(run)
        train_imagination(run)
    result, agent = run.folder / "eval.json", run.folder / "agent.pt"
    if main_process() and not (result.exists() and result.stat().st_mtime > agent.stat().st_mtime):
        dream(run, agent, 48, run.folder / "dream.gif")
        if cfg.env:
            evaluate(run, agent, run.folder / "policy.gif")


def wait():
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------
# Command line

def flag_type(field):
    """How the text of a flag becomes the value of a config field; errors of argparse show the function's name."""
    def numbers(text):
        return tuple(int(part) for part in re.split("[x,]", text))

    def boolean(text):
        return bool(("false", "true").index(text.lower()))

    return numbers if str(field.type).startswith("tuple") else boolean if field.type is bool else field.type


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (python train.py --help lists all flags)")
    parser.add_argument("--phase", choices=PHASES, default="all")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where CUDA is there, else cpu")
    parser.add_argument("--run", help="folder of this run, default runs/default; with --checkpoint its folder, or "
                        "runs/NAME where that is no run")
    parser.add_argument("--seed", type=int, help="training seed, default 0")
    parser.add_argument("--checkpoint", help="agent.pt to evaluate, dream with or play")
    parser.add_argument("--policy", help="collect: checkpoint of the policy that acts")
    parser.add_argument("--episodes", type=int, help="episodes to collect or to evaluate on")
    parser.add_argument("--length", type=int, default=48, help="frames of the dream's video")
    parser.add_argument("--record", nargs="?", metavar="FILE", help="evaluate, dream: the video to write, .gif or "
                        ".mp4, default RUN/policy.gif and RUN/dream.gif")
    parser.add_argument("--port", type=int, default=8000, help="port of the page to play on")
    group = parser.add_argument_group("config")
    comments = {}
    for cls in (Config, TrainConfig):
        comments |= dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(cls), re.M))
    for field in fields(TrainConfig):
        group.add_argument(f"--{field.name}", type=flag_type(field), default=argparse.SUPPRESS, metavar="X",
                           help=comments.get(field.name, "").replace("%", "%%"))
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parse(arguments)
    names = {field.name for field in fields(TrainConfig)}
    overrides = {name: value for name, value in vars(args).items() if name in names}
    if args.episodes is not None:
        counts = {"collect": ["round_episodes" if args.policy else "collect_episodes"], "evaluate": ["eval_episodes"]}
        overrides |= dict.fromkeys(
            counts.get(args.phase, ["collect_episodes", "round_episodes", "eval_episodes"]), args.episodes)
    if args.length < 5:
        fail("--length must be at least 5: four frames are context")
    if args.record and Path(args.record).suffix not in (".gif", ".mp4"):
        fail(f"--record {args.record}: the name of a video ends in .gif or .mp4")
    if (args.seed or 0) < 0:
        fail("--seed must not be negative")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _: STOP.append(signum))
    alone = args.phase in ("evaluate", "dream", "play", "bench")                # work for one process
    if alone and os.environ.get("RANK", "0") != "0":
        return
    if "WORLD_SIZE" in os.environ and not alone:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=1))         # the others wait while one collects
    preset = args.preset or ("gpu" if torch.cuda.is_available() else "cpu")
    if args.run is None:
        checkpoint = Path(args.checkpoint or "runs/default/agent.pt")
        known = not args.checkpoint or (checkpoint.parent / "config.json").exists()
        args.run = checkpoint.parent if known else Path("runs") / checkpoint.stem
    saved, settings = {}, Path(args.run) / "config.json"
    if args.checkpoint:
        state = load_checkpoint(args.checkpoint)
        saved = {"config": state["config"], "actions": json.loads(state["actions"]), "seed": state["seed"]}
    elif settings.exists():
        try:
            saved = json.loads(settings.read_text())
            saved["config"].keys()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            fail(f"{settings} is damaged ({error!r}); delete it and give the flags again")
    if args.preset and saved.get("preset", preset) != preset:
        fail(f"--preset {preset}, but {settings} was made with {saved['preset']}; use another --run")
    values = saved.get("config", PRESETS[preset])
    try:
        cfg = TrainConfig(**{**values, **overrides})
    except ValueError as error:
        fail(str(error))
    except TypeError as error:
        fail(f"{args.checkpoint or settings} has settings that this version does not know: {error}")
    seed = args.seed if args.seed is not None else saved.get("seed", 0)
    actions = saved.get("actions")
    if preset == "paper" and args.phase == "bench":
        with torch.device("meta"):                                    # without memory: the code reaches this scale
            models = {"tokenizer": Tokenizer(cfg), "dynamics": Dynamics(cfg)}
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        return print(json.dumps(sizes))
    if "action_spec" in overrides:                                    # recorded data, no environment at hand
        cfg.env = overrides.get("env", "")
        actions = describe(gym.spaces.MultiDiscrete(cfg.action_spec), cfg.action_bins)
    elif actions is None or {"env", "env_kwargs", "action_bins"} & set(overrides):
        env = make_env(cfg)
        actions = describe(env.action_space, cfg.action_bins)
        env.close()
    cfg.action_spec = action_sizes(actions)
    if not cfg.env:
        cfg.rounds = 1                                                # recorded data: nobody collects more
    run = Run(args.run, cfg, seed, actions, overrides)
    run.preset = saved.get("preset", preset)
    path = args.checkpoint or run.folder / "agent.pt"
    wait()
    if (run.folder / "agent.pt").exists() and args.phase in ("agent", "imagination"):
        run.round = load_checkpoint(run.folder / "agent.pt")["round"]
    began = time.time()
    {"collect": lambda: collect(run, args.policy), "tokenizer": lambda: train_tokenizer(run),
     "dynamics": lambda: train_dynamics(run), "agent": lambda: train_agent(run),
     "imagination": lambda: train_imagination(run),
     "evaluate": lambda: evaluate(run, path, args.record or run.folder / "policy.gif"),
     "dream": lambda: dream(run, path, args.length, args.record or run.folder / "dream.gif"),
     "play": lambda: serve(run, path, args.port),
     "bench": lambda: bench(run), "all": lambda: run_all(run)}[args.phase]()
    if args.phase not in ("evaluate", "bench", "all"):                    # their last line is the result as JSON
        say(f"[{args.phase}] done in {(time.time() - began) / 60:.1f} min")
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:                                           # a full disk while logging, for example
        fail(error)
