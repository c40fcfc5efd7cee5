"""Tests of worlds.py: action spaces, MineRL, Crafter, pictures, what cannot be played."""
import functools
import json
import multiprocessing
import os
import select
import signal
import sys
import time
import types

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch.testing import assert_close

import train
from assets import files, worlds
from test_dreamer4 import error, signals
from test_episodes import Count, Ticker, ticker


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


def test_bins_between_the_numbers_of_a_box_of_integers_mean_the_nearest_number():
    description = worlds.describe_actions(Box(-2, 8, (1,), np.int64), 5)
    # -2, 0.5, 3, 5.5, 8
    actions = [worlds.to_action(description, np.array([i]))[0] for i in range(5)]
    assert actions == [-2, 0, 3, 6, 8]


RECORDED = {"sizes": [5]}


@pytest.mark.parametrize("a, b, words", [
    (RECORDED, Discrete(5), ""),
    (RECORDED, Box(-1, 1, (1,)), ""),
    (RECORDED, RECORDED, ""),
    (Discrete(5), MultiDiscrete([5]), ""),
    (RECORDED, Discrete(7), "sizes [5] and 7"),
    (RECORDED, MultiDiscrete([5, 5]), "sizes [5] and [5, 5]"),
    (Discrete(5), Discrete(5, start=1), "low 0 and 1"),
    (Box(-1, 1, (1,)), Box(-1, 3, (1,)), "step [0.5] and [1.0]"),
    (Discrete(5), Box(0, 4, (1,)), "dtype int64 and float32")], ids=str)
def test_recorded_data_meets_any_actions_of_its_sizes_an_environment_only_its_own(a, b, words):
    a, b = (x if x is RECORDED else worlds.describe_actions(x, 5) for x in (a, b))
    assert worlds.action_differences(a, b) == words
    assert bool(worlds.action_differences(b, a)) == bool(words)


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


class Human(Treechop):
    """The buttons of MineRL 1.0 that must not be pressed at random; its spec has the time limit."""
    buttons = ("ESC", "attack", "drop", "inventory")
    action_space = Old.Dict(**{name: Old.Discrete(2) for name in buttons})
    spec = types.SimpleNamespace(max_episode_steps=6)

    def step(self, action):
        self.given.append(action)
        self.t += 1
        return self.look(), 1.0, self.t == self.seeded or bool(action["ESC"]), {}


@pytest.mark.parametrize("kwargs, held", [
    ("{}", ("ESC", "drop", "inventory")), ('{"held": ["ESC"]}', ("ESC",)), ('{"held": []}', ())])
def test_buttons_of_minerl_that_are_held_are_never_pressed_but_have_their_components(
        monkeypatch, minerl, kwargs, held):
    monkeypatch.setattr(sys.modules["gym"], "make", lambda name: Human())
    env = worlds.make("MineRLBasaltFindCave-v0", kwargs, 5)
    assert env.action_space == MultiDiscrete([2] * 4)
    env.reset(seed=99)
    env.step(np.ones(4, int))
    [given] = env.unwrapped.env.given
    assert given == {name: int(name not in held) for name in Human.buttons}


def test_a_time_limit_that_only_the_spec_of_minerl_knows_is_no_death(monkeypatch, minerl):
    monkeypatch.setattr(sys.modules["gym"], "make", lambda name: Human())
    minerl.action_spec = (2,) * 4
    # ends by itself, or at the limit, which counts from every reset
    for seed, e in train.play(minerl, train.RandomPolicy(minerl, 0), [4, 6, 3, 5]):
        assert len(e["frames"]) == seed + 1 and bool(e["terminal"]) == (seed != 6)


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
    env = train.PixelEnv(ticker(env="CrafterReward-v1", action_repeat=1, action_spec=(17,)))
    assert worlds.action_sizes(env.description) == (17,)
    for seed, action in ((4, 0), (5, 1)):
        assert (env.reset(seed=seed)[0] == seed).all()
        assert env.step(np.array([action]))[1:4] == (1, action == 1, action == 0)
    env = train.PixelEnv(ticker(env="CrafterNoReward-v1", action_repeat=1, action_spec=(17,)))
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


HUGE, INT, UINT = np.finfo(float).max, np.iinfo(np.int64), np.iinfo(np.uint64)


@pytest.mark.parametrize("space", [
    Box(-np.inf, 1, (2,)), Dict(a=Discrete(2), b=Box(-np.inf, 1)),
    # its width is not finite; floats do not hold the ends; no component
    Box(-HUGE, HUGE, (2,), float), Box(INT.min, INT.max, (1,), np.int64),
    Box(0, UINT.max, (1,), np.uint64), Box(-1, 1, (0,)), Tuple(()), Dict({}),
    # episode files hold int16
    Discrete(32768), Discrete(10 ** 9), MultiDiscrete([[2, 3], [4, 70000]]), None], ids=str)
