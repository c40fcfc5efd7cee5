"""Train Dreamer 4 on pixels, from random interaction to a policy that learned in its own dreams.

    python train.py --preset cpu                 # all phases, on a laptop -> runs/default
    python train.py --phase collect              # random driving -> runs/default/data/*.npz
    python train.py --phase tokenizer            # masked autoencoder: frames -> latents
    python train.py --phase dynamics             # shortcut forcing: the world model
    python train.py --phase agent                # agent token: cloning, reward, continuation
    python train.py --phase imagination          # PMPO inside the dreams
    python train.py --phase evaluate             # random, cloned and dreamed policy, unseen seeds
    python train.py --phase dream                # a video: truth above, dream below, same actions
    torchrun --nproc_per_node 2 -- train.py      # several GPUs or processes

--run runs/NAME names another folder. The same command continues what was interrupted, with the
same random numbers. Every field of dreamer4.Config and of TrainConfig below is a flag.
"""
import argparse
import contextlib
import datetime
import fcntl
import functools
import json
import multiprocessing
import os
import sys
import time
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from dreamer4 import Agent, Block, Cache, Config, Dream, Dynamics, Tokenizer, frozen, imagine

# In the order of time; random numbers follow from a phase's place in it.
PHASES = ("collect", "tokenizer", "dynamics", "agent", "imagination", "evaluate", "dream", "all")
FILES = {"tokenizer": "tokenizer.pt", "dynamics": "dynamics.pt", "agent": "agent.pt",
         "imagination": "agent.pt"}
# Run s collects with environment seeds s * SEEDS_PER_RUN + i, and evaluates with
# EVALUATION_SEEDS + 1000 s + i.
SEEDS_PER_RUN, EVALUATION_SEEDS = 100_000, 10 ** 9


# ---- Settings ------------------------------------------------------------------------------------

