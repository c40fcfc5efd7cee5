"""What `python train.py --phase evaluate` and the health reports measure of a model.

Functions of models and arrays; nothing here knows of runs or files. Episodes are dicts of arrays as
in the episode files, with "latents" (T, N, Z) beside them.
"""
import numpy as np
import torch

from assets.videos import decode, open_loop, random_windows
from dreamer4 import Dream, imagine, lambda_returns


# What is expected of a state may depend on how long no reward came: steps since the last unusual
# one, ends included
WAITING = {"0_2": (0, 2), "6_20": (6, 20), "21_60": (21, 60), "61_up": (61, 10 ** 9)}


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of uint8 frames (..., H, W, 3), averaged over the frames."""
    difference = a.astype(np.float32) - b.astype(np.float32)
    error = np.square(difference).mean((-3, -2, -1)) / 255 ** 2
    return float(np.mean(-10 * np.log10(np.maximum(error, 1e-10))))


def correlation(a, b):
    """Pearson's correlation of two arrays (n,); 0 where one of them is constant."""
    if min(np.std(a), np.std(b)) < 1e-8:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def mean_return(episodes):
    """Mean of the episodes' returns, and its standard error."""
    returns = np.array([episode["rewards"].sum() for episode in episodes], float)
    count = len(returns)
    return float(returns.mean()), float(returns.std(ddof=min(1, count - 1)) / count ** 0.5)


def drives(returns, lengths, cfg):
    """What a mean hides of the returns (n,) of episodes with `lengths` (n,) agent steps, a dict.

    CarRacing pays 1000 for all tiles together and -0.1 for a step of its own: that tells how many
    were visited.
    """
    results = {"return_median": float(np.median(returns))}
    if cfg.env.startswith("CarRacing"):
        tiles = (np.array(returns) + 0.1 * cfg.action_repeat * np.array(lengths)) / 1000
        results["share_below_500"] = float(np.mean(np.array(returns) < 500))
        results["share_95_percent_of_tiles"] = float(np.mean(tiles >= 0.95))
    return results


@torch.no_grad()
def predict(agent, episode, chunk=32):
    """Streams a whole episode through the agent, `chunk` frames at a time.

    Returns what it expects at every frame: the reward that came with it (T,), and the value (T,).
    """
    device, pieces = next(agent.parameters()).device, []
    stream = agent.dream(k=1)
    for t in range(0, len(episode["rewards"]), chunk):
        z = torch.as_tensor(episode["latents"][None, t:t + chunk], device=device)
        actions = torch.as_tensor(episode["actions"][None, t:t + chunk], device=device)
        h = stream.observe(z.float(), actions)
        pieces.append(torch.cat((agent.reward(h), agent.value(h))).cpu().numpy())
    return np.concatenate(pieces, 1)


def predicted_and_real_rewards(agent, episodes):
    """Of all frames of the episodes but their first, two flat arrays."""
    predicted = [predict(agent, episode)[0][1:] for episode in episodes]
    real = [e["rewards"][1:] for e in episodes]
    # large ones have squares that float32 cannot hold
    return np.concatenate(predicted, dtype=float), np.concatenate(real, dtype=float)


def reward_health(agent, data):
    """The agent phase's health report: a dict of numbers, and a list of lines. data: train.Data."""
    rewards = np.concatenate([e["rewards"][1:] for e in data.train], dtype=float)
    predicted, real = predicted_and_real_rewards(agent, data.held_out)
    share = float(is_unusual(rewards, data.usual_reward).mean())
    numbers = {"reward_corr": correlation(predicted, real), "reward_share": share}
    lines = [
        f"health: {(rewards != 0).mean():.1%} of the rewards are not zero, {share:.1%} differ from "
        f"the usual {data.usual_reward:.3g}, spread {rewards.std():.3g}; predicted rewards on "
        f"held-out episodes: spread {predicted.std():.3g}, correlation "
        f"{numbers['reward_corr']:.3f}"]
    if rewards.std() < 1e-6:
        lines.append(
            "WARNING: all rewards are equal: the reward head has nothing to learn, and imagination "
            "will have no good or bad actions. Phases 2 and 3 then only clone behaviour; bring "
            "data with rewards")
    elif predicted.std() < 0.1 * max(real.std(), 1e-6):
        lines.append("WARNING: the reward head has collapsed to a constant; try more --agent_steps "
                     "or a larger --rewarded_share")
    return numbers, lines


