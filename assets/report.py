"""The README's tables and pictures from finished runs, one per training seed.

    python assets/report.py runs/s0 runs/s1        # tables, *.png, results/episodes.csv
    python assets/report.py                        # how the drives in results/*.csv went
    python assets/report.py --ship runs/s5         # runs/s5/agent.pt as the small carracing.pt
    python assets/report.py --gif runs/s5          # dream.gif of a run's model, or of a checkpoint

The figures need `pip install matplotlib`. measures.py adds rows to the table of a run.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import train

ASSETS = Path(__file__).resolve().parent
# what `--preset cpu` plays: 160 + 3 * 60 episodes of 250 frames
FRAMES = 85_000
POLICIES = {"random": "random actions", "bc": "behaviour cloning", "return": "trained in dreams"}
COLORS = {"random": "#9aa0a6", "bc": "#e0a030", "return": "#2a6fbb"}
SEEDS = ["#2a6fbb", "#c2571a", "#2e8b57", "#7b4fa3", "#555555"]
# of eval.json and measures.json
MEASURES = [
    ("evaluation drives: PSNR of the tokenizer", "tokenizer_psnr"),
    ("evaluation drives: reward correlation", "reward_corr"),
    ("evaluation drives: value correlation", "value_corr"),
    ("held-out episodes: PSNR of the tokenizer", "held_out_psnr"),
    ("held-out episodes: reward correlation", "held_out_reward_corr"),
    ("PSNR of dreams, 16 frames from 4", "dream_psnr"), ("K = 1", "dream_psnr_k1"),
    ("K = 4", "dream_psnr_k4"), ("another episode's actions", "dream_psnr_shuffled"),
    ("PSNR of the last context frame, repeated", "copy_psnr"),
    ("spread of the latents, real", "latent_std_real"), ("dreamed", "latent_std_dream"),
    ("reward over a horizon, dreamed", "dreamed_all"), ("real", "real_all")]
# phase, what its log calls it, title, scale
CURVES = [
    ("tokenizer", "mse", "tokenizer: mean squared error", "log"),
    ("dynamics", "dynamics", "dynamics: weighted loss", "log"),
    ("agent", "reward", "agent: reward loss", "linear"),
    ("imagination", "return", "imagination: λ-return", "linear"),
    ("imagination", "kl", "imagination: KL to the prior", "linear")]


# ---- Finished runs -------------------------------------------------------------------------------

def read_rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def read_returns(path):
    """episodes.csv -> {policy: return of every drive (n,)}."""
    rows = read_rows(path)
    return {policy: np.array([float(row["return"]) for row in rows if row["policy"] == policy])
            for policy in POLICIES}


def curve(log, phase, key):
    """Steps over all rounds (n,), and the smoothed numbers that were logged there (n,)."""
    rows = [row for row in log if row["phase"] == phase and key in row and "step" in row]
    steps = max(row["step"] for row in rows)
    x = np.array([row["round"] * steps + row["step"] for row in rows])
    y = np.array([row[key] for row in rows], float)
    return x, np.array([y[max(0, i - 4):i + 5].mean() for i in range(len(y))])


def learning_curve(folder, config, log, final):
    """Thousands of environment steps by the end of every round, the return of its episodes."""
    paths = sorted((folder / "data").glob("*.npz"))
    steps = [config["action_repeat"] * (len(np.load(path)["rewards"]) - 1) for path in paths]
    collected = {row["round"]: row["return_mean"] for row in log if row["phase"] == "collect"}
    counts = [config["collect_episodes"] + r * config["round_episodes"] for r in collected]
    total = [sum(steps[:count]) / 1000 for count in counts]
    # the policy of the last round collects nothing, it is evaluated
    return [*total, total[-1]], [*collected.values(), final]


def read_run(folder):
    """A finished run: its seed, measures, lines of episodes.csv, and curves."""
    if not (folder / "eval.json").exists():
        sys.exit(f"error: {folder} is no finished run; run first: python train.py --run {folder}")
    config = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "eval.json").read_text())
    if (folder / "measures.json").exists():
        result |= json.loads((folder / "measures.json").read_text())
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    drives = folder / "episodes.csv"
    return {"seed": config["seed"], "result": result, "lines": drives.read_text().splitlines()[1:],
            "returns": read_returns(drives), "curves": [curve(log, *names[:2]) for names in CURVES],
            "learning": learning_curve(folder, config, log, result["return_mean"])}


# ---- Tables --------------------------------------------------------------------------------------

def mean_and_error(values):
    """Mean and standard error."""
    values = np.array(values, float)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return values.mean(), error


def print_table(header, rows):
    """Markdown."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")
    print()


