"""Tests of recordings.py: which action, reward and frame belong together, and what goes wrong.

    python -m pytest assets/test_recordings.py
"""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from assets import recordings
from test_dreamer4 import signals

BUTTONS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")


def grey_video(path, T):
    """An MP4 whose frame t is grey, 10 + 4 t."""
    path.parent.mkdir(parents=True, exist_ok=True)
    greys = (10 + 4 * np.arange(T, dtype=np.uint8))[:, None, None, None]
    frames = np.broadcast_to(greys, (T, 96, 128, 3))
    options = {"fps": 20, "quality": 10, "macro_block_size": 2}
    path.write_bytes(imageio.imwrite("<bytes>", frames, extension=".mp4", **options))


def minerl(folder):
    """Returns rewards, how many frames come before the first state, actions, terminal."""
    grey_video(folder / "v3_one/recording.mp4", 22)
    arrays = {f"action${name}": np.arange(19) % 2 for name in BUTTONS}
    arrays["action$camera"] = np.array([[0, 10.0]] * 19)
    arrays["action$craft"] = np.array(["none"] * 19)
    np.savez(folder / "v3_one/rendered.npz", reward=np.arange(19.0), **arrays)
    actions = [[-1] * 9] + [[t % 2] * 8 + [65] for t in range(19)]
    return [0, *range(19)], 2, actions, True


def vpt(folder):
    grey_video(folder / "player.mp4", 20)
    ticks = []
    for t in range(20):
        keys = ["key.keyboard.w"] if t % 2 else ["key.keyboard.e", "key.keyboard.f3"]
        mouse = {"dx": 0.0, "dy": -2400 / 36, "buttons": [1] if t % 2 else []}
        ticks.append(json.dumps({"mouse": mouse, "keyboard": {"keys": keys}}))
    (folder / "player.jsonl").write_text("\n".join(ticks))
    pressed = ([0] * 7 + [1, 0, 0, 5], [1] + [0] * 8 + [1, 5])
    return [0] * 20, 0, [[-1] * 11] + [pressed[t % 2] for t in range(19)], False


def video(folder):
    grey_video(folder / "a.mp4", 20)
    return [0] * 20, 0, [[-1]] * 20, False


FORMATS = pytest.mark.parametrize("make", [minerl, vpt, video])
SPECS = {"minerl": "2," * 8 + "121", "vpt": "2," * 10 + "121", "video": "1"}


def convert(make, folder):
    """Makes a recording and converts it -> what it holds, and its episodes in their order."""
    wanted = make(folder / "source")
    target = folder / "run/data"
    assert recordings.main([make.__name__, str(folder / "source"), str(target)]) == 0
    spec = tuple(map(int, SPECS[make.__name__].split(",")))
    cfg = train.TrainConfig(action_spec=spec)
    return *wanted, [train.load_episode(path, cfg) for path in sorted(target.iterdir())]


def same_greys(frames, first):
    """Whether frames (T, H, W, 3) are those of a grey video from the first on."""
    wanted = 10 + 4 * (first + np.arange(len(frames)))
    return np.abs(frames.mean((1, 2, 3)) - wanted).max() < 1.9


@FORMATS
def test_frames_stand_beside_the_actions_and_rewards_that_led_to_them(make, tmp_path):
    rewards, first, actions, terminal, [episode] = convert(make, tmp_path)
    assert episode["rewards"].tolist() == rewards
    assert episode["actions"].tolist() == actions
    assert episode["terminal"] == terminal
    assert same_greys(episode["frames"], first)


@FORMATS
def test_long_recordings_are_cut_and_only_their_last_episode_is_terminal(
        make, tmp_path, monkeypatch):
    assert recordings.LONGEST_EPISODE == 1000
    monkeypatch.setattr(recordings, "LONGEST_EPISODE", 8)
    rewards, first, actions, terminal, episodes = convert(make, tmp_path)
    assert [len(e["frames"]) for e in episodes] == [8, 8, 4]
    assert [bool(e["terminal"]) for e in episodes] == [False, False, terminal]
    for start, e in zip((0, 8, 16), episodes):
        assert e["rewards"].tolist() == rewards[start:start + 8]
        assert e["actions"].tolist() == actions[start:start + 8]
        assert same_greys(e["frames"], first + start)


