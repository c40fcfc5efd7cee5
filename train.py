"""Train Dreamer 4 on pixels, from random interaction to a policy that learned in its own dreams.

    python train.py --preset cpu                      # all phases, on a laptop; --run runs/NAME
    python train.py --phase collect                   # random driving -> runs/default/data/*.npz
    python train.py --phase tokenizer                 # masked autoencoder: frames -> latents
    python train.py --phase dynamics                  # shortcut forcing: the world model
    python train.py --phase agent                     # agent token: cloning, reward, continuation
    python train.py --phase imagination               # PMPO inside the dreams
    python train.py --phase evaluate --checkpoint runs/default/agent.pt
    python train.py --phase dream --record dream.mp4  # truth above, dream below, same actions
    python train.py --phase play                      # drive in the dream, in a browser
    python train.py --phase bench                     # speed on this machine
    torchrun --nproc_per_node 2 -- train.py           # several GPUs or processes

A phase that is interrupted (Ctrl-C, SIGTERM, SIGKILL) continues when the same command is given
again. Every field of the two configs (dreamer4.Config and TrainConfig below) is a flag.
"""
import functools
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

from assets import bench, flags, measures, worlds
from assets.checkpoints import FORMAT, load_checkpoint, load_optimizers
from assets.files import (STOP, barrier, check_stop, fail, in_one_line, init_distributed,
                          is_launched, is_main_process, limit_memory, load_episode, print0, to_json,
                          write_file)
from assets.latents import encode_episodes
from assets.muon import Muon
from assets.play import Player, serve
from assets.run import FILES, READ_ONLY, Progress
from assets.videos import (decode, encode, resize, to_images, write_dream, write_reconstructions,
                           write_video)
from assets.worlds import action_sizes, describe_actions, to_action
from dreamer4 import Agent, Block, Cache, Config, Dream, Dynamics, Tokenizer, frozen, imagine

# Seeds of the environment: run s collects with s * SEEDS_PER_RUN + i, and evaluates beyond all that
SEEDS_PER_RUN = 100_000
EVALUATION_SEEDS = (flags.MAX_SEED + 2) * SEEDS_PER_RUN


# --------------------------------------------------------------------------------------------------
# Settings

@dataclass
class TrainConfig(Config):
    """Data, environment and optimization, on top of the model's Config."""
    env: str = "CarRacing-v3"       # Gymnasium id with image observations or rgb_array rendering
    env_kwargs: str = "{}"          # JSON: arguments of the environment, '{"continuous": false}'
    action_bins: int = 5            # bins of a continuous action dimension, both ends included
    action_repeat: int = 4          # environment steps per agent step (1 but for CarRacing)
    episode_frames: int = 1000      # longest episode in agent steps
    envs: int = 8                   # environments played side by side, each in its own process
    collect_episodes: int = 240     # episodes of random interaction
    hold: int = 4                   # random actions are held for 1 ... hold steps, per component
    uniform_share: float = 0.25     # share of random episodes with a new action in every step
    rounds: int = 1                 # rounds of all phases; dynamics is trained in the first only
    round_episodes: int = 80        # episodes that the policy collects in every later round
    policy_random: float = 0.1      # share of random actions when the policy collects
    batch_size: int = 32            # sequences per training step, over all processes
    short_length: int = 16          # frames of a short training sequence, T1
    long_length: int = 32           # frames of a long one, T2: longer than the context C
    long_every: int = 4             # every n-th batch is long (of about as many frames)
    rewarded_share: float = 0.3     # share of sequences around a reward (agent phase, contexts)
    recent_share: float = 0.5       # later rounds: share of sequences from the newest episodes
    memory_gb: float = 8.0          # frames held in memory per process; others stay on disk
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
    tokenizer_lr: float = 1e-3      # peak rate of AdamW; matrices of the blocks: Muon with twice
    dynamics_lr: float = 1e-3       # the same for the dynamics, and in agent finetuning
    policy_lr: float = 3e-4         # AdamW, for policy and value head in imagination
    warmup: int = 50                # steps over which the learning rate rises
    cooldown: float = 0.3           # share of the steps, at the end, in which it falls to a tenth
    weight_decay: float = 0.01      # weight decay of the blocks' matrices
    ema: float = 0.99               # decay of the averaged weights; imagination has none
    eval_episodes: int = 20         # real episodes per policy in evaluation
    compile: bool = False           # torch.compile every transformer block (needs a C++ compiler)
    save_seconds: float = 120.0     # time between checkpoints
    ranges = Config.ranges | {
        "action_bins": (2, 1000), "collect_episodes": (2, 10 ** 6), "episode_frames": (2, 10 ** 6),
        "long_length": (2, 10 ** 6), "envs": (1, 500), "memory_gb": (0, 1e6),
        # longer ones would be deaf to Ctrl-C for minutes
        "horizon": (1, 10 ** 4), "updates": (1, 1000),
        "value_steps": (0, 10 ** 6), "temperature": (0, 100), "warmup": (0, 10 ** 6),
        "save_seconds": (0, 1e9)}

    def __post_init__(self):
        super().__post_init__()
        if self.k & (self.k - 1) or self.k > self.k_max:
            raise ValueError(f"config: k must be a power of two up to k_max = {self.k_max}")
        if self.shortcut_every > self.batch_size:
            raise ValueError("config: shortcut_every must not exceed batch_size")
        if self.collect_episodes + (self.rounds - 1) * self.round_episodes > SEEDS_PER_RUN // 2:
            raise ValueError("config: collect_episodes and round_episodes are too many, of all "
                             f"rounds together more than {SEEDS_PER_RUN // 2}")

    def sequence_shapes(self, step):
        """(B, T) of a step: most batches short, every n-th long, with about as many frames."""
        if step % self.long_every:
            return self.batch_size, self.short_length
        count = self.batch_size * self.short_length // self.long_length
        # whole groups of sequences, of which one bootstraps
        return max(1, count // self.shortcut_every) * self.shortcut_every, self.long_length


# What CarRacing wants at any size; the README says why, under Lessons and Deviations
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
    # one consumer GPU with 12 GB
    "gpu": RECIPE | dict(
        image_size=(96, 96), tokenizer_width=384, tokenizer_depth=6, latents=32, width=512,
        depth=12, heads=8, kv_heads=2, registers=4, context=24, batch_size=64, short_length=16,
        long_length=32, tokenizer_batch=16, tokenizer_steps=5000, dynamics_steps=40000,
        agent_steps=5000, imagination_steps=1000, rollouts=256, head_width=512,
        collect_episodes=1000, envs=16, round_episodes=200, tokenizer_lr=5e-4, dynamics_lr=5e-4,
        ema=0.999, compile=True, memory_gb=12.0),
} | bench.SIZES


