"""Tests of measures.py and videos.py: what is measured of a run, and the pictures it leaves."""
import dataclasses
import json
import math
import types
import warnings

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train
from assets import measures, videos
from dreamer4 import Agent, Tokenizer, frozen, imagine
# the fixtures among these work in a file that imports them
from test_dreamer4 import (config, copied, finished, main, new_agent, read_episodes, seeded,
                           signals)


def test_psnr_by_hand():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert measures.psnr(black, black) == pytest.approx(100)
    assert measures.psnr(black, black + 255) == pytest.approx(0)
    # 14 dB and 0 dB: the mean of the decibels
    noisy = black.copy()
    noisy[0], noisy[1] = 51, 255
    assert measures.psnr(noisy, black) == pytest.approx((20 * math.log10(5) + 0) / 2)


@pytest.mark.parametrize("a, b, expected", [
    ([1, 2, 3], [2, 4, 6], 1), ([1, 2, 3], [1, -1, 1], 0), ([1, 1, 1], [0, 1, 2], 0)])
def test_correlation_by_hand(a, b, expected):
    assert measures.correlation(np.array(a, float), np.array(b, float)) == pytest.approx(expected)


def halves(agent, episode):
    """A model that expects half of every reward, and a quarter of it from there on."""
    return episode["rewards"] / 2, episode["rewards"] / 4


def test_returns_by_hand():
    rewards = np.array([9, 1, 2, 4], np.float32)
    episode = {"rewards": rewards, "values": rewards / 4, "terminal": True}
    values, returns = measures.values_and_returns(episode, 0.5)
    assert values.tolist() == [2.25, 0.25, 0.5, 1] and returns.tolist() == [3, 4, 4, 0]


def test_huge_rewards_and_a_single_imagined_step_warn_of_nothing(monkeypatch):
    monkeypatch.setattr(measures, "predict", halves)
    rewards = np.array([0, 1e30, -1e30, 2e29], np.float32)
    episodes = [{"rewards": rewards, "values": rewards, "terminal": True}] * 2
    usual = float(rewards[2])
    data = types.SimpleNamespace(train=episodes, held_out=episodes, usual_reward=usual)
    agent = Agent(config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers, _ = measures.reward_health(None, data)
        assert numbers == {"reward_corr": pytest.approx(1), "reward_share": pytest.approx(2 / 3)}
        measures.mean_return([{"rewards": rewards}, {"rewards": -rewards}])
        measures.value_correlation(episodes, 0.9)
        rollout = imagine(agent, torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2).long(), horizon=1)
        _, metrics = agent.imagination_loss(rollout, frozen(agent.policy_head))
    assert metrics["advantage_std"] == 0


def test_drives_that_fail_and_tiles_that_were_visited_are_counted_in_carracing_only():
    returns, lengths = [300.0, 850.0, 900.0, 860.0], [249, 249, 200, 249]
    cfg = train.TrainConfig()
    # 850 and 0.4 for each of 249 steps: 94.96 %; 900 and 80: 98 %; 860 and 99.6: 95.96 %
    assert measures.drives(returns, lengths, cfg) == {
        "return_median": 855, "share_below_500": 0.25, "share_95_percent_of_tiles": 0.5}
    assert measures.drives(returns, lengths, train.TrainConfig(env="LunarLander-v3")) == {
        "return_median": 855}


@pytest.mark.parametrize("rewards, usual", [
    # a driver that is paid most of the time, a little different every time
    ([-0.4, -0.4, -0.4, 2.81, 2.92, 3.03, 2.74, 6.1], -0.4), ([0, 0, 0, 1, 1], 0), ([1, 1, 0], 1),
    # episodes of one frame
    ([], 0)])
def test_the_usual_reward_is_the_most_frequent(rewards, usual):
    # no reward came with the first frame
    episodes = [{"rewards": np.array([9.0, *rewards], np.float32)}] * 2
    assert measures.usual_reward(episodes) == pytest.approx(usual)