def test_actions_that_categories_cannot_stand_for_are_refused_in_one_line(
        monkeypatch, capsys, space):
    words = ("action space ", "is not supported; bounded Box")
    error(capsys, lambda: made(monkeypatch, space), *words)


@pytest.mark.parametrize("space", [
    Discrete(32767), Box(2, 2, (3,)), Box(-1, 1, (2,), np.float16), Box(0, 4, (2,), np.int8),
    Box(-2 ** 51, 2 ** 51, (1,), np.int64),
    Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (1,))], ids=str)
def test_the_widest_action_spaces_go_to_their_ends(space):
    sizes, to_action, _ = codec(space, 5)
    for indices in ([0] * len(sizes), np.array(sizes) - 1):
        assert space.contains(to_action(np.array(indices)))
    if isinstance(space, Box):
        assert to_action(np.array(sizes) - 1).tolist() == space.high.tolist()


@pytest.mark.parametrize("name, kwargs, words", [
    ("Nowhere-v0", "{}", ["--env Nowhere-v0: "]),
    ("CarRacing-v3", '{"bogus": 1}', ["--env CarRacing-v3 cannot be played", "bogus"]),
    ("CarRacing-v3", "[1]", ["--env CarRacing-v3 cannot be played", "--env_kwargs"]),
    ("CarRacing-v3", "{", ["--env_kwargs { is not JSON: "]),
    # these are not the arguments' fault
    ("a:b:c", "{}", ["--env a:b:c cannot be played (ValueError: "]),
    (":", "{}", ["--env : cannot be played (ValueError: "]),
    (".a:B-v0", "{}", ["--env .a:B-v0 cannot be played (TypeError: "])])
def test_a_wrong_name_or_argument_ends_in_one_line_that_names_the_flag(
        capsys, name, kwargs, words):
    error(capsys, lambda: worlds.make(name, kwargs, 5), *words)


class Shown(Ticker):
    """An environment that shows what it is told to show.

    observation, rendering: what reset() and render() give; rendering None: it must not be drawn.
    """

    def __init__(self, render_mode=None, space=None, observation=None, rendering=None):
        self.observation_space, self.observation, self.rendering = space, observation, rendering

    def look(self):
        return self.observation

    def render(self):
        assert self.rendering is not None
        return self.rendering


def shown(monkeypatch, **settings):
    """Registers it until the test ends."""
    spec = gym.envs.registration.EnvSpec("Shown-v0", functools.partial(Shown, **settings))
    monkeypatch.setitem(gym.registry, "Shown-v0", spec)
    return ticker(env="Shown-v0", image_size=(16, 24))


def pictures(height, width, channels=3):
    return Box(0, 255, (height, width, channels), np.uint8)


SCREEN = np.full((16, 24, 3), 50, np.uint8)
DRAWN = np.full((32, 48, 3), 90, np.uint8)


@pytest.mark.parametrize("space, observation, rendering", [
    (pictures(16, 24), SCREEN, None),
    # ViZDoom and MiniHack
    (Dict(screen=pictures(16, 24), depth=pictures(16, 24, 1), health=Box(0, 1)),
     {"screen": SCREEN}, None),
    # MiniGrid: codes; two eyes; numbers
    (Dict(direction=Discrete(4), image=pictures(7, 7)), {}, DRAWN),
    (Dict(left=pictures(16, 24), right=pictures(16, 24)), {}, DRAWN),
    (Box(-1, 1, (4,)), np.zeros(4), DRAWN)], ids=str)
def test_what_is_seen_is_the_observation_that_is_a_picture_or_else_drawn(
        monkeypatch, space, observation, rendering):
    cfg = shown(monkeypatch, space=space, observation=observation, rendering=rendering)
    seen = SCREEN if rendering is None else rendering
    _, size = worlds.look_from_afar(cfg.env, "{}", 5)
    assert size == seen.shape[:2]
    env = train.PixelEnv(cfg)
    for frame in (env.reset(seed=3)[0], env.step(np.array([1]))[0]):
        assert frame.shape == (16, 24, 3) and (frame == seen[0, 0]).all()


def test_no_environment_is_made_in_the_process_that_workers_are_forked_from(monkeypatch):
    original = Shown.__init__

    # what draws opens windows, which workers would inherit
    def checked(*args, **kwargs):
        assert multiprocessing.parent_process(), "made in the main process"
        original(*args, **kwargs)

    cfg = shown(monkeypatch, space=pictures(16, 24), observation=SCREEN)
    monkeypatch.setattr(Shown, "__init__", checked)
    worlds.look_from_afar(cfg.env, "{}", 5)
    assert len(list(train.play(cfg, train.RandomPolicy(cfg, 0), [4, 5]))) == 2