def print_runs(runs):
    """A column for every seed; the last one: their mean and standard error."""
    results, names = [run["result"] for run in runs], [f"seed {run['seed']}" for run in runs]
    rows = []
    for policy, label in POLICIES.items():
        cells = [f"{r[f'{policy}_mean']:.0f} ± {r[f'{policy}_se']:.0f}" for r in results]
        mean, error = mean_and_error([r[f"{policy}_mean"] for r in results])
        rows.append([label, *cells, f"{mean:.0f} ± {error:.0f}"])
    print_table(["return on unseen episodes", *names, "mean"], rows)
    rows = []
    for label, key in MEASURES:
        if all(key in result for result in results):
            values = [result[key] for result in results]
            digits = 1 if max(map(abs, values)) >= 3 else 2
            mean, error = mean_and_error(values)
            rows.append([label, *(f"{value:.{digits}f}" for value in values),
                         f"{mean:.{digits}f} ± {error:.{digits}f}"])
    print_table(["measure", *names, "mean"], rows)


def print_drives(returns):
    """How the drives of every policy went, over all training seeds. returns: of read_returns()."""
    rows = []
    for policy, label in POLICIES.items():
        x, (mean, error) = returns[policy], mean_and_error(returns[policy])
        rows.append([label, len(x), f"{mean:.0f} ± {error:.0f}", f"{np.median(x):.0f}",
                     (x >= 850).sum(), (x > 900).sum(), (x < 500).sum()])
    print_table(["policy", "drives", "mean, error over drives", "median", ">= 850", "> 900",
                 "< 500"], rows)


def ppo_curves():
    """Of every seed of results/ppo.csv: agent frames, the return of its last 40 episodes."""
    rows = read_rows(ASSETS / "results/ppo.csv")
    rows = [row for row in rows if row["what"] == "while training"]
    return [[(int(row["frames"]), float(row["return_mean"])) for row in rows if row["seed"] == seed]
            for seed in sorted({row["seed"] for row in rows})]


def ppo_after(count):
    """The returns of the seeds that got so far, once they had seen `count` frames. While it trains
    PPO samples its actions, as our policy does."""
    later = [[value for frames, value in points if frames >= count] for points in ppo_curves()]
    return [values[0] for values in later if values]


# ---- Figures -------------------------------------------------------------------------------------

def draw_returns(plt, runs):
    """Return of the three policies for every seed: drives are dots; mean and its 95 % interval."""
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
    figure.savefig(ASSETS / "returns.png", dpi=130, bbox_inches="tight")


def draw_curves(plt, runs):
    """Losses, imagined returns and collected returns of every seed."""
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), layout="constrained")
    *axes, last = axes.flat
    for i, run in enumerate(runs):
        color = SEEDS[i % len(SEEDS)]
        for axis, points in zip(axes, run["curves"]):
            axis.plot(*points, color=color, lw=1.1, label=f"seed {run['seed']}")
        last.plot(*run["learning"], "o-", color=color, lw=1.1, ms=4)
    for axis, (_, _, title, scale) in zip(axes, CURVES):
        axis.set_yscale(scale)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    for i, points in enumerate(ppo_curves()):
        frames, values = np.array(points).T
        # it repeats its actions four times, too
        last.plot(4 * frames / 1000, values, color="#9aa0a6", lw=1.1, label=None if i else "PPO")
    # PPO may have gone on for much longer
    last.set_xlim(0, 2 * max(run["learning"][0][-1] for run in runs))
    last.set_title("real return: while learning, final", fontsize=9)
    last.set_xlabel("thousand environment steps", fontsize=8)
    for axis in (axes[0], last):
        axis.legend(frameon=False, fontsize=8)
    for axis in (*axes, last):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    figure.savefig(ASSETS / "curves.png", dpi=110)


# ---- A checkpoint: the shipped file, the README's GIF --------------------------------------------

def to_half(value):
    """Every floating-point tensor of a checkpoint's entry as float16."""
    if isinstance(value, dict):
        return {name: to_half(x) for name, x in value.items()}
    return value.half() if torch.is_tensor(value) and value.is_floating_point() else value


