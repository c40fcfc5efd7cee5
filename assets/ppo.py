"""What a user might pick instead: PPO of Stable-Baselines3, in the same environment.

    pip install stable-baselines3                     # in an environment of its own
    python assets/ppo.py --seed 0                     # as many frames as `--preset cpu` plays
    python assets/ppo.py --seed 0 --minutes 52        # as much time as it takes

It sees what Dreamer 4 sees here, 64x64 pixels in colour, four frames of them, repeats its actions
as often, and chooses among the same categories. Rewards are normalized and the numbers below are
those of RL Baselines3 Zoo for CarRacing, but for shorter rollouts, as there are fewer frames. It is
evaluated on the same tracks as a run of train.py with this seed. Adds rows to results/ppo.csv: the
return of the last 40 episodes while it learns, and at the end the means over the tracks of the most
probable actions and of sampled ones.
"""
import argparse
import csv
import functools
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import train
from assets.report import ASSETS, FRAMES, mean_and_error

COLUMNS = ("seed", "frames", "minutes", "what", "episodes", "return_mean", "return_se",
           "return_median")


def evaluate(model, make, cfg, seed, deterministic):
    """The returns on the tracks that train.evaluate drives."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
    returns, env = [], VecFrameStack(DummyVecEnv([make]), 4)
    for i in range(cfg.eval_episodes):
        env.seed(train.EVALUATION_SEEDS + seed * 1000 + i)
        frames, total, is_done = env.reset(), 0.0, [False]
        while not is_done[0]:
            action, _ = model.predict(frames, deterministic=deterministic)
            frames, reward, is_done, _ = env.step(action)
            total += float(reward[0])
        returns.append(total)
    return returns


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="training seed, as of train.py")
    parser.add_argument("--frames", type=int, default=FRAMES, help="agent frames, 4 steps each")
    parser.add_argument("--minutes", type=float, help="train so long, however many frames")
    parser.add_argument("--out", type=Path, default=ASSETS / "results/ppo.csv")
    args = parser.parse_args(arguments)
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.vec_env import (SubprocVecEnv, VecFrameStack, VecMonitor,
                                                      VecNormalize)
    except ImportError:
        sys.exit("error: PPO needs Stable-Baselines3; run: pip install stable-baselines3")
    # the settings of the cpu preset, not those of runs/default
    _, cfg = train.parse(["--preset", "cpu", "--run", os.devnull])
    start, make = time.time(), functools.partial(train.PixelEnv, cfg)
    env = VecMonitor(SubprocVecEnv([make] * cfg.envs))
    env.seed(args.seed * train.SEEDS_PER_RUN)
    env = VecNormalize(VecFrameStack(env, 4), norm_obs=False, gamma=0.99)
    model = PPO("CnnPolicy", env, learning_rate=1e-4, n_steps=256, batch_size=128, n_epochs=10,
                gamma=0.99, gae_lambda=0.95, clip_range=0.2, max_grad_norm=0.5, seed=args.seed)
    file = open(args.out, "a", newline="")
    writer = csv.DictWriter(file, COLUMNS)
    if not file.tell():
        writer.writeheader()

    def write(what, returns):
        statistics = (*mean_and_error(returns), np.median(returns))
        row = dict(zip(COLUMNS, (
            args.seed, model.num_timesteps, round((time.time() - start) / 60, 2), what,
            len(returns), *(round(float(x), 1) for x in statistics))))
        print(row, flush=True)
        writer.writerow(row)
        file.flush()

    def goes_on(*_):
        # eight frames per call
        if model.num_timesteps % 4096 == 0 and model.ep_info_buffer:
            write("while training", [x["r"] for x in model.ep_info_buffer][-40:])
        return not args.minutes or time.time() - start < 60 * args.minutes

    model.learn(10 ** 9 if args.minutes else args.frames, callback=goes_on)
    # the most probable actions, as is customary, may keep a lost car where it is
    write("evaluation", evaluate(model, make, cfg, args.seed, deterministic=True))
    write("evaluation, sampled", evaluate(model, make, cfg, args.seed, deterministic=False))


if __name__ == "__main__":
    main()