@FORMATS
def test_the_command_printed_at_the_end_trains_on_the_episodes(make, tmp_path, capfd):
    convert(make, tmp_path)
    python, script, *flags = capfd.readouterr().out.splitlines()[-1].split()
    assert flags == ["--run", str(tmp_path / "run"), "--image_size", "64x64",
                     "--action_spec", SPECS[make.__name__]]
    [path] = tmp_path.rglob("*-000000.npz")
    shutil.copy(path, path.with_name("another.npz"))
    flags += ["--preset", "tiny", "--tokenizer_steps", "2", "--dynamics_steps", "2"]
    train.main([*flags, "--phase", "tokenizer"])
    train.main([*flags, "--phase", "dynamics"])
    assert (tmp_path / "run/dynamics.pt").exists()


@pytest.mark.parametrize("make", [minerl, vpt])
def test_a_missing_video_is_named_and_the_other_recordings_are_converted(make, tmp_path, capfd):
    for name in ("a", "b", "c"):
        make(tmp_path / name)
    [missing] = (tmp_path / "b").rglob("*.mp4")
    missing.unlink()
    assert recordings.main([make.__name__, str(tmp_path), str(tmp_path / "data")]) == 1
    assert [path.name[:2] for path in sorted((tmp_path / "data").iterdir())] == ["a-", "c-"]
    output = capfd.readouterr()
    assert [line[:3] for line in output.out.splitlines()[:2]] == ["1/3", "3/3"]
    named, advice = output.err.splitlines()
    assert str(missing) in named
    assert "1 of 3" in advice and "give the same command again" in advice


@pytest.mark.parametrize("make, pattern, reason", [
    (minerl, "*.npz", "zip"), (minerl, "*.mp4", "meta"), (vpt, "*.jsonl", "line 7 "),
    (vpt, "*.mp4", "meta"), (video, "*.mp4", "meta")])
def test_so_is_a_broken_file(make, pattern, reason, tmp_path, capfd):
    for name in ("a", "b"):
        make(tmp_path / name)
    [broken] = (tmp_path / "a").rglob(pattern)
    broken.write_bytes(broken.read_bytes()[:broken.stat().st_size // 3])
    assert recordings.main([make.__name__, str(tmp_path), str(tmp_path / "data")]) == 1
    assert [path.name[:2] for path in sorted((tmp_path / "data").iterdir())] == ["b-"]
    named, _ = capfd.readouterr().err.splitlines()
    assert named.startswith(f"error: {broken.parent}") and reason in named


def test_a_minerl_video_with_too_few_frames_is_none(tmp_path, capfd):
    minerl(tmp_path)
    grey_video(tmp_path / "v3_one/recording.mp4", 19)
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 1
    assert "19 frames for 20 states" in capfd.readouterr().err


def test_frames_that_came_at_uneven_times_keep_their_actions(tmp_path):
    *_, actions, _, _ = convert(vpt, tmp_path)
    path = tmp_path / "source/player.mp4"
    even = path.rename(tmp_path / "even.mp4")
    times = "setpts='if(lt(N,10),N,10+(N-10)*3)/20/TB'"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", even, "-vf", times]
    subprocess.run([*command, "-fps_mode", "vfr", "-crf", "5", path], check=True)
    assert recordings.main(["vpt", str(path.parent), str(tmp_path / "uneven")]) == 0
    [path] = (tmp_path / "uneven").iterdir()
    with np.load(path) as episode:
        assert episode["actions"].tolist() == actions
        assert same_greys(episode["frames"], 0)


def test_size_and_the_action_spec_of_videos_are_options(tmp_path, capfd):
    video(tmp_path)
    target = tmp_path / "data"
    options = ["--size", "32x48", "--action_spec", "3,2"]
    assert recordings.main(["video", str(tmp_path), str(target), *options]) == 0
    assert capfd.readouterr().out.endswith("--image_size 32x48 --action_spec 3,2\n")
    [path] = target.iterdir()
    cfg = train.TrainConfig(image_size=(32, 48), action_spec=(3, 2), patch=16)
    assert (train.load_episode(path, cfg)["actions"] == -1).all()
