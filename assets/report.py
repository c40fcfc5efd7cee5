"""The README's tables and figures from finished runs, one per training seed.

    pip install matplotlib                           # for the figures; the project does not need it
    python assets/report.py runs/s0 runs/s1 runs/s2  # tables, assets/*.png, results/episodes.csv
    python assets/report.py                          # how the drives in results/episodes.csv went
"""
import csv
import json
import sys
from pathlib import Path

import numpy as np

ASSETS = Path(__file__).parent
EPISODES = ASSETS / "results/episodes.csv"
POLICIES = {"random": "random actions", "bc": "behaviour cloning", "return": "trained in dreams"}
COLORS = {"random": "#9aa0a6", "bc": "#e0a030", "return": "#2a6fbb"}
SEEDS = ["#2a6fbb", "#c2571a", "#2e8b57", "#7b4fa3", "#555555"]
MEASURES = [
    ("tokenizer PSNR, dB", "tokenizer_psnr"),
    ("dream PSNR, 16 frames open loop from 4, K = 2, dB", "dream_psnr_k2"),
    ("the same with another episode's actions", "dream_psnr_shuffled"),
    ("the same with K = 1", "dream_psnr_k1"), ("the same with K = 4", "dream_psnr_k4"),
    ("the same with K = K_max = 64", "dream_psnr_k64"),
    ("repeating the last context frame", "copy_psnr"),
    ("mean of the latents, held-out data", "latent_mean_real"),
    ("mean of the latents, frames 151 ... 200 of a dream", "latent_mean_dream"),
    ("spread of the latents, held-out data", "latent_std_real"),
    ("spread of the latents, frames 151 ... 200 of a dream", "latent_std_dream"),
    ("predicted against real rewards, correlation", "reward_corr"),
    ("the same, linear fit to the real rewards of 4 steps before and after", "neighbour_corr"),
    ("value against the policy's real discounted returns, correlation", "value_corr"),
    ("reward over 16 steps from the policy's own frames, imagined", "imagined_reward"),
    ("the same, real", "real_reward")]


def mean_and_error(values):
    """Mean and standard error over training seeds."""
    values = np.array(values, float)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return values.mean(), error


def header(title, names):
    print(f"\n| {title} | " + " | ".join(names) + " | mean |")
    print("| --- |" + " --- |" * (len(names) + 1))


def table(names, results):
    """Markdown: a column for every seed, the last one their mean and standard error."""
    header("real unseen tracks, return", names)
    for policy, label in POLICIES.items():
        mean, error = mean_and_error([r[f"{policy}_mean"] for r in results])
        cells = [f"{r[f'{policy}_mean']:.0f} ± {r[f'{policy}_se']:.0f}" for r in results]
        print(f"| {label} | " + " | ".join(cells) + f" | {mean:.0f} ± {error:.0f} |")
    header("held-out episodes", names)
    for label, key in MEASURES:
        values = [r[key] for r in results]
        digits = 1 if max(map(abs, values)) >= 3 else 2
        mean, error = mean_and_error(values)
        print(f"| {label} | " + " | ".join(f"{v:.{digits}f}" for v in values)
              + f" | {mean:.{digits}f} ± {error:.{digits}f} |")


