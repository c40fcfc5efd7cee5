"""Recordings that exist already -> episode files to train on.

    python assets/recordings.py minerl SOURCE TARGET   # MineRL-v0: rendered.npz, recording.mp4
    python assets/recordings.py vpt SOURCE TARGET      # VPT's contractors: NAME.jsonl, NAME.mp4
    python assets/recordings.py video SOURCE TARGET    # NAME.mp4: no actions, so no agent either

SOURCE is a folder with any subfolders, TARGET one such as runs/minerl/data. What cannot be read is
named, the rest is converted. The last line printed is the command to train with. The components of
an action stand in the order of assets/minerl.py.

What differs from the loaders of minerl 0.4.4 and of OpenAI's Video-Pre-Training:
- Frames are shrunk with antialiasing, as train.py does it.
- MineRL: the last frame is kept (the loader repeats the one before it). Without success it is not
  terminal. BASALT and obfuscated actions are refused.
- VPT: angles are not cut to whole degrees. A tick that only turned the mouse wheel is not left out.
  ESC, which may end MineRL's episodes, is inventory while a GUI is open and nothing otherwise: so
  did the code of the paper, says the loader. The cursor is an arrow of ours.
"""
import argparse
import json
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np

# in the place of assets/, whose minerl.py is not the package of that name
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from assets.minerl import CAMERA_BINS, camera_bin
from train import resize, write_file

# Longer recordings become several episodes, of which train.py holds out every tenth
LONGEST_EPISODE = 1000
# MineRL: names of items in the order of their categories; buttons are pressed or not
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
    """Streams a video: frames (H, W, 3) uint8. "passthrough": every stored frame once, as actions
    need it; "cfr": at an even rate, by repeating or leaving out frames."""
    # Where a file breaks off, ffmpeg just ends. So first go through it without decoding.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", path,
               "-map", "0:v:0", "-c", "copy", "-f", "null", "-"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{path} is missing, broken off or damaged: {result.stderr}")
    yield from imageio.imiter(path, plugin="FFMPEG", output_params=["-fps_mode", mode])


# One function per format: a recording, size of the frames, --action_spec -> its action spec,
# whether the last frame ended the task, steps (frame, action that led to it, reward on arrival)

def minerl(path, size, spec):
    """rendered.npz, recording.mp4 and metadata.json, which may be missing."""
    if "tempting_capers_shapeshifter-14" in str(path):
        raise ValueError("the minerl package leaves this recording out as damaged")
    metadata = path.with_name("metadata.json")
    metadata = json.loads(metadata.read_text()) if metadata.exists() else {}
    with np.load(path) as rendered:
        rewards = np.append(0, rendered["reward"])
        names = sorted(key.split("$")[1] for key in rendered if key.startswith("action$"))
        spec, columns = zip(*[categories(name, rendered[f"action${name}"], names)
                              for name in names])
    T = len(rewards)
    actions = np.full((T, len(spec)), -1)
    actions[1:] = np.stack(columns, 1)
    video = path.with_name("recording.mp4")
    frames = [resize(frame, size) for frame in read_frames(video)]
    counted = metadata.get("true_video_frame_count", len(frames))
    if len(frames) != counted:
        print(f"{video}: {len(frames)} frames, {counted} in metadata.json; the shorter ends it")
    if counted < T:
        raise ValueError(f"{video} has {counted} frames for {T} states")
    # the video began earlier: its last T frames are the states
    terminal = metadata.get("success", True) and len(frames) >= counted
    return spec, terminal, zip(frames[counted - T:counted], actions, rewards)


def categories(name, values, names):
    """One of an environment's actions `names` -> number of categories, category per step (T,)."""
    if name == "camera":
        return CAMERA_BINS ** 2, camera_bin(values) @ (CAMERA_BINS, 1)
    # MineRLNavigate has but one item
    is_navigate = name == "place" and "craft" not in names
    known = ["dirt", "none"] if is_navigate else CATEGORIES.get(name, [])
    unknown = set(values.ravel().tolist()).difference(known)
    if unknown:
        raise ValueError(f"action${name} has unknown values: {sorted(unknown)}")
    return len(known), np.searchsorted(known, values)


