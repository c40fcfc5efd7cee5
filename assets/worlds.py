"""Environments that do not speak Gymnasium's plain interface, and the codec of action spaces.

    python train.py --env minigrid:MiniGrid-Empty-5x5-v0   # package:id, of a package installed
    python train.py --env MineRLTreechop-v0                # needs minerl and Java 8
    python train.py --env CrafterReward-v1                 # needs crafter
    python train.py --env ALE/Pong-v5                      # needs ale-py

MineRL and Crafter have the interface of Gym before Gymnasium; MineRL's camera, two angles, becomes
one component of 11 * 11 categories. Tuple, Dict and MultiBinary action spaces are flattened. Of a
Dict of observations the one that is a picture is taken; where none is, render() draws.
"""
import contextlib
import functools
import json
import math
import multiprocessing
import operator
import os
import signal
import sys
import time

import gymnasium as gym
import numpy as np
import torch

from assets.car_racing import CarRacing
from assets.files import check_stop, describe, fail

# VPT's camera: degrees per step, fine near 0 (μ-law)
CAMERA_BINS, CAMERA_MAX, CAMERA_MU = 11, 10.0, 10.0
# Frames without a screen. Of SDL's other driver for that, "dummy", highway_env thinks that nobody
# looks: it draws nothing.
NO_SCREEN = {"SDL_VIDEODRIVER": "offscreen", "MUJOCO_GL": "egl", "PYGLET_HEADLESS": "true"}
# Seconds in which an environment may close itself before its process is killed
PATIENCE = 5.0


class Refused(Exception):
    """What cannot be played and why, on its way from a worker to the main process."""


def refuse(message):
    """Ends the program with one line; a worker tells the main process, which ends."""
    if multiprocessing.parent_process():
        raise Refused(message)
    fail(" ".join(message.split()))


def camera_angle(index):
    """Bin of a camera axis in 0 ... 10 -> degrees in [-10, 10]."""
    x = np.asarray(index) / (CAMERA_BINS - 1) * 2 - 1
    return np.sign(x) * ((1 + CAMERA_MU) ** np.abs(x) - 1) / CAMERA_MU * CAMERA_MAX


def camera_bin(angle):
    """Degrees -> bin; what exceeds 10 degrees goes to the outer bins."""
    ends = camera_angle(np.arange(CAMERA_BINS - 1) + 0.5)
    return np.searchsorted(ends, angle)


def describe_actions(space, bins):
    """Box, Discrete, MultiDiscrete or MultiBinary -> plain values, stored with the model as JSON.

    Index i of a component stands for low + i * step. A Box gets `bins` values per dimension, both
    ends included. Other spaces end the program.
    """
    if isinstance(space, gym.spaces.Box) and is_bounded(space):
        low, sizes = space.low, np.full(space.shape, bins)
        step = (space.high.astype(float) - low) / (bins - 1)
        # rounding must not lead beyond the end
        while (beyond := low + (bins - 1) * step > space.high).any():
            step = np.where(beyond, np.nextafter(step, 0), step)
    elif isinstance(space, gym.spaces.Discrete):
        low, step, sizes = space.start, 1, space.n
    elif isinstance(space, gym.spaces.MultiDiscrete):
        low, step, sizes = space.start, np.ones_like(space.nvec), space.nvec
    elif isinstance(space, gym.spaces.MultiBinary):
        low, step = np.zeros(space.shape, int), np.ones(space.shape, int)
        sizes = np.full(space.shape, 2)
    else:
        low, step, sizes = 0, 1, 0
    # int16 holds the indices
    if not 1 <= np.min(sizes, initial=32767) <= np.max(sizes, initial=0) <= 32767:
        refuse(f"action space {space} is not supported; bounded Box (integers: up to 2**52), "
               "Discrete, MultiDiscrete, MultiBinary, Tuple and Dict are, of at least one "
               "component, each of at most 32767 categories")
    numbers = {"low": low, "step": step, "sizes": sizes}
    plain = {name: np.asarray(x).tolist() for name, x in numbers.items()}
    return plain | {"dtype": str(space.dtype)}


def is_bounded(box):
    """Whether a Box has ends, and floats hold them and what lies between them."""
    limit = 2.0 ** (1023 if box.dtype.kind == "f" else 52)
    return bool((np.abs([box.low, box.high], dtype=float) < limit).all())


def action_sizes(description):
    """The tuple of category counts, in the order of the action's components."""
    return tuple(np.ravel(description["sizes"]).tolist())


