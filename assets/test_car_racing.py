"""Tests of car_racing.py."""
import functools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

import train
from assets import worlds
from assets.car_racing import CarRacing, steer_and_pedals
from test_dreamer4 import error


def test_carracing_has_gas_and_brake_on_one_axis():
    env = CarRacing("CarRacing-v3")
    assert env.action_space == Box(-1, 1, (2,), np.float32)
    for action, pedals in [((-1, 0.5), [-1, 0.5, 0]), ((1, -0.25), [1, 0, 0.25]),
                           ((0, 0), [0, 0, 0])]:
        assert env.env.action(np.array(action)).tolist() == pedals


def test_carracing_may_be_discrete(capsys):
    env = worlds.make("CarRacing-v3", '{"continuous": false}', 5)
    assert env.action_space == Discrete(5)
    for text in ("{", '{"bogus": 1}', "[1]"):
        error(capsys, lambda: worlds.make("CarRacing-v3", text, 5), "--env_kwargs")


def test_only_frames_that_are_asked_for_are_drawn_and_pixel_for_pixel_the_environments_own(
        monkeypatch):
    from gymnasium.envs.box2d import car_racing as original
    drawn, polygons = [], []
    render, polygon = original.CarRacing._render, original.CarRacing._draw_colored_polygon

    def draw(self, *args):
        drawn.append(0)
        return render(self, *args)

    def draw_polygon(self, *args, **kwargs):
        polygons.append(0)
        return polygon(self, *args, **kwargs)

    monkeypatch.setattr(original.CarRacing, "_render", draw)
    monkeypatch.setattr(original.CarRacing, "_draw_colored_polygon", draw_polygon)
    cfg = train.TrainConfig(image_size=(96, 96))
    plain, ours = gym.make("CarRacing-v3"), train.PixelEnv(cfg)
    pairs = [(plain.reset(seed=5)[0], ours.reset(seed=5)[0])]
    # from the first second, when the picture zooms in, to bends, off the road and backwards
    for t in range(40):
        indices = np.array([(2, 4), (0, 3), (4, 4), (1, 2)][t // 5 % 4])
        rewards = 0
        for _ in range(cfg.action_repeat):
            pedals = steer_and_pedals(train.to_action(ours.description, indices))
            observation, reward, *_ = plain.step(pedals)
            rewards += reward
        drawn.clear()
        frame, total, *_ = ours.step(indices)
        assert total == pytest.approx(rewards) and len(drawn) == 1
        pairs.append((observation, frame))
    for true, frame in pairs:
        # the score aside: in ours the last step's reward is counted, too
        true[84:, :24] = frame[84:, :24] = 0
        assert np.array_equal(true, frame)
    assert len({true.tobytes() for true, _ in pairs}) > 30
    # what is out of sight is not even looked at
    counts = []
    for draw_once in (functools.partial(plain.unwrapped._render, "state_pixels"), ours.draw):
        polygons.clear()
        draw_once()
        counts.append(len(polygons))
    assert counts[1] < counts[0] / 3