@pytest.mark.parametrize("env, words", [
    ("Foo-v0", ["--env Foo-v0: ", "--env package:id, for example minigrid:MiniGrid-"]),
    ("noname:Foo-v0", ["noname:Foo-v0 is not installed (No module named 'noname'",
                       "; install the package it is from"]),
    ("Shown-v0", ["--env Shown-v0 ", "it shows no picture"])])
def test_what_cannot_be_played_ends_in_one_line(monkeypatch, capfd, env, words):
    # NetHack: text, drawn as text
    cfg = shown(monkeypatch, space=Dict(text=Box(0, 9, (5,))), observation={}, rendering="@...")
    cfg.env = env
    error(capfd, lambda: worlds.look_from_afar(env, "{}", 5), *words)
    error(capfd, lambda: played(cfg), *words)


def played(cfg):
    return list(train.play(cfg, train.RandomPolicy(cfg, 0), [4, 5]))


@pytest.mark.parametrize("rendering", [
    np.zeros((0, 0, 3), np.uint8), np.zeros((0, 24, 3), np.uint8), DRAWN[..., :1], DRAWN[..., :2],
    DRAWN[..., 0], DRAWN.transpose(2, 0, 1), DRAWN / 255, DRAWN.astype(object), DRAWN > 0, [DRAWN]],
    ids=lambda x: f"{np.shape(x)}{np.asarray(x).dtype}")
def test_only_a_picture_is_one(monkeypatch, capfd, rendering):
    cfg = shown(monkeypatch, space=Box(-1, 1, (4,)), observation=np.zeros(4), rendering=rendering)
    error(capfd, lambda: worlds.look_from_afar(cfg.env, "{}", 5), "--env Shown-v0", "no picture")
    error(capfd, lambda: played(cfg), "--env Shown-v0", "no picture")


def test_colors_may_be_any_integers_and_transparent():
    x = np.array([[[-1, 0, 255, 9], [256, 1, 2, 9]]])
    assert worlds.picture(x.tolist()).tolist() == [[[0, 0, 255], [255, 1, 2]]]
    assert worlds.picture(DRAWN).dtype == worlds.picture(x).dtype == np.uint8


def doing(monkeypatch, method, act):
    """An environment that does something else in one of its methods."""
    monkeypatch.setattr(Shown, method, lambda *args, **kwargs: act())
    return shown(monkeypatch, space=pictures(16, 24), observation=SCREEN)


@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
@pytest.mark.parametrize("what, words", [
    (ValueError("one\ntwo"), "(ValueError: one two)"), (SystemExit(0), "(SystemExit: 0)"),
    (SystemExit("one\ntwo"), "(SystemExit: one two)"), (KeyboardInterrupt(), "(KeyboardInterrupt:"),
    (EOFError(), "(EOFError:"), (worlds.gym.error.Error("x"), "(Error: x)")], ids=repr)
def test_whatever_an_environment_raises_ends_in_one_line(monkeypatch, capfd, method, what, words):
    def act():
        print("Warning: an old version", file=sys.stderr)
        raise what

    cfg = doing(monkeypatch, method, act)
    error(capfd, lambda: played(cfg), "--env Shown-v0 cannot be played", words)
    if method == "__init__":
        error(capfd, lambda: worlds.look_from_afar(cfg.env, "{}", 5), "cannot be played", words)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", ["__init__", "reset", "step", "with a child"])
def test_an_environment_that_breaks_its_process_is_named(monkeypatch, capfd, method):
    def broken():
        if method == "with a child" and not os.fork():
            time.sleep(30)
        os._exit(11)

    began = time.monotonic()
    cfg = doing(monkeypatch, method.replace("with a child", "step"), broken)
    error(capfd, lambda: played(cfg), "--env Shown-v0 broke", "exit code 11")
    if method == "__init__":
        error(capfd, lambda: worlds.look_from_afar(cfg.env, "{}", 5), "Shown-v0", "exit code 11")
    assert time.monotonic() - began < 25
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("method", ["__init__", "step"])
def test_memory_that_an_environment_does_not_get_is_named(monkeypatch, capfd, method):
    cfg = doing(monkeypatch, method, lambda: np.zeros(10 ** 15))
    error(capfd, lambda: files.in_one_line()(played)(cfg), "not enough memory", "7.11 PiB")


@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
@pytest.mark.parametrize("act", [
    lambda: time.sleep(1000), lambda: os.kill(os.getpid(), signal.SIGTERM)], ids=["hangs", "ends"])
