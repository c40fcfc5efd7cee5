"""Tests of how train.py plays environments, and of the episodes it draws windows from."""
import functools
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

import train
from assets import measures, worlds
from test_dreamer4 import error, main, signals


# --------------------------------------------------------------------------------------------------
# Environments

class Ticker(gym.Env):
    """Frame t shows the steps taken and the last action; the reward is 1 + the action.

    The seed says when it ends.
    """
    action_space, metadata = Discrete(5), {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None, image=True):
        self.image, self.render_mode = image, render_mode
        frames, numbers = Box(0, 255, (8, 8, 3), np.uint8), Box(-1, 1, (2,))
        self.observation_space = frames if image else numbers

    def look(self):
        return self.render() if self.image else np.zeros(2, np.float32)

    def render(self):
        return np.full((8, 8, 3), (self.t, self.last, 7), np.uint8)

    def reset(self, seed=None, options=None):
        self.t, self.last, self.end = 0, 99, seed
        return self.look(), {}

    def step(self, action):
        self.t, self.last = self.t + 1, action
        return self.look(), 1.0 + action, self.t == self.end, False, {}


gym.register("Ticker-v0", Ticker, max_episode_steps=15)
rendered = functools.partial(Ticker, image=False)
gym.register("TickerRendered-v0", rendered, max_episode_steps=15)


class Count:
    """Acts 0, 1, 2, 3, 4, 0, ..."""

    def reset(self, seeds):
        self.count, self.steps = len(seeds), 0

    def act(self, frames, actions):
        # it is told which action led to these frames
        led_here = (self.steps - 1) % 5 if self.steps else -1
        assert (actions == led_here).all()
        self.steps += 1
        return np.full((self.count, 1), (led_here + 1) % 5)


def ticker(**changes):
    settings = dict(env="Ticker-v0", image_size=(8, 8), action_spec=(5,), action_repeat=2, envs=3)
    return train.TrainConfig(**train.PRESETS["tiny"] | settings | changes)


@pytest.mark.parametrize("env", ["Ticker-v0", "TickerRendered-v0"])
def test_actions_and_rewards_stand_at_the_frame_they_led_to(env):
    episodes = dict(train.play(ticker(env=env), Count(), [7, 8, 99, 3]))
    lengths = {seed: len(e["frames"]) for seed, e in episodes.items()}
    ends = {seed: bool(e["terminal"]) for seed, e in episodes.items()}
    assert lengths == {7: 5, 8: 5, 99: 9, 3: 3}
    assert ends == {7: True, 8: True, 99: False, 3: True}
    for seed, e in episodes.items():
        steps, last = e["frames"][:, 0, 0, :2].T.astype(int)
        assert steps.tolist() == [min(2 * t, seed, 15) for t in range(len(steps))]
        assert e["actions"][0] == -1 and last[0] == 99 and e["rewards"][0] == 0
        assert e["actions"][1:, 0].tolist() == [t % 5 for t in range(len(steps) - 1)]
        assert e["actions"][1:, 0].tolist() == last[1:].tolist()
        # rewards of repeated actions are summed
        assert e["rewards"][1:].tolist() == (np.diff(steps) * (1 + last[1:])).tolist()


def test_episodes_that_are_there_are_not_played_again():
    whole = dict(train.play(ticker(), Count(), [7, 8, 99, 3]))
    waves, policy = [], Count()
    reset = policy.reset

    def reset_and_note(seeds):
        waves.append(seeds)
        reset(seeds)

    policy.reset = reset_and_note
    missing = dict(train.play(ticker(), policy, [7, 8, 99, 3], done={3, 8}))
    assert missing.keys() == {7, 99} and waves == [[7, 8, 99]]
    for seed, episode in missing.items():
        assert all(np.array_equal(x, whole[seed][name]) for name, x in episode.items())


# the second: both at once, which is an end
@pytest.mark.parametrize("last_step, terminal", [(99, False), (3, True)])
def test_the_longest_episode_is_a_time_limit_not_an_end(last_step, terminal):
    cfg = ticker(episode_frames=4, action_repeat=1)
    [(_, episode)] = train.play(cfg, Count(), [last_step])
    assert len(episode["frames"]) == 4 and episode["terminal"] == terminal


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf, 1e300, None, np.ones(2)], ids=str)
def test_a_reward_that_is_no_number_ends_in_one_line(monkeypatch, capfd, reward):
    step = Ticker.step
    monkeypatch.setattr(Ticker, "step", lambda *args: (*step(*args)[:1], reward, *step(*args)[2:]))
    error(capfd, lambda: list(train.play(ticker(), Count(), [7, 8])), "--env Ticker-v0 cannot be")


