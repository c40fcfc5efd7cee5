"""Tests of recordings.py: which action, reward and frame belong together, and what goes wrong.

    python -m pytest assets/test_recordings.py
"""
import functools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from assets import recordings, worlds
from assets.test_worlds import Old
from test_dreamer4 import error, signals

BUTTONS = ("attack", "back", "forward", "jump", "left", "right", "sneak", "sprint")
# What environments have besides buttons and the camera
TREECHOP, NAVIGATE = {}, {"place": "none dirt"}
DIAMOND = {
    "place": "none dirt stone cobblestone crafting_table furnace torch",
    "equip": "none air wooden_axe wooden_pickaxe stone_axe stone_pickaxe iron_axe iron_pickaxe",
    "craft": "none torch stick planks crafting_table",
    "nearbyCraft": "none wooden_axe wooden_pickaxe stone_axe stone_pickaxe iron_axe iron_pickaxe "
                   "furnace",
    "nearbySmelt": "none iron_ingot coal",
}
# The action space of MineRL 1.0
NAMES = ("ESC attack back camera drop forward hotbar.1 hotbar.2 hotbar.3 hotbar.4 hotbar.5 "
         "hotbar.6 hotbar.7 hotbar.8 hotbar.9 inventory jump left pickItem right sneak sprint "
         "swapHands use").split()


def grey_video(path, T):
    """An MP4 whose frame t is grey, 10 + 4 t."""
    path.parent.mkdir(parents=True, exist_ok=True)
    greys = (10 + 4 * np.arange(T, dtype=np.uint8))[:, None, None, None]
    frames = np.broadcast_to(greys, (T, 96, 128, 3))
    options = {"fps": 20, "quality": 10, "macro_block_size": 2}
    path.write_bytes(imageio.imwrite("<bytes>", frames, extension=".mp4", **options))


def minerl(folder, items=TREECHOP):
    """Returns rewards, how many frames come before the first state, actions, terminal."""
    grey_video(folder / "v3_one/recording.mp4", 22)
    arrays = {f"action${name}": np.arange(19) % 2 for name in BUTTONS}
    arrays |= {f"action${name}": np.array(["none"] * 19) for name in items}
    arrays["action$camera"] = np.array([[0, 10.0]] * 19)
    np.savez(folder / "v3_one/rendered.npz", reward=np.arange(19.0), **arrays)
    actions = [[-1] * 9] + [[t % 2] * 2 + [65] + [t % 2] * 6 for t in range(19)]
    return [0, *range(19)], 2, actions, True


def tick(keys="", buttons=(), new=(), dx=0.0, dy=0.0, x=0.0, y=0.0, **fields):
    """What VPT records at a frame. keys: their names."""
    keys = {"keys": [f"key.keyboard.{key}" for key in keys.split()]}
    mouse = {"dx": dx, "dy": dy, "x": x, "y": y, "buttons": buttons, "newButtons": new}
    return {"mouse": mouse, "keyboard": keys, "isGuiOpen": False, "hotbar": 0} | fields


def write_vpt(folder, ticks, T=None):
    """A recording of T frames; as many as ticks if not given."""
    grey_video(folder / "player.mp4", len(ticks) if T is None else T)
    (folder / "player.jsonl").write_text("\n".join(map(json.dumps, ticks)))


def pressed(*names, camera=60):
    """The action in which these components are 1."""
    return [camera if name == "camera" else int(name in names) for name in NAMES]


def vpt(folder):
    turned = {"dy": -2400 / 36}
    kinds = tick("e f3", **turned), tick("w", buttons=[1], **turned)
    write_vpt(folder, [kinds[t % 2] for t in range(20)])
    actions = pressed("inventory", camera=5), pressed("forward", "use", camera=5)
    return [0] * 20, 0, [[-1] * 24] + [actions[t % 2] for t in range(19)], False


def video(folder):
    grey_video(folder / "a.mp4", 20)
    return [0] * 20, 0, [[-1]] * 20, False


