"""The paper's claims at the scale of the cpu preset: variants of the dynamics of a finished run.

    python assets/ablations.py runs/s1 --steps 300    # about an hour; assets/results/ablations.csv
    python assets/ablations.py                        # what that file says, over the seeds in it

Every variant of a run trains from the same seed, on the same episodes and latents, for the same
number of steps, and then dreams 16 frames open loop from 4 frames of held-out episodes. Runs differ
in their data, so that only the differences within a run say something about a variant.
"""
import csv
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer4
import train
from assets.files import append_to, describe, fail, in_one_line, new_parser
from assets.latents import encode_episodes
from assets.measures import psnr
from assets.report import mean_and_error, read_rows
from assets.run import Run
from assets.videos import decode, open_loop, random_windows


class VelocityPrediction(dreamer4.Dynamics):
    """The network's output is the velocity; ẑ1 = z̃ + (1 - τ) v. Its loss: see VARIANTS."""

    def denoise(self, z, tau, *args, **kwargs):
        velocity, h = super().denoise(z, tau, *args, **kwargs)
        return z + (1 - tau)[..., None, None] * velocity, h


class DiffusionForcing(dreamer4.Dynamics):
    """Without shortcuts: every frame is trained at d_min, and dreamed with that label."""

    def draw(self, B, T, *args, **kwargs):
        draws = super().draw(B, T, *args, **kwargs)
        tau = torch.randint(0, self.config.k_max, (B, T)) / self.config.k_max
        return draws | {"tau": torch.where(draws["d"] > 1 / self.config.k_max, tau, draws["tau"]),
                        "d": torch.full_like(draws["d"], 1 / self.config.k_max)}

    def denoise(self, z, tau, d, *args, **kwargs):
        return super().denoise(z, tau, torch.full_like(d, 1 / self.config.k_max), *args, **kwargs)


def velocity_weight(tau):
    """Weight of the squared error in x-space that makes it one in v-space."""
    return 1 / (1 - tau) ** 2


SHORTCUT, FORCING = dreamer4.Dynamics, DiffusionForcing
# name: model, changed settings, weight of the squared error in x-space, share of episodes with
# actions, K to dream with (at most the model's own k_max)
VARIANTS = {
    "as in the preset": (SHORTCUT, {}, None, 1.0, (1, 2, 4, 8, 16, 64)),
    "diffusion forcing": (FORCING, {}, None, 1.0, (1, 2, 4, 8, 16, 64)),
    "K_max = 8": (SHORTCUT, {"k_max": 8}, None, 1.0, (1, 2, 4, 8)),
    "v-prediction and loss": (VelocityPrediction, {}, velocity_weight, 1.0, (1, 2, 4, 8)),
    "no ramp weight": (SHORTCUT, {}, torch.ones_like, 1.0, (4,)),
    "time attention every 2nd layer": (SHORTCUT, {"time_every": 2}, None, 1.0, (4,)),
    "30 % separate images": (SHORTCUT, {"separate_images": 0.3}, None, 1.0, (4,)),
    "no separate images": (SHORTCUT, {"separate_images": 0.0}, None, 1.0, (4,)),
    "τ drawn evenly for every frame": (SHORTCUT, {"context_share": 0.0}, None, 1.0, (4,)),
    "a tokenizer of one round": (SHORTCUT, {"mask_max": 0.9}, None, 1.0, (4,)),
    "the same without masking": (SHORTCUT, {"mask_max": 0.0}, None, 1.0, (4,)),
    "actions on 0 % of the episodes": (SHORTCUT, {}, None, 0.0, (4,)),
    "actions on 5 % of the episodes": (SHORTCUT, {}, None, 0.05, (4,)),
    "actions on 20 % of the episodes": (SHORTCUT, {}, None, 0.2, (4,)),
}

REFERENCE = "as in the preset"
# what a variant is compared with, where that is not the preset
REFERENCES = {"the same without masking": "a tokenizer of one round"}

COLUMNS = ("variant", "steps", "K", "psnr", "psnr_other_actions", "copy_psnr", "std_ratio",
           "minutes", "seed")
SUMMARIZED = COLUMNS[3:7]


class AblationRun(Run):
    """A run whose own files stay as they are."""

    def save_config(self):
        pass

    def log(self, phase, **numbers):
        pass


def new_tokenizer(run, data, folder):
    """A tokenizer trained anew, for as long as in one round."""
    folder = folder / f"tokenizer{run.cfg.mask_max}"

    def load_data(_):
        return data

    other = AblationRun(folder, run.cfg, run.seed, run.actions)
    train.load_data = load_data
    train.train_tokenizer(other)
    return other.load_tokenizer()


