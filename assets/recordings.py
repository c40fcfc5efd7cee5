"""Recordings that exist already -> episode files to train on.

    python assets/recordings.py minerl SOURCE TARGET   # MineRL-v0: rendered.npz, recording.mp4
    python assets/recordings.py vpt SOURCE TARGET      # VPT's contractors: NAME.jsonl, NAME.mp4
    python assets/recordings.py video SOURCE TARGET    # NAME.mp4: no actions, so no agent either
    python train.py --run runs/minerl --image_size 64x64 --action_spec 2,2,121,2,2,2,2,2,2

SOURCE is a folder with any subfolders, TARGET one such as runs/minerl/data. What cannot be read is
named, the rest is converted. The last line printed is the command to train with. The components of
an action stand in the order of MineRL's action space: the alphabet, the camera among the others.

What differs from the loaders of minerl 0.4.4 and of OpenAI's Video-Pre-Training:
- Frames are shrunk with antialiasing, as train.py does it.
- MineRL: the last frame is kept (the loader repeats the one before it). Without success it is not
  terminal. Folders need no v3_ or v4_ in their names. BASALT and obfuscated actions are refused.
- VPT: angles are not cut to whole degrees. A tick that only turned the mouse wheel is not left out.
  ESC, which may end MineRL's episodes, is inventory while a GUI is open and nothing otherwise: so
  did the code of the paper, says the loader. The cursor is an arrow of ours. The mouse scales of
  recorders 5.7 to 6.9 are left out: no tick names its recorder, and the loader does not use them.
"""
import json
import re
import shlex
import sys
from itertools import islice
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assets.files import describe, fail, in_one_line, new_parser, write_file
from assets.videos import resize
from assets.worlds import CAMERA_BINS, camera_bin
from dreamer4 import Config

# Longer recordings become several episodes: train.py reads files as a whole
LONGEST_EPISODE = 1000
# MineRL: names of items in the order of their categories, the alphabet; buttons are pressed or not
TOOLS = "iron_axe iron_pickaxe none stone_axe stone_pickaxe wooden_axe wooden_pickaxe".split()
CATEGORIES = {
    "craft": ["crafting_table", "none", "planks", "stick", "torch"],
    "equip": ["air", *TOOLS],
    "nearbyCraft": ["furnace", *TOOLS],
    "nearbySmelt": ["coal", "iron_ingot", "none"],
    "place": ["cobblestone", "crafting_table", "dirt", "furnace", "none", "stone", "torch"],
}
CATEGORIES |= dict.fromkeys("attack back forward jump left right sneak sprint".split(), (0, 1))
# VPT: key or number of the mouse button
KEYS = {"back": "s", "drop": "q", "forward": "w", "inventory": "e", "jump": "space", "left": "a",
        "right": "d", "sneak": "left.shift", "sprint": "left.control", "swapHands": "f"}
KEYS |= {f"hotbar.{number}": str(number) for number in range(1, 10)}
MOUSE = {"attack": 0, "use": 1, "pickItem": 2}
VPT_ACTIONS = sorted([*KEYS, *MOUSE, "ESC", "camera"])
# How far a move of the mouse by one pixel turns the camera
DEGREES = 360 / 2400


def read_frames(path, mode="passthrough"):
    """Streams a video: frames (H, W, 3) uint8, one at a time."""
    # a pipe would be waited for
    if not path.is_file():
        raise ValueError(f"{path} is missing or no file")
    # "passthrough": every stored frame once, as actions need it; "cfr": an even rate, by repeating
    # or leaving out frames of videos that have none
    yield from imageio.imiter(path, plugin="FFMPEG", output_params=["-fps_mode", mode])