FORMATS = pytest.mark.parametrize("make", [minerl, vpt, video])
SPECS = {"minerl": "2,2,121" + ",2" * 6, "vpt": "2,2,2,121" + ",2" * 20, "video": "1"}


def convert(make, folder):
    """Makes a recording and converts it -> what it holds, and its episodes in their order."""
    wanted = make(folder / "source")
    target = folder / "run/data"
    assert recordings.main([make.__name__, str(folder / "source"), str(target)]) == 0
    spec = tuple(map(int, SPECS[make.__name__].split(",")))
    cfg = train.TrainConfig(action_spec=spec)
    return *wanted, [train.load_episode(path, cfg) for path in sorted(target.iterdir())]


def convert_ticks(ticks, folder, *options):
    """VPT's ticks -> the episode."""
    write_vpt(folder / "source", ticks)
    assert recordings.main(["vpt", str(folder / "source"), str(folder / "data"), *options]) == 0
    [path] = (folder / "data").iterdir()
    with np.load(path) as episode:
        return dict(episode)


def same_greys(frames, numbers):
    """Whether frames (T, H, W, 3) are these of a grey video, or those from a first number on."""
    numbers = numbers + np.arange(len(frames)) if np.isscalar(numbers) else np.array(numbers)
    return np.abs(frames.mean((1, 2, 3)) - (10 + 4 * numbers)).max() < 1.9


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


def test_of_a_recording_that_breaks_off_nothing_is_left(tmp_path, monkeypatch, capfd):
    def resize(frame, size, original=recordings.resize):
        frames.append(frame)
        if len(frames) == 10:
            raise OSError("the end of the tape")
        return original(frame, size)

    frames = []
    monkeypatch.setattr(recordings, "resize", resize)
    monkeypatch.setattr(recordings, "LONGEST_EPISODE", 4)
    video(tmp_path)
    assert recordings.main(["video", str(tmp_path), str(tmp_path / "data")]) == 1
    assert "end of the tape" in capfd.readouterr().err and not [*(tmp_path / "data").iterdir()]


@pytest.mark.parametrize("make, pattern", [
    (minerl, "*.npz"), (minerl, "*.mp4"), (vpt, "*.jsonl"), (vpt, "*.mp4"), (video, "*.mp4")])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(make, pattern, tmp_path, capfd):
    make(tmp_path)
    [path] = tmp_path.rglob(pattern)
    path.unlink()
    os.mkfifo(path)
    assert recordings.main([make.__name__, str(tmp_path), str(tmp_path / "data")]) == 1
    assert "no file" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["reward", "action$camera"])
@pytest.mark.parametrize("value", [np.nan, 1j, 1e300, "1"])
def test_minerls_numbers_are_real_and_finite(name, value, tmp_path, capfd):
    minerl(tmp_path)
    path = tmp_path / "v3_one/rendered.npz"
    with np.load(path) as rendered:
        arrays = dict(rendered)
    np.savez(path, **arrays | {name: np.full(arrays[name].shape, value)})
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 1
    assert f"{name} must be" in capfd.readouterr().err


def test_a_minerl_video_with_too_few_frames_is_none(tmp_path, capfd):
    minerl(tmp_path)
    grey_video(tmp_path / "v3_one/recording.mp4", 19)
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 1
    assert "19 frames for 20 states" in capfd.readouterr().err