def test_waiting_is_counted_from_the_last_reward_that_is_not_the_usual_one():
    rewards = np.array([0, -0.1, -0.1, 3, -0.1, -0.1, -5, -0.1], np.float32)
    assert measures.steps_without_reward(rewards, -0.1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("terminal", [True, False])
def test_expectations_are_split_by_how_long_no_reward_came(monkeypatch, terminal):
    cfg = train.TrainConfig(**dataclasses.asdict(config(gamma=0.9)), horizon=4, rollout_context=3)
    agent, T, rng = frozen(new_agent(gamma=0.9)), 60, np.random.default_rng(0)
    torch.nn.init.normal_(agent.value_head.layers[-1].weight)
    rewards = np.zeros(T, np.float32)
    rewards[[5, 7, 30]] = 1, 2, 4
    latents = rng.uniform(-1, 1, (T, cfg.latents, cfg.latent_channels)).astype(np.float16)
    episode = {"rewards": rewards, "terminal": np.array(terminal), "latents": latents,
               "actions": np.zeros((T, 2), np.int16)}
    predicted, values = measures.predict(agent, episode)
    episode |= {"expected_rewards": predicted, "values": values}
    results, lines = measures.by_waiting(agent, [episode], cfg, rng)
    # beyond a time limit, what is expected of the last frame
    returns = [sum(0.9 ** (i - t - 1) * rewards[i] for i in range(t + 1, T))
               + 0.9 ** (T - 1 - t) * (0 if terminal else values[-1]) for t in range(T)]
    # between contexts of three frames and the last four, or ten before a time limit
    end = 56 if terminal else 50
    moments = {"0_2": [2, 5, 6, 7, 8, 9, 30, 31, 32],
               "6_20": [*range(13, 28), *range(36, min(51, end))],
               "21_60": [28, 29, *range(51, end)]}
    assert len(lines) == len(moments) and "real_61_up" not in results
    for name, ts in moments.items():
        for label, numbers in {
                "real": [rewards[t + 1:t + 5].sum() for t in ts],
                "value": [values[t] for t in ts],
                "predicted": [predicted[t + 1:t + 5].sum() for t in ts],
                "return": [returns[t] for t in ts]}.items():
            assert results[f"{label}_{name}"] == pytest.approx(np.mean(numbers), rel=1e-4)
    # the dream goes on from the context's frames, actions and policy
    calls = []

    def noted(agent, z, actions, horizon, *args, **kwargs):
        calls.append((z, horizon))
        return {"rewards": torch.ones(len(z), horizon)}

    monkeypatch.setattr(measures, "imagine", noted)
    assert measures.by_waiting(agent, [episode], cfg, rng)[0]["dreamed_0_2"] == 4
    last = torch.as_tensor(latents[moments["0_2"]]).float()
    assert {tuple(z.flatten().tolist()) for z in calls[0][0][:, -1]} == {
        tuple(z.flatten().tolist()) for z in last}


def test_predictions_stand_beside_what_came_with_the_same_frames():
    # a stream whose h is the latent; the reward is h, and the value its negative
    stream = types.SimpleNamespace(observe=lambda z, actions: z[:, :, 0])
    agent = types.SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]), dream=lambda k: stream,
        reward=lambda h: h[..., 0], value=lambda h: -h[..., 0])
    episodes = []
    for T in (70, 5):
        rewards = np.arange(T, dtype=np.float32)
        episodes.append({"rewards": rewards, "actions": np.zeros((T, 2), np.int16),
                         "latents": 2 * rewards[:, None, None].astype(np.float16)})
        rewards_and_values = measures.predict(agent, episodes[-1])
        assert np.array_equal(rewards_and_values, (2 * rewards, -2 * rewards))
    predicted, real = measures.predicted_and_real_rewards(agent, episodes)
    assert np.array_equal(predicted, 2 * real)
    # no reward came with the first frame
    assert len(real) == 69 + 4 and 0 not in real


def test_dreams_with_other_actions_have_the_same_context(monkeypatch):
    cfg, given = config(), []
    tokenizer, agent = frozen(Tokenizer(cfg)), frozen(new_agent())
    rng = np.random.default_rng(0)
    episodes = [{
        "frames": np.zeros((12, 12, 20, 3), np.uint8), "rewards": np.zeros(12, np.float32),
        "latents": rng.uniform(-1, 1, (12, 4, 4)).astype(np.float16),
        "actions": np.full((12, 2), i, np.int16)} for i in (0, 1)]

    def noted(dream, z, actions, context):
        given.append(actions)
        return torch.as_tensor(z).float()

    monkeypatch.setattr(measures, "open_loop", noted)
    measures.dream_measures(tokenizer, agent, episodes, rng, k=1, context=4, ahead=6, count=4)
    right, other = given[-2], given[-1]
    assert np.array_equal(right[:, :4], other[:, :4])
    assert (right[:, 4:] != other[:, 4:]).all()


def test_what_cannot_be_measured_is_null_and_said(finished, tmp_path, capsys):
    short = ("--episodes", 1, "--episode_frames", 3, "--run", tmp_path / "run")
    main("--phase", "evaluate", "--checkpoint", finished / "agent.pt", *short)

    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    results = json.loads((tmp_path / "run/eval.json").read_text(), parse_constant=refuse)
    unknown = [name for name, value in results.items() if value is None]
    assert "dream_psnr" in unknown and "return_mean" not in unknown
    text = capsys.readouterr().out
    assert f"too short to measure {', '.join(unknown)}" in text
    assert json.loads(text.splitlines()[-1], parse_constant=refuse) == results


def test_an_episode_is_encoded_and_decoded_as_a_stream(T=9):
    tokenizer = frozen(Tokenizer(config()))
    frames = np.random.default_rng(0).integers(0, 256, (T, 12, 20, 3), np.uint8)
    z = tokenizer.encode(torch.as_tensor(frames).permute(0, 3, 1, 2)[None] / 255)
    decoded = tokenizer.decode(z)[0].permute(0, 2, 3, 1).numpy() * 255
    for chunk in (1, 4, 32):
        latents = videos.encode(tokenizer, frames, chunk)
        assert latents.dtype == np.float16
        assert_close(torch.as_tensor(latents).float(), z[0], atol=2e-3, rtol=1e-3)
        assert np.abs(videos.decode(tokenizer, latents[None], chunk)[0] - decoded).max() < 2


