"""Tests of worlds.py: action spaces, MineRL, Crafter, missing packages."""
import functools
import json
import os
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch.testing import assert_close

import train
from assets import worlds
from test_dreamer4 import error, ticker


SPACES = [
    Box(-1, 2, ()),
    Box(np.array([-1, 0], np.float32), np.array([1, 0.3], np.float32)),
    Box(-0.9, -0.3, (2, 2), float),
    Discrete(4, start=-2),
    MultiDiscrete([2, 3], start=[5, -1]),
    MultiDiscrete([[2, 3], [1, 4]]),
    MultiBinary(3),
    Tuple((Discrete(3), Box(-1, 1, (1,)))),
    Dict(b=Dict(x=MultiBinary((2, 2)), c=Discrete(5)), a=Box(0, 1, (2,))),
]


class Playground(gym.Env):
    """An environment that has nothing but an action space."""

    def __init__(self, space):
        self.action_space, self.observation_space = space, Discrete(1)


def codec(space, bins):
    """The category counts of a space, and functions from indices to actions and back."""
    if isinstance(space, (Tuple, Dict, MultiBinary)):
        env = worlds.FlatActions(Playground(space), bins)
        assert isinstance(env.action_space, MultiDiscrete)
        return tuple(env.action_space.nvec.tolist()), env.action, env.indices
    description = json.loads(json.dumps(worlds.describe_actions(space, bins)))
    return (worlds.action_sizes(description), functools.partial(worlds.to_action, description),
            functools.partial(worlds.to_indices, description))


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("bins", [2, 5, 11])
def test_every_action_space_is_a_tuple_of_categories_and_back(space, bins):
    sizes, to_action, to_indices = codec(space, bins)
    assert len(sizes) == len(to_indices(space.sample()))
    space.seed(0)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, sizes) for _ in range(20)]
    for indices in ([0] * len(sizes), np.array(sizes) - 1, *drawn):
        action = to_action(np.array(indices))
        # both ends included
        assert space.contains(action)
        assert to_indices(action).tolist() == list(indices)
    # an action goes to the nearest one; what is discrete, exactly
    width = (flat_high(space) - flat_low(space)) / (bins - 1)
    limit = np.where(discrete(space), 0, width / 2 + 1e-6)
    for action in (space.sample() for _ in range(20)):
        near = to_action(to_indices(action))
        assert (np.abs(flat(space, near) - flat(space, action)) <= limit).all()


def flat(space, action):
    return gym.spaces.flatten(space, action).astype(float)


def flat_low(space):
    return gym.spaces.flatten_space(space).low.astype(float)


def flat_high(space):
    return gym.spaces.flatten_space(space).high.astype(float)


def discrete(space):
    """Which entries of the flattened space come from discrete parts."""
    if isinstance(space, (Tuple, Dict)):
        parts = space.spaces.values() if isinstance(space, Dict) else space.spaces
        return np.concatenate([discrete(part) for part in parts])
    return np.full(gym.spaces.flatdim(space), not isinstance(space, Box))


def test_bins_of_a_box_are_even_from_end_to_end():
    description = worlds.describe_actions(Box(-1, 2, (1,)), 4)
    assert [worlds.to_action(description, np.array([i]))[0] for i in range(4)] == [-1, 0, 1, 2]


class Old:
    """A stand-in for MineRL and old gym: their classes are known by name only."""

    class Discrete:
        def __init__(self, n):
            self.n = n

    class Enum(Discrete):
        def __init__(self, *values):
            self.values, self.n = np.array(sorted(values)), len(values)

    class Box:
        def __init__(self, low, high, shape, dtype=np.float32):
            self.low, self.high = np.full(shape, low), np.full(shape, high)
            self.shape, self.dtype = shape, np.dtype(dtype)

    class Dict:
        def __init__(self, **spaces):
            self.spaces = spaces


