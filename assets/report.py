"""The README's tables and figures from finished runs, one per training seed.

    pip install matplotlib                           # for the figures; the project does not need it
    python assets/report.py runs/s0 runs/s1 runs/s2  # tables, assets/*.png, results/episodes.csv
    python assets/report.py                          # how the drives in results/episodes.csv went
"""
import csv
import functools
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assets.files import describe, fail, in_one_line, new_parser, write_file
from assets.measures import correlation

ASSETS = Path(__file__).parent
EPISODES = ASSETS / "results/episodes.csv"
PPO_TABLE = ASSETS / "results/ppo.csv"
# What `--preset cpu` plays: 160 + 3 * 60 episodes of 250 frames
FRAMES = 85_000
DRIVE = ("policy", "seed", "return", "length")
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
# Phase, what its log calls it, title, scale
CURVES = [
    ("tokenizer", "mse", "tokenizer: mean squared error", "log"),
    ("dynamics", "dynamics", "dynamics: weighted loss", "log"),
    ("agent", "reward", "agent: reward loss", "linear"),
    ("imagination", "return", "imagination: λ-return", "linear"),
    ("imagination", "kl", "imagination: KL to the prior", "linear")]


def read(path):
    """A file's text."""
    # a pipe would be waited for
    if not path.is_file():
        raise ValueError(f"{path} is missing or no file")
    return path.read_text("utf-8")


def read_rows(path):
    return list(csv.DictReader(read(path).splitlines()))


def returns(rows):
    """Rows of episodes.csv -> {policy: return of every drive (n,)}."""
    values = {}
    for policy in POLICIES:
        values[policy] = np.array([float(x["return"]) for x in rows if x["policy"] == policy])
        if not len(values[policy]):
            raise ValueError(f"no drive of the policy {policy!r}")
    return values


def curve(log, phase, key):
    """Steps over all rounds (n,), and the smoothed numbers that were logged there (n,)."""
    rows = [row for row in log if row["phase"] == phase and key in row and "step" in row]
    if not rows:
        raise ValueError(f"metrics.jsonl has no {key!r} of the {phase} phase")
    steps = max(row["step"] for row in rows)
    x = np.array([row["round"] * steps + row["step"] for row in rows])
    y = np.array([row[key] for row in rows], float)
    return x, np.array([y[max(0, i - 4):i + 5].mean() for i in range(len(y))])


def read_rewards(folder):
    """The rewards (T,) of a run's episodes, in the order in which they were collected."""
    rewards = []
    for path in sorted((folder / "data").glob("*.npz")):
        # a pipe would be waited for
        if not path.is_file():
            raise ValueError(f"{path} is no file")
        rewards.append(np.load(path)["rewards"].astype(float))
    return rewards


def learning_curve(episodes, settings, log, final):
    """Thousands of environment steps by the end of every round, and the return of its episodes.

    episodes: of read_rewards().
    """
    lengths = [settings["action_repeat"] * (len(rewards) - 1) for rewards in episodes]
    collected = {row["round"]: row["return_mean"] for row in log if row["phase"] == "collect"}
    counts = [settings["collect_episodes"] + r * settings["round_episodes"] for r in collected]
    steps = [sum(lengths[:count]) / 1000 for count in counts]
    # the policy of the last round collects nothing, it is evaluated
    return [*steps, steps[-1]], [*collected.values(), final]


def read_run(folder):
    """A finished run: its seed, numbers of eval.json, rows of episodes.csv, curves."""
    try:
        config = json.loads(read(folder / "config.json"))
        evaluation = json.loads(read(folder / "eval.json"))
        # null: the episodes were too short to measure it
        result = {name: np.array(x, float).item() for name, x in evaluation.items()}
        needed = {f"{policy}_{x}" for policy in POLICIES for x in ("mean", "se")}
        if not needed <= result.keys():
            raise ValueError(f"eval.json lacks {needed - result.keys()}")
        episodes = read_rewards(folder)
        result["neighbour_corr"] = neighbour_correlation(episodes)
        rows = [{name: row[name] for name in DRIVE} for row in read_rows(folder / "episodes.csv")]
        log = [json.loads(line) for line in read(folder / "metrics.jsonl").splitlines()]
        curves = [curve(log, phase, key) for phase, key, *_ in CURVES]
        learning = learning_curve(episodes, config["config"], log, result["return_mean"])
        return {"seed": int(config["seed"]), "result": result, "rows": rows,
                "returns": returns(rows), "curves": curves, "learning": learning}
    except Exception as error:
        # damaged files raise many kinds of errors
        fail(f"{folder} is no finished run or damaged ({describe(error)}); give one in which "
             "train.py has come to the end of its evaluation")


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
    # how many K were measured depends on a run's k_max
    for label, key in [(label, key) for label, key in MEASURES if all(key in r for r in results)]:
        values = [r[key] for r in results]
        digits = 1 if max(map(abs, values)) >= 3 else 2
        mean, error = mean_and_error(values)
        print(f"| {label} | " + " | ".join(f"{v:.{digits}f}" for v in values)
              + f" | {mean:.{digits}f} ± {error:.{digits}f} |")


