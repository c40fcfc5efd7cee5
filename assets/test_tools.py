"""Tests of play.py, bench.py, measures.py, report.py and ablations.py."""
import base64
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from assets import ablations, bench, measures, play, report
from dreamer4 import Agent, Dream, Tokenizer

torch.set_num_threads(1)
ASSETS = Path(play.__file__).parent
TINY = train.PRESETS["tiny"] | dict(image_size=(16, 24), action_spec=(3, 2))
STILL = {"k": 4, "policy": False, "x": 0, "y": 0}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run folder in which train.py has come to its end: one for all processes."""
    is_worker, base = "PYTEST_XDIST_WORKER" in os.environ, tmp_path_factory.getbasetemp()
    folder = (base.parent if is_worker else base) / "tools"
    steps = [f"--{phase}_steps=2" for phase in ("tokenizer", "dynamics", "agent", "imagination")]
    with open(folder.with_name("tools.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "eval.json").exists():
            subprocess.run([sys.executable, train.__file__, "--run", folder, "--preset=tiny",
                            "--image_size=32x32", "--episode_frames=25", "--collect_episodes=2",
                            "--eval_episodes=1", *steps], check=True, stdout=subprocess.DEVNULL,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


@pytest.fixture(scope="module")
def models():
    """A tokenizer, an agent whose heads say something, three episodes; rewards are in tens."""
    torch.manual_seed(0)
    cfg, rng = train.TrainConfig(**TINY, reward_scale=10.0), np.random.default_rng(0)
    tokenizer, agent = Tokenizer(cfg).eval(), Agent(cfg).eval()
    # new ones say nothing: their outputs start at zero
    for weight in (*tokenizer.parameters(), *agent.parameters()):
        weight.data += 0.1 * torch.randn_like(weight)
    episodes = [{"frames": rng.integers(0, 256, (T, 16, 24, 3), np.uint8),
                 "latents": rng.uniform(-1, 1, (T, 8, 8)).astype(np.float16),
                 "actions": np.full((T, 2), i % 2, np.int16),
                 "rewards": rng.normal(size=T).astype(np.float32), "terminal": np.array(False)}
                for i, T in enumerate((40, 30, 50))]
    return tokenizer, agent, episodes


# ---- play.py -------------------------------------------------------------------------------------
def test_from_the_same_context_and_noise_other_keys_dream_another_frame(models):
    player, dreams = play.Player(*models), []
    for keys in ({"x": -1}, {"x": 1}, {"x": -1}, {"y": 1}, {"digit": 1}):
        player.rng = np.random.default_rng(0)
        torch.manual_seed(0)
        player.start()
        keys = STILL | {"x": -1, "y": -1} | keys
        dreams.append([player.step(**keys)["pixels"] for _ in range(4)])
    assert dreams[0] == dreams[2]
    assert all(dreams[0] != other for other in (dreams[1], dreams[3], dreams[4]))
    # the page shows rewards in their own unit
    assert player.step(**STILL)["value"] == pytest.approx(10 * player.agent.value(player.h).item())


@pytest.fixture(scope="module")
def ask(models):
    """ask(path, body, method, **headers) -> status, answer of a server with random models."""
    with play.make_server(play.Player(*models), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def ask(path, body=None, method="POST", **headers):
            connection = http.client.HTTPConnection(*server.server_address, timeout=30)
            connection.request(method, path, json.dumps(body), headers)
            answer = connection.getresponse()
            text, kind = answer.read(), answer.headers["Content-Type"]
            return answer.status, json.loads(text) if kind == "application/json" else text

        yield ask
        server.shutdown()


def test_the_page_is_served_frames_advance_and_a_start_begins_anew(ask):
    assert b"<canvas" in ask("/", method="GET")[1]
    for _ in range(2):
        status, state = ask("/start", {})
        assert (status, state["frame"], state["steps"]) == (200, 0, [1, 2, 4])
        for frame, policy in ((1, False), (2, True)):
            status, state = ask("/step", STILL | {"policy": policy})
            assert (status, state["frame"], state["size"]) == (200, frame, [16, 24])
            assert len(base64.b64decode(state["pixels"])) == 16 * 24 * 3
            assert 0 < state["continuation"] < 1


@pytest.mark.parametrize("status, path, body, method, headers", [
    (403, "/", None, "GET", {"Host": "evil.example"}),
    (403, "/start", {}, "POST", {"Origin": "http://evil.example"}),
    (403, "/start", {}, "POST", {"Host": "localhost:9", "Origin": "http://localhost:8"}),
    # through an SSH forward
    (200, "/start", {}, "POST", {"Host": "localhost:9", "Origin": "http://localhost:9"}),
    (404, "/etc/passwd", None, "GET", {}),
    (400, "/start", [1], "POST", {}),
    (400, "/step", STILL | {"k": 8}, "POST", {}),
    (400, "/step", STILL | {"x": 2}, "POST", {}),
    (400, "/step", STILL | {"digit": "x"}, "POST", {})])
def test_strangers_and_nonsense_are_refused_and_the_dream_goes_on(
        ask, status, path, body, method, headers):
    assert ask(path, body, method, **headers)[0] == status
    assert ask("/step", STILL)[0] == 200


def test_a_tab_that_closes_before_its_picture_comes_is_no_error(models, capsys):
    player = play.Player(*models)
    with play.make_server(player, 0) as server:
        # it is closed when its threads have ended
        server.daemon_threads = False
        tab = socket.create_connection(server.server_address)
        # closed at once, as a browser does
        tab.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        player.start = lambda: tab.close() or {}
        tab.sendall(b"POST /start HTTP/1.0\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        server.handle_request()
    assert capsys.readouterr().err == ""


def test_a_checkpoint_alone_is_enough_to_play(finished, tmp_path):
    shutil.copy(finished / "agent.pt", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-u", play.__file__, tmp_path / "agent.pt", "--port", "0"], text=True,
        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "plays two short episodes" in process.stdout.readline()
    port = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1]
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
    connection.request("POST", "/step", json.dumps(STILL))
    assert json.loads(connection.getresponse().read())["frame"] == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_dreams_start_from_held_out_episodes_where_there_are_some(finished):
    run = train.Run(*train.parse(["--run", str(finished)]))
    tokenizer, agent, _ = run.load_agent()
    [episode] = play.find_episodes(run, finished / "agent.pt", tokenizer, agent)
    assert np.array_equal(episode["frames"], train.Data(run).held_out[0]["frames"])


# ---- bench.py ------------------------------------------------------------------------------------
def test_costs_on_paper_are_those_of_the_work_itself():
    args, cfg = train.parse(["--preset", "tiny", "--run", os.devnull, "--device", "cpu"])
    costs = bench.costs(train.Run(args, cfg))
    for name, frames, work, _ in bench.jobs(train.Run(args, cfg)):
        if name != "imagination":
            with FlopCounterMode(display=False) as counter:
                work()
            gflop = counter.get_total_flops() / frames / 1e9
            assert costs[f"{name}_gflop"] == round(gflop, 3) > 0
    # at least what goes into each layer, float32, of eight tokens
    assert costs["dynamics_training_mb"] * 1e6 > 8 * cfg.depth * cfg.width * 4


def test_bench_prints_the_speed_of_every_job_as_json(monkeypatch, capsys):
    def seconds(work, threads):
        work()
        return 0.5

    monkeypatch.setattr(bench, "seconds", seconds)
    monkeypatch.setattr(train, "play", lambda *_: [(0, {"rewards": np.zeros(40)})])
    bench.main(["tiny"])
    results, tiny = json.loads(capsys.readouterr().out.splitlines()[-1]), train.PRESETS["tiny"]
    assert results["dynamics_training"] == 2 * tiny["batch_size"] * tiny["short_length"]
    assert results["play"] == 2 and results["collect"] > 0 and results["peak_memory_gb"] > 0.1


# ---- measures.py ---------------------------------------------------------------------------------
def test_a_shuffled_dream_has_the_same_context_and_the_actions_of_the_one_beside_it(models):
    _, agent, episodes = models
    pair = [{name: x[:12] for name, x in e.items() if np.ndim(x)} for e in episodes[:2]]
    actions = [e["actions"] for e in pair]
    swapped = [e | {"actions": np.concatenate((x[:4], y[4:]))}
               for e, x, y in zip(pair, actions, actions[::-1])]
    shuffled, expected, same = (
        train.dream_on(kind(agent.dynamics, k=1), chosen, 0, 12, 2)[1]
        for kind, chosen in ((measures.Shuffled, pair), (Dream, swapped), (Dream, pair)))
    assert torch.equal(shuffled, expected) and not torch.allclose(shuffled, same)


def test_drives_that_fail_and_tiles_that_were_visited_are_counted():
    # 850 and 0.4 for each of 249 steps: 94.96 %; 900 and 80: 98 %; 860 and 99.6: 95.96 %
    drives = ((300, 250), (850, 250), (900, 201), (860, 250))
    episodes = [{"rewards": np.eye(1, T, 1)[0] * total} for total, T in drives]
    assert measures.measure_drives(episodes, train.TrainConfig(action_repeat=4)) == {
        "share_below_500": 0.25, "share_95_percent_of_tiles": 0.5}


@pytest.mark.parametrize("terminal", [True, False])
def test_expectations_are_split_by_how_long_no_reward_came(models, monkeypatch, terminal):
    _, agent, [*_, long] = models
    cfg = train.TrainConfig(**TINY | dict(gamma=0.9, rollout_context=3), reward_scale=10.0)
    rewards = np.zeros(50, np.float32)
    rewards[[5, 7, 30]] = 1, 2, 4
    e, contexts = long | {"rewards": rewards, "terminal": np.array(terminal)}, []

    def noted(agent, z, actions, horizon, *args, **kwargs):
        contexts.append(z)
        return {"rewards": torch.ones(len(z), horizon)}

    # a model that expects half of every reward, and a quarter of it from there on; in tens
    monkeypatch.setattr(train, "predict", lambda agent, e: np.stack((rewards / 20, rewards / 40)))
    monkeypatch.setattr(measures, "imagine", noted)
    results = measures.measure_expectations(agent, [e], cfg, 0.0, np.random.default_rng(0))
    returns = [sum(0.9 ** (i - t - 1) * rewards[i] for i in range(t + 1, 50)) for t in range(50)]
    # contexts of three frames lie behind, a horizon of four ahead
    moments = {"all": range(2, 46), "0_2": [2, 5, 6, 7, 8, 9, 30, 31, 32],
               "6_20": [*range(13, 28), *range(36, 46)], "21_60": [28, 29]}
    assert "real_61_up" not in results
    for name, ts in moments.items():
        # two horizons 1 / (1 - γ) before a time limit returns are unknown
        known = [t for t in ts if t < (49 if terminal else 30)]
        real = np.mean([rewards[t + 1:t + 5].sum() for t in ts])
        for label, number in {"real": real, "predicted": real / 2,
                              "value": np.mean(rewards[known]) / 4,
                              "return": np.mean([returns[t] for t in known])}.items():
            assert results[f"{label}_{name}"] == pytest.approx(number, rel=1e-4)
        # four rewards of 1, in tens
        assert results[f"dreamed_{name}"] == 40
    last = torch.as_tensor(e["latents"][moments["0_2"]]).float()
    assert sorted(contexts[1][:, -1].flatten().tolist()) == sorted(last.flatten().tolist())


def test_a_run_is_measured(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    measures.main([str(run), "--episodes", "1"])
    results = json.loads((run / "measures.json").read_text())
    assert results == json.loads(capsys.readouterr().out)
    assert set(results) >= {"held_out_psnr", "held_out_reward_corr", "dream_psnr_k1",
                            "dream_psnr_shuffled", "latent_std_dream", "real_all"}
    assert np.isfinite(list(results.values())).all()
    assert results["dream_psnr"] == results["dream_psnr_k4"] and 0 < results["copy_psnr"] < 60


# ---- report.py -----------------------------------------------------------------------------------
@pytest.fixture
def assets(tmp_path, monkeypatch):
    """The folder that report.py reads and writes; its results are the real ones."""
    shutil.copytree(ASSETS / "results", tmp_path / "assets/results")
    monkeypatch.setattr(report, "ASSETS", tmp_path / "assets")
    return tmp_path / "assets"


def test_without_runs_the_evidence_is_read(capsys):
    report.main([])
    printed = capsys.readouterr().out
    assert "| trained in dreams | 100 | 740 ± 20 | 850 | 51 | 12 | 19 |" in printed
    assert "597 ± 53 over 4 seeds" in printed


def test_runs_become_a_table_and_the_drives_of_all_seeds(finished, assets, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        report.main([str(finished)] * 2)
    mean = json.loads((finished / "eval.json").read_text())["return_mean"]
    assert re.search(rf"trained in dreams \|( {mean:.0f} ± \d+ \|){{2}} {mean:.0f} ± 0 \|",
                     capsys.readouterr().out)
    rows = report.read_rows(assets / "results/episodes.csv")
    drives = [row["return"] for row in report.read_rows(finished / "episodes.csv")]
    assert [row["return"] for row in rows] == 2 * drives


def test_the_learning_curve_counts_environment_steps(tmp_path):
    (tmp_path / "data").mkdir()
    for i, frames in enumerate((501, 501, 251, 1)):
        np.savez(tmp_path / f"data/{i}.npz", rewards=np.zeros(frames, np.float32))
    config = {"action_repeat": 4, "collect_episodes": 2, "round_episodes": 1}
    log = [{"phase": "collect", "round": r, "return_mean": x} for r, x in ((0, 1), (1, 2))]
    curve = report.learning_curve(tmp_path, config, log, final=3)
    assert curve == ([4.0, 5.0, 5.0], [1, 2, 3])


def test_a_shipped_agent_is_small_and_acts_as_the_trained_one(finished, assets):
    report.main(["--ship", str(finished)])
    shipped, h, actions = assets / "carracing.pt", torch.randn(5, 32), []
    assert shipped.stat().st_size < (finished / "agent.pt").stat().st_size / 3
    for flags in (f"--run={finished}",), (f"--checkpoint={shipped}", f"--run={assets}"):
        _, agent, _ = train.Run(*train.parse(flags)).load_agent()
        actions.append(agent.policy(h))
    torch.testing.assert_close(*actions, atol=1e-2, rtol=1e-2)


def test_the_gif_shows_four_drives_their_dreams_and_a_bar_over_the_context(finished, assets):
    report.main(["--gif", str(finished)])
    frames = imageio.imread(assets / "dream.gif")
    assert frames.shape[1:3] == (2 * 32 * 3, 4 * 32 * 3)
    assert ((frames[:, 98, :, :3] > 200).all((1, 2)) == (np.arange(len(frames)) < 4)).all()


def test_the_shipped_model_sees_what_carracing_draws():
    flags = f"--checkpoint={ASSETS / 'carracing.pt'}", f"--run={ASSETS}"
    run = train.Run(*train.parse(flags))
    tokenizer, agent, _ = run.load_agent()
    run.cfg.episode_frames = 12
    [(_, e)] = train.play(run.cfg, train.AgentPolicy(tokenizer, agent, run.cfg, 0), [7])
    guess = train.decode(tokenizer, train.encode(tokenizer, e["frames"])[None])[0]
    assert train.psnr(e["frames"], guess) > 24


# ---- ablations.py --------------------------------------------------------------------------------
def test_ablations_dream_with_the_ks_of_the_model_and_leave_the_run_as_it_was(
        finished, tmp_path, monkeypatch):
    def contents():
        return {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    monkeypatch.setattr(ablations, "DREAMS", 2)
    before, out = contents(), tmp_path / "out.csv"
    for name in ("the same without masking", "time attention"):
        ablations.main([str(finished), "--steps", "1", "--only", name, "--out", str(out)])
    assert contents() == before
    # k_max of the tiny preset is 4
    assert [row["K"] for row in report.read_rows(out)] == ["4", "4"]


def test_ablations_compare_variants_within_a_seed(capsys):
    psnrs = [("as in the preset", 4, 20, 1), ("as in the preset", 4, 30, 2),
             ("no ramp weight", 4, 21, 1), ("no ramp weight", 4, 33, 2),
             ("a tokenizer of one round", 4, 10, 1), ("the same without masking", 4, 8, 1)]
    ablations.summarize([dict.fromkeys(ablations.SUMMARIZED, 1) | dict(
        variant=name, steps=300, K=k, psnr=psnr, seed=seed) for name, k, psnr, seed in psnrs])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:6]]
    assert [row[:6] for row in rows] == [
        ["as in the preset", "300", "4", "2", "+0.00 ± 0.00", "25.00"],
        ["no ramp weight", "300", "4", "2", "+2.00 ± 1.00", "27.00"],
        ["a tokenizer of one round", "300", "4", "1", "-10.00 ± nan", "10.00"],
        ["the same without masking", "300", "4", "1", "-2.00 ± nan", "8.00"]]


def test_variants_are_what_they_say(models):
    _, agent, _ = models
    cfg, z, tau = agent.config, torch.randn(2, 3, 8, 8), torch.full((2, 3), 0.5)
    d, actions = torch.full_like(tau, 0.5), torch.zeros(2, 3, 2, dtype=torch.int64)
    velocity = ablations.VelocityPrediction(cfg)
    velocity.load_state_dict(agent.dynamics.state_dict())
    v, z1 = agent.dynamics.denoise(z, tau, d, actions)[0], velocity.denoise(z, tau, d, actions)[0]
    torch.testing.assert_close((z1 - z) / 0.5, v)
    target = torch.randn_like(z)
    errors = [(x - y).square().mean() for x, y in ((z1, target), (v, (target - z) / 0.5))]
    torch.testing.assert_close(errors[0] * ablations.velocity_weight(tau[0, 0]), errors[1])
    assert (ablations.DiffusionForcing(cfg).draw(8, 50)["d"] == 1 / cfg.k_max).all()
