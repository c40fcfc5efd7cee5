"""Does the road bend in dreams as often as it does in reality? CarRacing only; the policy drives in both.

    python assets/bends.py runs/cpu                # a table: reality, then dreams in K = 1, 2, 4, ... steps

A dream that straightens the road flatters the policy, and PSNR, which favours the mean of all futures, does not show it.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer4
import train

CONTEXT, AHEAD, COUNT = 8, 64, 64                # frames given and dreamed, and how many dreams at most


def describe(frames, rewards):
    """Frames (B, T, 64, 64, 3), rewards (B, T) of 64 steps -> figures of all frames but the first 16."""
    far = np.abs(frames[:, 16:, 4:12].astype(int) - 104).max(-1) < 18                # asphalt in the rows farthest ahead
    count = far.sum((-1, -2))
    offset = np.abs((far * np.arange(64)).sum((-1, -2)) / np.maximum(count, 1) - 32)
    road = (count > 8) & (rewards[:, 16:] > 0.3)                                     # the car earns, and sees the road
    return f"{(offset[road] > 12).mean():.2f} | {road.mean():.2f} | {rewards.mean():.2f}"


def main(folder):
    state = train.load_checkpoint(folder / "agent.pt")
    cfg = train.TrainConfig(**state["config"])
    run = train.Run(folder, cfg, state["seed"], None)
    tokenizer, agent, _ = train.load_agent(run, folder / "agent.pt")
    data = run.data()
    data.encode(tokenizer, folder)
    newest, rng = data.episodes[-cfg.round_episodes:], np.random.default_rng(0)
    batch = train.windows(newest, rng, 2 * COUNT, CONTEXT + AHEAD)
    earning = np.flatnonzero((batch["rewards"][:, CONTEXT - 4:CONTEXT] > 0).any(1))[:COUNT]
    batch = {name: x[earning] for name, x in batch.items()}
    z, actions = (torch.as_tensor(batch[name][:, :CONTEXT]) for name in ("latents", "actions"))
    print("| frames | road's far end over 12 pixels aside | car earns and sees road | reward per step |\n"
          "| --- | --- | --- | --- |")
    print(f"| real | {describe(batch['frames'][:, CONTEXT:], batch['rewards'][:, CONTEXT:])} |")
    for i in range(cfg.k_max.bit_length()):
        torch.manual_seed(0)
        rollout = dreamer4.imagine(agent, z.float(), actions, AHEAD, 2 ** i)
        frames = train.decode(tokenizer, torch.cat((z.float(), rollout["z"]), 1))[:, CONTEXT:]
        print(f"| dream, K = {2 ** i} | {describe(frames, rollout['rewards'].numpy())} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