def test_an_environment_whose_package_is_missing_or_whose_actions_are_unbounded(
        monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    collect = ("--phase", "collect", "--preset", "tiny", "--run", tmp_path / "run")
    error(capsys, lambda: main(*collect), "CarRacing-v3", "Box2D")
    monkeypatch.setattr(Ticker, "action_space", Box(-np.inf, 1, (2,)))
    error(capsys, lambda: worlds.make("Ticker-v0", "{}", 5), "Box", "not supported")


# --------------------------------------------------------------------------------------------------
# Data

def one_at_5(t):
    return float(t == 5)


def write_episodes(folder, lengths, terminal=False, reward=one_at_5, **changes):
    """Frame t of episode i shows (i, t, 0), its action is t % 5; names are in the given order."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, T in enumerate(lengths):
        t = np.arange(T)
        frames = np.zeros((T, 8, 8, 3), np.uint8)
        frames[..., 0] = i
        frames[..., 1] = t[:, None, None]
        actions = np.where(t == 0, -1, t % 5).astype(np.int16)[:, None]
        rewards = np.array([reward(i) for i in range(T)], np.float32)
        episode = {"frames": frames, "actions": actions, "rewards": rewards,
                   "terminal": np.array(terminal)}
        np.savez(folder / f"{i:03d}.npz", **episode | changes)
    return folder


def small_data(folder, *args, **kwargs):
    data = train.Data(ticker(), write_episodes(folder / "data", *args, **kwargs))
    for e in data.episodes:
        e["latents"] = e["frames"][:, 0, 0].astype(np.float16)
    return data


def sample(data, *args):
    return data.sample(np.random.default_rng(0), *args)


def test_windows_are_aligned_and_stay_within_one_training_episode(tmp_path):
    data = small_data(tmp_path, [9] * 21 + [30, 4], reward=lambda t: t)
    assert {e["frames"][0, 0, 0, 0] for e in data.held_out} == {0, 10, 20}
    batch = sample(data, 2000, 6, ["frames", "latents", "actions", "rewards"], 0.3)
    episode, t = batch["frames"][:, :, 0, 0, :2].astype(int).transpose(2, 0, 1)
    assert (episode == episode[:, :1]).all() and (np.diff(t) == 1).all()
    assert (batch["latents"][..., :2] == np.stack((episode, t), -1)).all()
    assert (batch["rewards"] == t).all()
    assert (batch["actions"][..., 0] == np.where(t == 0, -1, t % 5)).all()
    # all episodes but the last, which is too short; every window of nine frames
    assert set(episode[:, 0]) == set(range(22)) - {0, 10, 20}
    assert set(t[:, 0][episode[:, 0] == 1]) == {0, 1, 2, 3}


@pytest.mark.parametrize("terminal", [True, False])
def test_continuation_is_0_at_a_terminal_last_frame_only(tmp_path, terminal):
    batch = sample(small_data(tmp_path, [9] * 3, terminal), 200, 6, ["frames"])
    is_last = batch["frames"][:, :, 0, 0, 1] == 8
    assert is_last.any()
    assert np.array_equal(batch["continues"], np.where(is_last & terminal, 0, 1))


def test_a_share_of_the_windows_holds_an_unusual_reward(tmp_path):
    # time costs a little
    data = small_data(tmp_path, [50] * 3, reward=lambda t: 3.0 if t == 20 else -0.1 * (t > 0))
    for e in data.train:
        unusual = measures.is_unusual(e["rewards"], data.usual_reward)
        assert np.flatnonzero(unusual[1:]).tolist() == [19]
    chance = 4 / 47
    for share in (0, 0.5, 1):
        found = sample(data, 1000, 4, ["rewards"], share)["rewards"] == 3
        assert abs(found.any(1).mean() - (share + (1 - share) * chance)) < 0.05
    # at any place in the window
    assert (found.mean(0) > 0.15).all()


@torch.no_grad()
def test_later_rounds_draw_a_share_from_the_newest_episodes(tmp_path):
    write_episodes(tmp_path, [30] * 40)
    for recent, share in [(0, 4 / 36), (4, 0.5 + 0.5 * 4 / 36)]:
        data = train.Data(ticker(recent_share=0.5), tmp_path, recent)
        for i, e in enumerate(data.train):
            e["rewards"] = np.full(30, float(i >= 32), np.float32)
        newest = sample(data, 2000, 5, ["rewards"])["rewards"][:, 0]
        assert newest.mean() == pytest.approx(share, abs=0.03)