def test_at_a_signal_an_environment_is_left_that_hangs_or_ends_by_it(monkeypatch, method, act):
    class Policy(train.RandomPolicy):
        def act(self, frames, actions):
            files.STOP.append(signal.SIGTERM)
            return super().act(frames, actions)

    monkeypatch.setattr(worlds, "PATIENCE", 0.1)
    cfg = doing(monkeypatch, method, act)
    works = [lambda: list(train.play(cfg, Policy(cfg, 0), [4, 5]))]
    if method != "step":
        files.STOP.append(signal.SIGTERM)
    if method == "__init__":
        works.append(lambda: worlds.look_from_afar(cfg.env, "{}", 5))
    for work in works:
        with pytest.raises(SystemExit) as stop:
            work()
        assert stop.value.code == 130 and not multiprocessing.active_children()


@pytest.mark.parametrize("act", [lambda: time.sleep(1000), lambda: 1 / 0])
def test_an_environment_that_does_not_close_has_been_played(monkeypatch, capfd, act):
    monkeypatch.setattr(worlds, "PATIENCE", 0.1)
    cfg = doing(monkeypatch, "close", act)
    assert len(played(cfg)) == 2
    assert capfd.readouterr().err == "" and not multiprocessing.active_children()


@pytest.mark.parametrize("reward", [0.0, np.nan])
def test_every_environment_is_closed(monkeypatch, tmp_path, reward):
    cfg = doing(monkeypatch, "close", lambda: (tmp_path / str(os.getpid())).touch())
    monkeypatch.setattr(Shown, "step", lambda self, action: (SCREEN, reward, False, False, {}))
    with pytest.raises(SystemExit):
        played(cfg)
    assert len(list(tmp_path.iterdir())) == 2


def handlers(env, number):
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_ctrl_c_is_the_main_processs_and_workers_can_be_terminated(monkeypatch):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with worlds.in_processes("Shown-v0", dict, 2) as call:
        assert call(handlers, [0, 1]) == [[signal.SIG_IGN, signal.SIG_DFL]] * 2


def test_too_few_file_handles_or_processes_end_in_one_line(monkeypatch, capfd):
    original, pipes = multiprocessing.Pipe, []

    def pipe():
        pipes.append(1)
        if len(pipes) > 1:
            raise OSError(24, "Too many open files")
        return original()

    monkeypatch.setattr(multiprocessing, "Pipe", pipe)
    cfg = shown(monkeypatch, space=pictures(16, 24), observation=SCREEN)
    error(capfd, lambda: played(cfg), "--envs 2", "Too many open files")
    assert not multiprocessing.active_children()


def test_workers_end_with_the_main_process_even_if_it_is_killed(monkeypatch):
    cfg = shown(monkeypatch, space=pictures(16, 24), observation=SCREEN)
    read, write = os.pipe()

    def main():
        with worlds.in_processes(cfg.env, functools.partial(train.PixelEnv, cfg), 3) as call:
            call(train.PixelEnv.reset, [4, 5, 6])
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.Process(target=main)
    process.start()
    os.close(write)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
    # the other end is open as long as one of them lives
    assert select.select([read], [], [], 10)[0] and os.read(read, 1) == b""
    os.close(read)


@pytest.mark.parametrize("native, wanted, patch, size", [
    ((96, 96), (64, 64), 8, (64, 64)), ((360, 640), (90, 160), 10, (90, 160)),
    # highway, LunarLander, ViZDoom
    ((150, 600), (64, 64), 8, (32, 128)), ((400, 600), (64, 64), 8, (56, 80)),
    ((240, 320), (96, 96), 8, (80, 112)),
    # one patch is the least
    ((10, 1000), (64, 64), 16, (16, 640)), ((8, 8), (4, 4), 16, (16, 16))])
def test_a_frame_keeps_its_proportions_in_whole_patches(native, wanted, patch, size):
    assert worlds.proportional_size(native, wanted, patch) == size


def test_only_carracing_repeats_actions_by_default():
    names = ("CarRacing-v3", "LunarLander-v3", "minigrid:MiniGrid-Empty-5x5-v0")
    assert [worlds.action_repeat(name) for name in names] == [4, 1, 1]


@pytest.mark.parametrize("display", [None, ":0"])
def test_without_a_display_drawing_needs_none(monkeypatch, display):
    monkeypatch.setattr(sys, "platform", "linux")
    drawing = ("SDL_VIDEODRIVER", "MUJOCO_GL", "PYGLET_HEADLESS")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", *drawing):
        # set first, so that what make() sets is undone as well
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if display:
        monkeypatch.setenv("DISPLAY", display)
    made(monkeypatch, Discrete(2))
    settings = [os.environ.get(name) for name in drawing]
    # "dummy" would do for most, but with it highway_env leaves its frames black
    assert settings == ([None] * 3 if display else ["offscreen", "egl", "true"])