@pytest.mark.parametrize("items", [TREECHOP, NAVIGATE, DIAMOND])
def test_minerls_actions_are_those_of_its_environment(items, tmp_path, capfd):
    minerl(tmp_path)
    rng = np.random.default_rng(0)
    names = {name: rng.choice(names.split(), 60) for name, names in items.items()}
    buttons = {name: rng.integers(2, size=60) for name in BUTTONS}
    recorded = names | buttons | {"camera": worlds.camera_angle(rng.integers(11, size=(60, 2)))}
    grey_video(tmp_path / "v3_one/recording.mp4", 61)
    np.savez(tmp_path / "v3_one/rendered.npz", reward=np.zeros(60),
             **{f"action${name}": values for name, values in recorded.items()})
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 0
    [path] = (tmp_path / "data").iterdir()
    with np.load(path) as episode:
        actions = episode["actions"][1:]
    spaces = {name: Old.Enum(*names.split()) for name, names in items.items()}
    spaces |= {name: Old.Discrete(2) for name in BUTTONS}
    space = Old.Dict(camera=Old.Box(-180, 180, (2,)), **spaces)
    picture = Old.Box(0, 255, (64, 64, 3), np.uint8)
    env = worlds.OldGym(types.SimpleNamespace(action_space=space, observation_space=picture))
    flat = worlds.FlatActions(env, bins=11)
    spec = ",".join(map(str, flat.action_space.nvec))
    assert capfd.readouterr().out.endswith(f"--action_spec {spec}\n")
    played = [env.old(space, flat.action(action)) for action in actions]
    for name, values in recorded.items():
        same = np.array_equal if name != "camera" else np.allclose
        assert same([action[name] for action in played], values)


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize("stored, counted, first, T", [
    (22, 22, 2, 20), (22, 21, 1, 20), (21, 22, 2, 19)])
def test_minerls_metadata_tells_the_first_state_and_success(
        success, stored, counted, first, T, tmp_path, capfd):
    rewards, _, actions, _ = minerl(tmp_path)
    metadata = {"success": success, "true_video_frame_count": counted}
    (tmp_path / "v3_one/metadata.json").write_text(json.dumps(metadata))
    grey_video(tmp_path / "v3_one/recording.mp4", stored)
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 0
    differs = f"recording.mp4: {stored} frames, {counted} in metadata.json"
    assert (differs in capfd.readouterr().out) == (stored != counted)
    [path] = (tmp_path / "data").iterdir()
    with np.load(path) as episode:
        assert same_greys(episode["frames"], first)
        assert episode["actions"].tolist() == actions[:T]
        assert episode["rewards"].tolist() == rewards[:T]
        # without the last state, nobody sees the end
        assert episode["terminal"] == (success and T == 20)


@pytest.mark.parametrize("metadata, reason", [
    ({"success": None}, "success is None"), ({"success": "false"}, "success is 'false'"),
    ({"true_video_frame_count": 22.5}, "frames are 22.5"),
    ({"true_video_frame_count": 1000}, "no frame of it")])
def test_metadata_that_minerl_cannot_have_is_named(metadata, reason, tmp_path, capfd):
    minerl(tmp_path)
    (tmp_path / "v3_one/metadata.json").write_text(json.dumps(metadata))
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 1
    assert reason in capfd.readouterr().err and not list(tmp_path.glob("data/*"))


def test_recordings_have_names_of_their_own_and_the_command_is_one_for_a_shell(tmp_path, capfd):
    for name in ("a-b/c.mp4", "a/b-c.mp4", f"{'a' * 200}/{'b' * 200}.mp4"):
        (tmp_path / "from" / name).parent.mkdir(parents=True)
        grey_video(tmp_path / "from" / name, 3)
    target = tmp_path / "my run/data"
    assert recordings.main(["video", str(tmp_path / "from"), str(target)]) == 0
    assert len(list(target.iterdir())) == 3
    assert f"--run '{tmp_path / 'my run'}' " in capfd.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("folder, arrays, reason", [
    ("v3_one", {"attack": np.zeros(1, int)}, "as many of every action"),
    ("v3_one", {"craft": np.array(["other"] * 19)}, "action$craft has unknown values: ['other']"),
    ("v3_one", {"use": np.zeros(19, int)}, "action$use"),
    ("v3_one", {"vector": np.zeros((19, 64))}, "action$vector"),
    ("v3_tempting_capers_shapeshifter-14_9", {}, "damaged")])