def vpt(path, size, spec):
    """NAME.jsonl and NAME.mp4; the shorter of the two ends the recording."""
    # of a tick: the action, None if nothing was done; x and y of the cursor, None without a GUI
    ticks, attack_is_stuck, slot = [], False, 0
    for line in path.read_bytes().splitlines():
        tick = json.loads(line)
        mouse, keys, gui = tick["mouse"], tick["keyboard"]["keys"], tick["isGuiOpen"]
        action = {name: f"key.keyboard.{key}" in keys for name, key in KEYS.items()}
        action |= {name: button in mouse["buttons"] for name, button in MOUSE.items()}
        # some games begin with an attack that nobody made; it lasts until the button is pressed
        if not ticks:
            attack_is_stuck = mouse["newButtons"] == [0]
        elif 0 in mouse["newButtons"]:
            attack_is_stuck = False
        action["attack"] &= not attack_is_stuck
        action["inventory"] |= gui and "key.keyboard.escape" in keys
        # the mouse wheel is not recorded, the slot it chose is (since recorder 6.11)
        before, slot = slot, tick.get("hotbar", slot)
        if slot != before:
            action[f"hotbar.{slot + 1}"] = True
        turn = np.array([mouse["dy"], mouse["dx"]])
        is_null = not (any(action.values()) or turn.any())
        action |= {"ESC": False, "camera": camera_bin(turn * DEGREES) @ (CAMERA_BINS, 1)}
        cursor = (mouse["x"], mouse["y"]) if gui else None
        ticks.append((None if is_null else [int(action[name]) for name in VPT_ACTIONS], cursor))
    spec = [CAMERA_BINS ** 2 if name == "camera" else 2 for name in VPT_ACTIONS]
    capital = path.with_suffix(".MP4")
    video = capital if capital.exists() else path.with_suffix(".mp4")
    return spec, False, vpt_steps(video, size, ticks)


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


# Function, how the names of its files end
FORMATS = {"minerl": (minerl, "rendered.npz"), "vpt": (vpt, ".jsonl"), "video": (video, ".mp4")}


def write_episodes(steps, target, name, terminal):
    """Cuts a recording into episode files; only the last can be terminal. Returns their lengths.
    Of a recording that breaks off none is left."""
    lengths, paths, part = [], [], list(islice(steps, LONGEST_EPISODE))
    if len(part) < 2:
        raise ValueError("fewer than two frames of it can be used")
    try:
        while part:
            rest = list(islice(steps, LONGEST_EPISODE))
            if len(rest) == 1:
                # one frame alone is no episode
                part, rest = part + rest, []
            frames, actions, rewards = zip(*part)
            episode = {"frames": np.stack(frames), "actions": np.array(actions, np.int16),
                       "rewards": np.array(rewards, np.float32),
                       "terminal": np.array(terminal and not rest)}
            paths.append(target / f"{name}-{sum(lengths):06d}.npz")
            write_file(paths[-1], lambda file: np.savez_compressed(file, **episode))
            lengths.append(len(part))
            part = rest
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return lengths


def main(arguments=None):
    """Converts all recordings; returns the exit code, 1 if some could not be read."""
    def numbers(text):
        return tuple(int(part) for part in text.replace("x", ",").split(","))

    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=Path, help="folder of the recordings, with subfolders")
    parser.add_argument("target", type=Path, help="folder of the episodes, such as runs/NAME/data")
    parser.add_argument("--size", type=numbers, default=(64, 64), help="height x width (64x64)")
    parser.add_argument("--action_spec", type=numbers, default=(1,),
                        help="format video: that of the others in TARGET")
    args = parser.parse_args(arguments)
    read, ending = FORMATS[args.format]
    paths = sorted(path for path in args.source.rglob("*") if path.name.lower().endswith(ending))
    if not paths:
        parser.error(f"no file below {args.source} ends in {ending}")
    lengths, failed, spec = [], 0, None
    for number, path in enumerate(paths, 1):
        name = "__".join(path.relative_to(args.source).with_suffix("").parts)
        try:
            sizes, terminal, steps = read(path, args.size, args.action_spec)
            spec = spec or sizes
            if sizes != spec:
                raise ValueError(f"its action spec is {sizes}, before it was {spec}: such "
                                 "recordings need another TARGET")
            new = write_episodes(steps, args.target, name, terminal)
        except Exception as error:
            # readers of videos raise many kinds of errors, some with pages of text
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"error: {path}: {text[:300]}", file=sys.stderr, flush=True)
            failed += 1
            continue
        lengths += new
        print(f"{number}/{len(paths)} {path}: {sum(new)} frames, episodes: {len(new)}", flush=True)
    print(f"{args.target}: {sum(lengths)} frames in {len(lengths)} episodes; {failed} of "
          f"{len(paths)} recordings failed")
    if lengths:
        print(f'python train.py --run {shlex.quote(str(args.target.parent))} --env "" '
              f"--image_size {'x'.join(map(str, args.size))} "
              f"--action_spec {','.join(map(str, spec))}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
