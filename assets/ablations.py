"""The paper's claims at the scale of the cpu preset: variants of the dynamics of a finished run.

    python assets/ablations.py runs/s1 --steps 300    # about an hour; adds to results/ablations.csv
    python assets/ablations.py                        # what that file says, over the seeds in it

Every variant of a run trains from the same seed, on the same episodes and latents, for the same
number of steps, and then dreams 16 frames open loop from 4 frames of held-out episodes. Runs differ
in their data, so that only the differences within a run say something about a variant.
"""
import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import dreamer4
import train
from assets.measures import Shuffled
from assets.report import mean_and_error, print_table, read_rows


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
# actions, K to dream with
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
    "actions on 0 % of the episodes": (SHORTCUT, {}, None, 0.0, (4,)),
    "actions on 5 % of the episodes": (SHORTCUT, {}, None, 0.05, (4,)),
    "actions on 20 % of the episodes": (SHORTCUT, {}, None, 0.2, (4,)),
    "a tokenizer of one round": (SHORTCUT, {"mask_max": 0.9}, None, 1.0, (4,)),
    "the same without masking": (SHORTCUT, {"mask_max": 0.0}, None, 1.0, (4,)),
}
# dreams that a PSNR is the mean of
DREAMS = 64
REFERENCE = "as in the preset"
# what a variant is compared with, where that is not the preset
REFERENCES = {"the same without masking": "a tokenizer of one round"}

COLUMNS = ("variant", "steps", "K", "psnr", "psnr_other_actions", "copy_psnr", "std_ratio",
           "minutes", "seed")
SUMMARIZED = COLUMNS[3:7]


def train_variant(name, run):
    """Trains the dynamics of a variant -> frozen tokenizer and dynamics, the episodes with latents.
    run.folder is a temporary one, with the data and the tokenizer of a finished run."""
    cls, changes, weight, labeled, _ = VARIANTS[name]
    cfg, checkpoint = run.cfg, run.folder / "tokenizer.pt"
    if "mask_max" in changes:
        # anew, for as long as in one round
        cfg.mask_max = changes["mask_max"]
        checkpoint.unlink()
        train.train_tokenizer(run)
    data = train.Data(run)
    tokenizer = data.encode(torch.load(checkpoint, "cpu", weights_only=True)["ema"])
    # only now: the tokenizer has the run's architecture
    for setting, value in changes.items():
        setattr(cfg, setting, value)
    for i, e in enumerate(data.train):
        # an even, fixed choice of episodes
        if (i * 0.6180339887) % 1 >= labeled:
            e["actions"] = np.full_like(e["actions"], -1)
    run.rng("dynamics")
    model, ramp = cls(cfg), dreamer4.ramp_weight
    loop = train.Loop(run, "dynamics", model, cfg.dynamics_lr)
    dreamer4.ramp_weight = weight or ramp
    for step in loop:
        B, T = cfg.sequence_shapes(step)
        batch = data.sample(loop.rng, B, T, ["latents", "actions"])
        batch = run.share(batch | model.draw(B, T))
        with run.autocast():
            loss, metrics = model(batch["latents"].float(), batch["actions"], batch, batch["valid"])
        loop.update(loss, metrics, B * T)
    dreamer4.ramp_weight = ramp
    return tokenizer, run.for_inference(loop.ema), data


def measure(name, folder, steps, temporary, context=4):
    """Trains one variant of the run in `folder` -> rows of the table, one for every K."""
    flags = ["--run", str(folder), "--dynamics_steps", str(steps), "--save_seconds", "inf"]
    run, start = train.Run(*train.parse(flags)), time.time()
    # the run's own files stay as they are
    run.folder = temporary
    for link in ("data", "tokenizer.pt"):
        (temporary / link).unlink(missing_ok=True)
        (temporary / link).symlink_to(folder.resolve() / link)
    tokenizer, dynamics, data = train_variant(name, run)
    minutes = round((time.time() - start) / 60, 1)
    real = np.concatenate([e["latents"] for e in data.held_out], dtype=np.float32)
    if VARIANTS[name][3] == 0:
        # without labels there is nothing to give
        for e in data.held_out:
            e["actions"] = np.full_like(e["actions"], -1)
    for k in sorted({min(k, run.cfg.k_max) for k in VARIANTS[name][4]}):
        scores = {}
        for label, dream in (("psnr_other_actions", Shuffled), ("psnr", dreamer4.Dream)):
            truth, z = train.dream_on(dream(dynamics, k=k), data.held_out, 0, context + 16,
                                      DREAMS)
            future = truth[:, context:]
            scores[label] = train.psnr(train.decode(tokenizer, z)[:, context:], future)
        still = np.broadcast_to(truth[:, context - 1:context], future.shape)
        scores |= {"copy_psnr": train.psnr(still, future), "std_ratio": float(z.std() / real.std())}
        scores = {label: round(x, 3) for label, x in scores.items()}
        yield {"variant": name, "steps": steps, "K": k, **scores, "minutes": minutes,
               "seed": run.cfg.seed}


def summarize(rows):
    """Prints means over the seeds, and differences to the reference, paired by seed."""
    groups, table = {}, []
    for row in rows:
        group = groups.setdefault((row["variant"], row["steps"], row["K"]), {})
        group[row["seed"]] = {name: float(row[name]) for name in SUMMARIZED}
    for (name, steps, k), seeds in groups.items():
        reference = groups.get((REFERENCES.get(name, REFERENCE), steps, k), {})
        paired = [seeds[x]["psnr"] - reference[x]["psnr"] for x in seeds if x in reference]
        difference = "{:+.2f} ± {:.2f}".format(*mean_and_error(paired)) if paired else "–"
        means = [f"{np.mean([x[name] for x in seeds.values()]):.2f}" for name in SUMMARIZED]
        table.append([name, steps, k, len(seeds), difference, *means])
    print_table(["variant", "steps", "K", "seeds", "difference, dB", *SUMMARIZED], table)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run")
    parser.add_argument("--steps", type=int, default=600, help="training steps of every variant")
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ablations.csv")
    args = parser.parse_args(arguments)
    if args.run:
        with open(args.out, "a", newline="") as file, tempfile.TemporaryDirectory() as temporary:
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():
                writer.writeheader()
            for name in [name for name in VARIANTS if args.only in name]:
                for row in measure(name, args.run, args.steps, Path(temporary)):
                    print(row, flush=True)
                    writer.writerow(row)
                    file.flush()
    summarize(read_rows(args.out))


if __name__ == "__main__":
    main()
