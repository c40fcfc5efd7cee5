"""CarRacing for learning: gas and brake on one axis, and frames only where they are asked for.

    python train.py --env CarRacing-v3

Its own step() draws every frame, in Python, polygon by polygon, most of them outside of the
picture: nearly all of its time. Here render() draws, and only what can be seen; pixel for pixel
the same.
"""
import functools
import math

import gymnasium as gym
import numpy as np


def steer_and_pedals(action):
    """(steer, pedal) in [-1, 1] -> CarRacing's (steer, gas, brake)."""
    steer, pedal = action
    return np.array([steer, max(pedal, 0), max(-pedal, 0)], np.float32)


def draw_nothing(mode):
    """In the place of _render, which step() calls."""


@functools.cache
def grass(size):
    """The squares of grass in every second row and column of the playing field, by corners."""
    corners = ((size, 0), (0, 0), (0, size), (size, size))
    return [[(size * column + x, size * row + y) for x, y in corners]
            for column in range(-20, 20, 2) for row in range(-20, 20, 2)]


def draw_road(game, zoom, translation, angle):
    """In the place of _render_road: field, grass and road, without what is out of sight."""
    # imported late: it needs Box2D
    from gymnasium.envs.box2d import car_racing as original
    draw, end = game._draw_colored_polygon, original.PLAYFIELD
    field = [(end, end), (end, -end), (-end, -end), (-end, end)]
    draw(game.surf, field, game.bg_color, zoom, translation, angle, clip=False)
    # The car is at half of the picture's width and a quarter of its height. The farthest corner is
    # so far away; a polygon reaches beyond its first corner, and the edges are smoothed.
    width, height = original.WINDOW_W, original.WINDOW_H
    reach = (math.hypot(width / 2, height * 3 / 4) + original.MAX_SHAPE_DIM + 2) / zoom
    x, y = game.car.hull.position

    def is_near(corner):
        return math.hypot(corner[0] - x, corner[1] - y) < reach

    for square in grass(original.GRASS_DIM):
        if is_near(square[0]):
            draw(game.surf, square, game.grass_color, zoom, translation, angle)
    for road, color in game.road_poly:
        if is_near(road[0]):
            color = [int(c) for c in color]
            draw(game.surf, road, color, zoom, translation, angle)


class CarRacing(gym.Wrapper):
    """gym.make(name, **kwargs) without observations: render() draws the frame (96, 96, 3)."""

    def __init__(self, name, **kwargs):
        env = gym.make(name, disable_env_checker=True, **kwargs)
        game = env.unwrapped
        self.draw = functools.partial(game._render, "state_pixels")
        game._render, game._render_road = draw_nothing, functools.partial(draw_road, game)
        if isinstance(env.action_space, gym.spaces.Box):
            pedals = gym.spaces.Box(-1, 1, (2,), np.float32)
            env = gym.wrappers.TransformAction(env, steer_and_pedals, pedals)
        super().__init__(env)
        self.observation_space = gym.spaces.Tuple(())

    def render(self):
        return self.draw()
