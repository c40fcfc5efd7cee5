"""Tests of recordings.py: which action, reward and frame belong together, and what goes wrong."""
import json
import os
import shlex
from types import SimpleNamespace
from unittest.mock import Mock

import imageio.v3 as imageio
import numpy as np
import pytest

import train
from assets import recordings
from assets.minerl import MineRL

BUTTONS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
DIAMOND = {name: known for name, known in recordings.CATEGORIES.items() if name not in BUTTONS}


def grey_video(path, T, *options):
    """An MP4 whose frame t is grey, 10 + 4 t."""
    path.parent.mkdir(parents=True, exist_ok=True)
    greys = (10 + 4 * np.arange(T, dtype=np.uint8))[:, None, None, None]
    path.write_bytes(imageio.imwrite(
        "<bytes>", np.broadcast_to(greys, (T, 96, 128, 3)), extension=".mp4", fps=20, quality=10,
        macro_block_size=2, output_params=list(options)))


def same_greys(frames, numbers):
    """Whether frames (T, H, W, 3) are these of a grey video."""
    return np.abs(frames.mean((1, 2, 3)) - 10 - 4 * np.array(numbers)).max() < 1.9


def minerl(folder, video=22, **items):
    """Writes a recording of 20 states; returns rewards, the first state's number among the frames,
    actions, whether the last state is terminal."""
    grey_video(folder / "v3_one/recording.mp4", video)
    arrays = {f"action${name}": np.arange(19) % 2 for name in BUTTONS}
    arrays |= {f"action${name}": np.resize(values, 19) for name, values in items.items()}
    arrays["action$camera"] = np.array([[0, 10.0]] * 19)
    np.savez(folder / "v3_one/rendered.npz", reward=np.arange(19.0), **arrays)
    actions = [[-1] * 9] + [[t % 2] * 2 + [65] + [t % 2] * 6 for t in range(19)]
    return [0, *range(19)], 2, actions, True


def tick(keys="", buttons=(), new=(), dx=0.0, dy=0.0, x=0.0, y=0.0, **fields):
    """What VPT records at a frame. keys: their names."""
    keys = {"keys": [f"key.keyboard.{key}" for key in keys.split()]}
    mouse = {"dx": dx, "dy": dy, "x": x, "y": y, "buttons": buttons, "newButtons": new}
    return {"mouse": mouse, "keyboard": keys, "isGuiOpen": False, "hotbar": 0} | fields


def pressed(names, camera=60):
    """The action of VPT in which these components are 1."""
    return [camera if name == "camera" else int(name in names.split())
            for name in recordings.VPT_ACTIONS]


def vpt(folder, ticks=None):
    kinds = tick("e f3", dy=-200 / 3), tick("w", buttons=[1], dy=-200 / 3)
    ticks = ticks or [kinds[t % 2] for t in range(20)]
    # some systems write names in capital letters
    grey_video(folder / "player.MP4", len(ticks))
    (folder / "player.jsonl").write_text("\n".join(map(json.dumps, ticks)))
    actions = pressed("inventory", camera=5), pressed("forward use", camera=5)
    return [0] * 20, 0, [[-1] * 24] + [actions[t % 2] for t in range(19)], False


def video(folder):
    grey_video(folder / "a.MP4", 20)
    return [0] * 20, 0, [[-1]] * 20, False


def convert(kind, folder, *options):
    code = recordings.main([kind, str(folder / "source"), str(folder / "run/data"), *options])
    return code, [dict(np.load(path)) for path in sorted((folder / "run/data").glob("*"))]


# one file; three; not two, of which the second would be a frame alone
@pytest.mark.parametrize("longest, starts", [(1000, [0]), (8, [0, 8, 16]), (19, [0])])
@pytest.mark.parametrize("make, spec", [
    (minerl, "2,2,121" + ",2" * 6), (vpt, "2,2,2,121" + ",2" * 20), (video, "1")])