class Treechop:
    """Some of the spaces of MineRLObtainDiamond-v0, and its interface; keeps what it was given."""
    buttons = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
    observation_space = Old.Dict(pov=Old.Box(0, 255, (64, 64, 3), np.uint8), inventory=Old.Dict())
    items = ("none", "torch", "stick", "planks")
    action_space = Old.Dict(camera=Old.Box(-180, 180, (2,)), craft=Old.Enum(*items),
                            **{name: Old.Discrete(2) for name in buttons})

    def seed(self, seed):
        self.seeded = seed

    def look(self):
        return {"pov": np.full((64, 64, 3), self.t, np.uint8), "inventory": {}}

    def reset(self):
        self.t, self.given = 0, []
        return self.look()

    def step(self, action):
        assert set(action) == {*self.buttons, "camera", "craft"}
        assert action["craft"] in self.items
        assert action["camera"].shape == (2,) and np.abs(action["camera"]).max() <= 10
        assert all(action[name] in (0, 1) for name in self.buttons)
        self.given.append(action)
        self.t += 1
        info = {"TimeLimit.truncated": self.seeded == 2}
        return self.look(), float(action["attack"]), self.t == 7, info

    def close(self):
        pass


@pytest.fixture
def minerl(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym", types.SimpleNamespace(make=lambda name: Treechop()))
    monkeypatch.setitem(sys.modules, "minerl", types.ModuleType("minerl"))
    return ticker(env="MineRLTreechop-v0", image_size=(64, 64), action_repeat=1,
                  action_spec=(2, 2, 121, 4) + (2,) * 6)


def camera_index(angles):
    """(pitch, yaw) in degrees -> the one component that MineRL's camera is."""
    return worlds.camera_bin(np.array(angles)) @ (11, 1)


def stretched(camera):
    """The μ-law of VPT: degrees -> bins as a float."""
    x = np.clip(camera / 10, -1, 1)
    return 5 + 5 * np.sign(x) * np.log(1 + 10 * np.abs(x)) / np.log(11)


def test_minerl_has_a_camera_of_11_by_11_bins_items_by_name_and_the_old_interface(minerl):
    env = train.PixelEnv(minerl)
    flat_env = worlds.make(minerl.env, "{}", minerl.action_bins)
    sizes = worlds.action_sizes(json.loads(json.dumps(env.description)))
    # in the order of the names
    assert sizes == minerl.action_spec
    items = Treechop.action_space.spaces["craft"].values.tolist()
    rng = np.random.default_rng(0)
    first, _ = env.reset(seed=5)
    assert first.tolist() == np.zeros((64, 64, 3)).tolist()
    assert env.unwrapped.env.seeded == 5
    for t in range(1, 8):
        indices = rng.integers(0, sizes)
        frame, reward, terminated, truncated, _ = env.step(indices)
        action = env.unwrapped.env.given[-1]
        assert (frame == t).all() and reward == action["attack"]
        assert (terminated, truncated) == (t == 7, False)
        craft = items.index(action["craft"])
        plain = action | {"camera": camera_index(action["camera"]), "craft": craft}
        assert flat_env.indices(plain).tolist() == indices.tolist()
    for pitch, yaw in rng.normal(0, 6, (100, 2)):
        assert camera_index([pitch, yaw]) == round(stretched(pitch)) * 11 + round(stretched(yaw))
    # up (pitch) first, then sideways
    assert camera_index([0, 0]) == 60 and camera_index([-180, 180]) == 10
    angles = np.array([-10, -5.81, -3.22, -1.61, -0.62, 0])
    assert_close(worlds.camera_angle(np.arange(6)), angles, atol=0.01, rtol=0)


def test_minerl_is_played_into_episode_files(minerl):
    for seed, e in train.play(minerl, train.RandomPolicy(minerl, 0), [1, 2]):
        assert e["frames"].shape == (8, 64, 64, 3) and e["actions"].max() > 10
        assert e["frames"][:, 0, 0, 0].tolist() == [*range(8)]
        assert bool(e["terminal"]) == (seed != 2)


def test_crafter_is_seeded_and_a_time_limit_is_no_death(monkeypatch):
    class Crafter:
        observation_space = Old.Box(0, 255, (64, 64, 3), np.uint8)
        action_space = Old.Discrete(17)
        _seed, _episode = None, 3

        def __init__(self, reward=True):
            self.reward = reward

        def seed(self, seed):
            """Comes from older versions of Gym, and does nothing here."""

        def reset(self):
            return np.full((64, 64, 3), self._seed + 10 * self._episode, np.uint8)

        def step(self, action):
            frame = np.zeros((64, 64, 3), np.uint8)
            return frame, float(self.reward), True, {"discount": 1.0 - action}

    monkeypatch.setitem(sys.modules, "crafter", types.SimpleNamespace(Env=Crafter))
    env = train.PixelEnv(ticker(env="CrafterReward-v1", action_repeat=1))
    assert worlds.action_sizes(env.description) == (17,)
    for seed, action in ((4, 0), (5, 1)):
        assert (env.reset(seed=seed)[0] == seed).all()
        assert env.step(np.array([action]))[1:4] == (1, action == 1, action == 0)
    env = train.PixelEnv(ticker(env="CrafterNoReward-v1", action_repeat=1))
    env.reset(seed=4)
    assert env.step(np.array([0]))[1] == 0


@pytest.mark.parametrize("env, package", [
    ("MineRLTreechop-v0", "pip install minerl"),
    ("CrafterReward-v1", "pip install crafter"),
    ("ALE/Pong-v5", "pip install ale-py")])
def test_a_missing_package_ends_in_its_pip_command(monkeypatch, capsys, env, package):
    for name in ("gym", "crafter", "ale_py"):
        monkeypatch.setitem(sys.modules, name, None)
    error(capsys, lambda: worlds.make(env, "{}", 5), env, package)


def made(monkeypatch, space, bins=5):
    """worlds.make of an environment with this action space."""
    monkeypatch.setattr(gym, "make", lambda name, **kwargs: Playground(space))
    return worlds.make("Playground-v0", "{}", bins)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_only_nested_and_binary_action_spaces_are_flattened_with_the_bins_asked_for(
        monkeypatch, space):
    env = made(monkeypatch, space, 7)
    flattened = isinstance(space, (Tuple, Dict, MultiBinary))
    assert isinstance(env, worlds.FlatActions) == flattened
    if flattened:
        assert tuple(env.action_space.nvec) == codec(space, 7)[0]


@pytest.mark.parametrize("space", [Box(-np.inf, 1, (2,)), Dict(a=Discrete(2), b=Box(-np.inf, 1))],
                         ids=str)
def test_an_unbounded_action_anywhere_is_refused_in_one_line(monkeypatch, capsys, space):
    words = ("action space Box", "is not supported; bounded Box")
    error(capsys, lambda: made(monkeypatch, space), *words)


@pytest.mark.parametrize("name, kwargs, words", [
    ("Nowhere-v0", "{}", ["--env Nowhere-v0: "]),
    ("CarRacing-v3", '{"bogus": 1}', ["--env_kwargs", "bogus", "does not fit CarRacing-v3: "]),
    ("CarRacing-v3", "{", ["--env_kwargs { is not JSON"])])
def test_a_wrong_name_or_argument_ends_in_one_line_that_names_the_flag(
        capsys, name, kwargs, words):
    error(capsys, lambda: worlds.make(name, kwargs, 5), *words)


@pytest.mark.parametrize("display", [None, ":0"])
def test_without_a_display_drawing_needs_none(monkeypatch, display):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "MUJOCO_GL"):
        # set first, so that what make() sets is undone as well
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if display:
        monkeypatch.setenv("DISPLAY", display)
    made(monkeypatch, Discrete(2))
    settings = [os.environ.get(name) for name in ("SDL_VIDEODRIVER", "MUJOCO_GL")]
    assert settings == ([None, None] if display else ["offscreen", "egl"])
