"""Latents of a run's episodes: encoded once, then read from files that know when they are outdated.

    runs/NAME/latents-CHECKSUM/*.npz      CHECKSUM: of the tokenizer's weights
"""
import functools
import shutil
import time
import zlib
from pathlib import Path

import numpy as np

from assets.files import check_stop, is_main_process, print0, write_file
from assets.videos import encode


def encode_episodes(data, tokenizer, folder):
    """Gives every episode of data (train.Data) its "latents" (T, N, Z) float16.

    Those of another tokenizer, in the same folder of a run, are deleted.
    """
    weights = b"".join(p.float().cpu().numpy().tobytes() for p in tokenizer.parameters())
    folder = Path(folder) / f"latents-{zlib.crc32(weights):08x}"
    start, count = time.time(), 0
    for path, episode in zip(data.paths, data.episodes):
        check_stop()
        # .npz files carry checksums
        cached, T = folder / path.name, len(episode["rewards"])
        wanted = ((T, data.cfg.latents, data.cfg.latent_channels), np.float16)
        try:
            outdated = cached.stat().st_mtime < path.stat().st_mtime
            if outdated or not cached.is_file():
                raise ValueError("the latents of another episode, or none")
            with np.load(cached, allow_pickle=False) as file:
                latents = episode["latents"] = file["latents"]
            if (latents.shape, latents.dtype) != wanted or not np.isfinite(latents).all():
                raise ValueError("something else")
        except Exception:
            # not there, damaged in any way, or of an episode before
            latents = episode["latents"] = encode(tokenizer, episode["frames"])
            count += T
            if is_main_process():
                write_file(cached, functools.partial(np.savez, latents=latents))
    if is_main_process():
        # nobody needs those of the tokenizer before
        for old in set(folder.parent.glob("latents-" + 8 * "[0-9a-f]")) - {folder}:
            # a file or link is not ours
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
    if count:
        print0(f"encoded {count} frames at {count / (time.time() - start):.0f} frames/s")
