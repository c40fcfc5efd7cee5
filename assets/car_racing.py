"""CarRacing, drawn faster: what is out of sight is left out, and no pixel differs.

    python train.py --env assets.car_racing:CulledCarRacing-v3 --action_repeat 4

As in CarRacing-v3 under train.py, gas and brake share an axis, and only render() draws: step()
would draw every frame, also those that a repeated action skips.
"""
import math

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d import car_racing as original

# The car is at half of the picture's width and a quarter of its height: the farthest corner is so
# many pixels away. A polygon reaches beyond its first corner, and its edges are smoothed.
REACH = (math.hypot(original.WINDOW_W / 2, original.WINDOW_H * 3 / 4)
         + original.MAX_SHAPE_DIM + 2)


class CulledCarRacing(original.CarRacing):
    """Actions: steering, and a pedal that is gas above 0 and brake below."""
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if self.continuous:
            self.action_space = gym.spaces.Box(-1, 1, (2,))

    def step(self, action):
        # reset() steps without an action
        if self.continuous and action is not None:
            steer, pedal = action
            action = np.array([steer, max(pedal, 0), max(-pedal, 0)], np.float32)
        return super().step(action)

    def _render(self, mode):
        """In step(): draws nothing."""

    def render(self):
        return super()._render("state_pixels")

    def _render_road(self, zoom, translation, angle):
        """Field, grass and road; the road's pieces are sorted out first, which saves most."""
        x, y = self.car.hull.position
        self.is_near = lambda corner: math.hypot(corner[0] - x, corner[1] - y) * zoom < REACH
        everything = self.road_poly
        self.road_poly = [piece for piece in everything if self.is_near(piece[0][0])]
        super()._render_road(zoom, translation, angle)
        self.road_poly = everything

    def _draw_colored_polygon(self, surface, polygon, color, zoom, translation, angle, clip=True):
        # the field has clip=False; else it is a square of grass, or a near piece of the road
        if not clip or self.is_near(polygon[0]):
            super()._draw_colored_polygon(surface, polygon, color, zoom, translation, angle, clip)


gym.register("CulledCarRacing-v3", CulledCarRacing, disable_env_checker=True)