def drives(rows):
    """How the drives of every policy went, over all training seeds. rows: of episodes.csv."""
    print("\n| policy | drives | mean, error over drives | median | >= 850 | > 900 | < 500 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for policy, label in POLICIES.items():
        values = np.array([float(row["return"]) for row in rows if row["policy"] == policy])
        mean, error = mean_and_error(values)
        counts = [(values >= 850).sum(), (values > 900).sum(), (values < 500).sum()]
        print(f"| {label} | {len(values)} | {mean:.0f} ± {error:.0f} | {np.median(values):.0f} | "
              + " | ".join(map(str, counts)) + " |")


def neighbour_correlation(folder, reach=4):
    """How well the real rewards around a step tell that step's.

    In which of two steps a wheel touches the next tile is chance, as far as pictures of this size
    show. Fitted on training episodes, measured on held-out ones.
    """
    rows, targets, held_out = [], [], []
    for i, path in enumerate(sorted((folder / "data").glob("*.npz"))):
        rewards = np.load(path)["rewards"].astype(float)
        for t in range(reach + 1, len(rewards) - reach):
            rows.append([*rewards[t - reach:t], *rewards[t + 1:t + 1 + reach], 1.0])
            targets.append(rewards[t])
            held_out.append(i % 10 == 0)
    rows, targets, held_out = np.array(rows), np.array(targets), np.array(held_out)
    weights = np.linalg.lstsq(rows[~held_out], targets[~held_out], rcond=None)[0]
    return float(np.corrcoef(rows[held_out] @ weights, targets[held_out])[0, 1])


def returns_figure(names, episodes):
    """Return of the three policies for every seed: tracks are dots; mean and its 95 % interval."""
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 3.2))
    rng = np.random.default_rng(0)
    for i in range(len(names)):
        for j, policy in enumerate(POLICIES):
            rows = [row for row in episodes[i] if row["policy"] == policy]
            values = np.array([float(row["return"]) for row in rows])
            x, color = i + 0.26 * (j - 1), COLORS[policy]
            spread = x + rng.uniform(-0.07, 0.07, len(values))
            axis.plot(spread, values, ".", color=color, alpha=0.35, ms=5, mew=0)
            mean, error = mean_and_error(values)
            axis.errorbar(x, mean, 1.96 * error, fmt="o", color=color, ms=6, capsize=4,
                          label=POLICIES[policy] if i == 0 else None)
    for y, text in ((343, "DQN"), (429, "PPO, 4 M steps"), (906, "World Models")):
        axis.axhline(y, color="#bbbbbb", lw=0.8, ls="--", zorder=0)
        axis.text(-0.49, y + 8, text, fontsize=7, color="#777777")
    axis.set_xticks(range(len(names)), [f"seed {name}" for name in names])
    axis.set_xlim(-0.5, len(names) - 0.4)
    axis.set_ylabel("return, real unseen tracks")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.13))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(ASSETS / "returns.png", dpi=130, bbox_inches="tight")


def curves_figure(names, logs, results):
    """Losses, imagined returns and collected returns of every seed."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    panels = [("tokenizer", "mse", "tokenizer: mean squared error", "log"),
              ("dynamics", "dynamics", "dynamics: weighted loss", "log"),
              ("agent", "reward", "agent: reward loss", "linear"),
              ("imagination", "return", "imagination: λ-return", "linear"),
              ("imagination", "kl", "imagination: KL to the prior", "linear")]
    for axis, (phase, key, title, scale) in zip(axes.flat, panels):
        for name, log, color in zip(names, logs, SEEDS):
            rows = [row for row in log if row["phase"] == phase and key in row and "step" in row]
            steps = max(row["step"] for row in rows)
            x = np.array([row["round"] * steps + row["step"] for row in rows])
            y = np.array([row[key] for row in rows])
            smooth = np.array([y[max(0, i - 4):i + 5].mean() for i in range(len(y))])
            axis.plot(x, smooth, color=color, lw=1.1, label=f"seed {name}")
        axis.set_yscale(scale)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    axis = axes.flat[-1]
    for name, log, result, color in zip(names, logs, results, SEEDS):
        rounds = {row["round"]: row["return_mean"] for row in log if row["phase"] == "collect"}
        rounds[max(rounds) + 1] = result["return_mean"]
        axis.plot(rounds.keys(), rounds.values(), "o-", color=color, lw=1.1, ms=4)
    middle = [f"round {r}" for r in range(1, len(rounds) - 1)]
    axis.set_xticks(range(len(rounds)), ["random", *middle, "final"])
    axis.set_title("real return: collected (1/10 random), final", fontsize=9)
    axes.flat[0].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    figure.savefig(ASSETS / "curves.png", dpi=110)


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def main(folders):
    import matplotlib
    matplotlib.use("Agg")
    results, names, logs = [], [], []
    for folder in folders:
        result = json.loads((folder / "eval.json").read_text())
        results.append(result | {"neighbour_corr": neighbour_correlation(folder)})
        names.append(str(json.loads((folder / "config.json").read_text())["seed"]))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    episodes = [read_rows(folder / "episodes.csv") for folder in folders]
    table([f"seed {name}" for name in names], results)
    with open(EPISODES, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["training_seed", "policy", "track_seed", "return", "length"])
        for name, rows in zip(names, episodes):
            writer.writerows([name, *row.values()] for row in rows)
    returns_figure(names, episodes)
    curves_figure(names, logs, results)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main([Path(folder) for folder in sys.argv[1:]])
    drives(read_rows(EPISODES))
