"""MineRL, which has the interface of Gym before Gymnasium, for train.py.

    pip install minerl                                     # needs Java 8
    python train.py --env assets.minerl:MineRLTreechop-v0 --preset minerl --envs 1

Every environment is a Minecraft of its own, with some gigabytes of memory. A picture is what the
player sees. An action has one component for every entry of MineRL's Dict, in the order of the
alphabet: buttons are 0 or 1, items are numbered in the alphabet's order, too, and the two angles of
the camera are one component of 11 x 11 bins, as in VPT (Baker et al. 2022).
"""
import math

import gymnasium as gym
import numpy as np

# Degrees per step: fine near 0, up to 10 (μ-law)
CAMERA_BINS, CAMERA_MAX, CAMERA_MU = 11, 10.0, 10.0
TASKS = ("Treechop Navigate NavigateDense NavigateExtreme NavigateExtremeDense ObtainDiamond "
         "ObtainDiamondDense ObtainIronPickaxe ObtainIronPickaxeDense ObtainDiamondShovel "
         "BasaltFindCave BasaltMakeWaterfall BasaltCreateVillageAnimalPen BasaltBuildVillageHouse")


def camera_angle(index):
    """Bin of a camera axis in 0 ... 10 -> degrees in [-10, 10]."""
    x = np.asarray(index) / (CAMERA_BINS - 1) * 2 - 1
    return np.sign(x) * ((1 + CAMERA_MU) ** np.abs(x) - 1) / CAMERA_MU * CAMERA_MAX


def camera_bin(angle):
    """Degrees -> bin; what exceeds 10 degrees goes to the outer bins."""
    return np.searchsorted(camera_angle(np.arange(CAMERA_BINS - 1) + 0.5), angle)


class MineRL(gym.Env):
    """held: buttons that are never pressed, whatever the action says. Pressed at random, ESC ends
    an episode within steps, and the other two are all that is seen. Recordings have them."""
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, name, held=("ESC", "drop", "inventory"), render_mode=None, **kwargs):
        import gym as old_gym
        # importing it registers its environments
        import minerl  # noqa: F401
        self.game, self.held = old_gym.make(name, **kwargs), held
        self.limit = self.game.spec.max_episode_steps or math.inf
        self.parts = sorted(self.game.action_space.spaces.items())
        sizes = [CAMERA_BINS ** 2 if name == "camera" else int(space.n)
                 for name, space in self.parts]
        self.action_space = gym.spaces.MultiDiscrete(sizes)
        shape = self.game.observation_space.spaces["pov"].shape
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def to_old(self, action):
        """Category indices -> MineRL's Dict."""
        old = {}
        for (name, space), index in zip(self.parts, action):
            if name == "camera":
                old[name] = camera_angle(divmod(index, CAMERA_BINS)).astype(np.float32)
            elif hasattr(space, "values"):
                old[name] = str(space.values[index])
            else:
                old[name] = 0 if name in self.held else int(index)
        return old

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.game.seed(seed)
        self.steps = 0
        return self.game.reset()["pov"], {}

    def step(self, action):
        observation, reward, done, info = self.game.step(self.to_old(action))
        self.steps += 1
        # MineRL 1.0 does not tell a time limit from an end
        is_cut = done and (info.get("TimeLimit.truncated", False) or self.steps >= self.limit)
        return observation["pov"], reward, done and not is_cut, is_cut, info

    def close(self):
        self.game.close()


for task in TASKS.split():
    gym.register(f"MineRL{task}-v0", MineRL, kwargs={"name": f"MineRL{task}-v0"})