# --------------------------------------------------------------------------------------------------
# Environment and policies: frames in, category indices out

class PixelEnv(gym.Wrapper):
    """Frames (H, W, 3) uint8 of cfg.image_size, actions as category indices, actions repeated.

    After the end of an episode it stands still: of environments that play side by side, some end
    earlier.
    """

    def __init__(self, cfg):
        bare = worlds.make(cfg.env, cfg.env_kwargs, cfg.action_bins)
        env = gym.wrappers.RepeatAction(bare, cfg.action_repeat)
        super().__init__(gym.wrappers.TimeLimit(env, cfg.episode_frames - 1))
        self.image_size = cfg.image_size
        self.description = describe_actions(bare.action_space, cfg.action_bins)
        sizes = action_sizes(self.description)
        if sizes != cfg.action_spec:
            worlds.refuse(f"--env {cfg.env} has actions of {sizes} categories, but the run's "
                          f"action_spec is {cfg.action_spec}; use another --run")
        self.action_space = gym.spaces.MultiDiscrete(sizes)
        self.observation_space = gym.spaces.Box(0, 255, (*cfg.image_size, 3), np.uint8)
        self.draw = None if worlds.is_picture(bare.observation_space) else bare.render

    def frame(self, observation):
        if self.draw:
            observation = self.draw()
        self.last = resize(worlds.picture(observation), self.image_size)
        return self.last

    def reset(self, seed=None, options=None):
        self.end = (False, False)
        observation, _ = self.env.reset(seed=seed)
        return self.frame(observation), {}

    def step(self, indices):
        if any(self.end):
            return self.last, 0.0, *self.end, {}
        action = to_action(self.description, indices)
        observation, reward, terminated, truncated, _ = self.env.step(action)
        # float32 must hold sums of them as well
        if not abs(reward) < 1e30:
            raise ValueError(f"it gives a reward of {reward}")
        self.end = bool(terminated), bool(truncated)
        return self.frame(observation), reward, *self.end, {}