def checked_sizes(description):
    """action_sizes of a description from a file; what is none raises one of
    checkpoints.DAMAGED."""
    sizes = action_sizes(description)
    # recorded data knows nothing but the sizes
    if "low" in description:
        # numbers that its dtype cannot hold
        with np.errstate(invalid="raise"):
            to_action(description, [0] * len(sizes))
    return sizes


def action_differences(a, b):
    """In what two descriptions contradict each other, as text; "" where they go together.

    Recorded data says nothing but the sizes. One number and a list of one number are the same.
    """
    return ", ".join(f"{name} {a[name]} and {b[name]}" for name in a.keys() & b.keys()
                     if np.ravel(a[name]).tolist() != np.ravel(b[name]).tolist())


def to_action(description, indices):
    """Category indices (A,) -> an action of the described space."""
    low, step, sizes = (np.array(description[name]) for name in ("low", "step", "sizes"))
    action = low + np.reshape(indices, sizes.shape) * step
    # bins between the numbers of a Box of integers: the nearest one
    is_between = action.dtype.kind == "f" and np.dtype(description["dtype"]).kind in "iu"
    action = (np.rint(action) if is_between else action).astype(description["dtype"])
    return action if sizes.shape else action[()]


def to_indices(description, action):
    """An action of the described space -> indices (A,) int16; the nearest bin of a Box."""
    low, step, sizes = (np.array(description[name]) for name in ("low", "step", "sizes"))
    index = (np.asarray(action, float) - low) / np.where(step == 0, 1, step)
    return index.round().clip(0, sizes - 1).astype(np.int16).ravel()


class FlatActions(gym.ActionWrapper):
    """Tuple, Dict and MultiBinary action spaces as one MultiDiscrete, in the order of the parts."""

    def __init__(self, env, bins):
        super().__init__(env)
        self.leaves = [describe_actions(space, bins) for space in leaves(env.action_space)]
        sizes = [n for leaf in self.leaves for n in action_sizes(leaf)]
        self.action_space = gym.spaces.MultiDiscrete(sizes)

    def action(self, indices):
        """Indices (A,) -> an action of the original space."""
        ends = np.cumsum([len(action_sizes(leaf)) for leaf in self.leaves])
        pieces = np.split(np.asarray(indices), ends[:-1])
        actions = [to_action(leaf, piece) for leaf, piece in zip(self.leaves, pieces)]
        return build(self.env.action_space, iter(actions))

    def indices(self, action):
        """The inverse: an action of the original space -> indices (A,) int16."""
        parts = flatten(self.env.action_space, action)
        return np.concatenate([to_indices(leaf, part) for leaf, part in zip(self.leaves, parts)])


def keys(space):
    """Keys of the parts of a Tuple or Dict; None for other spaces."""
    if isinstance(space, gym.spaces.Tuple):
        return range(len(space.spaces))
    return space.spaces if isinstance(space, gym.spaces.Dict) else None


def leaves(space):
    """The spaces that a nested space consists of."""
    if keys(space) is None:
        return [space]
    return [leaf for key in keys(space) for leaf in leaves(space[key])]


def flatten(space, action):
    """The parts of an action, one for each leaf of the space."""
    if keys(space) is None:
        return [action]
    return [part for key in keys(space) for part in flatten(space[key], action[key])]


def build(space, parts):
    """The inverse of flatten; parts: an iterator."""
    if keys(space) is None:
        return next(parts)
    built = {key: build(space[key], parts) for key in keys(space)}
    return built if isinstance(space, gym.spaces.Dict) else tuple(built.values())