def check_numbers(name, values):
    """Raises ValueError unless an array holds real numbers that float32 can hold."""
    # NaN is not below
    if values.dtype.kind not in "biuf" or not (abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError(f"{name} must be real, finite numbers")


# One function per format: a recording, size of the frames, --action_spec -> its action spec,
# whether the last frame ended the task, steps (frame, action that led to it, reward on arrival)

def minerl(path, size, spec):
    """rendered.npz, recording.mp4 and metadata.json, which may be missing."""
    if "tempting_capers_shapeshifter-14" in str(path):
        raise ValueError("the minerl package leaves this recording out as damaged")
    metadata = path.with_name("metadata.json")
    metadata = json.loads(metadata.read_text()) if metadata.is_file() else {}
    with np.load(path) as rendered:
        rewards = np.append(0, rendered["reward"])
        check_numbers("reward", rewards)
        names = sorted(key.split("$")[1] for key in rendered if key.startswith("action$"))
        if not names:
            raise ValueError("rendered.npz holds no actions")
        parts = [categories(name, rendered[f"action${name}"], names) for name in names]
    spec, columns = zip(*parts)
    T = len(rewards)
    if {len(column) for column in columns} != {T - 1}:
        raise ValueError(f"there are {T - 1} rewards, but not as many of every action")
    actions = np.full((T, len(spec)), -1)
    actions[1:] = np.stack(columns, 1)
    video = path.with_name("recording.mp4")
    stored = sum(1 for _ in read_frames(video))
    counted = metadata.get("true_video_frame_count", stored)
    success = metadata.get("success", True)
    if type(success) is not bool or type(counted) is not int:
        raise ValueError(f"metadata.json: success is {success!r}, frames are {counted!r}")
    if stored != counted:
        print(f"{video}: {stored} frames, {counted} in metadata.json; the shorter ends it")
    if counted < T:
        raise ValueError(f"recording.mp4 has {counted} frames for {T} states")
    # the video began earlier: its last T frames are the states
    frames = islice(read_frames(video), counted - T, counted)
    terminal = success and stored >= counted
    return spec, terminal, zip((resize(frame, size) for frame in frames), actions, rewards)


def categories(name, values, names):
    """One of an environment's actions `names` -> number of categories, category per step (T,)."""
    if name == "camera":
        check_numbers("action$camera", values)
        return CAMERA_BINS ** 2, camera_bin(values) @ (CAMERA_BINS, 1)
    # MineRLNavigate has but one item
    is_navigate = name == "place" and "craft" not in names
    known = ["dirt", "none"] if is_navigate else CATEGORIES.get(name, [])
    unknown = set(values.ravel().tolist()).difference(known)
    if unknown or not known:
        raise ValueError(f"action${name} has unknown values: {sorted(unknown)}")
    return len(known), np.searchsorted(known, values)


def vpt(path, size, spec):
    """NAME.jsonl and NAME.mp4; the shorter of the two ends the recording."""
    # of a tick: the action, None if nothing was done; x and y of the cursor, None without a GUI
    ticks, attack_is_stuck, slot = [], False, 0
    # splitlines() would also split at characters that JSON may hold
    lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            tick = json.loads(line)
            mouse, keys, gui = tick["mouse"], tick["keyboard"]["keys"], tick["isGuiOpen"]
            if (type(keys), type(gui)) != (list, bool):
                raise TypeError(f"keys are {keys!r}, isGuiOpen is {gui!r}")
            action = {name: f"key.keyboard.{key}" in keys for name, key in KEYS.items()}
            action |= {name: button in mouse["buttons"] for name, button in MOUSE.items()}
            # some games begin with an attack that nobody made; it lasts until the button is pressed
            if number == 1:
                attack_is_stuck = mouse["newButtons"] == [0]
            elif 0 in mouse["newButtons"]:
                attack_is_stuck = False
            action["attack"] &= not attack_is_stuck
            action["inventory"] |= gui and "key.keyboard.escape" in keys
            # the mouse wheel is not recorded, the slot it chose is (since recorder 6.11)
            before, slot = slot, tick.get("hotbar", slot)
            if slot != before:
                # a slot without a key is a KeyError
                action[f"hotbar.{slot + 1}"] |= True
            turn = np.array([mouse["dy"], mouse["dx"]])
            check_numbers("dx and dy", turn)
            is_null = not (any(action.values()) or turn.any())
            action |= {"ESC": False, "camera": camera_bin(turn * DEGREES) @ (CAMERA_BINS, 1)}
            cursor = (mouse["x"], mouse["y"]) if gui else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} cannot be used: {error!r}") from error
        ticks.append((None if is_null else [int(action[name]) for name in VPT_ACTIONS], cursor))
    spec = [CAMERA_BINS ** 2 if name == "camera" else 2 for name in VPT_ACTIONS]
    return spec, False, vpt_steps(path.with_suffix(".mp4"), size, ticks)


def vpt_steps(video, size, ticks):
    """Leaves out frames without an action, as VPT does."""
    # what was done at a frame led to the next one that stays
    before, T = [-1] * len(VPT_ACTIONS), 0
    for T, frame in enumerate(read_frames(video), 1):
        action, cursor = ticks[T - 1] if T <= len(ticks) else (None, None)
        if action is None:
            continue
        if cursor:
            draw_cursor(frame, *cursor)
        yield resize(frame, size), before, 0
        before = action
    if T != len(ticks):
        print(f"{video}: {T} frames for {len(ticks)} ticks; the shorter ends it")