class RandomPolicy:
    """Random but useful: every action component is held for a while.

    A uniform_share of the episodes changes them in every step.
    """

    def __init__(self, cfg, seed):
        self.cfg, self.seed = cfg, seed

    def reset(self, seeds):
        """Episodes begin. Random numbers follow from their seeds, whatever was played before."""
        count, A = len(seeds), len(self.cfg.action_spec)
        self.rng = np.random.default_rng((self.seed, seeds[0]))
        self.steps_left = np.zeros((count, A), int)
        self.action = np.zeros((count, A), np.int16)
        uniform = self.rng.random((count, 1)) < self.cfg.uniform_share
        self.longest = np.where(uniform, 1, self.cfg.hold)

    def act(self, frames, actions):
        """frames (n, H, W, 3), the actions (n, A) that led to them -> the next actions (n, A)."""
        new = self.steps_left == 0
        drawn = self.rng.integers(0, self.cfg.action_spec, new.shape)
        self.action = np.where(new, drawn, self.action).astype(np.int16)
        length = self.rng.integers(1, self.longest + 1, new.shape)
        self.steps_left = np.where(new, length, self.steps_left) - 1
        return self.action


class AgentPolicy:
    """Tokenizer, world model and policy head in the real environment, through the Dream stream.

    random_share of the actions is RandomPolicy's.
    """

    def __init__(self, tokenizer, agent, cfg, seed, random_share=0.0):
        self.tokenizer, self.agent, self.random_share = tokenizer, agent, random_share
        self.device = next(agent.parameters()).device
        self.random = RandomPolicy(cfg, seed)

    def reset(self, seeds):
        self.random.reset(seeds)
        seed = int(self.random.rng.integers(2**31))
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.cache = Cache()
        self.dream = self.agent.dream(generator=self.generator, k=1)

    @torch.inference_mode()
    def act(self, frames, actions):
        z = self.tokenizer.encode(to_images(frames[:, None], self.device), cache=self.cache)
        led_here = torch.as_tensor(actions[:, None], device=self.device)
        h = self.dream.observe(z, led_here)[:, 0]
        action = self.agent.sample(self.agent.policy(h), self.generator).cpu().numpy()
        explore = self.random.rng.random((len(action), 1)) < self.random_share
        return np.where(explore, self.random.act(frames, actions), action).astype(np.int16)


def play(cfg, policy, seeds, done=()):
    """Plays one episode per seed, cfg.envs at a time; yields (seed, arrays of an episode file).

    Those whose seed is in `done` are left out. Episodes played side by side share random numbers:
    they are played together again if one is missing.
    """
    seeds, count = list(seeds), min(cfg.envs, len(seeds))
    if not cfg.env:
        fail("this run learns from recorded data and has no environment; give --env")
    with worlds.in_processes(cfg.env, functools.partial(PixelEnv, cfg), count) as call:
        for start in range(0, len(seeds), count):
            # the last wave may repeat a seed
            wave = (seeds[start:] + [seeds[-1]] * count)[:count]
            if all(seed in done for seed in wave):
                continue
            policy.reset(wave)
            frames = np.array([frame for frame, _ in call(PixelEnv.reset, wave)])
            actions = np.full((count, len(cfg.action_spec)), -1, np.int16)
            # no action led to the first frame, and no reward came with it
            episodes = [[(frames[i], actions[i], 0.0)] for i in range(count)]
            ended = np.zeros(count, bool)
            while not ended.all():
                check_stop()
                # the action that h_t chooses leads to frame t + 1, with which it is stored
                actions = policy.act(frames, actions)
                answers = call(PixelEnv.step, actions)
                frames, rewards, terminated, truncated, _ = map(np.array, zip(*answers))
                for i in np.flatnonzero(~ended):
                    episodes[i].append((frames[i], actions[i], rewards[i]))
                # an environment that has ended goes on saying so
                ended = terminated | truncated
            lengths = [len(steps) for steps in episodes]
            moves = any((frame != steps[0][0]).any() for steps in episodes for frame, *_ in steps)
            if isinstance(policy, RandomPolicy) and max(lengths) > 8 and not moves:
                fail(f"--env {cfg.env} shows the same picture in all {sum(lengths)} frames of "
                     "random actions; is it black? Look at what it draws")
            for i, seed in enumerate(seeds[start:start + count]):
                if seed in done:
                    continue
                own_frames, own_actions, own_rewards = zip(*episodes[i])
                yield seed, {
                    "frames": np.array(own_frames, np.uint8),
                    "actions": np.array(own_actions, np.int16),
                    "rewards": np.array(own_rewards, np.float32),
                    "terminal": np.array(terminated[i])}


# --------------------------------------------------------------------------------------------------
# Episodes: windows and latents (the files: assets/files.py)

