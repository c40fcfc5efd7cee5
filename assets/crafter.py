"""Crafter (Hafner 2021), which has the interface of Gym before Gymnasium, for train.py.

    pip install crafter
    python train.py --env assets.crafter:Crafter-v1       # CrafterNoReward-v1: without rewards
"""
import gymnasium as gym
import numpy as np


class Crafter(gym.Env):
    """Observations are the picture. An episode that a time limit cuts is no death."""
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None, **kwargs):
        import crafter
        self.game = crafter.Env(**kwargs)
        self.action_space = gym.spaces.Discrete(self.game.action_space.n)
        shape = self.game.observation_space.shape
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def reset(self, seed=None, options=None):
        # it counts its episodes from its seed, and has no other way to seed them
        if seed is not None:
            self.game._seed, self.game._episode = seed, 0
        return self.game.reset(), {}

    def step(self, action):
        observation, reward, done, info = self.game.step(action)
        is_dead = done and info["discount"] == 0
        return observation, reward, is_dead, done and not is_dead, info


gym.register("Crafter-v1", Crafter)
gym.register("CrafterNoReward-v1", Crafter, kwargs={"reward": False})