def drives(values):
    """How the drives of every policy went, over all training seeds. values: of returns()."""
    print("\n| policy | drives | mean, error over drives | median | >= 850 | > 900 | < 500 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for policy, label in POLICIES.items():
        x = values[policy]
        mean, error = mean_and_error(x)
        counts = [(x >= 850).sum(), (x > 900).sum(), (x < 500).sum()]
        print(f"| {label} | {len(x)} | {mean:.0f} ± {error:.0f} | {np.median(x):.0f} | "
              + " | ".join(map(str, counts)) + " |")


def neighbour_correlation(episodes, reach=4):
    """How well the real rewards around a step tell that step's.

    In which of two steps a wheel touches the next tile is chance, as far as pictures of this size
    show. Fitted on training episodes, measured on held-out ones. episodes: of read_rewards().
    """
    rows, targets, held_out = [], [], []
    for i, rewards in enumerate(episodes):
        for t in range(reach + 1, len(rewards) - reach):
            rows.append([*rewards[t - reach:t], *rewards[t + 1:t + 1 + reach], 1.0])
            targets.append(rewards[t])
            held_out.append(i % 10 == 0)
    # episodes too short to measure it
    if all(held_out) or not any(held_out):
        return float("nan")
    rows, targets, held_out = np.array(rows), np.array(targets), np.array(held_out)
    weights = np.linalg.lstsq(rows[~held_out], targets[~held_out], rcond=None)[0]
    return correlation(rows[held_out] @ weights, targets[held_out])


def write_figure(name, figure, **options):
    write_file(ASSETS / name, functools.partial(figure.savefig, format="png", **options))


def ppo_curves():
    """Of every seed of PPO: agent frames, the return of its last 40 episodes."""
    rows = [row for row in read_rows(PPO_TABLE) if row["what"] == "while training"]
    curves = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed]
        curves.append(([int(row["frames"]) for row in own],
                       [float(row["return_mean"]) for row in own]))
    return curves


def ppo_after(count):
    """The returns of ppo_curves() of the seeds that got so far, once they had seen `count` frames.

    While it trains it samples its actions, as ours are sampled.
    """
    later = [[value for frames, value in zip(*curve) if frames >= count] for curve in ppo_curves()]
    return [values[0] for values in later if values]


def returns_figure(runs):
    """Return of the three policies for every seed: tracks are dots; mean and its 95 % interval."""
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 3.2))
    rng = np.random.default_rng(0)
    for i, run in enumerate(runs):
        for j, (policy, values) in enumerate(run["returns"].items()):
            x, color = i + 0.26 * (j - 1), COLORS[policy]
            spread = x + rng.uniform(-0.07, 0.07, len(values))
            axis.plot(spread, values, ".", color=color, alpha=0.35, ms=5, mew=0)
            mean, error = mean_and_error(values)
            axis.errorbar(x, mean, 1.96 * error, fmt="o", color=color, ms=6, capsize=4,
                          label=POLICIES[policy] if i == 0 else None)
    for y, text in ((343, "DQN"), (429, "PPO, 4 M steps"), (906, "World Models"),
                    (np.mean(ppo_after(FRAMES)), "PPO, 0.34 M steps")):
        axis.axhline(y, color="#bbbbbb", lw=0.8, ls="--", zorder=0)
        axis.text(-0.49, y + 8, text, fontsize=7, color="#777777")
    axis.set_xticks(range(len(runs)), [f"seed {run['seed']}" for run in runs])
    axis.set_xlim(-0.5, len(runs) - 0.4)
    axis.set_ylabel("return, real unseen tracks")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.13))
    axis.spines[["top", "right"]].set_visible(False)
    write_figure("returns.png", figure, dpi=130, bbox_inches="tight")


def curves_figure(runs):
    """Losses, imagined returns and collected returns of every seed."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    for i, (axis, (_, _, title, scale)) in enumerate(zip(axes.flat, CURVES)):
        for run, color in zip(runs, itertools.cycle(SEEDS)):
            axis.plot(*run["curves"][i], color=color, lw=1.1, label=f"seed {run['seed']}")
        axis.set_yscale(scale)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    axis = axes.flat[-1]
    for run, color in zip(runs, itertools.cycle(SEEDS)):
        axis.plot(*run["learning"], "o-", color=color, lw=1.1, ms=4)
    for i, (frames, values) in enumerate(ppo_curves()):
        # it repeats its actions four times, too
        steps = [4 * x / 1000 for x in frames]
        axis.plot(steps, values, color="#9aa0a6", lw=1.1, label=None if i else "PPO")
    # PPO may have gone on for much longer
    axis.set_xlim(0, 2 * max(run["learning"][0][-1] for run in runs))
    axis.legend(frameon=False, fontsize=8)
    axis.set_title("real return: while learning, final", fontsize=9)
    axis.set_xlabel("thousand environment steps", fontsize=8)
    axes.flat[0].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    write_figure("curves.png", figure, dpi=110)


def write_rows(path, runs):
    """The drives of all runs as one episodes.csv."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["training_seed", "policy", "track_seed", "return", "length"])
    for run in runs:
        writer.writerows([run["seed"], *row.values()] for row in run["rows"])
    write_file(path, lambda file: file.write(text.getvalue().encode()))


@in_one_line()
def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    runs = [read_run(folder) for folder in parser.parse_args(arguments).runs]
    if runs:
        table([f"seed {run['seed']}" for run in runs], [run["result"] for run in runs])
        try:
            import matplotlib
        except ImportError as error:
            fail(f"the figures need matplotlib ({error}): pip install matplotlib")
        matplotlib.use("Agg")
        write_rows(EPISODES, runs)
        returns_figure(runs)
        curves_figure(runs)
    try:
        values = returns(read_rows(EPISODES))
    except Exception as error:
        fail(f"{EPISODES} is missing or damaged ({describe(error)}); give the folders of finished "
             "runs, which write it anew")
    drives(values)
    ppo = ppo_after(FRAMES)
    print("\nPPO after as many frames, its last 40 episodes: {:.0f} ± {:.0f} over {} seeds".format(
        *mean_and_error(ppo), len(ppo)))


if __name__ == "__main__":
    main()