def test_recordings_that_minerl_cannot_use_are_named(folder, arrays, reason, tmp_path, capfd):
    minerl(tmp_path, items=DIAMOND)
    path = (tmp_path / "v3_one").rename(tmp_path / folder) / "rendered.npz"
    with np.load(path) as rendered:
        arrays = dict(rendered) | {f"action${name}": values for name, values in arrays.items()}
    np.savez(path, **arrays)
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 1
    assert reason in capfd.readouterr().err


def test_a_recording_without_actions_is_named(tmp_path, capfd):
    minerl(tmp_path)
    for arrays, reason in [({}, "holds no actions"), ({"action$x": np.zeros(0)}, "action$x has")]:
        np.savez(tmp_path / "v3_one/rendered.npz", reward=np.zeros(0), **arrays)
        assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 1
        assert reason in capfd.readouterr().err


def test_recordings_of_another_environment_need_another_target(tmp_path, capfd):
    minerl(tmp_path / "a")
    minerl(tmp_path / "b", items=DIAMOND)
    minerl(tmp_path / "c")
    assert recordings.main(["minerl", str(tmp_path), str(tmp_path / "data")]) == 1
    assert [path.name[:2] for path in sorted((tmp_path / "data").iterdir())] == ["a-", "c-"]
    output = capfd.readouterr()
    assert "another TARGET" in output.err and "v3_one/rendered.npz" in output.err
    assert output.out.endswith(f"--action_spec {SPECS['minerl']}\n")


@pytest.mark.parametrize("T", [16, 24])
def test_the_shorter_of_vpts_frames_and_ticks_ends_a_recording_and_a_line_says_so(
        T, tmp_path, capfd):
    write_vpt(tmp_path, [tick("w")] * 20, T)
    assert recordings.main(["vpt", str(tmp_path), str(tmp_path / "data")]) == 0
    assert f"player.mp4: {T} frames for 20 ticks" in capfd.readouterr().out
    [path] = (tmp_path / "data").iterdir()
    with np.load(path) as episode:
        assert len(episode["frames"]) == min(T, 20)


def test_every_key_and_button_of_vpt_is_a_component(tmp_path):
    keys = {"attack": 0, "use": 1, "pickItem": 2, "back": "s", "drop": "q", "forward": "w",
            "inventory": "e", "jump": "space", "left": "a", "right": "d", "sneak": "left.shift",
            "sprint": "left.control", "swapHands": "f"}
    keys |= {f"hotbar.{number}": str(number) for number in range(1, 10)}
    ticks = [tick(key) if isinstance(key, str) else tick(buttons=[key]) for key in keys.values()]
    actions = convert_ticks([*ticks, tick("w")], tmp_path)["actions"]
    assert actions.tolist() == [[-1] * 24, *map(pressed, keys)]


@pytest.mark.parametrize("new, attack", [([0], [0, 0, 1, 1]), ([], [1] * 4), ([0, 1], [1] * 4)])
def test_vpts_attack_is_stuck_from_the_first_tick_until_it_is_pressed(new, attack, tmp_path):
    news = [new, [], [0], []]
    ticks = [tick("w", buttons=[0], new=new) for new in news]
    actions = convert_ticks([*ticks, tick("w")], tmp_path)["actions"]
    assert actions[1:, NAMES.index("attack")].tolist() == attack


def test_vpts_frames_without_an_action_are_left_out_and_actions_lead_to_the_next_that_stays(
        tmp_path):
    ticks = [tick(), tick("w"), tick("f3"), tick("escape"), tick(dx=1.0), tick("s"), tick(),
             tick("d", buttons=[1]), tick("a")]
    episode = convert_ticks(ticks, tmp_path)
    assert same_greys(episode["frames"], [1, 4, 5, 7, 8])
    turned = pressed(camera=60)
    assert episode["actions"].tolist() == [
        [-1] * 24, pressed("forward"), turned, pressed("back"), pressed("right", "use")]


def test_without_an_episode_there_is_nothing_to_train_on(tmp_path, capfd):
    write_vpt(tmp_path, [tick()] * 3)
    assert recordings.main(["vpt", str(tmp_path), str(tmp_path / "data")]) == 1
    output = capfd.readouterr()
    assert output.out.splitlines()[-1].endswith("0 frames in 0 episodes")
    assert "player.jsonl" in output.err and "no frame" in output.err