def draw_cursor(frame, x, y):
    """Draws an arrow into a frame (H, W, 3), which has no cursor; x, y: on a screen of 720 rows."""
    x, y = (max(0, int(at * len(frame) / 720)) for at in (x, y))
    for width, row in enumerate(frame[y:y + 16], 1):
        row[x:x + width] = 0
        row[x + 1:x + width - 1] = 255


def video(path, size, spec):
    """NAME.mp4 at an even frame rate."""
    frames = read_frames(path, mode="cfr")
    return spec, False, ((resize(frame, size), [-1] * len(spec), 0) for frame in frames)


# Function, files to look for
FORMATS = {"minerl": (minerl, "rendered.npz"), "vpt": (vpt, "*.jsonl"), "video": (video, "*.mp4")}


def write_episodes(steps, target, name, terminal):
    """Cuts a recording into episode files; only the last can be terminal. Returns their lengths.

    Of a recording that breaks off none is left.
    """
    lengths, paths, step = [], [], next(steps, None)
    try:
        while step:
            # room for all frames at once: one by one, they would leave the memory full of holes
            frames, rest = np.empty((LONGEST_EPISODE, *step[0].shape), np.uint8), []
            while step and len(rest) < LONGEST_EPISODE:
                frames[len(rest)] = step[0]
                rest.append(step[1:])
                step = next(steps, None)
            actions, rewards = zip(*rest)
            episode = {"frames": frames[:len(rest)], "actions": np.array(actions, np.int16),
                       "rewards": np.array(rewards, np.float32),
                       "terminal": np.array(terminal and not step)}
            path = target / f"{name}-{sum(lengths):06d}.npz"
            write_file(path, lambda file: np.savez_compressed(file, **episode))
            paths.append(path)
            lengths.append(len(rest))
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return lengths


@in_one_line()
def main(arguments=None):
    """Converts all recordings; returns the exit code, 1 if some could not be read."""
    parser = new_parser(__doc__)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=Path, help="folder of the recordings, with subfolders")
    parser.add_argument("target", type=Path, help="folder of the episodes, such as runs/NAME/data")
    parser.add_argument("--size", default="64x64", help="height x width of the frames (64x64)")
    parser.add_argument("--action_spec", default="1", help="video: that of others in TARGET")
    args = parser.parse_args(arguments)
    read, pattern = FORMATS[args.format]
    try:
        size, video_spec = (tuple(map(int, re.split("[x,]", text)))
                            for text in (args.size, args.action_spec))
        Config(image_size=size, action_spec=video_spec)
        # which holds an episode's actions
        np.array(video_spec, np.int16)
    except (ValueError, OverflowError) as error:
        fail(f"--size {args.size} or --action_spec {args.action_spec} cannot be ({error}); give "
             "numbers such as 64x64 and 2,121")
    paths = sorted(args.source.rglob(pattern))
    if not paths:
        fail(f"{args.source} holds no {pattern}; give the folder of the recordings")
    lengths, failed, spec, names = [], 0, None, set()
    for number, path in enumerate(paths, 1):
        # with its subfolders: recordings of several folders may have the same name; names of files
        # may not be much longer
        name = "-".join(path.relative_to(args.source).with_suffix("").parts)[-200:]
        while name in names:
            name += "+"
        names.add(name)
        try:
            # a pipe would be waited for
            if not path.is_file():
                raise ValueError("it is no file")
            sizes, terminal, steps = read(path, size, video_spec)
            spec = spec or sizes
            if sizes != spec:
                raise ValueError(f"its action spec is {sizes}, before it was {spec}: such "
                                 "recordings need another TARGET")
            new = write_episodes(steps, args.target, name, terminal)
            if not new:
                raise ValueError("no frame of it can be used")
        except Exception as error:
            # readers of videos raise many kinds of errors, some with pages of text
            line = " ".join(f"error: {path}: {describe(error)}".splitlines())
            print(line, file=sys.stderr, flush=True)
            failed += 1
            continue
        lengths += new
        print(f"{number}/{len(paths)} {path}: {sum(new)} frames, episodes: {len(new)}", flush=True)
    print(f"{args.target}: {sum(lengths)} frames in {len(lengths)} episodes")
    if failed:
        print(f"error: {failed} of {len(paths)} recordings failed; mend or remove what is named "
              "above and give the same command again", file=sys.stderr, flush=True)
    if lengths:
        run = shlex.quote(str(args.target.parent))
        print(f"python train.py --run {run} --image_size {size[0]}x{size[1]} "
              f"--action_spec {','.join(map(str, spec))}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