def test_frames_stand_beside_the_actions_and_rewards_that_led_to_them(
        make, spec, longest, starts, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(recordings, "LONGEST_EPISODE", longest)
    folder = tmp_path / "my folder"
    rewards, first, actions, terminal = make(folder / "source")
    assert convert(make.__name__, folder)[0] == 0
    # train.py reads them with the command that is printed at the end
    command = capfd.readouterr().out.splitlines()[-1]
    assert command == (f"python train.py --run '{folder}/run' --env \"\" --image_size 64x64 "
                       f"--action_spec {spec}")
    _, cfg = train.parse(shlex.split(command)[2:])
    paths = sorted((folder / "run/data").iterdir())
    for path, start, end in zip(paths, starts, [*starts[1:], 20], strict=True):
        e = train.load_episode(path, cfg)
        assert e["rewards"].tolist() == rewards[start:end]
        assert e["actions"].tolist() == actions[start:end]
        assert same_greys(e["frames"], range(first + start, first + end))
        # only the last one can be
        assert e["terminal"] == (terminal and end == 20)


@pytest.mark.parametrize("make, broken, share, words", [
    (minerl, "rendered.npz", 1 / 3, "zip"), (minerl, "recording.mp4", 1 / 3, "broken off"),
    (vpt, "player.jsonl", 1 / 3, "JSON"), (vpt, "player.MP4", 1 / 3, "broken off"),
    (vpt, "player.MP4", None, "missing"), (video, "a.MP4", 1 / 3, "broken off")])
def test_a_file_that_is_missing_or_breaks_off_is_named_and_the_others_are_converted(
        make, broken, share, words, tmp_path, capfd):
    for name in ("a", "b", "c"):
        make(tmp_path / "source" / name)
    [path] = (tmp_path / "source/b").rglob(broken)
    os.truncate(path, int(path.stat().st_size * share)) if share else path.unlink()
    assert convert(make.__name__, tmp_path)[0] == 1
    assert {path.name[:3] for path in (tmp_path / "run/data").iterdir()} == {"a__", "c__"}
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {path.parent}") and words in line


@pytest.mark.parametrize("share", [0.8, 0.9, 0.999])
def test_of_a_video_whose_header_promises_more_frames_than_there_are_no_episode_is_made(
        share, tmp_path, capfd):
    path = tmp_path / "source/a.mp4"
    # with the header in front, ffmpeg shows what there is and calls that a success
    grey_video(path, 60, "-movflags", "faststart")
    os.truncate(path, int(path.stat().st_size * share))
    assert len(imageio.imread(path, plugin="FFMPEG")) > 5
    assert convert("video", tmp_path) == (1, [])
    assert "broken off" in capfd.readouterr().err


def test_of_a_recording_that_cannot_be_read_to_its_end_no_episode_is_left(tmp_path, monkeypatch):
    resize = Mock(side_effect=[np.zeros((64, 64, 3), np.uint8)] * 10 + [OSError("end of tape")])
    monkeypatch.setattr(recordings, "resize", resize)
    monkeypatch.setattr(recordings, "LONGEST_EPISODE", 4)
    video(tmp_path / "source")
    assert convert("video", tmp_path) == (1, []) and (tmp_path / "run/data").exists()


def test_actions_recorded_in_minerl_are_those_that_its_environment_takes(tmp_path):
    minerl(tmp_path / "source", **DIAMOND)
    _, [episode] = convert("minerl", tmp_path)
    spaces = {name: SimpleNamespace() for name in (*BUTTONS, "camera")}
    spaces |= {name: SimpleNamespace(values=sorted(known)) for name, known in DIAMOND.items()}
    env = object.__new__(MineRL)
    env.parts, env.held = sorted(spaces.items()), ()
    played = [env.to_old(action) for action in episode["actions"][1:]]
    recorded = np.load(tmp_path / "source/v3_one/rendered.npz")
    for name in spaces:
        same = np.allclose if name == "camera" else np.array_equal
        assert same([action[name] for action in played], recorded[f"action${name}"])


@pytest.mark.parametrize("stored, counted, success, first, T", [
    (22, 22, True, 2, 20), (22, 22, False, 2, 20), (22, 21, True, 1, 20), (21, 22, True, 2, 19)])
def test_minerls_metadata_tells_the_first_state_and_success(
        stored, counted, success, first, T, tmp_path, capfd):
    _, _, actions, _ = minerl(tmp_path / "source", stored)
    metadata = {"success": success, "true_video_frame_count": counted}
    (tmp_path / "source/v3_one/metadata.json").write_text(json.dumps(metadata))
    _, [episode] = convert("minerl", tmp_path)
    assert ("in metadata.json" in capfd.readouterr().out) == (stored != counted)
    assert same_greys(episode["frames"], range(first, first + T))
    assert episode["actions"].tolist() == actions[:T] and len(episode["rewards"]) == T
    # without the last state, nobody sees the end
    assert episode["terminal"] == (success and T == 20)


@pytest.mark.parametrize("settings, words", [
    ({"video": 19}, "19 frames for 20 states"), (DIAMOND, "another TARGET"),
    ({"craft": ["other"]}, "action$craft has unknown values: ['other']")])
def test_recordings_that_do_not_go_together_are_named(settings, words, tmp_path, capfd):
    # MineRLNavigate has one item, "dirt": category 0; "none" is 1
    minerl(tmp_path / "source/a", place=["none", "dirt"])
    minerl(tmp_path / "source/b", **settings)
    code, [episode] = convert("minerl", tmp_path)
    assert code == 1 and words in capfd.readouterr().err
    assert episode["actions"][1:3, 6].tolist() == [1, 0]


# recorders before 6.11 do not tell the slot
OLD_TICK = {name: value for name, value in tick("w").items() if name != "hotbar"}


@pytest.mark.parametrize("ticks, frames, actions", [
    # keys and buttons
    ([*map(tick, "s q w e space 1 9 left.shift f".split()), tick(buttons=[0, 2])], [*range(10)],
     "back, drop, forward, inventory, jump, hotbar.1, hotbar.9, sneak, swapHands, attack pickItem"),
    # frames without an action are left out; what was done at a frame led to the next that stays
    ([tick(), tick("w"), tick("f3"), tick("escape"), tick(dx=1.0), tick("s"), tick(), tick("a d")],
     [1, 4, 5, 7], "forward, , back, left right"),
    # an attack that nobody made lasts until the button is pressed; this one was made
    ([tick("w", [0], new) for new in ([0], [], [0], [])], [0, 1, 2, 3],
     "forward, forward, forward attack, forward attack"),
    ([tick("w", [0, 1], [0, 1]), tick("w", [0])], [0, 1], "forward attack use, forward attack"),
    # the mouse wheel shows in the slot
    ([tick(hotbar=4), tick(hotbar=4), tick(), tick(hotbar=8), OLD_TICK], [0, 2, 3, 4],
     "hotbar.5, hotbar.1, hotbar.9, forward"),
    # ESC closes a GUI as inventory does, and is never MineRL's ESC
    ([tick("escape", isGuiOpen=True, y=999.0), tick("escape w")], [0, 1], "inventory, forward")])
def test_what_vpt_recorded_becomes_actions_of_minerl(ticks, frames, actions, tmp_path):
    vpt(tmp_path / "source", [*ticks, tick("w")])
    _, [episode] = convert("vpt", tmp_path)
    assert same_greys(episode["frames"], [*frames, len(ticks)])
    assert episode["actions"].tolist() == [[-1] * 24, *map(pressed, actions.split(","))]


def test_a_cursor_is_drawn_where_vpt_had_one(tmp_path):
    # 96 rows show a screen of 720
    vpt(tmp_path / "source", [tick("w", x=480, y=360, isGuiOpen=t == 1) for t in range(3)])
    _, [episode] = convert("vpt", tmp_path, "--size", "96x128")
    is_white = episode["frames"].min(-1) > 200
    assert is_white.any((1, 2)).tolist() == [False, True, False]
    rows, columns = is_white[1].nonzero()
    assert (rows.min(), columns.min()) == (50, 65) and (rows.max(), columns.max()) == (63, 78)


def test_the_shorter_of_vpts_frames_and_ticks_ends_a_recording(tmp_path, capfd):
    # frames that came at uneven times keep their actions, too
    times = "setpts='if(lt(N,10),N,10+(N-10)*3)/20/TB'"
    for T in (16, 24):
        *_, actions, _ = vpt(tmp_path / "source")
        grey_video(tmp_path / "source/player.MP4", T, "-vf", times, "-fps_mode", "vfr")
        _, [episode] = convert("vpt", tmp_path)
        assert episode["actions"].tolist() == actions[:T]
        assert same_greys(episode["frames"], range(min(T, 20)))
        assert f"player.MP4: {T} frames for 20 ticks" in capfd.readouterr().out