def test_vpts_mouse_wheel_is_a_change_of_the_hotbars_slot(tmp_path):
    slots = [tick(hotbar=slot) for slot in (4, 4, 0, 8)]
    without = tick("w")
    # recorders before 6.11 have no slots
    del without["hotbar"]
    episode = convert_ticks([*slots, without, without], tmp_path)
    assert same_greys(episode["frames"], [0, 2, 3, 4, 5])
    names = ["hotbar.5", "hotbar.1", "hotbar.9", "forward"]
    assert episode["actions"].tolist() == [[-1] * 24, *map(pressed, names)]


@pytest.mark.parametrize("lines", [
    "", json.dumps(tick("w", hotbar=50)), json.dumps(tick("w", hotbar=-1)),
    json.dumps(tick("w", dx=np.nan)), json.dumps(tick("w", isGuiOpen="false")),
    json.dumps(tick("w", keyboard={"keys": "key.keyboard.w"}))])
def test_a_tick_that_vpt_cannot_have_is_named(lines, tmp_path, capfd):
    write_vpt(tmp_path, [tick("w")] * 3)
    (tmp_path / "player.jsonl").write_text(lines)
    assert recordings.main(["vpt", str(tmp_path), str(tmp_path / "data")]) == 1
    assert "line 1 cannot be used" in capfd.readouterr().err


def test_only_the_end_of_a_line_ends_a_tick(tmp_path):
    write_vpt(tmp_path, [tick("w")] * 3)
    line = json.dumps(tick("w", player="a\u2028b"), ensure_ascii=False) + "\n"
    (tmp_path / "player.jsonl").write_text(line * 3, "utf-8")
    assert recordings.main(["vpt", str(tmp_path), str(tmp_path / "data")]) == 0
    [path] = (tmp_path / "data").iterdir()
    with np.load(path) as episode:
        assert len(episode["frames"]) == 3


def test_vpts_escape_closes_a_gui_as_inventory_does_and_is_never_minerls_esc(tmp_path):
    ticks = [tick("escape", isGuiOpen=True), tick("escape w"), tick("w")]
    actions = convert_ticks(ticks, tmp_path)["actions"].tolist()
    assert actions == [[-1] * 24, pressed("inventory"), pressed("forward")]


@pytest.mark.parametrize("x, y, corner", [
    (480, 360, (48, 64)), (0, 0, (0, 0)), (955, 715, (95, 127)), (-100, -100, (0, 0))])
def test_a_cursor_is_drawn_where_vpt_had_one(x, y, corner, tmp_path):
    # the 96 rows of the video show a screen of 720; frame 30 is grey
    ticks = [tick("w", x=x, y=y, isGuiOpen=t == 30) for t in range(32)]
    frames = convert_ticks(ticks, tmp_path, "--size", "96x128")["frames"]
    assert same_greys(np.delete(frames, 30, 0)[:30], 0) and same_greys(frames[31:], 31)
    changed = np.abs(frames[30].mean(-1) - 130) > 40
    rows, columns = changed.nonzero()
    assert (rows.min(), columns.min()) == corner
    assert rows.max() < corner[0] + 16 and columns.max() < corner[1] + 16
    if corner[0] < 80:
        # white with a black edge
        assert frames[30].max() > 230 and frames[30].min() < 25


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


@pytest.mark.parametrize("option, values", [
    ("--action_spec", ["x,y", "", "0,-3", "2.5", "40000"]),
    ("--size", ["axb", "", "0x64", "64", "9x9x9"])])
def test_what_cannot_be_trained_with_is_refused(option, values, tmp_path, capsys):
    video(tmp_path)
    for value in values:
        arguments = ["video", str(tmp_path), str(tmp_path / "data"), option, value]
        error(capsys, functools.partial(recordings.main, arguments), option)
    assert not (tmp_path / "data").exists()