def test_reconstructions_are_of_eight_episodes_of_all_rounds(tmp_path):
    episodes = [{"frames": np.full((3, 12, 20, 3), i, np.uint8)} for i in range(17)]
    tokenizer = frozen(Tokenizer(config()))
    pairs = videos.write_reconstructions(tmp_path / "a.png", tokenizer, episodes)
    assert [int(truth.mean()) for truth, _ in pairs] == list(range(0, 16, 2))
    for truth, reconstruction in pairs:
        again = videos.decode(tokenizer, videos.encode(tokenizer, truth)[None])[0]
        assert np.array_equal(reconstruction, again)
    picture = imageio.imread(tmp_path / "a.png")
    # two rows of eight, three times as large
    assert picture.shape == (2 * 12 * 3, 8 * 20 * 3, 3) and (picture[:36, -60:] == 14).all()


def test_dreams_are_as_long_as_asked_for_and_gif_or_mp4(copied, tmp_path):
    gif, mp4 = tmp_path / "a.gif", tmp_path / "b.mp4"
    main("--phase", "dream", "--run", copied, "--length", 9, "--record", gif)
    main("--phase", "dream", "--run", copied, "--length", 70, "--record", mp4)
    assert imageio.imread(gif).shape == (9, 256, 512, 3)
    frames = imageio.imread(mp4, plugin="FFMPEG")
    assert frames.shape == (70, 256, 512, 3)
    # the episodes have 40 frames: beyond the truth the dream goes on
    assert frames[-1, :120].max() < 20 and frames[-1, 128:].std() > 5


def test_an_evaluation_is_of_clone_and_policy_and_shows_the_real_track_and_its_reconstruction(
        copied, tmp_path, monkeypatch):
    play, policies = train.play, []

    def play_and_note(cfg, policy, *args):
        policies.append(policy)
        return play(cfg, policy, *args)

    monkeypatch.setattr(train, "play", play_and_note)
    main("--phase", "evaluate", "--run", copied, "--record", tmp_path / "a.mp4")
    frames = imageio.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert frames.shape[1:] == (128, 256, 3)
    real, seen = frames[:, :, :128].astype(float), frames[:, :, 128:].astype(float)
    # a tiny tokenizer sees something else
    assert 5 < np.abs(real - seen).mean() < 100
    saved = torch.load(copied / "agent.pt")
    for policy, entry in zip(policies[1:], ("ema", "heads"), strict=True):
        for name, weights in policy.agent.policy_head.state_dict().items():
            assert torch.equal(weights, saved[entry][f"policy_head.{name}"])


def test_the_last_line_is_the_evaluation_as_json(finished):
    results = json.loads((finished / "stdout").read_text().splitlines()[-1])
    assert results == json.loads((finished / "eval.json").read_text())
    assert set(results) >= set("""return_mean return_se bc_mean bc_se random_mean random_se
        episodes tokenizer_psnr dream_psnr dream_psnr_k1 dream_psnr_k2 dream_psnr_k4
        dream_psnr_shuffled copy_psnr reward_corr value_corr latent_std_real latent_std_dream
        wall_s""".split())
    assert np.isfinite(list(results.values())).all()
    assert results["episodes"] == 2
    # the preset's K
    assert results["dream_psnr"] == results["dream_psnr_k4"] != results["dream_psnr_k2"]
    assert 0 < results["copy_psnr"] < 60
    assert results["latent_std_real"] > 0 and results["latent_std_dream"] > 0


def test_policies_are_compared_on_the_same_seeds_that_no_collection_uses(finished):
    table = (finished / "episodes.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in table]
    results = json.loads((finished / "eval.json").read_text())
    for name in ("random", "bc", "return"):
        seeds = [int(seed) for policy, seed, *_ in rows if policy == name]
        assert seeds == [train.EVALUATION_SEEDS, train.EVALUATION_SEEDS + 1]
        assert min(seeds) > max(read_episodes(finished))
        returns = [float(row[2]) for row in rows if row[0] == name]
        error = np.std(returns, ddof=1) / 2 ** 0.5
        assert results[f"{name}_mean"] == pytest.approx(np.mean(returns), abs=1e-3)
        assert results[f"{name}_se"] == pytest.approx(error, abs=1e-3)


def test_every_phase_of_every_round_is_logged_and_reports_its_health(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    in_every_round = ("collect", "tokenizer", "agent", "imagination")
    assert {(row["phase"], row["round"]) for row in rows} == {
        ("dynamics", 0), *((phase, i) for phase in in_every_round for i in (0, 1))}
    numbers = [x for row in rows for x in row.values() if not isinstance(x, str)]
    assert np.isfinite(numbers).all()
    stdout = (finished / "stdout").read_text()
    for text in ("[tokenizer] PSNR", "[agent] health", "[imagination] health",
                 "[evaluate] health", "spread", "correlation", "D+ holds", "really gets"):
        assert text in stdout