def ship(checkpoint, path):
    """The averaged weights, policy and value of an agent.pt, in half precision: no optimizers."""
    state = torch.load(checkpoint, "cpu", weights_only=True)
    names = ("phase", "round", "step", "config", "tokenizer", "ema", "heads")
    if state.get("phase") != "imagination":
        sys.exit(f"error: {checkpoint} is not the agent.pt of a finished run")
    small = {name: to_half(state[name]) for name in names}
    torch.save(small, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def find_bend(episode, config, length):
    """The start of the window of an episode that begins with the sharpest bend: the policy steers
    to one side."""
    steering = episode["actions"][1:, 0] - (config.action_spec[0] - 1) / 2
    bends = np.abs(np.convolve(steering, np.ones(8) / 8, "same"))
    sums = np.convolve(bends, np.ones(12), "valid")
    return int(sums[:max(1, len(steering) - length)].argmax())


def draw_dreams(checkpoint, path, length=32, context=4):
    """GIF: four drives of the policy on unseen tracks; below each a dream of the same actions. A
    bar marks the frames that the dream is given. The road bends soon after: a dream knows only the
    road that was in sight, and leaves its own when the real one turns."""
    flags = ["--checkpoint", str(checkpoint), "--run", str(checkpoint.parent)]
    run = train.Run(*train.parse(flags))
    cfg, (tokenizer, agent, _) = run.cfg, run.load_agent()
    policy, windows = train.AgentPolicy(tokenizer, agent, cfg, cfg.seed), []
    for _, e in train.play(cfg, policy, [train.EVALUATION_SEEDS - 1 - i for i in range(4)]):
        e["latents"], start = train.encode(tokenizer, e["frames"]), find_bend(e, cfg, length)
        windows.append({name: x[start:start + length] for name, x in e.items() if np.ndim(x)})
    truth, latents = train.dream_on(agent.dream(cfg.k), windows, cfg.seed, length, 4, context)
    dreamed = train.decode(tokenizer, latents)
    dreamed[:, :context, :2] = 255
    # (B, T, H, W, 3) -> side by side (T, H, B W, 3)
    rows, images = [np.concatenate(list(row), 2) for row in (truth, dreamed)], []
    for picture in np.concatenate(rows, 1):
        image = Image.fromarray(picture)
        image = image.resize((3 * image.width, 3 * image.height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for row, label in enumerate(("real", "dream")):
            draw.text((6, row * image.height // 2 + 8), label, "white", font_size=18)
        images.append(image)
    # few colors, those of the first frames, and no dithering: a small file
    column = np.concatenate([np.asarray(image) for image in images[:8]])
    palette = Image.fromarray(column).quantize(128, Image.Quantize.FASTOCTREE)
    first, *others = (x.quantize(palette=palette, dither=Image.Dither.NONE) for x in images)
    first.save(path, save_all=True, append_images=others, duration=100, loop=0)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--ship", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--gif", type=Path, metavar="CHECKPOINT")
    args = parser.parse_args(arguments)
    for job, checkpoint, name in ((ship, args.ship, "carracing.pt"),
                                  (draw_dreams, args.gif, "dream.gif")):
        if checkpoint:
            job(checkpoint / "agent.pt" if checkpoint.is_dir() else checkpoint, ASSETS / name)
    if args.ship or args.gif:
        return
    if args.runs:
        runs = [read_run(folder) for folder in args.runs]
        print_runs(runs)
        lines = ["training_seed,policy,track_seed,return,length"]
        lines += [f"{run['seed']},{line}" for run in runs for line in run["lines"]]
        (ASSETS / "results/episodes.csv").write_text("\n".join(lines) + "\n")
        try:
            import matplotlib
            matplotlib.use("Agg")
            import matplotlib.pyplot as plt
        except ImportError:
            sys.exit("error: the figures need matplotlib; run: pip install matplotlib")
        draw_returns(plt, runs)
        draw_curves(plt, runs)
    print_drives(read_returns(ASSETS / "results/episodes.csv"))
    mean, error = mean_and_error(ppo_after(FRAMES))
    print(f"PPO after as many frames, its last 40 episodes: {mean:.0f} ± {error:.0f} over "
          f"{len(ppo_after(FRAMES))} seeds")


if __name__ == "__main__":
    main()