@dataclass
class TrainConfig(Config):
    """Data, environment and optimization, on top of the model's Config."""
    preset: str = "cpu"             # where the settings of a new run come from: see PRESETS
    seed: int = 0                   # training seed: other episodes, weights and random numbers
    env: str = "CarRacing-v3"       # Gymnasium id (package:id if another package registers it)
    env_kwargs: str = "{}"          # JSON: arguments of the environment, '{"continuous": false}'
    action_bins: int = 5            # bins of a continuous action dimension, both ends included
    action_repeat: int = 1          # environment steps per agent step; a new CarRacing run has 4
    episode_frames: int = 1000      # longest episode in agent steps
    envs: int = 8                   # environments played side by side, each in its own process
    collect_episodes: int = 240     # episodes of random interaction
    hold: int = 4                   # random actions are held for 1 ... hold steps, per component
    uniform_share: float = 0.25     # share of random episodes with a new action in every step
    rounds: int = 1                 # of all phases; dynamics has one of its own in the first only
    round_episodes: int = 80        # episodes that the policy collects in every later round
    policy_random: float = 0.1      # share of random actions when the policy collects
    reward_scale: float = 0.0       # the model sees rewards divided by it; 0: chosen by the data
    batch_size: int = 32            # sequences per training step, over all processes
    short_length: int = 16          # frames of a short training sequence, T1
    long_length: int = 32           # frames of a long one, T2: longer than the context C
    long_every: int = 4             # every n-th batch is long (of about as many frames)
    rewarded_share: float = 0.3     # share of sequences around a reward (agent phase, contexts)
    recent_share: float = 0.5       # later rounds: share of sequences from the newest episodes
    tokenizer_batch: int = 8        # sequences per tokenizer step
    tokenizer_length: int = 8       # frames of a tokenizer sequence: more than tokenizer_context
    tokenizer_steps: int = 3000     # training steps of the tokenizer, in every round
    mask_ramp: float = 0.5          # share of the first round in which masking ramps up from none
    dynamics_steps: int = 1200      # training steps of the dynamics
    agent_steps: int = 500          # training steps of agent finetuning, in every round
    imagination_steps: int = 250    # batches of rollouts in imagination, in every round
    rollouts: int = 64              # imagined sequences in a batch
    rollout_context: int = 8        # real frames an imagined sequence starts from
    horizon: int = 16               # imagined frames, H
    updates: int = 4                # gradient steps on every batch of rollouts
    value_steps: int = 30           # first batches of a round, which train the value head only
    k: int = 4                      # denoising steps of a dreamed frame, K
    temperature: float = 1.0        # std of the noise dreams start from in the last round; rises
    tokenizer_lr: float = 1e-3      # peak learning rate of the tokenizer
    dynamics_lr: float = 1e-3       # the same for the dynamics, and in agent finetuning
    policy_lr: float = 3e-4         # the same for policy and value head in imagination
    warmup: int = 50                # steps over which the learning rate rises; see Loop.update
    ema: float = 0.99               # decay of the averaged weights; imagination has none
    eval_episodes: int = 20         # real episodes per policy in evaluation
    compile: str = "auto"           # blocks by torch.compile: "true", "false", "auto" (see Run)
    save_seconds: float = 120.0     # time between checkpoints

    def __post_init__(self):
        super().__post_init__(("beta", "reward_scale", "temperature", "save_seconds"))
        # before there was "auto" it was a bool
        self.compile = str(self.compile).lower()
        if self.compile not in ("auto", "true", "false"):
            raise ValueError(f"config: compile is {self.compile}, must be auto, true or false")
        if not self.env:
            # nobody collects more of recorded data
            self.rounds = 1
        if self.k & (self.k - 1) or self.k > self.k_max:
            raise ValueError(f"config: k must be a power of two up to k_max = {self.k_max}")

    def sequence_shapes(self, step):
        """(B, T) of a step: most batches short, every n-th long, with about as many frames."""
        if step % self.long_every:
            return self.batch_size, self.short_length
        count = self.batch_size * self.short_length // self.long_length
        # whole groups of sequences, of which one bootstraps
        return max(1, count // self.shortcut_every) * self.shortcut_every, self.long_length


# Of Config, what may change while a run goes on; all else in it is the architecture.
TUNABLE = {"mask_max", "shortcut_every", "separate_images", "context_share", "unimix", "gamma",
           "lam", "alpha", "beta"}
ARCHITECTURE = {field.name for field in fields(Config)} - TUNABLE
# What the episodes and random numbers of a run come from: it may not change, either.
ORIGIN = {"preset", "seed", "env", "env_kwargs", "action_bins", "action_repeat", "image_size",
          "action_spec"}

# What CarRacing wants at any size; elsewhere the paper's values (the defaults) may do better
RECIPE = dict(gamma=0.98, beta=0.05, rounds=4, k_max=64, separate_images=0.1, temperature=1.6)
PRESETS = {
    # for the tests: a minute
    "tiny": dict(
        tokenizer_width=32, tokenizer_depth=2, tokenizer_heads=2, latents=8, latent_channels=8,
        width=32, depth=4, heads=2, kv_heads=1, registers=1, context=8, head_width=32, pack=2,
        k_max=4, episode_frames=40, envs=2, collect_episodes=6, batch_size=4, short_length=6,
        long_length=12, tokenizer_batch=4, tokenizer_steps=30, dynamics_steps=30, agent_steps=20,
        imagination_steps=6, rollouts=4, rollout_context=4, horizon=4, value_steps=2, warmup=10,
        eval_episodes=2),
    # the README's result: two cores, an hour
    "cpu": RECIPE | dict(
        patch=16, tokenizer_width=128, tokenizer_heads=4, width=192, head_width=128, pack=4, k=2,
        collect_episodes=160, round_episodes=60, tokenizer_steps=1500, agent_steps=400,
        imagination_steps=300),
    # one consumer GPU with 12 GB; not measured yet
    "gpu": RECIPE | dict(
        image_size=(96, 96), tokenizer_width=384, tokenizer_depth=6, latents=32, width=512,
        depth=12, heads=8, registers=4, context=24, batch_size=64, tokenizer_batch=16,
        tokenizer_steps=5000, dynamics_steps=40000, agent_steps=5000, imagination_steps=1000,
        rollouts=256, head_width=512, collect_episodes=1000, envs=16, round_episodes=200,
        tokenizer_lr=5e-4, dynamics_lr=5e-4, ema=0.999),
    # 64x64 MineRL recordings, the sizes of an earlier implementation; not measured yet
    "minerl": dict(
        latent_channels=32, tokenizer_width=256, tokenizer_depth=6, tokenizer_heads=8, depth=6,
        heads=8, registers=4, pack=1, batch_size=8, tokenizer_length=16),
}


# ---- Run: folder, device, precision, seeds, processes --------------------------------------------

class Run:
    """runs/NAME with its settings, the device, and this process's place among others."""
    def __init__(self, args, cfg):
        self.folder, self.cfg, self.round = Path(args.run), cfg, 0
        self.checkpoint = args.checkpoint
        self.rank, self.world_size = 0, 1
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        # without instructions for it, bfloat16 is slower than float32
        if self.device == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # "bf16" is ARM's name; oneDNN makes products of it
            fast = map(torch.cpu.get_capabilities().get, ("amx_bf16", "avx512_bf16", "bf16"))
            bf16 = self.device == "cpu" and torch.backends.mkldnn.is_available() and any(fast)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        if dist.is_torchelastic_launched():
            if self.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # the others wait while one collects, maybe for hours
            dist.init_process_group(timeout=datetime.timedelta(days=1))
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            # every share begins with a sequence that bootstraps
            groups = [B / cfg.shortcut_every for B in (cfg.batch_size, cfg.sequence_shapes(0)[0])]
            shares = *groups, cfg.rollouts, cfg.tokenizer_batch
            if self.world_size > 1 and any(B % self.world_size for B in shares):
                raise ValueError(f"{self.world_size} processes cannot share batch_size, short or "
                                 "long, in groups of shortcut_every, rollouts, tokenizer_batch")
            if self.rank:
                sys.stdout = open(os.devnull, "w")

    def log(self, phase, **numbers):
        """Prints the numbers and adds them to metrics.jsonl."""
        numbers = {name: float(f"{x:.5g}") for name, x in numbers.items()}
        print(f"[{phase}]", *(f"{name} {x:g}" for name, x in numbers.items()))
        if self.rank == 0:
            row = json.dumps({"phase": phase, "round": self.round, **numbers})
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(f"{row}\n")

    def save_config(self):
        """Written with the first thing that a command makes: a refused one changes nothing."""
        text = json.dumps(asdict(self.cfg), indent=1)
        write_file(self.folder / "config.json", lambda file: file.write(text.encode()))

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def autocast(self):
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def rng(self, phase, step=0):
        """Seeds torch; returns a NumPy generator. All random numbers follow from (seed, phase,
        round, step), alike on all processes: a resumed run draws what it would have drawn."""
        sequence = np.random.SeedSequence((self.cfg.seed, PHASES.index(phase), self.round, step))
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        return np.random.default_rng(sequence)

    def share(self, batch):
        """This process's share of a batch drawn alike by all -> tensors on the device."""
        n = self.world_size
        return {name: torch.as_tensor(x[len(x) // n * self.rank:][:len(x) // n]).to(self.device)
                for name, x in batch.items()}

    def for_inference(self, module):
        """A frozen copy, its transformers in this device's precision; heads stay in float32."""
        module = frozen(module).to(self.device)
        getattr(module, "dynamics", module).to(self.dtype)
        return module

    def compile(self, phase, model):
        """torch.compile for the transformer blocks of a model; "auto": only if the phase is long
        enough to earn back the minute or two that it takes, and it works. Returns whether."""
        wanted = self.cfg.compile == "true"
        if self.cfg.compile == "auto" and getattr(self.cfg, f"{phase}_steps") >= 200:
            wanted = can_compile(self.device)
        if wanted:
            # the blocks share graphs, more than the 8 after which PyTorch stops compiling
            torch._dynamo.config.recompile_limit = 64
            for block in model.modules():
                if isinstance(block, Block):
                    block.compile(dynamic=False)
        return wanted

    def require(self, is_there, what, phase):
        if not is_there:
            command = f"python train.py --phase {phase} --run {self.folder}"
            raise ValueError(f"{what}; run first: {command}")

    def is_past(self, phase, state):
        """Whether a checkpoint has this phase of this round behind it, picture included."""
        wanted = self.round, PHASES.index(phase), getattr(self.cfg, f"{phase}_steps")
        return bool(state) and wanted <= (
            state["round"], PHASES.index(state["phase"]), state["step"])

    def load(self, name, needed=None):
        """A checkpoint, or {} where there is none; `needed`: a phase that must be behind it."""
        path, state = self.folder / name, {}
        if path.exists():
            with naming(path):
                state = torch.load(path, "cpu", weights_only=True)
            check_same(path, state["config"], self.cfg, ARCHITECTURE)
        if needed:
            self.require(self.is_past(needed, state), f"{path} is missing or unfinished", needed)
        return state

    def load_tokenizer(self, weights):
        tokenizer = Tokenizer(self.cfg)
        tokenizer.load_state_dict(weights)
        return self.for_inference(tokenizer)

    def load_agent(self):
        """Of --checkpoint or agent.pt: tokenizer, agent, agent with the cloned policy; frozen."""
        path = os.path.abspath(self.checkpoint or self.folder / "agent.pt")
        state, agent = self.load(path), Agent(self.cfg)
        self.require(state, f"{path} is missing", "agent")
        agent.load_state_dict(state["ema"])
        clone = self.for_inference(agent)
        agent.load_state_dict(state.get("heads", {}), strict=False)
        return self.load_tokenizer(state["tokenizer"]), self.for_inference(agent), clone


@functools.cache
def can_compile(device):
    """Whether torch.compile finds all that it needs, a C++ compiler above all."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
        return device != "mps"
    except Exception:
        # --compile true shows what is missing
        torch._dynamo.reset()
        return False


@contextlib.contextmanager
def naming(path):
    """Puts a file's name before what is wrong with it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def check_same(path, saved, cfg, names):
    """Refuses settings that differ from the saved ones and may not."""
    for name in sorted(names & saved.keys()):
        old, new = saved[name], getattr(cfg, name)
        if new != (tuple(old) if isinstance(old, list) else old):
            raise ValueError(f"--{name} is {new}, but {path} has {old}; use another --run")


def checksum(weights):
    return zlib.crc32(b"".join(x.float().cpu().numpy().tobytes() for x in weights.values()))


def write_file(path, write):
    """write(file) to a temporary name, then rename: a file is there as a whole or not at all. Only
    the main process writes."""
    if dist.is_initialized() and dist.get_rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # a process's own, should two evaluate in one folder
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- Environment and policies: frames in, category indices out -----------------------------------

def make_env(cfg):
    """gym.make; CarRacing draws only where a frame is asked for, which makes it four times as
    fast, and has gas and brake on one axis: random ones would mostly cancel out."""
    kwargs = {"disable_env_checker": True, **json.loads(cfg.env_kwargs)}
    try:
        env = gym.make(cfg.env, **{"render_mode": "rgb_array"} | kwargs)
    except TypeError:
        # it knows no render_mode; then its observation must be the picture
        env = gym.make(cfg.env, **kwargs)
    except gym.error.UnregisteredEnv as error:
        raise ValueError(f"{error} What another package registers is package:id, for example "
                         "minigrid:MiniGrid-Empty-5x5-v0") from error
    if cfg.env.startswith("CarRacing"):
        game = env.unwrapped
        draw, game._render = game._render, lambda mode: None
        if isinstance(env.action_space, gym.spaces.Box):
            env = gym.wrappers.TransformAction(
                env, lambda a: np.array([a[0], max(a[1], 0), max(-a[1], 0)], np.float32),
                gym.spaces.Box(-1, 1, (2,)))
        env.render = functools.partial(draw, "state_pixels")
    return env


def action_sizes(space, bins):
    """The categories of each action component; a bounded Box is binned, both ends included."""
    if isinstance(space, gym.spaces.Box) and space.is_bounded():
        return (bins,) * int(np.prod(space.shape))
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return tuple(space.nvec.ravel().tolist())
    raise ValueError(f"action space {space}: wrap it to be a bounded Box, Discrete, MultiDiscrete")


def to_action(space, indices, bins):
    """Category indices (A,) -> an action of the space."""
    indices = np.reshape(indices, space.shape)
    if not isinstance(space, gym.spaces.Box):
        return space.start + indices
    action = space.low + indices / max(bins - 1, 1) * (space.high.astype(float) - space.low)
    return (action.round() if space.dtype.kind in "iu" else action).astype(space.dtype)


class PixelEnv(gym.Wrapper):
    """Frames (H, W, 3) uint8 of cfg.image_size, actions as category indices, actions repeated.
    After the end of an episode it stands still: others play beside it."""
    def __init__(self, cfg):
        if multiprocessing.parent_process():
            # OpenMP's threads do not survive a fork
            torch.set_num_threads(1)
        self.cfg, self.bare = cfg, make_env(cfg)
        steps = (cfg.episode_frames - 1) * cfg.action_repeat
        super().__init__(gym.wrappers.TimeLimit(self.bare, steps))
        sizes = action_sizes(self.bare.action_space, cfg.action_bins)
        self.action_space = gym.spaces.MultiDiscrete(sizes)
        self.observation_space = gym.spaces.Box(0, 255, (*cfg.image_size, 3), np.uint8)

    def frame(self, observation):
        # something smaller holds codes, like MiniGrid's, not colors
        is_picture = (isinstance(observation, np.ndarray) and observation.dtype == np.uint8
                      and observation.shape[2:] == (3,) and min(observation.shape[:2]) >= 16)
        picture = np.asarray(observation if is_picture else self.bare.render())
        if picture.ndim != 3 or picture.shape[2] < 3 or picture.dtype != np.uint8:
            raise ValueError("neither observation nor render() is a picture (H, W, 3) of uint8, "
                             f"but {picture.shape} {picture.dtype}")
        self.last = resize(picture[..., :3], self.cfg.image_size)
        return self.last

    def reset(self, seed=None, options=None):
        self.end = (False, False)
        return self.frame(self.env.reset(seed=seed)[0]), {}

    def step(self, indices):
        if any(self.end):
            return self.last, 0.0, *self.end, {}
        action, total = to_action(self.bare.action_space, indices, self.cfg.action_bins), 0.0
        for _ in range(self.cfg.action_repeat):
            observation, reward, *self.end, _ = self.env.step(action)
            # None becomes NaN
            reward = np.asarray(reward, float)
            if reward.size != 1 or not np.isfinite(reward).all():
                raise ValueError(f"the environment's reward is {reward}, not a number")
            total += reward.item()
            if any(self.end):
                break
        return self.frame(observation), total, *self.end, {}


class RandomPolicy:
    """Random but useful: every action component is held for a while; a uniform_share of the
    episodes changes them in every step."""
    def __init__(self, cfg, seed):
        self.cfg, self.seed = cfg, seed

    def reset(self, seeds):
        """Episodes begin. Random numbers follow from the first seed and how many there are."""
        shape = len(seeds), len(self.cfg.action_spec)
        self.rng = np.random.default_rng((self.seed, seeds[0]))
        self.steps_left, self.action = np.zeros(shape, int), np.zeros(shape, np.int16)
        uniform = self.rng.random((len(seeds), 1)) < self.cfg.uniform_share
        self.longest = np.where(uniform, 1, self.cfg.hold)

    def act(self, frames, actions):
        """frames (n, H, W, 3), the actions (n, A) that led to them -> the next actions (n, A)."""
        new = self.steps_left == 0
        drawn = self.rng.integers(0, self.cfg.action_spec, new.shape)
        self.action = np.where(new, drawn, self.action).astype(np.int16)
        length = self.rng.integers(1, self.longest + 1, new.shape)
        self.steps_left = np.where(new, length, self.steps_left) - 1
        return self.action


class AgentPolicy(RandomPolicy):
    """Tokenizer, world model and policy head in the real environment, through the Dream stream;
    random_share of the actions is random."""
    def __init__(self, tokenizer, agent, cfg, seed, random_share=0.0):
        super().__init__(cfg, seed)
        self.tokenizer, self.agent, self.random_share = tokenizer, agent, random_share
        self.device = next(agent.parameters()).device

    def reset(self, seeds):
        super().reset(seeds)
        self.generator = torch.Generator(self.device).manual_seed(int(self.rng.integers(2**31)))
        self.cache, self.dream = Cache(), self.agent.dream(generator=self.generator, k=1)

    @torch.inference_mode()
    def act(self, frames, actions):
        z = self.tokenizer.encode(to_images(frames[:, None], self.device), cache=self.cache)
        h = self.dream.observe(z, torch.as_tensor(actions[:, None], device=self.device))[:, 0]
        action = self.agent.sample(self.agent.policy(h), self.generator).cpu().numpy()
        explore = self.rng.random((len(action), 1)) < self.random_share
        return np.where(explore, super().act(frames, actions), action).astype(np.int16)


def play(cfg, policy, seeds, count=None):
    """Plays one episode per seed, `count` (or cfg.envs) at a time, which share random numbers;
    yields (seed, arrays of an episode file)."""
    if not cfg.env:
        raise ValueError("this run has recorded data and no environment; give --env")
    count = count or min(cfg.envs, len(seeds))
    envs = AsyncVectorEnv([functools.partial(PixelEnv, cfg)] * count,
                          autoreset_mode=AutoresetMode.DISABLED)
    try:
        for start in range(0, len(seeds), count):
            # the last wave may repeat a seed
            wave = (seeds[start:] + [seeds[-1]] * count)[:count]
            policy.reset(wave)
            frames, _ = envs.reset(seed=wave)
            # no action led to the first frame, and no reward came with it
            actions = np.full((count, len(cfg.action_spec)), -1, np.int16)
            steps, lengths = [(frames, actions, np.zeros(count))], np.ones(count, int)
            ended = np.zeros(count, bool)
            while not ended.all():
                # the action that h_t chooses leads to frame t + 1, with which it is stored
                actions = policy.act(frames, actions)
                frames, rewards, terminated, truncated, _ = envs.step(actions)
                steps.append((frames, actions, rewards))
                lengths += ~ended
                ended = terminated | truncated
            columns = [np.stack(column, 1) for column in zip(*steps)]
            moves = (columns[0] != columns[0][:, :1]).any()
            if type(policy) is RandomPolicy and lengths.max() > 8 and not moves:
                raise ValueError(f"--env {cfg.env} shows the same picture in all frames of random "
                                 "actions")
            for i, seed in enumerate(seeds[start:start + count]):
                frames, actions, rewards = (column[i, :lengths[i]] for column in columns)
                yield seed, {"frames": frames, "actions": actions, "terminal": terminated[i],
                             "rewards": rewards.astype(np.float32)}
    except (EOFError, OSError) as error:
        raise ValueError(f"a process of --env {cfg.env} ended ({error}); what it printed may say "
                         "why") from error
    finally:
        with contextlib.suppress(EOFError, OSError):
            envs.close(terminate=True)


# ---- Episodes: files, windows, latents -----------------------------------------------------------

def load_episode(path, cfg):
    """Reads and checks one episode file; the format is in the README."""
    with naming(path), np.load(path) as file:
        episode = dict(file)
    T = len(episode.get("rewards", ()))
    wanted = {"frames": f"uint8 {(T, *cfg.image_size, 3)}", "rewards": f"float32 {(T,)}",
              "actions": f"int16 {(T, len(cfg.action_spec))}", "terminal": "bool ()"}
    found = {name: f"{x.dtype} {x.shape}" for name, x in episode.items()}
    if T < 2 or not wanted.items() <= found.items():
        raise ValueError(f"{path} holds {found}, but this run wants {wanted}")
    is_finite = np.isfinite(episode["rewards"]).all()
    if (episode["actions"] >= cfg.action_spec).any() or not is_finite:
        raise ValueError(f"{path} has actions beyond the action_spec {cfg.action_spec}, or rewards "
                         "that are not finite")
    return episode


class Data:
    """All episodes of a run. Every tenth is held out and never trains anything; the last ones by
    name are those of the newest round."""
    def __init__(self, run):
        self.run, folder = run, run.folder / "data"
        paths = sorted(folder.glob("*.npz"))
        run.require(len(paths) > 1, f"{folder} holds {len(paths)} episodes", "collect")
        self.episodes = [load_episode(path, run.cfg) for path in paths]
        self.train = [e for i, e in enumerate(self.episodes) if i % 10]
        self.held_out = self.episodes[::10]
        newest = len(paths) - (run.cfg.round_episodes if run.round else 0)
        self.is_recent = np.array([i >= newest for i in range(len(paths)) if i % 10])
        # a power of ten near the size of the rewards: two-hot bins are fine around 1
        self.rewards = np.concatenate([e["rewards"][1:] for e in self.train], dtype=float)
        square = np.square(self.rewards).sum() / max(np.count_nonzero(self.rewards), 1)
        self.scale = float(10.0 ** np.round(np.log10(square or 1.0) / 2))
        # in many tasks every step costs a little; what differs from that is news
        values, counts = np.unique((self.rewards / self.scale).round(3), return_counts=True)
        self.usual_reward = values[counts.argmax()] * self.scale
        for e in self.episodes:
            news = np.abs(e["rewards"] - self.usual_reward) > 1e-3 * self.scale
            e["news"] = np.flatnonzero(news[1:]) + 1

    def encode(self, weights, begun={}):
        """Gives every episode its "latents" (T, N, Z) float16, from files whose names are the
        checksums of what they were made from: tokenizer and frames. Returns the tokenizer, which
        must be that of `begun`, the checkpoint that goes on, if that is of this round."""
        tokenizer, folder = self.run.load_tokenizer(weights), self.run.folder / "latents"
        source, needed = checksum(weights), set()
        if begun.get("round") == self.run.round and begun["tokenizer_checksum"] != source:
            path = self.run.folder / FILES[begun["phase"]]
            raise ValueError(f"{path} was trained on the latents of another tokenizer.pt; delete "
                             "it to train it anew")
        for episode in self.episodes:
            path = folder / f"{source:08x}-{zlib.crc32(episode['frames']):08x}.npy"
            needed.add(path)
            if path.exists():
                episode["latents"] = np.load(path)
            else:
                episode["latents"] = encode(tokenizer, episode["frames"])
                write_file(path, functools.partial(np.save, arr=episode["latents"]))
        for path in set(folder.glob("*.npy")) - needed:
            path.unlink(missing_ok=True)
        return tokenizer

    def draw(self, rng, counts):
        """An episode, by how many (n,) of the things that are wanted each one has; in later rounds
        a recent_share comes from the newest episodes, besides those that chance takes there."""
        recent = counts * self.is_recent
        if recent.any() and rng.random() < self.run.cfg.recent_share:
            counts = recent
        return self.train[rng.choice(len(counts), p=counts / counts.sum())]

    def sample(self, rng, B, T, names, rewarded_share=0.0, is_context=False):
        """B windows of T frames -> arrays (B, T, ...), "continues" and "valid". Every frame is as
        likely as any other: windows reach beyond both ends of an episode. What lies there is cut,
        and the last frame repeated, not valid: of T = 4 from t = -2 on there are 0, 1, 1, 1.
        A rewarded_share is moved over a frame whose reward is unusual. Contexts of dreams are
        whole, repeat the first frame where there are too few, never end with a terminal one."""
        lengths = np.array([len(e["rewards"]) for e in self.train])
        news = np.array([len(e["news"]) for e in self.train])
        windows = []
        for _ in range(B):
            if news.any() and rng.random() < rewarded_share:
                e = self.draw(rng, news)
                start = rng.choice(e["news"]) - rng.integers(T)
            elif is_context:
                e = self.draw(rng, lengths)
                start = 1 - T + rng.integers(len(e["rewards"]) - e["terminal"])
            else:
                e = self.draw(rng, lengths + T - 1)
                start = rng.integers(1 - T, len(e["rewards"]))
            index, last = np.arange(start, start + T), len(e["rewards"]) - 1
            if is_context:
                index = (index - max(0, index[-1] - last + e["terminal"])).clip(0)
            index = index[(index >= 0) & (index <= last)]
            valid = np.arange(T) < len(index)
            index = np.pad(index, (0, T - len(index)), mode="edge")
            continues = np.float32(1) - (e["terminal"] & (index == last))
            windows.append([valid, continues, *(e[name][index] for name in names)])
        return dict(zip(("valid", "continues", *names), map(np.stack, zip(*windows))))


# ---- Frames and latents, pictures, PSNR ----------------------------------------------------------

def resize(frame, size):
    """uint8 frame (H, W, 3) -> (*size, 3), antialiased."""
    x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True)[0]
    return x.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


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
def decode(tokenizer, latents, chunk=32):
    """Streams latents (B, T, N, Z) through the decoder -> frames (B, T, H, W, 3) uint8."""
    cache, device = Cache(), next(tokenizer.parameters()).device
    latents = torch.as_tensor(latents, device=device).float()
    images = torch.cat([tokenizer.decode(z, cache) for z in latents.split(chunk, 1)], 1)
    return (images * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of uint8 frames (..., H, W, 3), averaged over the frames."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean((-3, -2, -1)) / 255 ** 2
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))


@torch.no_grad()
def dream_on(dream, episodes, seed, length, count, context=4):
    """Dreams on from `context` frames of `count` episodes, with their actions, up to `length`
    frames -> truth (B, T, H, W, 3), dreamed latents (B, T, N, Z)."""
    rng, device = np.random.default_rng(seed), next(dream.dynamics.parameters()).device
    torch.manual_seed(seed)
    T = min(length, max(len(e["rewards"]) for e in episodes))
    context = min(context, T - 1)
    long, windows = [e for e in episodes if len(e["rewards"]) >= T], []
    # evenly chosen, so that all rounds are among them
    for e in (long[::max(1, len(long) // count)] * count)[:count]:
        start = rng.integers(len(e["rewards"]) - T + 1)
        windows.append([e[name][start:start + T] for name in ("frames", "latents", "actions")])
    truth, z, actions = (np.stack(arrays) for arrays in zip(*windows))
    z, actions = torch.as_tensor(z, device=device).float(), torch.as_tensor(actions, device=device)
    dream.reset(z[:, :context], actions[:, :context])
    frames = [dream.step(action)[0] for action in actions[:, context:].unbind(1)]
    return truth, torch.cat((z[:, :context], torch.stack(frames, 1)), 1)


def write_dream(path, tokenizer, dream, episodes, seed, length=32):
    """Video: truth above, dream below, same actions; a bar marks the frames given as context."""
    truth, latents = dream_on(dream, episodes, seed, length, count=4)
    dreamed = decode(tokenizer, latents)
    dreamed[:, :4, :2] = 255
    # (B, T, H, W, 3) -> side by side (T, H, B W, 3)
    rows = [np.concatenate(list(row), 2) for row in (truth, dreamed)]
    write_video(path, np.concatenate(rows, 1))


def write_video(path, frames, fps=12):
    """frames (T, H, W, 3) uint8, enlarged -> an endless GIF."""
    frames = frames.repeat(3, 1).repeat(3, 2)
    video = imageio.imwrite("<bytes>", frames, extension=".gif", duration=1000 / fps, loop=0)
    write_file(path, lambda file: file.write(video))


# ---- The training loop: optimizers, averaged weights, learning rate, log, checkpoints ------------

def orthogonalize(x, dtype, steps=5):
    """x (rows, columns) -> U V^T of its SVD, roughly: its singular values near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = x.shape[0] > x.shape[1]
    # the smaller product of the matrix with itself
    x = (x.mT if is_tall else x).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    # Newton-Schulz: a x + b (x x^T) x + c (x x^T)^2 x
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized (Jordan et al. 2024), in steps twice as large as AdamW's
    (Liu et al. 2025, arXiv:2502.16982: as large). torch.optim.Muon works in bfloat16 even where
    that is slow. All matrices need a gradient, and the group a rate, before every step."""
    def __init__(self, matrices, dtype, momentum=0.95, weight_decay=0.02):
        super().__init__(matrices, dict(lr=0.0))
        self.dtype, self.momentum, self.weight_decay = dtype, momentum, weight_decay

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        for p in group["params"]:
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(buffer, self.momentum)
            update = orthogonalize(update, self.dtype).to(p.dtype)
            p.mul_(1 - group["lr"] * self.weight_decay)
            p.add_(update, alpha=-group["lr"] * 0.4 * max(p.shape) ** 0.5)


class Loop:
    """What all training loops share: `for step in loop: ...; loop.update(loss, metrics, frames)`,
    then the picture, then loop.save(). Optimizers, learning rate, averaged weights, log."""
    def __init__(self, run, phase, model, lr, state={}):
        """state: what a checkpoint holds besides; of it, the weights go on, and optimizers and
        step, too, if it is of this phase and round."""
        self.run, self.phase, self.model, self.lr = run, phase, model.to(run.device), lr
        self.state, self.first, self.steps = state, 0, getattr(run.cfg, f"{phase}_steps")
        # imagination trains on its own data, and needs no averaging
        self.parts = {"heads": model}
        if phase != "imagination":
            self.ema = frozen(model)
            self.parts = {"model": model, "ema": self.ema}
        for name, module in self.parts.items():
            if name in state:
                module.load_state_dict(state[name])
        # Muon for the matrices of the transformer blocks, AdamW for all else
        blocks = [block for block in model.modules() if isinstance(block, Block)]
        matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
        self.trained = [p for p in model.parameters() if p.requires_grad]
        others = [p for p in self.trained if all(p is not matrix for matrix in matrices)]
        self.optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0, fused=True)]
        if matrices:
            self.optimizers.append(Muon(matrices, run.dtype))
        if (state.get("round"), state.get("phase")) == (run.round, phase):
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            self.first = state["step"]
        self.is_compiled = run.compile(phase, model)
        count = sum(p.numel() for p in self.trained) / 1e6
        print(f"[{phase}] round {run.round} on {run.device} in {str(run.dtype)[6:]}, "
              f"{run.world_size} process(es), {count:.2f} M parameters, {self.steps} steps"
              + ", compiling" * self.is_compiled)

    def __iter__(self):
        start = saved = logged = time.time()
        first, self.frames = self.first, 0
        for self.step in range(self.first, self.steps):
            self.rng = self.run.rng(self.phase, self.step)
            yield self.step
            now, done = time.time(), self.step + 1
            if now - logged > 5 or done == self.steps:
                logged, left = now, (now - start) / (done - first) * (self.steps - done)
                self.run.log(self.phase, step=done, **self.metrics, minutes_left=left / 60,
                             frames_per_s=self.frames / (now - start))
            if self.is_compiled and done == self.first + self.run.cfg.long_every:
                # sequences of both lengths were among them
                print(f"[{self.phase}] compiled: {done - first} steps took {now - start:.0f} s")
                start, first, self.frames = now, done, 0
            # after the last step the phase saves, when its picture is there
            if now - saved > self.run.cfg.save_seconds and done < self.steps:
                self.save()
                saved = now

    def save(self):
        state = self.state | {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"phase": self.phase, "round": self.run.round, "step": self.step + 1,
                  "config": asdict(self.run.cfg),
                  "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        # first: the reward scale of this checkpoint stands in it
        self.run.save_config()
        write_file(self.run.folder / FILES[self.phase], functools.partial(torch.save, state))

    def update(self, loss, metrics, frames=0):
        """One optimizer step on the loss, then averaged weights. frames: the video frames that it
        learned from."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        if self.run.world_size > 1:
            for p in self.trained:
                dist.all_reduce(p.grad)
                p.grad /= self.run.world_size
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        if not torch.isfinite(norm + loss):
            raise ValueError(f"{self.phase}, step {self.step}: loss or gradient is not finite; try "
                             "a smaller --tokenizer_lr, --dynamics_lr or --policy_lr")
        cfg, left = self.run.cfg, 1 - self.step / self.steps
        rise = min(1.0, (self.step + 1) / cfg.warmup)
        # in the last three tenths of the steps, to a tenth
        fall = min(1.0, 0.1 + 0.9 * left / 0.3)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.lr * rise * fall
            optimizer.step()
        if "ema" in self.parts:
            # over few steps at first: it soon forgets the weights that the round began with
            decay = min(cfg.ema, (1 + self.step) / (10 + self.step))
            averages, weights = list(self.ema.parameters()), list(self.model.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - decay)
        self.metrics, self.frames = metrics, self.frames + frames


# ---- The phases ----------------------------------------------------------------------------------

def collect(run):
    """Real episodes -> data/*.npz. Round 0 acts randomly, later ones by the policy so far."""
    cfg, first, wanted = run.cfg, 0, run.cfg.collect_episodes
    policy = RandomPolicy(cfg, cfg.seed * 1000 + run.round)
    if run.round:
        first, wanted = wanted + (run.round - 1) * cfg.round_episodes, cfg.round_episodes
        tokenizer, agent, _ = run.load_agent()
        policy = AgentPolicy(tokenizer, agent, cfg, policy.seed, cfg.policy_random)
    seeds = [cfg.seed * SEEDS_PER_RUN + i for i in range(first, first + wanted)]
    paths = {seed: run.folder / "data" / f"{seed:010d}.npz" for seed in seeds}
    # those played side by side share random numbers: if one is missing, all are played again
    envs = min(cfg.envs, wanted)
    waves = [seeds[i:i + envs] for i in range(0, wanted, envs)]
    left = sum([wave for wave in waves if not all(paths[seed].exists() for seed in wave)], [])
    start, frames, returns = time.time(), 0, []
    # one process collects, the others wait
    for seed, episode in play(cfg, policy, left, envs) if left and run.rank == 0 else ():
        run.save_config()
        write_file(paths[seed], functools.partial(np.savez_compressed, **episode))
        frames += len(episode["rewards"])
        returns.append(float(episode["rewards"].sum()))
        if len(returns) % envs == 0 or len(returns) == len(left):
            run.log("collect", episodes=len(returns), of=len(left), return_mean=np.mean(returns),
                    frames_per_s=frames / (time.time() - start))
    run.barrier()


def train_tokenizer(run):
    """Phase 1a: masked autoencoding of frames (eq. 5)."""
    cfg, data = run.cfg, Data(run)
    run.rng("tokenizer")
    model = Tokenizer(cfg)
    loop = Loop(run, "tokenizer", model, cfg.tokenizer_lr, run.load("tokenizer.pt"))
    B, T = cfg.tokenizer_batch, cfg.tokenizer_length
    for step in loop:
        # masked from the start, it would stay at the mean image for long
        ramp = min(1.0, step / max(cfg.mask_ramp * cfg.tokenizer_steps, 1))
        mask = model.draw(B, T, cfg.mask_max * (1.0 if run.round else ramp))
        batch = run.share(data.sample(loop.rng, B, T, ["frames"]) | {"mask": mask})
        images = to_images(batch["frames"], run.device)
        with run.autocast():
            loss, metrics = model(images, batch["mask"], valid=batch["valid"])
        loop.update(loss, metrics, B * T)
    tokenizer, truth = run.for_inference(loop.ema), data.held_out[-1]["frames"]
    guess = decode(tokenizer, encode(tokenizer, truth)[None])[0]
    write_video(run.folder / "tokenizer.gif", np.concatenate((truth, guess), 2))
    run.log("tokenizer", held_out_psnr=psnr(truth, guess))
    loop.save()


def train_dynamics(run):
    """Phase 1b: shortcut forcing on latents (eq. 7)."""
    cfg, data, state = run.cfg, Data(run), run.load("dynamics.pt")
    weights = run.load("tokenizer.pt", "tokenizer")["ema"]
    tokenizer = data.encode(weights, state)
    run.rng("dynamics")
    model = Dynamics(cfg)
    state["tokenizer_checksum"] = checksum(weights)
    loop = Loop(run, "dynamics", model, cfg.dynamics_lr, state)
    for step in loop:
        B, T = cfg.sequence_shapes(step)
        batch = data.sample(loop.rng, B, T, ["latents", "actions"])
        batch = run.share(batch | model.draw(B, T))
        with run.autocast():
            loss, metrics = model(batch["latents"].float(), batch["actions"], batch, batch["valid"])
        loop.update(loss, metrics, B * T)
    world = Dream(run.for_inference(loop.ema), k=cfg.k)
    write_dream(run.folder / "dynamics.gif", tokenizer, world, data.held_out, cfg.seed)
    loop.save()


def train_agent(run):
    """Phase 2: agent token and heads (eq. 9), the world model trained on beside them. Round 0
    starts from dynamics.pt, later rounds from the agent of the round before."""
    cfg, data, state = run.cfg, Data(run), run.load("agent.pt")
    weights = run.load("tokenizer.pt", "tokenizer")["ema"]
    tokenizer = data.encode(weights, state or run.load("dynamics.pt"))
    cfg.reward_scale = cfg.reward_scale or data.scale
    run.rng("agent")
    model = Agent(cfg)
    # the value learns in imagination
    model.value_head.requires_grad_(False)
    if not state:
        model.dynamics.load_state_dict(run.load("dynamics.pt", "dynamics")["ema"])
    # the heads of the round before stay in the checkpoint: imagination goes on from there
    state |= {"tokenizer": weights, "tokenizer_checksum": checksum(weights)}
    state.pop("prior", None)
    loop = Loop(run, "agent", model, cfg.dynamics_lr, state)
    for step in loop:
        B, T = cfg.sequence_shapes(step)
        names = ["latents", "actions", "rewards"]
        batch = data.sample(loop.rng, B, T, names, cfg.rewarded_share)
        batch = run.share(batch | model.dynamics.draw(B, T))
        rewards = batch["rewards"] / cfg.reward_scale
        with run.autocast():
            loss, metrics = model(batch["latents"].float(), batch["actions"], rewards,
                                  batch["continues"], batch, valid=batch["valid"])
        loop.update(loss, metrics, B * T)
    agent = run.for_inference(loop.ema)
    report_rewards(run, agent, data)
    dream = agent.dream(cfg.k)
    write_dream(run.folder / "agent.gif", tokenizer, dream, data.held_out, cfg.seed)
    loop.save()


def train_imagination(run):
    """Phase 3: policy and value head learn (eq. 10, 11) on what model and policy dream up."""
    cfg, data, state, agent = run.cfg, Data(run), run.load("agent.pt", "agent"), Agent(run.cfg)
    data.encode(state["tokenizer"])
    agent.load_state_dict(state["ema"])
    # Later rounds go on with policy and value of the round before, and with that policy as the
    # prior: a clone of all data would pull back to the random driving in it.
    state.setdefault("prior", state.get("heads", {}))
    agent.load_state_dict(state["prior"], strict=False)
    agent = run.for_inference(agent)
    run.compile("imagination", agent)
    prior = frozen(agent.policy_head)
    # Loop loads the newest heads, those of a resumed phase; the prior, copied here, stays.
    heads = nn.ModuleDict({"policy_head": agent.policy_head, "value_head": agent.value_head})
    loop = Loop(run, "imagination", heads.requires_grad_(True), cfg.policy_lr, state)
    # a beginner learns from easier dreams
    temperature = 1 + (cfg.temperature - 1) * min(1, (run.round + 1) / cfg.rounds)
    for step in loop:
        batch = data.sample(loop.rng, cfg.rollouts, cfg.rollout_context, ["latents", "actions"],
                            cfg.rewarded_share, is_context=True)
        batch = run.share(batch)
        # every process dreams its own dreams
        torch.manual_seed(int(loop.rng.integers(2**31)) + run.rank)
        rollout = imagine(agent, batch["latents"].float(), batch["actions"], cfg.horizon, cfg.k,
                          temperature=temperature)
        # advantages mean something only when the value does
        policy_weight = float(step >= cfg.value_steps)
        for _ in range(cfg.updates):
            loss, metrics = agent.imagination_loss(rollout, prior, policy_weight)
            loop.update(loss, metrics, cfg.rollouts * cfg.horizon / cfg.updates)
    if not 0.02 < loop.metrics["good"] < 0.98:
        print("[imagination] WARNING: D+ or D- is nearly empty, which teaches nothing; try another "
              "--run with more --agent_steps, if rewards are not predicted, or --value_steps")
    loop.save()


TRAINERS = {"tokenizer": train_tokenizer, "dynamics": train_dynamics, "agent": train_agent,
            "imagination": train_imagination}


def train(run, phase):
    """Trains a phase, unless it has finished."""
    if run.is_past(phase, run.load(FILES[phase])):
        print(f"[{phase}] round {run.round} finished before")
        return
    TRAINERS[phase](run)
    # no process reads a checkpoint before it is there
    run.barrier()


def run_all(run):
    """collect -> tokenizer -> dynamics -> agent -> imagination, in rounds; then evaluate."""
    cfg, begun = run.cfg, run.load("agent.pt").get("round", 0)
    for run.round in range(begun, cfg.rounds):
        if cfg.env:
            collect(run)
        # in later rounds the dynamics goes on learning within the agent
        for phase in ("tokenizer", "agent", "imagination") if run.round else TRAINERS:
            train(run, phase)
    result = run.folder / "eval.json"
    if result.exists() and result.stat().st_mtime > (run.folder / "agent.pt").stat().st_mtime:
        print("[evaluate] finished before; --phase evaluate does it again")
    elif run.rank == 0:
        dream(run)
        if cfg.env:
            evaluate(run)


# ---- Evaluate and dream; what the model says of itself -------------------------------------------

@torch.no_grad()
def predict(agent, episode, chunk=32):
    """Streams an episode with latents through the agent -> for every frame the reward that it
    expects to have come with it (T,), and the value (T,), both divided by reward_scale."""
    stream, device, pieces = agent.dream(k=1), next(agent.parameters()).device, []
    for t in range(0, len(episode["rewards"]), chunk):
        z, actions = (torch.as_tensor(episode[name][None, t:t + chunk], device=device)
                      for name in ("latents", "actions"))
        h = stream.observe(z.float(), actions)
        pieces.append(torch.cat((agent.reward(h), agent.value(h))).cpu().numpy())
    return np.concatenate(pieces, 1)


def correlation(a, b):
    """Pearson's correlation of two lists of arrays; 0 where one of them is constant."""
    a, b = (np.concatenate(arrays, dtype=float) for arrays in (a, b))
    return float(np.corrcoef(a, b)[0, 1]) if min(np.ptp(a), np.ptp(b)) > 0 else 0.0


def real_returns(episode, gamma):
    """The discounted return that came after every frame, where it is known: of an episode that a
    time limit cut, not in its last two horizons 1 / (1 - γ), at most its second half."""
    T = len(episode["rewards"])
    returns = np.zeros(T)
    for t in reversed(range(T - 1)):
        returns[t] = episode["rewards"][t + 1] + gamma * returns[t + 1]
    cut = 1 if episode["terminal"] else min(round(2 / max(1 - gamma, 1e-6)), T // 2)
    return returns[:T - cut]


def report_rewards(run, agent, data):
    """What the reward head can know, and does; a warning where that is nothing."""
    predicted = [predict(agent, e)[0][1:] for e in data.held_out]
    real, spread = data.rewards.std(), np.concatenate(predicted).std() * run.cfg.reward_scale
    run.log("agent", rewards_not_zero=(data.rewards != 0).mean(), usual_reward=data.usual_reward,
            reward_std=real, predicted_std=spread,
            reward_corr=correlation(predicted, [e["rewards"][1:] for e in data.held_out]))
    # a constant reward teaches where episodes can end: to make them last, or stop
    if real == 0 and not (data.usual_reward and any(e["terminal"] for e in data.train)):
        print("[agent] WARNING: all returns are equal: phases 2 and 3 can only clone; bring data "
              "with rewards")
    elif spread < 0.1 * real:
        print("[agent] WARNING: the reward head is nearly constant; try another --run with more "
              "--agent_steps or a larger --rewarded_share")


def evaluate(run):
    """Random, cloned and dreamed policy on the same unseen seeds; tokenizer and heads on what the
    last one saw there."""
    cfg, table, (tokenizer, agent, clone) = run.cfg, run.folder / "episodes.csv", run.load_agent()
    policies = {"random": RandomPolicy(cfg, cfg.seed),
                "bc": AgentPolicy(tokenizer, clone, cfg, cfg.seed),
                "return": AgentPolicy(tokenizer, agent, cfg, cfg.seed)}
    seeds = [EVALUATION_SEEDS + 1000 * cfg.seed + i for i in range(cfg.eval_episodes)]
    # found out now, not after minutes: a place where one may not write
    run.folder.mkdir(parents=True, exist_ok=True)
    open(table, "ab").close()
    results, rows = {}, "policy,seed,return,length\n"
    for name, policy in policies.items():
        episodes = [episode for _, episode in play(cfg, policy, seeds)]
        returns = np.array([e["rewards"].sum() for e in episodes], float)
        for seed, total, e in zip(seeds, returns, episodes):
            rows += f"{name},{seed},{total:.6g},{len(e['rewards']) - 1}\n"
        error = returns.std(ddof=min(1, len(returns) - 1)) / len(returns) ** 0.5
        results |= {f"{name}_mean": returns.mean(), f"{name}_se": error,
                    f"{name}_median": np.median(returns)}
        print(f"[evaluate] {name}: {returns.mean():.4g} ± {error:.2g}")
    torch.manual_seed(cfg.seed)
    frames, rewards, values = [], [], []
    for e in episodes:
        e["latents"] = encode(tokenizer, e["frames"])
        frames.append((e["frames"], decode(tokenizer, e["latents"][None])[0]))
        reward, value = predict(agent, e)
        rewards.append((reward[1:], e["rewards"][1:]))
        returns = real_returns(e, cfg.gamma)
        values.append((value[:len(returns)], returns))
    results |= {"tokenizer_psnr": np.mean([psnr(*pair) for pair in frames]),
                "reward_corr": correlation(*zip(*rewards)),
                "value_corr": correlation(*zip(*values))}
    write_video(run.folder / "policy.gif", np.concatenate(frames[0], 2), fps=20)
    write_file(table, lambda file: file.write(rows.encode()))
    text = json.dumps({name: float(f"{x:.5g}") for name, x in results.items()})
    # last: it says that the evaluation has finished
    write_file(run.folder / "eval.json", lambda file: file.write(f"{text}\n".encode()))
    print(text)


def dream(run):
    """A video of dreams beside held-out episodes; without data, beside four that are played."""
    cfg, path, (tokenizer, agent, _) = run.cfg, run.folder / "dream.gif", run.load_agent()
    if (run.folder / "data").exists():
        episodes = Data(run).held_out
    else:
        seeds = [EVALUATION_SEEDS - 1 - i for i in range(4)]
        episodes = [e for _, e in play(cfg, AgentPolicy(tokenizer, agent, cfg, cfg.seed), seeds)]
    for e in episodes:
        e["latents"] = encode(tokenizer, e["frames"])
    write_dream(path, tokenizer, agent.dream(cfg.k), episodes, cfg.seed, length=48)
    print(f"[dream] {path}: truth above, dream below, same actions")


# ---- Command line --------------------------------------------------------------------------------

def parse(arguments=None):
    """Flags -> (args, config): settings of the checkpoint, the run or the preset, flags on top."""
    def numbers(text):
        return tuple(int(part) for part in text.replace("x", ",").split(","))

    parser = argparse.ArgumentParser(
        usage="python train.py [--phase PHASE] [--FLAG VALUE ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--phase", choices=PHASES, default="all")
    parser.add_argument("--run", help="folder; default: runs/default, or runs/NAME of a NAME.pt")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--checkpoint", help="an agent.pt to evaluate or dream with")
    for field in fields(TrainConfig):
        kind = field.type if field.type in (float, int, str) else numbers
        choices = PRESETS if field.name == "preset" else None
        parser.add_argument(f"--{field.name}", type=kind, choices=choices,
                            default=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    names = [field.name for field in fields(TrainConfig)]
    given = {name: value for name, value in vars(args).items() if name in names}
    args.run = args.run or f"runs/{Path(args.checkpoint).stem if args.checkpoint else 'default'}"
    path = Path(args.run) / "config.json"
    with naming(path):
        saved = json.loads(path.read_text()) if path.exists() else {}
    if args.checkpoint:
        with naming(args.checkpoint):
            settings = torch.load(args.checkpoint, "cpu", weights_only=True)["config"]
    elif saved:
        settings = saved
    else:
        settings = dict(PRESETS[given.get("preset", "cpu")])
        if "CarRacing" in given.get("env", TrainConfig.env):
            settings["action_repeat"] = 4
    if args.checkpoint or saved:
        # from before there was a scale; others know theirs
        settings = {"reward_scale": 1.0} | settings
    # a checkpoint of before may have settings that are no more
    cfg = TrainConfig(**{name: x for name, x in settings.items() if name in names} | given)
    if cfg.env and not saved and not args.checkpoint:
        env = make_env(cfg)
        cfg.action_spec = action_sizes(env.action_space, cfg.action_bins)
        env.close()
    # the scale is 0 until the agent has begun
    check_same(path, saved, cfg, ORIGIN | {"reward_scale"} if saved.get("reward_scale") else ORIGIN)
    return args, cfg


def main(arguments=None):
    args, cfg = parse(arguments)
    run = Run(args, cfg)
    if args.phase in ("evaluate", "dream"):
        return {"evaluate": evaluate, "dream": dream}[args.phase](run) if run.rank == 0 else None
    if args.checkpoint:
        raise ValueError("--checkpoint is for --phase evaluate and --phase dream")
    if run.rank == 0:
        # Two trainings would mix their files. The lock ends with the process, however that ends.
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = open(run.folder / ".lock", "a")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process trains in {run.folder}") from error
        # of a process that was killed
        for path in run.folder.glob(".*.pt.*.part"):
            path.unlink()
    # also refuses another architecture than that of a checkpoint
    states = [run.load(name) for name in ("tokenizer.pt", "dynamics.pt", "agent.pt")]
    if args.phase in ("agent", "imagination"):
        run.round = states[-1].get("round", 0)
    if args.phase in TRAINERS:
        train(run, args.phase)
    else:
        {"collect": collect, "all": run_all}[args.phase](run)
    if run.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    # it would say in five lines what the error says
    gym.logger.min_level = gym.logger.ERROR + 1
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"error: {text[:500]} (TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)