class Data:
    """All episodes of a run. Every tenth is held out and never trains anything.

    The last `recent` ones, in the order of their names, are those of the newest round.
    """

    def __init__(self, cfg, folder, recent=0):
        self.cfg, self.paths = cfg, sorted(Path(folder).glob("*.npz"))
        if len(self.paths) < 2:
            more = "run: python train.py --phase collect (with the same --run)"
            fail(f"{folder} holds {len(self.paths)} episodes, at least 2 are needed; "
                 f"{more if cfg.env else 'bring more, or cut long ones'}")
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
        self.usual_reward = measures.usual_reward(self.train)

    def sample(self, rng, B, T, names, rewarded_share=0.0):
        """B random windows of T frames of training episodes -> arrays (B, T, ...), and continues.

        With probability rewarded_share a window is moved over a frame whose reward is unusual, if
        its episode has one. In later rounds a recent_share comes from the newest episodes, besides
        those that chance takes from there.
        """
        episodes = [e for e in self.train if len(e["rewards"]) >= T]
        if not episodes:
            fail(f"no training episode has {T} frames; use shorter sequences (--long_length, "
                 "--tokenizer_length, --rollout_context), a smaller --action_repeat, or more data")
        # every window is equally likely
        chances = np.array([len(e["rewards"]) - T + 1 for e in episodes], float)
        recent = chances * [id(e) in self.recent for e in episodes]
        if recent.any():
            share = self.cfg.recent_share
            chances = (1 - share) * chances / chances.sum() + share * recent / recent.sum()
        windows = []
        for index in rng.choice(len(episodes), B, p=chances / chances.sum()):
            episode = episodes[index]
            rewards = episode["rewards"]
            start = rng.integers(len(rewards) - T + 1)
            unusual = np.flatnonzero(measures.is_unusual(rewards[1:], self.usual_reward)) + 1
            if rng.random() < rewarded_share and len(unusual):
                # at any place in the window
                start = rng.choice(unusual) - rng.integers(T)
                start = np.clip(start, 0, len(rewards) - T)
            windows.append((episode, slice(start, start + T)))
        batch = {name: np.stack([e[name][window] for e, window in windows]) for name in names}
        batch["continues"] = np.ones((B, T), np.float32)
        for i, (episode, window) in enumerate(windows):
            if episode["terminal"] and window.stop == len(episode["rewards"]):
                batch["continues"][i, -1] = 0
        return batch


def load_data(run):
    return Data(run.cfg, run.folder / "data", run.cfg.round_episodes if run.round else 0)


# --------------------------------------------------------------------------------------------------
# The training loop: optimizer, averaged weights, checkpoint, resume (run folder: assets/run.py)

def make_optimizers(model, lr, weight_decay, dtype):
    """Muon for the matrices of the transformer blocks, AdamW for all else that is trained."""
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    trained = [p for p in model.parameters() if p.requires_grad]
    in_blocks = {id(p) for block in blocks for p in block.parameters() if p.dim() == 2}
    matrices = [p for p in trained if id(p) in in_blocks]
    others = [p for p in trained if id(p) not in in_blocks]
    optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr, weight_decay, dtype))
    return optimizers