def imagination_health(metrics):
    """The imagination phase's health report, a list of lines. metrics: of the last step."""
    lines = [f"health: D+ holds {metrics['good']:.0%} of the steps, advantages spread "
             f"{metrics['advantage_std']:.3g}, KL to the prior {metrics['kl']:.3g}, "
             f"imagined reward per step {metrics['reward']:.3g}"]
    if not 0.02 < metrics["good"] < 0.98 or metrics["advantage_std"] < 1e-4:
        lines.append("WARNING: D+ or D- is (nearly) empty: no learning signal. Look at the reward "
                     "head's correlation; try a larger --rewarded_share, more --value_steps or a "
                     "longer --horizon")
    return lines


def dream_measures(tokenizer, agent, episodes, rng, k, context=4, ahead=16, count=32, far=200):
    """Open-loop dreams from `context` frames against held-out truth, a dict of numbers.

    PSNR of `count` dreams of `ahead` frames for every number of denoising steps K (k: the
    preset's), with the true actions and with other ones; and whether the latents keep their mean
    and spread `far` ahead.
    """
    near = random_windows(episodes, rng, count, context + ahead)
    long = random_windows(episodes, rng, count // 4, context + far)
    truth = near["frames"][:, context:]

    def dream_on(batch, actions, steps):
        dream = Dream(agent.dynamics, k=steps)
        return open_loop(dream, batch["latents"], actions, context)

    def score(actions, steps):
        frames = decode(tokenizer, dream_on(near, actions, steps))
        return psnr(frames[:, context:], truth)

    real = long["latents"].astype(np.float32)
    dreamed = dream_on(long, long["actions"], k)[:, context:][:, -50:]
    scores = {}
    for i in range(agent.config.k_max.bit_length()):
        scores[f"dream_psnr_k{2 ** i}"] = score(near["actions"], 2 ** i)
    # the same contexts with another episode's actions: how much the actions matter
    other = np.roll(near["actions"], 1, 0)
    other[:, :context] = near["actions"][:, :context]
    still = np.broadcast_to(near["frames"][:, context - 1:context], truth.shape)
    return scores | {
        "dream_psnr": scores[f"dream_psnr_k{k}"],
        "dream_psnr_shuffled": score(other, k),
        "copy_psnr": psnr(still, truth),
        "latent_std_real": float(real.std()), "latent_std_dream": float(dreamed.std()),
        "latent_mean_real": float(real.mean()), "latent_mean_dream": float(dreamed.mean())}


def discounted_returns(rewards, values, gamma):
    """Returns (T,) of every frame, from rewards (T,); after the last it is values[-1]."""
    rewards, values = torch.as_tensor(rewards[None, 1:]), torch.as_tensor(values[None])
    returns = lambda_returns(rewards, values, torch.ones_like(rewards), gamma, lam=1.0)
    return np.append(returns[0].numpy(), values[0, -1].numpy())


def values_and_returns(episode, gamma):
    """The value head's expectation and the discounted return that came, where that is known.

    A time limit cuts returns off, which the value cannot foresee: two horizons 1 / (1 - γ) before
    it, at most half of the episode, are left out. Returns two arrays of equal length.
    """
    T = len(episode["rewards"])
    known = T
    if not episode["terminal"]:
        known = T - min(round(2 / max(1 - gamma, 1e-6)), T // 2)
    returns = discounted_returns(episode["rewards"], np.zeros(T, np.float32), gamma)
    return episode["values"][:known], returns[:known]


def value_correlation(episodes, gamma):
    """Correlation of value and real discounted return, over the frames of episodes with values."""
    pairs = [values_and_returns(episode, gamma) for episode in episodes]
    values, returns = (np.concatenate(arrays, dtype=float) for arrays in zip(*pairs))
    return correlation(values, returns)


def usual_reward(episodes):
    """The most frequent one: in many tasks every step costs a little; what differs is news."""
    rewards = np.concatenate([e["rewards"][1:] for e in episodes])
    values, counts = np.unique(rewards.round(3), return_counts=True)
    # none in episodes of one frame
    return float(values[counts.argmax()]) if len(values) else 0.0


def is_unusual(rewards, usual):
    return np.abs(rewards - usual) > 1e-3


def steps_without_reward(rewards, usual):
    """(T,) -> the steps since the last reward that is not the usual one, or since the start."""
    since, unusual = np.zeros(len(rewards), int), is_unusual(rewards, usual)
    for t in range(1, len(rewards)):
        since[t] = 0 if unusual[t] else since[t - 1] + 1
    return since


def by_waiting(agent, episodes, cfg, rng, count=96):
    """What the model expects and what comes, by how long no reward came. A dict, and lines.

    episodes: played by this policy, with what predict() gives as "expected_rewards" and "values".
    For every group in WAITING: the reward of the next `horizon` steps, as dreamed, as the reward
    head reads it off the real frames, and as it came; the value, and the discounted return that
    came (beyond a time limit at least 1 / (1 - γ) steps ahead, the last value stands for it). Means
    over up to `count` moments.
    """
    usual = usual_reward(episodes)
    C, H, device = cfg.rollout_context, cfg.horizon, next(agent.parameters()).device
    moments = {name: [] for name in WAITING}
    for episode in episodes:
        since, rewards = steps_without_reward(episode["rewards"], usual), episode["rewards"]
        predicted, values = episode["expected_rewards"], episode["values"].copy()
        values[-1] *= not episode["terminal"]
        returns, T = discounted_returns(rewards, values, cfg.gamma), len(rewards)
        left = 0 if episode["terminal"] else min(round(1 / max(1 - cfg.gamma, 1e-6)), T // 2)
        for t in range(C - 1, T - max(H, left)):
            for name, (low, high) in WAITING.items():
                if low <= since[t] <= high:
                    future = slice(t + 1, t + 1 + H)
                    sums = predicted[future].sum(), rewards[future].sum(), values[t], returns[t]
                    moments[name].append((episode, slice(t + 1 - C, t + 1), sums))
    results, lines = {}, []
    for name, found in moments.items():
        if not found:
            continue
        chosen = [found[i] for i in rng.permutation(len(found))[:count]]
        z, actions = (torch.as_tensor(np.stack([e[key][window] for e, window, _ in chosen]),
                                      device=device) for key in ("latents", "actions"))
        rollout = imagine(agent, z.float(), actions, H, cfg.k, temperature=cfg.temperature)
        dreamed = float(rollout["rewards"].sum(1).mean())
        means = [dreamed, *np.mean([sums for *_, sums in chosen], 0).tolist()]
        labels = ("dreamed", "predicted", "real", "value", "return")
        results |= {f"{label}_{name}": x for label, x in zip(labels, means)}
        numbers = ", ".join(f"{label} {x:.1f}" for label, x in zip(labels, means))
        lines.append(f"{name.replace('_', ' to ')} steps without reward ({len(chosen)} moments), "
                     f"reward of the next {H}: {numbers}")
    return results, lines


def imagined_and_real_reward(agent, episodes, rng, context, horizon, k, temperature):
    """Reward that the policy imagines, and really got, in the same `horizon` frames.

    episodes: played by this policy; rewards are summed over the frames after `context` others.
    Returns two means over 64 windows, and how many frames they are (fewer in short episodes).
    """
    batch = random_windows(episodes, rng, 64, context + horizon)
    length = batch["rewards"].shape[1]
    context = min(context, length - 1)
    device = next(agent.parameters()).device
    z, actions = (torch.as_tensor(batch[name][:, :context], device=device)
                  for name in ("latents", "actions"))
    rollout = imagine(agent, z.float(), actions, length - context, k, temperature=temperature)
    real = batch["rewards"][:, context:].sum(1).mean()
    return float(rollout["rewards"].sum(1).mean()), float(real), length - context


def model_measures(tokenizer, agent, held_out, played, cfg, seed):
    """Of tokenizer and world model on held-out episodes, of value and dreams on those that the
    policy played. Returns a dict of numbers, and the health report, a list of lines."""
    scores = []
    for episode in held_out:
        reconstruction = decode(tokenizer, episode["latents"][None])[0]
        scores.append(psnr(episode["frames"], reconstruction))
    returns, lengths = zip(*((e["rewards"].sum(), len(e["rewards"]) - 1) for e in played))
    results = {"episodes": len(played), **drives(returns, lengths, cfg)}
    results["tokenizer_psnr"] = float(np.mean(scores))
    results |= dream_measures(tokenizer, agent, held_out, np.random.default_rng(seed), cfg.k)
    results["reward_corr"] = correlation(*predicted_and_real_rewards(agent, held_out))
    for episode in played:
        episode["expected_rewards"], episode["values"] = predict(agent, episode)
    results["value_corr"] = value_correlation(played, cfg.gamma)
    imagined, real, count = imagined_and_real_reward(
        agent, played, np.random.default_rng(seed), cfg.rollout_context, cfg.horizon, cfg.k,
        cfg.temperature)
    results |= {"imagined_reward": imagined, "real_reward": real}
    numbers, lines = by_waiting(agent, played, cfg, np.random.default_rng(seed))
    lines.insert(0, f"health: over {count} steps from the same frames the policy imagines "
                    f"{imagined:.2f} and really gets {real:.2f}")
    if unknown := [name for name, value in results.items() if not np.isfinite(value)]:
        lines.append(f"the episodes are too short to measure {', '.join(unknown)}")
    return results | numbers, lines
