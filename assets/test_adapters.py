"""Tests of minerl.py, crafter.py, car_racing.py: their environments as train.py plays them."""
import sys
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.box2d.car_racing import CarRacing

import train
from assets import minerl


def test_a_culled_drawing_is_pixel_for_pixel_the_original_and_made_when_asked_for(monkeypatch):
    drawn, polygons = [], []
    render, polygon = CarRacing._render, CarRacing._draw_colored_polygon
    monkeypatch.setattr(CarRacing, "_render", lambda *args: drawn.append(0) or render(*args))
    monkeypatch.setattr(CarRacing, "_draw_colored_polygon",
                        lambda *args, **kwargs: polygons.append(0) or polygon(*args, **kwargs))
    ours = train.PixelEnv(train.TrainConfig(env="assets.car_racing:CulledCarRacing-v3",
                                            image_size=(96, 96), action_repeat=4))
    plain = gym.make("CarRacing-v3")
    pairs = [(plain.reset(seed=5)[0], ours.reset(seed=5)[0])]
    # from the first second, when the picture zooms in, to bends, off the road and backwards
    for t in range(25):
        indices = np.array([(2, 4), (0, 3), (4, 4), (1, 2), (3, 0)][t // 5])
        steer, pedal = indices / 2 - 1
        # gas and brake share an axis
        steps = [plain.step(np.array([steer, max(pedal, 0), max(-pedal, 0)])) for _ in range(4)]
        whole = len(polygons)
        drawn.clear(), polygons.clear()
        frame, reward, *_ = ours.step(indices)
        assert reward == pytest.approx(sum(step[1] for step in steps)) and len(drawn) == 1
        pairs.append((steps[-1][0], frame))
    for true, frame in pairs:
        # the score aside: in ours the last step's reward is counted, too
        true[84:, :24] = frame[84:, :24] = 0
        assert np.array_equal(true, frame)
    # most of what is out of sight is not even looked at
    assert len({true.tobytes() for true, _ in pairs}) > 20 and len(polygons) < whole / 12


BUTTONS = ("ESC", "attack", "drop", "inventory", "jump")
ITEMS = ["none", "planks", "stick", "torch"]


class Game:
    """A stand-in with MineRL's spaces and interface, which keeps what it was given. Its frame t is
    of brightness t; it ends after seven steps, or when the time is up."""
    parts = dict.fromkeys(BUTTONS, SimpleNamespace(n=2))
    parts |= {"camera": SimpleNamespace(), "craft": SimpleNamespace(n=4, values=np.array(ITEMS))}
    action_space = SimpleNamespace(spaces=parts)
    observation_space = SimpleNamespace(spaces={"pov": SimpleNamespace(shape=(64, 64, 3))})

    def __init__(self, limit=None):
        self.spec = SimpleNamespace(max_episode_steps=limit)

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.t, self.given = 0, []
        return {"pov": np.zeros((64, 64, 3), np.uint8)}

    def step(self, action):
        self.given.append(action)
        self.t += 1
        is_over = self.t in (7, self.spec.max_episode_steps) or action["ESC"]
        # what older versions say when the time is up: here with seed 2
        info = {"TimeLimit.truncated": True} if self.seeded == 2 else {}
        frame = np.full((64, 64, 3), self.t, np.uint8)
        return {"pov": frame}, float(action["attack"]), bool(is_over), info

    def close(self):
        pass


@pytest.fixture
def cfg(monkeypatch):
    monkeypatch.setitem(sys.modules, "minerl", ModuleType("minerl"))
    monkeypatch.setitem(sys.modules, "gym", SimpleNamespace(make=lambda _, **args: Game(**args)))
    # in the order of the alphabet: ESC attack camera craft drop inventory jump
    return train.TrainConfig(env="assets.minerl:MineRLTreechop-v0", envs=2,
                             action_spec=(2, 2, 121, 4, 2, 2, 2))


def test_an_action_of_minerl_is_one_category_per_entry_in_the_order_of_the_alphabet(cfg):
    env = train.PixelEnv(cfg)
    assert tuple(env.action_space.nvec) == cfg.action_spec
    assert not env.reset(seed=5)[0].any() and env.unwrapped.game.seeded == 5
    for t in range(1, 8):
        indices = np.random.default_rng(t).integers(0, cfg.action_spec)
        frame, reward, terminated, truncated, _ = env.step(indices)
        assert (frame == t).all() and (terminated, truncated) == (t == 7, False)
        action = env.unwrapped.game.given[-1]
        assert reward == action["attack"] == indices[1] and action["jump"] == indices[6]
        assert type(action["craft"]) is str and action["craft"] == ITEMS[indices[3]]
        # up (pitch) first, then sideways
        assert minerl.camera_bin(action["camera"]) @ (11, 1) == indices[2]
        # a random agent would end every episode at once, and look into its inventory
        assert action["ESC"] == action["drop"] == action["inventory"] == 0
    cfg.env_kwargs = '{"held": ["drop"]}'
    env = train.PixelEnv(cfg)
    env.reset(seed=5)
    env.step(np.ones(7, int))
    assert all(env.unwrapped.game.given[0][name] == (name != "drop") for name in BUTTONS)


def test_minerls_camera_has_the_bins_of_vpt():
    angles = np.array([-10, -5.81, -3.22, -1.61, -0.62, 0])
    np.testing.assert_allclose(minerl.camera_angle(np.arange(6)), angles, atol=0.01)
    assert minerl.camera_bin([-180, 0, 180]).tolist() == [0, 5, 10]
    angles = np.random.default_rng(0).normal(0, 6, 1000)
    # VPT's formula of the μ-law
    x = np.clip(angles / 10, -1, 1)
    stretched = np.sign(x) * np.log(1 + 10 * np.abs(x)) / np.log(11)
    assert (minerl.camera_bin(angles) == np.round(5 + 5 * stretched)).all()


# its own end; a limit that only its spec knows. With seed 2 the game itself says it was a limit
@pytest.mark.parametrize("limit, length, terminal", [(10, 8, True), (5, 6, False)])
def test_a_time_limit_of_minerl_is_no_death(cfg, limit, length, terminal):
    cfg.env_kwargs = f'{{"limit": {limit}}}'
    for seed, e in train.play(cfg, train.RandomPolicy(cfg, 0), [3, 2, 3, 2]):
        assert e["frames"][:, 0, 0, 0].tolist() == [*range(length)]
        assert e["rewards"][1:].tolist() == e["actions"][1:, 1].tolist()
        assert bool(e["terminal"]) == (terminal and seed == 3)


class CrafterGame:
    """A stand-in for crafter.Env: action 1 dies, any other ends by the time limit."""
    observation_space, action_space = SimpleNamespace(shape=(64, 64, 3)), SimpleNamespace(n=17)
    _seed, _episode = None, 3

    def __init__(self, reward=True):
        self.reward = reward

    def reset(self):
        self._episode += 1
        return np.full((64, 64, 3), self._seed + 10 * self._episode, np.uint8)

    def step(self, action):
        return np.zeros((64, 64, 3), np.uint8), self.reward, True, {"discount": float(action != 1)}


@pytest.mark.parametrize("name, reward", [("Crafter-v1", 1), ("CrafterNoReward-v1", 0)])
def test_crafter_is_seeded_and_a_time_limit_is_no_death(name, reward, monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", SimpleNamespace(Env=CrafterGame))
    env = train.PixelEnv(train.TrainConfig(env=f"assets.crafter:{name}"))
    assert env.action_space.nvec.tolist() == [17]
    for seed, action in ((4, 0), (5, 1), (4, 2)):
        assert (env.reset(seed=seed)[0] == seed + 10).all()
        assert env.step(np.array([action]))[1:4] == (reward, action == 1, action != 1)