class Loop:
    """What all training loops share:

        for step in loop:
            loss, metrics = loop.model_in_ddp(...)
            loop.update(loss, metrics, frames)

    It holds the optimizers, learning rate, averaged weights, log, checkpoints and DDP.
    """

    def __init__(self, run, phase, model, lr, state=None, names=("model", "ema"), extra={}):
        """state: a checkpoint whose weights go on, and its optimizers and step if it is of this
        phase and round; names: the checkpoint's entries for the weights and the averaged weights
        (one name: no averaging); extra: further entries to store."""
        self.run, self.phase, self.model = run, phase, model.to(run.device)
        self.path, self.steps = run.folder / FILES[phase], run.steps(phase)
        self.names, self.lr, self.extra = names, lr, extra
        self.ema = frozen(model) if len(names) > 1 else None
        for name, module in zip(names, (model, self.ema)):
            if state and name in state:
                module.load_state_dict(state[name])
        self.optimizers = make_optimizers(model, lr, run.cfg.weight_decay, run.dtype)
        self.first_step, self.metrics = 0, {}
        if state and (state["round"], state["phase"]) == (run.round, phase):
            load_optimizers(self.optimizers, state, self.path)
            self.first_step, self.metrics = state["step"], state.get("metrics", {})
        self.model_in_ddp = run.compile_and_distribute(model)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print0(f"[{phase}] round {run.round} on {run.device} in {str(run.dtype)[6:]}, "
               f"{run.world_size} process(es), {count / 1e6:.2f} M trained parameters, "
               f"steps {self.first_step} ... {self.steps}")

    def __iter__(self):
        self.save_time, self.step = time.time(), self.first_step - 1
        self.progress = Progress(self.run, self.phase, self.first_step, self.steps)
        for self.step in range(self.first_step, self.steps):
            self.rng = self.run.seed_phase(self.phase, self.step)
            yield self.step
            save = time.time() - self.save_time > self.run.cfg.save_seconds
            # all processes stop and save together
            stop, save = self.run.any_process(bool(STOP), save)
            if stop or save:
                self.save()
            check_stop(stop)
        self.save()

    def save(self, finished=False):
        """Writes the checkpoint. finished: the phase has also written its picture and report."""
        run = self.run
        if is_main_process():
            state = {"format": FORMAT, "phase": self.phase, "round": run.round,
                     "step": self.step + 1, "seed": run.seed, "config": asdict(run.cfg),
                     "actions": json.dumps(run.actions), **self.extra, "finished": finished,
                     "metrics": {name: float(value) for name, value in self.metrics.items()},
                     "optimizers": [{"state": optimizer.state_dict()["state"]}
                                    for optimizer in self.optimizers]}
            for name, module in zip(self.names, (self.model, self.ema)):
                state[name] = module.state_dict()
            write_file(self.path, functools.partial(torch.save, state))
            run.save_config()
        # no process reads the checkpoint before it is there
        barrier()
        self.save_time = time.time()

    def update(self, loss, metrics, frames=0):
        """One optimizer step on the loss, then averaged weights.

        frames: the video frames finished with this step; 0: more updates on the same ones follow.
        """
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        # one look at the device, not two
        if not torch.isfinite(norm + loss):
            fail(f"{self.phase}, step {self.step}: not finite: loss {loss.item()}, "
                 f"gradient norm {norm.item()}; {self.path} from before, if any, is intact; try a "
                 "smaller learning rate (--tokenizer_lr, --dynamics_lr, --policy_lr)")
        lr = self.learning_rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * 2 if isinstance(optimizer, Muon) else lr
            optimizer.step()
        if self.ema is not None:
            # over few steps at first: it soon forgets the weights that the round began with
            decay = min(self.run.cfg.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.metrics = metrics
        self.progress.update(self.step, frames, metrics)

    def learning_rate(self):
        """A linear rise over the warmup, and a linear fall to a tenth in the cooldown."""
        cfg = self.run.cfg
        left = 1 - self.step / self.steps
        rise = min(1.0, (self.step + 1) / max(cfg.warmup, 1))
        fall = min(1.0, 0.1 + 0.9 * left / max(cfg.cooldown, 1e-9))
        return self.lr * rise * fall


# --------------------------------------------------------------------------------------------------
# The phases

def collect(run, policy_file=None, first=None, wanted=None):
    """Real episodes -> data/*.npz. Round 0 acts randomly, later ones by a policy.

    first, wanted: numbers of the episodes, where they are not those of the round.
    """
    cfg = run.cfg
    if first is None:
        first = cfg.collect_episodes + (run.round - 1) * cfg.round_episodes if run.round else 0
        wanted = cfg.round_episodes if run.round else cfg.collect_episodes
    # one process collects, the others wait
    if not is_main_process():
        return
    seeds = [run.seed * SEEDS_PER_RUN + i for i in range(first, first + wanted)]
    paths = {seed: run.folder / "data" / f"{seed:010d}.npz" for seed in seeds}
    done = {seed for seed, path in paths.items() if path.exists()}
    if len(done) == wanted:
        print0(f"[collect] finished before: the {wanted} episodes are there")
        return
    policy_seed = run.seed * 1000 + run.round
    policy = RandomPolicy(cfg, policy_seed)
    if policy_file:
        tokenizer, agent = run.load_policy(policy_file)
        policy = AgentPolicy(tokenizer, agent, cfg, policy_seed, cfg.policy_random)
    progress, returns = Progress(run, "collect", len(done), wanted), []
    for seed, episode in play(cfg, policy, seeds, done):
        if not returns:
            run.save_config()
        write_file(paths[seed], functools.partial(np.savez_compressed, **episode))
        returns.append(float(episode["rewards"].sum()))
        metrics = {"return_mean": np.mean(returns), "return_std": np.std(returns)}
        count = len(done) + len(returns)
        progress.update(count - 1, len(episode["frames"]), metrics)


def train_tokenizer(run):
    """Phase 1a: masked autoencoding of frames (eq. 5)."""
    cfg, state, picture = run.cfg, run.load("tokenizer.pt"), run.folder / "tokenizer.png"
    if run.is_finished("tokenizer", state):
        return
    data = load_data(run)
    run.seed_phase("tokenizer")
    model = Tokenizer(cfg)
    loop = Loop(run, "tokenizer", model, cfg.tokenizer_lr, state)
    B, T = cfg.tokenizer_batch, cfg.tokenizer_length
    for step in loop:
        # masked from the start, it would stay at the mean image for long
        ramp = min(1.0, step / max(cfg.mask_ramp * cfg.tokenizer_steps, 1))
        mask_max = cfg.mask_max * (1.0 if run.round else ramp)
        batch = {"frames": data.sample(loop.rng, B, T, ["frames"])["frames"],
                 "mask": model.draw(B, T, mask_max)}
        batch = run.to_device(batch)
        with run.autocast():
            images = to_images(batch["frames"], run.device)
            loss, metrics = loop.model_in_ddp(images, batch["mask"])
        loop.update(loss, metrics, B * T)
    pairs = write_reconstructions(picture, run.for_inference(loop.ema), data.held_out)
    score = float(np.mean([measures.psnr(*pair) for pair in pairs]))
    run.log("tokenizer", psnr=score)
    print0(f"[tokenizer] PSNR on held-out episodes {score:.2f} dB; see {picture}")
    loop.save(finished=True)


def train_dynamics(run):
    """Phase 1b: shortcut forcing on latents (eq. 7)."""
    cfg, state, video = run.cfg, run.load("dynamics.pt"), run.folder / "dynamics.gif"
    if run.is_finished("dynamics", state):
        return
    tokenizer, data = run.load_tokenizer(), load_data(run)
    encode_episodes(data, tokenizer, run.folder)
    run.seed_phase("dynamics")
    model = Dynamics(cfg)
    loop = Loop(run, "dynamics", model, cfg.dynamics_lr, state)
    for step in loop:
        B, T = cfg.sequence_shapes(step)
        batch = data.sample(loop.rng, B, T, ["latents", "actions"])
        batch = run.to_device(batch | model.draw(B, T))
        with run.autocast():
            loss, metrics = loop.model_in_ddp(batch["latents"].float(), batch["actions"], batch)
        loop.update(loss, metrics, B * T)
    world = Dream(run.for_inference(loop.ema), k=cfg.k)
    write_dream(video, tokenizer, world, data.held_out, run.seed)
    print0(f"[dynamics] dream beside the truth: {video}")
    loop.save(finished=True)


def train_agent(run):
    """Phase 2: agent token and heads (eq. 9), the world model trained on beside them.

    Round 0 starts from dynamics.pt, later rounds from the agent of the round before.
    """
    cfg, state, video = run.cfg, run.load("agent.pt"), run.folder / "agent.gif"
    if run.is_finished("agent", state):
        return
    tokenizer, data = run.load_tokenizer(), load_data(run)
    encode_episodes(data, tokenizer, run.folder)
    run.seed_phase("agent")
    model = Agent(cfg)
    # the value learns in imagination
    model.value_head.requires_grad_(False)
    if not state:
        world = run.load("dynamics.pt", "dynamics")
        model.dynamics.load_state_dict(world["ema"])
    extra = {"tokenizer": run.load("tokenizer.pt")["ema"]}
    if state and "heads" in state:
        # of the round before: policy and value go on from there in imagination
        extra["heads"] = state["heads"]
    loop = Loop(run, "agent", model, cfg.dynamics_lr, state, extra=extra)
    for step in loop:
        B, T = cfg.sequence_shapes(step)
        names = ["latents", "actions", "rewards"]
        batch = data.sample(loop.rng, B, T, names, cfg.rewarded_share)
        batch = run.to_device(batch | model.dynamics.draw(B, T))
        with run.autocast():
            loss, metrics = loop.model_in_ddp(
                batch["latents"].float(), batch["actions"], batch["rewards"], batch["continues"],
                batch)
        loop.update(loss, metrics, B * T)
    agent = run.for_inference(loop.ema)
    numbers, lines = measures.reward_health(agent, data)
    for line in lines:
        print0(f"[agent] {line}")
    run.log("agent", **numbers)
    write_dream(video, tokenizer, agent.dream(cfg.k), data.held_out, run.seed)
    loop.save(finished=True)


class Imagination(nn.Module):
    """The loss of phase 3 as the forward of a module that holds just what it trains, for DDP."""

    def __init__(self, agent):
        super().__init__()
        # in a tuple: neither trained nor saved
        self.frozen = (agent, frozen(agent.policy_head))
        self.policy_head = agent.policy_head.requires_grad_(True)
        self.value_head = agent.value_head.requires_grad_(True)

    def forward(self, rollout, policy_weight):
        agent, prior = self.frozen
        return agent.imagination_loss(rollout, prior, policy_weight)


def train_imagination(run):
    """Phase 3: policy and value head learn (eq. 10, 11) on what model and policy dream up."""
    cfg = run.cfg
    if run.is_finished("imagination", run.load("agent.pt")):
        return
    state = run.load("agent.pt", "agent")
    data, tokenizer, agent = load_data(run), Tokenizer(cfg), Agent(cfg)
    # that of the agent's latents: tokenizer.pt may have been trained on
    tokenizer.load_state_dict(state["tokenizer"])
    encode_episodes(data, run.for_inference(tokenizer), run.folder)
    agent.load_state_dict(state["ema"])
    # Later rounds go on with policy and value of the round before, and with that policy as the
    # prior: a clone of all data would pull back to the random driving in it. A resumed phase finds
    # them under "prior".
    begin = state.get("prior", state.get("heads", {}))
    agent.load_state_dict(begin, strict=False)
    agent = run.for_inference(agent)
    model = Imagination(agent)
    # Loop loads the newest heads, those of a resumed phase; the prior, copied here, stays.
    extra = {"prior": begin, **{name: state[name] for name in ("tokenizer", "model", "ema")}}
    loop = Loop(run, "imagination", model, cfg.policy_lr, state, ("heads",), extra)
    # a beginner learns from easier dreams
    temperature = 1 + (cfg.temperature - 1) * min(1, (run.round + 1) / cfg.rounds)
    for step in loop:
        batch = data.sample(loop.rng, cfg.rollouts, cfg.rollout_context, ["latents", "actions"],
                            cfg.rewarded_share)
        batch = run.to_device(batch)
        # every process dreams its own dreams
        torch.manual_seed(int(loop.rng.integers(2**31)) + run.rank)
        rollout = imagine(agent, batch["latents"].float(), batch["actions"], cfg.horizon, cfg.k,
                          temperature=temperature)
        for i in range(cfg.updates):
            # advantages mean something only when the value does
            policy_weight = float(step >= cfg.value_steps)
            loss, metrics = loop.model_in_ddp(rollout, policy_weight)
            # counted once, with the last of them
            frames = cfg.rollouts * cfg.horizon if i + 1 == cfg.updates else 0
            loop.update(loss, metrics, frames)
    for line in measures.imagination_health(loop.metrics):
        print0(f"[imagination] {line}")
    loop.save(finished=True)


def run_all(run):
    """collect -> tokenizer -> dynamics -> agent -> imagination, in rounds; then evaluate."""
    cfg, agent = run.cfg, run.folder / "agent.pt"
    for run.round in range(cfg.rounds):
        if cfg.env:
            collect(run, agent if run.round else None)
        barrier()
        train_tokenizer(run)
        # in later rounds the dynamics goes on learning within the agent
        if run.round == 0:
            train_dynamics(run)
        train_agent(run)
        train_imagination(run)
    result = run.folder / "eval.json"
    if result.is_file() and result.stat().st_mtime > agent.stat().st_mtime:
        print0("[evaluate] finished before; --phase evaluate does it again")
        return
    if is_main_process():
        dream(run, agent, 48, run.folder / "dream.gif")
        if cfg.env:
            evaluate(run, agent, run.folder / "policy.gif")


# --------------------------------------------------------------------------------------------------
# Evaluate and dream

def held_out_episodes(run, tokenizer, agent):
    """Held-out episodes with latents; where the run has no data, four that the policy plays."""
    if len(list(run.folder.glob("data/*.npz"))) >= 2:
        data = load_data(run)
        encode_episodes(data, tokenizer, run.folder)
        return data.held_out
    print0(f"{run.folder / 'data'} holds no episodes: the policy plays 4 for contexts")
    seeds = [EVALUATION_SEEDS - 1 - i for i in range(4)]
    policy = AgentPolicy(tokenizer, agent, run.cfg, run.seed, run.cfg.policy_random)
    episodes = [episode for _, episode in play(run.cfg, policy, seeds)]
    for episode in episodes:
        episode["latents"] = encode(tokenizer, episode["frames"])
    return episodes


def evaluate(run, path, video):
    """Policy, cloned policy and random policy on the same unseen seeds; the model's measures."""
    start, cfg = time.time(), run.cfg
    tokenizer, agent, cloned = run.load_agent(path)
    clone = frozen(agent)
    clone.policy_head = cloned
    policies = {"random": RandomPolicy(cfg, run.seed),
                "bc": AgentPolicy(tokenizer, clone, cfg, run.seed),
                "return": AgentPolicy(tokenizer, agent, cfg, run.seed)}
    seeds = [EVALUATION_SEEDS + run.seed * 1000 + i for i in range(cfg.eval_episodes)]
    results, rows = {}, ["policy,seed,return,length"]
    for name, policy in policies.items():
        played = dict(play(cfg, policy, seeds))
        for seed, episode in played.items():
            total, steps = episode["rewards"].sum(), len(episode["rewards"]) - 1
            rows.append(f"{name},{seed},{total:.3f},{steps}")
        episodes = list(played.values())
        mean, error = measures.mean_return(episodes)
        results |= {f"{name}_mean": mean, f"{name}_se": error}
        print0(f"[evaluate] {name}: {mean:.1f} ± {error:.1f} over {len(episodes)} episodes")
    # from here on `episodes` are those of the policy that was trained in dreams
    torch.manual_seed(run.seed)
    for episode in episodes:
        episode["latents"] = encode(tokenizer, episode["frames"])
    held_out = held_out_episodes(run, tokenizer, agent)
    model, health = measures.model_measures(tokenizer, agent, held_out, episodes, cfg, run.seed)
    for line in health:
        print0(f"[evaluate] {line}")
    # first: the place that a user names may not be writable
    reconstruction = decode(tokenizer, episodes[0]["latents"][None])[0]
    write_video(video, np.concatenate((episodes[0]["frames"], reconstruction), 2), fps=20)
    table = "\n".join(rows) + "\n"
    write_file(run.folder / "episodes.csv", lambda file: file.write(table.encode()))
    results |= model | {"wall_s": time.time() - start}
    text = to_json({name: round(value, 4) for name, value in results.items()})
    # last: it says that the evaluation has finished
    write_file(run.folder / "eval.json", lambda file: file.write(f"{text}\n".encode()))
    print0(text)


def dream(run, path, length, video):
    """A video of dreams beside held-out episodes."""
    tokenizer, agent, _ = run.load_agent(path)
    episodes = held_out_episodes(run, tokenizer, agent)
    write_dream(video, tokenizer, agent.dream(run.cfg.k), episodes, run.seed, length, agent)
    print0(f"[dream] {video}: truth above, dream below, same actions; the policy goes on where "
           "the truth ends")


# --------------------------------------------------------------------------------------------------
# Command line

@in_one_line()
def main(arguments=None):
    limit_memory()
    args = flags.parse(arguments, __doc__, PRESETS, TrainConfig)
    if args.phase not in READ_ONLY:
        init_distributed(args.device)
    elif is_launched() and os.environ["RANK"] != "0":
        return
    if args.preset == "paper" and args.phase == "bench":
        return bench.costs(flags.make_config(TrainConfig, PRESETS["paper"] | args.settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        # noted here, looked at between two steps; a second one changes nothing
        signal.signal(number, lambda signum, _: STOP.append(signum))
    start, run = time.time(), flags.open_run(args, PRESETS, TrainConfig)
    agent = Path(args.checkpoint or run.folder / "agent.pt")
    # all have read config.json before the main process writes it
    barrier()
    if args.phase in ("agent", "imagination") and (run.folder / "agent.pt").exists():
        run.round = load_checkpoint(run.folder / "agent.pt")["round"]
    phases = {"tokenizer": train_tokenizer, "dynamics": train_dynamics, "agent": train_agent,
              "imagination": train_imagination, "all": run_all}
    if args.phase in phases:
        phases[args.phase](run)
    elif args.phase == "collect":
        # by hand: beyond the episodes of all rounds
        hand = (SEEDS_PER_RUN // 2, args.episodes or run.cfg.round_episodes)
        collect(run, args.policy, *(hand if args.policy else ()))
    elif args.phase == "evaluate":
        evaluate(run, agent, args.record or run.folder / "policy.gif")
    elif args.phase == "dream":
        dream(run, agent, args.length, args.record or run.folder / "dream.gif")
    elif args.phase == "play":
        tokenizer, model, _ = run.load_agent(agent)
        episodes = held_out_episodes(run, tokenizer, model)
        serve(Player(tokenizer, model, episodes, run.cfg), args.port, lambda: bool(STOP))
    elif args.phase == "bench":
        bench.bench(run, play, RandomPolicy(run.cfg, 0))
    # the last line of the others is their result as JSON
    if args.phase not in ("evaluate", "bench", "all"):
        print0(f"[{args.phase}] done in {(time.time() - start) / 60:.1f} min")
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
