"""Recordings that exist already -> episode files to train on.

    python assets/recordings.py minerl SOURCE TARGET   # MineRL-v0: rendered.npz, recording.mp4
    python assets/recordings.py vpt SOURCE TARGET      # VPT's contractors: NAME.jsonl, NAME.mp4
    python assets/recordings.py video SOURCE TARGET    # NAME.mp4: no actions, so no agent either
    python train.py --run runs/minerl --image_size 64x64 --action_spec 2,2,2,2,2,2,2,2,121

SOURCE is a folder with any subfolders, TARGET one such as runs/minerl/data. What cannot be read is
named, the rest is converted. The last line printed is the command to train with.
"""
import json
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assets.files import write_file
from assets.videos import resize
from assets.worlds import CAMERA_BINS, camera_bin

# Longer recordings become several episodes: train.py reads files as a whole
LONGEST_EPISODE = 1000
BUTTONS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
KEYS = [f"key.keyboard.{name}" for name in "w s a d space left.shift left.control e".split()]
# VPT: how far a move of the mouse by one pixel turns the camera
DEGREES = 360 / 2400


def read_frames(path, size, mode="passthrough"):
    """Streams a video: frames (*size, 3) uint8, one at a time."""
    # "passthrough": every stored frame once, as actions need it; "cfr": an even rate, by repeating
    # or leaving out frames of videos that have none
    for frame in imageio.imiter(path, plugin="FFMPEG", output_params=["-fps_mode", mode]):
        yield resize(frame, size)


# One function per format: a recording -> steps (frame, action that led to it, reward on arrival)

def minerl(path, size, A):
    """rendered.npz and recording.mp4."""
    with np.load(path) as rendered:
        rewards = np.append(0, rendered["reward"])
        T = len(rewards)
        actions = np.full((T, A), -1)
        actions[1:, :-1] = np.stack([rendered[f"action${name}"] for name in BUTTONS], 1)
        actions[1:, -1] = camera_bin(rendered["action$camera"]) @ (CAMERA_BINS, 1)
    # the last T frames are the states
    frames = deque(read_frames(path.with_name("recording.mp4"), size), maxlen=T)
    if len(frames) < T:
        raise ValueError(f"recording.mp4 has {len(frames)} frames for {T} states")
    yield from zip(frames, actions, rewards)


def vpt(path, size, A):
    """NAME.jsonl and NAME.mp4; the shorter of the two ends the recording."""
    actions = [[-1] * A]
    # what was pressed at a frame led to the next one
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            tick = json.loads(line)
            mouse, keys = tick["mouse"], tick["keyboard"]["keys"]
            camera = camera_bin(np.array([mouse["dy"], mouse["dx"]]) * DEGREES)
            pressed = [key in keys for key in KEYS]
            pressed += [button in mouse["buttons"] for button in (0, 1)]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} cannot be used: {error!r}") from error
        actions.append([*pressed, camera @ (CAMERA_BINS, 1)])
    yield from zip(read_frames(path.with_suffix(".mp4"), size), actions, [0] * len(actions))


def video(path, size, A):
    """NAME.mp4 at an even frame rate."""
    for frame in read_frames(path, size, mode="cfr"):
        yield frame, [-1] * A, 0


# Function, files to look for, action spec, whether the last frame ended the task
FORMATS = {
    "minerl": (minerl, "rendered.npz", [2] * 8 + [CAMERA_BINS ** 2], True),
    "vpt": (vpt, "*.jsonl", [2] * 10 + [CAMERA_BINS ** 2], False),
    "video": (video, "*.mp4", None, False),
}


def write_episodes(steps, target, name, terminal):
    """Cuts a recording into episode files; only the last can be terminal. Returns their lengths."""
    lengths, step = [], next(steps, None)
    while step:
        # room for all frames at once: kept one by one, they would leave the memory full of holes
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
        lengths.append(len(rest))
    return lengths


def main(arguments=None):
    """Converts all recordings; returns the exit code, 1 if some could not be read."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=Path, help="folder of the recordings, with subfolders")
    parser.add_argument("target", type=Path, help="folder of the episodes, such as runs/NAME/data")
    parser.add_argument("--size", default="64x64", help="height x width of the frames (64x64)")
    parser.add_argument("--action_spec", default="1", help="video: that of others in TARGET")
    args = parser.parse_args(arguments)
    read, pattern, spec, terminal = FORMATS[args.format]
    spec = spec or args.action_spec.split(",")
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", args.size):
        parser.error(f"--size {args.size} is not height x width, such as 64x64")
    size = tuple(map(int, args.size.split("x")))
    paths = sorted(args.source.rglob(pattern))
    if not paths:
        parser.error(f"{args.source} holds no {pattern}")
    lengths, failed = [], 0
    for number, path in enumerate(paths, 1):
        # with its subfolders: recordings of several folders may have the same name
        name = "-".join(path.relative_to(args.source).with_suffix("").parts)
        try:
            new = write_episodes(read(path, size, len(spec)), args.target, name, terminal)
        except Exception as error:
            # readers of videos raise many kinds of errors, some with pages of text
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"error: {path}: {reason}", file=sys.stderr, flush=True)
            failed += 1
            continue
        lengths += new
        print(f"{number}/{len(paths)} {path}: {sum(new)} frames, episodes: {len(new)}", flush=True)
    print(f"{args.target}: {sum(lengths)} frames in {len(lengths)} episodes")
    if failed:
        print(f"error: {failed} of {len(paths)} recordings failed; mend or remove what is named "
              "above and give the same command again", file=sys.stderr, flush=True)
    spec, run = ",".join(map(str, spec)), args.target.parent
    print(f"python train.py --run {run} --image_size {args.size} --action_spec {spec}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
