"""What a model knows and does not know, beyond what `train.py --phase evaluate` says.

    python assets/measures.py runs/s0      # some minutes; --episodes 20 --device cpu

The dreams and predictions are measured on the run's held-out episodes, the policy's expectations on
episodes that it plays now, on the evaluation's seeds. Writes runs/s0/measures.json and prints it:

    held_out_psnr, held_out_reward_corr    tokenizer and reward head
    dream_psnr_k1, _k2, ...                dreams of 16 frames from 4, with K = 1, 2, ... steps
    dream_psnr, dream_psnr_shuffled        with the run's own K; with another episode's actions
    copy_psnr                              of repeating the last of the 4 frames
    latent_mean_real, latent_mean_dream    and latent_std: frames 151 ... 200 of a dream, and truth
    share_below_500, share_95_percent_of_tiles        CarRacing: drives that fail, that see it all
    real_all, real_0_2, real_21_60, ...    the reward of the next `horizon` steps, from moments with
                                           so many steps without reward; predicted_: as the reward
                                           head reads it off the real frames; dreamed_; also the
    value_all, return_all, ...             value there, and the discounted return that came
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import train
from dreamer4 import Dream, imagine

# Steps since the last unusual reward, ends included: what is expected may depend on it
WAITING = {"all": (0, 10 ** 9), "0_2": (0, 2), "6_20": (6, 20), "21_60": (21, 60),
           "61_up": (61, 10 ** 9)}


class Shuffled(Dream):
    """After the same context, each dream of a batch gets the actions of the one beside it."""
    def step(self, action):
        return super().step(action.roll(1, 0))


def measure_dreams(tokenizer, agent, episodes, cfg, context=4, ahead=16, far=200):
    """Dreams that go on from held-out episodes with latents, against what really came."""
    def dream(k, length=context + ahead, count=32, kind=Dream):
        """-> truth (B, T, H, W, 3), dreamed latents (B, T, N, Z)."""
        return train.dream_on(kind(agent.dynamics, k=k), episodes, cfg.seed, length, count, context)

    def score(truth, z):
        return train.psnr(train.decode(tokenizer, z)[:, context:], truth[:, context:])

    steps = [2 ** i for i in range(cfg.k_max.bit_length())]
    scores = {f"dream_psnr_k{k}": score(*dream(k)) for k in steps}
    truth, _ = dream(k=1)
    still = np.broadcast_to(truth[:, context - 1:context], truth.shape)
    _, z = dream(cfg.k, context + far, count=8)
    dreamed = z[:, context:][:, -50:].cpu().numpy()
    real = np.concatenate([e["latents"] for e in episodes], dtype=np.float32)
    return scores | {
        "dream_psnr": scores[f"dream_psnr_k{cfg.k}"],
        "dream_psnr_shuffled": score(*dream(cfg.k, kind=Shuffled)),
        "copy_psnr": train.psnr(still[:, context:], truth[:, context:]),
        "latent_std_real": real.std(), "latent_std_dream": dreamed.std(),
        "latent_mean_real": real.mean(), "latent_mean_dream": dreamed.mean()}


def measure_drives(episodes, cfg):
    """What a mean return hides. CarRacing pays 1000 for all tiles together and -0.1 for a step of
    its own, which tells how many were visited."""
    if not cfg.env.startswith("CarRacing"):
        return {}
    returns = np.array([e["rewards"].sum() for e in episodes])
    steps = cfg.action_repeat * np.array([len(e["rewards"]) - 1 for e in episodes])
    return {"share_below_500": np.mean(returns < 500),
            "share_95_percent_of_tiles": np.mean((returns + 0.1 * steps) / 1000 >= 0.95)}


def steps_without_reward(is_news):
    """(T,) whether a reward was unusual -> the steps since the last such one, or the start."""
    t = np.arange(len(is_news))
    return t - np.maximum.accumulate(np.where(is_news, t, 0))


@torch.no_grad()
def measure_expectations(agent, episodes, cfg, usual, rng, count=96):
    """What the model expects and what comes, in means over up to `count` moments of every group in
    WAITING. episodes: played by this policy, with latents; usual: the usual reward."""
    scale, C, H = cfg.reward_scale or 1.0, cfg.rollout_context, cfg.horizon
    device, moments = next(agent.parameters()).device, {name: [] for name in WAITING}
    for e in episodes:
        predicted, values = train.predict(agent, e) * scale
        returns = train.real_returns(e, cfg.gamma)
        since = steps_without_reward(np.abs(e["rewards"] - usual) > 1e-3 * scale)
        # where a whole context lies behind, and a whole horizon ahead
        for t in range(C - 1, len(since) - H):
            future = slice(t + 1, t + 1 + H)
            numbers = {"real": e["rewards"][future].sum(), "predicted": predicted[future].sum()}
            # not near a time limit, which cuts the return off
            if t < len(returns):
                numbers |= {"value": values[t], "return": returns[t]}
            for name, (low, high) in WAITING.items():
                if low <= since[t] <= high:
                    moments[name].append((e, slice(t + 1 - C, t + 1), numbers))
    results = {}
    for name, found in moments.items():
        if not found:
            continue
        chosen = [found[i] for i in rng.permutation(len(found))[:count]]
        z, actions = (torch.as_tensor(np.stack([e[key][window] for e, window, _ in chosen]),
                                      device=device) for key in ("latents", "actions"))
        rollout = imagine(agent, z.float(), actions, H, cfg.k, temperature=cfg.temperature)
        results[f"dreamed_{name}"] = float(rollout["rewards"].sum(1).mean()) * scale
        for label in ("real", "predicted", "value", "return"):
            known = [numbers[label] for _, _, numbers in chosen if label in numbers]
            if known:
                results[f"{label}_{name}"] = np.mean(known)
    return results


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--episodes", type=int, help="that the policy plays; as many as the run's "
                        "eval_episodes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    run = train.Run(*train.parse(["--run", args.run, "--device", args.device]))
    cfg, data, (tokenizer, agent, _) = run.cfg, train.Data(run), run.load_agent()
    torch.manual_seed(cfg.seed)
    policy = train.AgentPolicy(tokenizer, agent, cfg, cfg.seed)
    first = train.EVALUATION_SEEDS + 1000 * cfg.seed
    seeds = list(range(first, first + (args.episodes or cfg.eval_episodes)))
    played = [episode for _, episode in train.play(cfg, policy, seeds)] if cfg.env else []
    for e in data.held_out + played:
        e["latents"] = train.encode(tokenizer, e["frames"])
    scores = [train.psnr(e["frames"], train.decode(tokenizer, e["latents"][None])[0])
              for e in data.held_out]
    expected = [train.predict(agent, e)[0][1:] for e in data.held_out]
    real = [e["rewards"][1:] for e in data.held_out]
    results = {"held_out_psnr": np.mean(scores),
               "held_out_reward_corr": train.correlation(expected, real),
               **measure_dreams(tokenizer, agent, data.held_out, cfg)}
    if played:
        rng = np.random.default_rng(cfg.seed)
        results |= measure_drives(played, cfg)
        results |= measure_expectations(agent, played, cfg, data.usual_reward, rng)
    text = json.dumps({name: float(f"{x:.5g}") for name, x in results.items()}, indent=1)
    train.write_file(run.folder / "measures.json", lambda file: file.write(f"{text}\n".encode()))
    print(text)


if __name__ == "__main__":
    main()