def measure(run, data, name, steps, folder):
    """Trains one variant, with files in a folder for that -> rows (variant, K, figures)."""
    cls, changes, weight, labeled, ks = VARIANTS[name]
    context = 4
    if max(len(e["rewards"]) for e in data.held_out) <= context:
        fail(f"{run.folder / 'data'}: the held-out episodes are too short to dream on from "
             f"{context} frames; give a run with longer ones")
    cfg, ramp, began = run.cfg, dreamer4.ramp_weight, time.time()
    cfg.mask_max = changes.get("mask_max", cfg.mask_max)
    if "mask_max" in changes:
        tokenizer = new_tokenizer(run, data, folder)
    else:
        tokenizer = run.load_tokenizer()
    # only now: the tokenizer has the run's architecture
    for setting, value in changes.items():
        setattr(cfg, setting, value)
    cfg.dynamics_steps, cfg.save_seconds = steps, 1e9
    encode_episodes(data, tokenizer, folder)
    actions = [e["actions"] for e in data.train]
    for i, e in enumerate(data.train):
        # an even, fixed choice of episodes
        if (i * 0.6180339887) % 1 >= labeled:
            e["actions"] = np.full_like(e["actions"], -1)
    run.seed_phase("dynamics")
    model = cls(cfg)
    run.folder = folder / "dynamics"
    loop = train.Loop(run, "dynamics", model, cfg.dynamics_lr)
    dreamer4.ramp_weight = weight or ramp
    for step in loop:
        B, T = cfg.sequence_shapes(step)
        batch = data.sample(loop.rng, B, T, ["latents", "actions"])
        batch = run.to_device(batch | model.draw(B, T))
        with run.autocast():
            loss, metrics = loop.model_in_ddp(batch["latents"].float(), batch["actions"], batch)
        loop.update(loss, metrics, B * T)
    dreamer4.ramp_weight = ramp
    minutes = (time.time() - began) / 60
    for e, labels in zip(data.train, actions):
        e["actions"] = labels
    dynamics, rng = run.for_inference(loop.ema), np.random.default_rng(0)
    batch = random_windows(data.held_out, rng, 64, context + 16)
    truth = batch["frames"][:, context:]
    other = np.roll(batch["actions"], 1, 0)
    other[:, :context] = batch["actions"][:, :context]
    # without labels there is nothing to give
    given = batch["actions"] if labeled else np.full_like(other, -1)
    for k in sorted({min(k, cfg.k_max) for k in ks}):
        scores = {}
        for label, chosen in (("psnr", given), ("psnr_other_actions", other)):
            torch.manual_seed(0)
            z = open_loop(dreamer4.Dream(dynamics, k=k), batch["latents"], chosen, context)
            scores[label] = round(psnr(decode(tokenizer, z)[:, context:], truth), 2)
        copy = psnr(np.broadcast_to(batch["frames"][:, context - 1:context], truth.shape), truth)
        yield {"variant": name, "steps": steps, "K": k, **scores, "copy_psnr": round(copy, 2),
               "std_ratio": round(float(z.std() / batch["latents"].astype(np.float32).std()), 3),
               "minutes": round(minutes, 1), "seed": run.seed}


def summarize(rows):
    """Prints means over the seeds, and differences to the reference, paired by seed."""
    if not rows:
        raise ValueError("no row")
    groups = {}
    for row in rows:
        group = groups.setdefault((row["variant"], row["steps"], row["K"]), {})
        group[row["seed"]] = {name: float(row[name]) for name in SUMMARIZED}
    print("| variant | steps | K | seeds | difference, dB | " + " | ".join(SUMMARIZED) + " |")
    print("| --- " * (5 + len(SUMMARIZED)) + "|")
    for (name, steps, k), seeds in groups.items():
        reference = groups.get((REFERENCES.get(name, REFERENCE), steps, k), {})
        paired = [seeds[x]["psnr"] - reference[x]["psnr"] for x in seeds if x in reference]
        difference = "{:+.2f} ± {:.2f}".format(*mean_and_error(paired)) if paired else "–"
        means = [f"{np.mean([x[name] for x in seeds.values()]):.2f}" for name in SUMMARIZED]
        print("|", " | ".join([name, steps, k, str(len(seeds)), difference, *means]), "|")


def add_rows(args):
    """Trains the variants of args.run and adds their figures to args.out."""
    names = [name for name in VARIANTS if args.only in name]
    if not names:
        fail(f"--only {args.only}: no variant is called so; there are: {', '.join(VARIANTS)}")
    if args.steps < 1:
        fail("--steps must be at least 1")
    state = train.load_checkpoint(args.run / "tokenizer.pt")
    begin = args.out.read_bytes() if args.out.is_file() else b""
    if begin and not begin.startswith(",".join(COLUMNS).encode()):
        fail(f"--out {args.out} holds something else than ablations; name another file")
    # the file is opened first: what cannot be written is not worth training for
    with append_to(args.out) as file, tempfile.TemporaryDirectory() as folder:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
            file.flush()
        elif not begin.endswith(b"\n"):
            file.write("\n")
        for name in names:
            try:
                cfg = train.TrainConfig(**state["config"])
            except (TypeError, ValueError) as error:
                fail(f"{args.run / 'tokenizer.pt'} is of another version ({describe(error)}); use "
                     "the code that it was made with")
            run = AblationRun(args.run, cfg, state["seed"], json.loads(state["actions"]))
            data = train.Data(cfg, args.run / "data")
            for row in measure(run, data, name, args.steps, Path(folder)):
                print(row, flush=True)
                writer.writerow(row)
                file.flush()


@in_one_line()
def main(arguments=None):
    parser = new_parser(__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run")
    parser.add_argument("--steps", type=int, default=600, help="training steps of every variant")
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ablations.csv")
    args = parser.parse_args(arguments)
    if args.run:
        add_rows(args)
    try:
        summarize(read_rows(args.out))
    except (KeyError, ValueError) as error:
        fail(f"--out {args.out} holds no table of ablations ({describe(error)}); give the folder "
             "of a finished run, which adds to it")


if __name__ == "__main__":
    main()