class OldGym(gym.Env):
    """An environment from before Gymnasium: reset() gives the observation, step() four values.

    MineRL's camera becomes one component of 11 * 11 categories; names of items become numbers.
    held: names of buttons that are never pressed, whatever the action says.
    """

    def __init__(self, env, held=()):
        self.env, self.held, self.action_space = env, held, self.modern(env.action_space)
        limit = getattr(getattr(env, "spec", None), "max_episode_steps", None)
        self.limit = limit or math.inf
        picture = getattr(env.observation_space, "spaces", {}).get("pov", env.observation_space)
        self.observation_space = gym.spaces.Box(0, 255, tuple(picture.shape), np.uint8)

    def modern(self, space, name=None):
        """The action space in Gymnasium's classes; only names tell what the old one is."""
        kind = type(space).__name__.removesuffix("Space")
        if kind == "Dict":
            parts = {name: self.modern(part, name) for name, part in space.spaces.items()}
            return gym.spaces.Dict(parts)
        if name == "camera":
            return gym.spaces.Discrete(CAMERA_BINS ** 2)
        if kind == "Box":
            return gym.spaces.Box(space.low, space.high, space.shape, space.dtype)
        if kind not in ("Discrete", "Enum"):
            refuse(f"action space {space} is not supported for environments of the old interface")
        return gym.spaces.Discrete(int(space.n))

    def old(self, space, action, name=None):
        """An action of the modern space -> the same one of the old space."""
        if isinstance(action, dict):
            return {name: self.old(space.spaces[name], part, name)
                    for name, part in action.items()}
        if name in self.held:
            return 0
        if name == "camera":
            return camera_angle(divmod(action, CAMERA_BINS)).astype(np.float32)
        return str(space.values[action]) if hasattr(space, "values") else action

    def frame(self, observation):
        return observation["pov"] if isinstance(observation, dict) else observation

    def reset(self, seed=None, options=None):
        if seed is not None and hasattr(self.env, "_episode"):
            # Crafter has no other way
            self.env._seed, self.env._episode = seed, 0
        elif seed is not None:
            self.env.seed(seed)
        self.steps = 0
        return self.frame(self.env.reset()), {}

    def step(self, action):
        action = self.old(self.env.action_space, action)
        observation, reward, done, info = self.env.step(action)
        self.steps += 1
        # Gym's and Crafter's ways to tell a time limit from an end; MineRL 1.0 tells nothing
        time_is_up = (info.get("TimeLimit.truncated", False) or info.get("discount", 0) > 0
                      or self.steps >= self.limit)
        truncated = done and time_is_up
        return self.frame(observation), reward, done and not truncated, truncated, info

    def close(self):
        if hasattr(self.env, "close"):
            self.env.close()


def make_minerl(name, held=("ESC", "drop", "inventory"), **kwargs):
    import gym as old_gym
    # importing it registers its environments
    import minerl  # noqa: F401
    # Pressed at random, ESC ends an episode within steps, and the other two are all that is seen.
    # The components stay: recordings have them.
    return OldGym(old_gym.make(name, **kwargs), held)


def make_crafter(name, **kwargs):
    import crafter
    if "NoReward" in name:
        kwargs = {"reward": False} | kwargs
    return OldGym(crafter.Env(**kwargs))


def make_atari(name, **kwargs):
    # "package:" makes Gymnasium import the package, which registers its environments
    return make_gymnasium(f"ale_py:{name}", **kwargs)


def make_gymnasium(name, **kwargs):
    return gym.make(name, render_mode="rgb_array", disable_env_checker=True, **kwargs)


# Beginning of the name: how to make it, what to install
FAMILIES = {"CarRacing": (CarRacing, "gymnasium[box2d]"),
            "MineRL": (make_minerl, "minerl (it needs Java 8)"),
            "Crafter": (make_crafter, "crafter"), "ALE/": (make_atari, "ale-py")}


def is_picture(space):
    """Whether it holds RGB pictures; MiniGrid's 7 x 7 x 3 numbers are codes of things."""
    return (isinstance(space, gym.spaces.Box) and space.dtype == np.uint8
            and space.shape[2:] == (3,) and min(space.shape[:2]) > 7)


def make(name, kwargs, bins):
    """gym.make(name, **kwargs), whatever package it is from; nested action spaces are flattened.

    kwargs: as JSON; bins: of a Box within a nested action space. What cannot be used ends the
    program.
    """
    on_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not on_screen:
        for variable, value in NO_SCREEN.items():
            os.environ.setdefault(variable, value)
    prefix = next((prefix for prefix in FAMILIES if name.startswith(prefix)), None)
    make_it, package = FAMILIES.get(prefix, (make_gymnasium, None))
    try:
        arguments = json.loads(kwargs)
    except ValueError as error:
        refuse(f"--env_kwargs {kwargs} is not JSON: {error}")
    try:
        env = make_it(name, **arguments)
    except ImportError as error:
        package = package or error.name
        advice = f"run: pip install {package}" if package else "install the package it is from"
        refuse(f"--env {name} is not installed ({error}); {advice}")
    except gym.error.UnregisteredEnv as error:
        refuse(f"--env {name}: {error} What another package registers is --env package:id, for "
               "example minigrid:MiniGrid-Empty-5x5-v0")
    except (TypeError, ValueError) as error:
        refuse(cannot_be_played(name, error))
    seen = env.observation_space
    parts = seen.spaces if isinstance(seen, gym.spaces.Dict) else {}
    pictures = [key for key, part in parts.items() if is_picture(part)]
    if len(pictures) == 1:
        key = pictures[0]
        env = gym.wrappers.TransformObservation(env, operator.itemgetter(key), seen[key])
    nested = (gym.spaces.Tuple, gym.spaces.Dict, gym.spaces.MultiBinary)
    if isinstance(env.action_space, nested):
        env = FlatActions(env, bins)
    # or it says here that it cannot
    describe_actions(env.action_space, bins)
    return env


