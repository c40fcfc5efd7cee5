"""Tests of measures.py and videos.py."""
import math

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from assets import measures, videos
from dreamer4 import Tokenizer, frozen
from test_dreamer4 import config, copied, finished, main, seeded, signals


def test_videos_are_as_long_as_asked_for_and_gif_or_mp4(copied, tmp_path):
    gif, mp4 = tmp_path / "a.gif", tmp_path / "b.mp4"
    main("--phase", "dream", "--run", copied, "--length", 9, "--record", gif)
    main("--phase", "dream", "--run", copied, "--length", 70, "--record", mp4)           # the episodes have 40 frames
    short, long = imageio.imread(gif), np.stack([*imageio.imiter(mp4, plugin="FFMPEG")])
    assert short.shape == (9, 256, 512, 3) and long.shape == (70, 256, 512, 3)
    assert long[-1, :120].max() < 20 and long[-1, 128:].std() > 5              # beyond the truth the dream goes on
    main("--phase", "evaluate", "--run", copied, "--record", mp4)
    frames = imageio.imread(mp4, plugin="FFMPEG")
    assert frames.shape[1:] == (128, 256, 3)                                 # the real track, and its reconstruction
    real, seen = frames[:, :, :128].astype(float), frames[:, :, 128:].astype(float)
    assert 5 < np.abs(real - seen).mean() < 100                              # a tiny tokenizer sees something else


def test_an_episode_is_encoded_and_decoded_as_a_stream(T=9):
    tokenizer, frames = frozen(Tokenizer(config())), np.random.default_rng(0).integers(0, 256, (T, 12, 20, 3), np.uint8)
    images = torch.as_tensor(frames).permute(0, 3, 1, 2)[None] / 255
    z = tokenizer.encode(images)
    for chunk in (1, 4, 32):
        latents = videos.encode(tokenizer, frames, chunk)
        assert latents.dtype == np.float16
        assert_close(torch.as_tensor(latents).float(), z[0], atol=2e-3, rtol=1e-3)
        video = videos.decode(tokenizer, latents[None], chunk)[0].transpose(0, 3, 1, 2)
        assert np.abs(video - tokenizer.decode(z)[0].numpy() * 255).max() < 2


def test_psnr_correlation_and_returns_by_hand():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert measures.psnr(black, black) == pytest.approx(100) and measures.psnr(black, black + 255) == pytest.approx(0)
    noisy = black.copy()
    noisy[0], noisy[1] = 51, 255                                             # 14 dB and 0 dB: the mean of the decibels
    assert measures.psnr(noisy, black) == pytest.approx((20 * math.log10(5) + 0) / 2)
    assert measures.correlation(np.array([1, 2, 3.0]), np.array([2, 4, 6.0])) == pytest.approx(1)
    assert measures.correlation(np.array([1, 2, 3.0]), np.array([1, -1, 1.0])) == pytest.approx(0)
    assert measures.correlation(np.ones(3), np.arange(3.0)) == 0
    e = {"rewards": np.array([9, 1, 2, 4], np.float32), "values": np.zeros(4), "terminal": True}
    assert_close(measures.values_and_returns(e, 0.5)[1], np.array([3, 4, 4, 0], np.float32))
