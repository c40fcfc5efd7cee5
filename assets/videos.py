"""Videos: frames to latents and back, and the pictures by which one can judge a world model.

    python train.py --phase dream --checkpoint assets/carracing.pt --record dream.mp4
"""
import functools
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F

from assets.files import check_stop, is_main_process, write_file
from dreamer4 import Cache


def resize(frames, size):
    """uint8 frames (..., H, W, 3) -> (..., *size, 3), antialiased."""
    *batch, H, W, channels = frames.shape
    if (H, W) == tuple(size):
        return frames
    x = torch.from_numpy(np.ascontiguousarray(frames)).reshape(-1, H, W, channels)
    x = x.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True)
    x = x.round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    return x.numpy().reshape(*batch, *size, channels)


def to_images(frames, device):
    """uint8 frames (B, T, H, W, 3) -> float images (B, T, 3, H, W) in [0, 1]."""
    return torch.as_tensor(frames, device=device).permute(0, 1, 4, 2, 3).float() / 255


def to_frames(images):
    """Float images (B, T, 3, H, W) in [0, 1] -> uint8 frames (B, T, H, W, 3), a NumPy array."""
    return (images * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()


@torch.no_grad()
def encode(tokenizer, frames, chunk=32):
    """Streams frames (T, H, W, 3) through the tokenizer -> latents (T, N, Z) float16."""
    cache, pieces, device = Cache(), [], next(tokenizer.parameters()).device
    for t in range(0, len(frames), chunk):
        images = to_images(frames[None, t:t + chunk], device)
        pieces.append(tokenizer.encode(images, cache=cache)[0])
    return torch.cat(pieces).half().cpu().numpy()


@torch.no_grad()
def decode(tokenizer, latents, chunk=32):
    """Streams latents (B, T, N, Z) through the decoder -> frames (B, T, H, W, 3) uint8."""
    cache, pieces, device = Cache(), [], next(tokenizer.parameters()).device
    latents = torch.as_tensor(latents).to(device).float()
    for t in range(0, latents.shape[1], chunk):
        pieces.append(tokenizer.decode(latents[:, t:t + chunk], cache))
    return to_frames(torch.cat(pieces, 1))


def random_windows(episodes, rng, count, length):
    """Random windows of the episodes in turn, for measuring -> arrays (count, length, ...).

    They are shorter where no episode is as long.
    """
    length = min(length, max(len(e["rewards"]) for e in episodes))
    long = [e for e in episodes if len(e["rewards"]) >= length]
    chosen = []
    for episode in (long * count)[:count]:
        start = int(rng.integers(len(episode["rewards"]) - length + 1))
        chosen.append((episode, slice(start, start + length)))
    return {name: np.stack([e[name][window] for e, window in chosen])
            for name in ("frames", "latents", "actions", "rewards")}


@torch.no_grad()
def open_loop(dream, z, actions, context, agent=None, length=0):
    """Dreams on from the first `context` frames of z (B, T, N, Z) with actions (B, T, A).

    With an agent the dream has at least `length` frames: it acts where the actions end. Returns
    latents (B, T or length, N, Z).
    """
    device = next(dream.dynamics.parameters()).device
    z, actions = torch.as_tensor(z, device=device).float(), torch.as_tensor(actions, device=device)
    T = actions.shape[1]
    h, frames = dream.reset(z[:, :context], actions[:, :context]), list(z[:, :context].unbind(1))
    for t in range(context, max(length, T) if agent else T):
        check_stop()
        action = actions[:, t] if t < T else agent.sample(agent.policy(h))
        frame, h = dream.step(action)
        frames.append(frame)
    return torch.stack(frames, 1)


def write_dream(path, tokenizer, dream, episodes, seed, length=32, agent=None, context=4):
    """Video: truth above, dream below, same actions; a bar marks the frames given as context.

    Where the truth ends the agent goes on, below a black picture.
    """
    if not is_main_process():
        return
    torch.manual_seed(seed)
    # four episodes, of all rounds
    episodes = episodes[::max(1, len(episodes) // 4)]
    batch = random_windows(episodes, np.random.default_rng(seed), 4, length)
    latents = open_loop(dream, batch["latents"], batch["actions"], context, agent, length)
    dreamed = decode(tokenizer, latents)
    dreamed[:, :context, :2] = 255
    truth = np.zeros_like(dreamed)
    truth[:, :batch["frames"].shape[1]] = batch["frames"]
    # (B, T, H, W, 3) -> side by side (T, H, B W, 3)
    above, below = (np.concatenate(list(part), 2) for part in (truth, dreamed))
    write_video(path, np.concatenate((above, below), 1))


def write_reconstructions(path, tokenizer, episodes):
    """Picture: the middle frames of up to eight episodes, and below them what is left of them.

    Returns pairs of whole videos (T, H, W, 3): truth and reconstruction.
    """
    # of all rounds
    chosen = [e["frames"] for e in episodes[::max(1, len(episodes) // 8)][:8]]
    pairs = [(truth, decode(tokenizer, encode(tokenizer, truth)[None])[0]) for truth in chosen]
    columns = [np.concatenate((a[len(a) // 2], b[len(b) // 2]), 0) for a, b in pairs]
    image = np.concatenate(columns, 1).repeat(3, 0).repeat(3, 1)
    if is_main_process():
        write_file(path, functools.partial(imageio.imwrite, image=image, extension=".png"))
    return pairs


def write_video(path, frames, scale=2, fps=12):
    """frames (T, H, W, 3) uint8 -> an endless GIF, or an MP4, by the name of the file."""
    kind, frames = Path(path).suffix, frames.repeat(scale, 1).repeat(scale, 2)
    options = dict(fps=fps, macro_block_size=2)
    if kind == ".gif":
        options = dict(duration=1000 / fps, loop=0)
    video = imageio.imwrite("<bytes>", frames, extension=kind, **options)
    write_file(path, lambda file: file.write(video))