def picture(seen):
    """What an environment shows -> (H, W, 3) uint8; what is no picture raises ValueError."""
    array = np.asarray(seen)
    has_colors = array.ndim == 3 and array.shape[2] in (3, 4) and array.size
    if not has_colors or array.dtype.kind not in "iu":
        raise ValueError("it shows no picture (H, W, 3) of integers, neither as just one of its "
                         f"observations nor by render(), but {array.shape} of {array.dtype}")
    return array[..., :3].clip(0, 255).astype(np.uint8)


def look(env, bins):
    """What must be known of an environment before it is played: its actions, its frames' (H, W)."""
    shape = env.observation_space.shape
    # begun only where it must be: MineRL takes minutes
    if not is_picture(env.observation_space):
        env.reset(seed=0)
        shape = picture(env.render()).shape
    return describe_actions(env.action_space, bins), shape[:2]


def look_from_afar(name, kwargs, bins):
    """look() in a process that ends: windows and OpenGL, once here, would not survive a fork."""
    with in_processes(name, functools.partial(make, name, kwargs, bins), 1) as call:
        return call(look, [bins])[0]


@contextlib.contextmanager
def in_processes(name, make_env, count):
    """Environments, each in its own process; gives call(), which has each of them do something.

    They are foreign code. Whatever it does there, raise, exit, crash or hang, the program ends with
    one line, at the latest after Ctrl-C or SIGTERM, and no process is left.
    """
    pipes, processes = [], []

    def call(function, *columns):
        """[function(env, x, y, ...) of each environment]; columns: xs, ys, ..."""
        for pipe, arguments in zip(pipes, zip(*columns)):
            # where its process has ended, receive() says so
            with contextlib.suppress(OSError):
                pipe.send((function, arguments))
        return [receive(*each) for each in zip(pipes, processes)]

    def receive(pipe, process):
        try:
            while not pipe.poll(0.2):
                check_stop()
                # a child that it has left may hold its end open
                if not process.is_alive() and not pipe.poll():
                    raise EOFError
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join(PATIENCE)
            check_stop()
            refuse(f"--env {name} broke its process (exit code {process.exitcode}); what is "
                   "printed above, if anything, says why")
        if isinstance(answer, Refused):
            refuse(str(answer))
        if isinstance(answer, MemoryError):
            # files.in_one_line knows what to say of it
            raise answer
        return answer

    try:
        try:
            for _ in range(count):
                pipe, far = multiprocessing.Pipe()
                pipes.append(pipe)
                arguments = name, make_env, far, pipes
                process = multiprocessing.Process(target=work, args=arguments, daemon=True)
                process.start()
                processes.append(process)
                far.close()
        except OSError as error:
            refuse(f"--envs {count}: not as many processes can be started ({error}); make it less")
        yield call
    finally:
        for pipe in pipes:
            pipe.close()
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()
            process.join()


def work(name, make_env, far, pipes):
    """A process of in_processes(): makes an environment, does what comes from far until it ends."""
    # copies of the main process's ends: while one is open, the other end does not see its end
    for pipe in pipes:
        pipe.close()
    # Ctrl-C is the main process's; and OpenMP's threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    env = None
    try:
        # what a package warns of, it would warn of in every process
        sys.stderr = open(os.devnull, "w")
        env = make_env()
        while True:
            function, arguments = far.recv()
            far.send(function(env, *arguments))
    except BaseException as error:
        if isinstance(error, MemoryError):
            answer = MemoryError(describe(error))
        else:
            known = isinstance(error, Refused)
            answer = error if known else Refused(cannot_be_played(name, error))
        # also at the end, when nobody listens any more
        with contextlib.suppress(OSError):
            far.send(answer)
    with contextlib.suppress(BaseException):
        env.close()


def cannot_be_played(name, error):
    return (f"--env {name} cannot be played ({describe(error)}); look at its packages and "
            "--env_kwargs")


def action_repeat(name):
    """Environment steps per agent step, where no flag says otherwise."""
    return 4 if name.startswith("CarRacing") else 1


def proportional_size(native, wanted, patch):
    """(H, W) in whole patches: the proportions of `native`, about as many pixels as `wanted`."""
    scale = math.sqrt(math.prod(wanted) / math.prod(native))
    return tuple(max(1, round(side * scale / patch)) * patch for side in native)
