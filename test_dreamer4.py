"""Tests of dreamer4.py and train.py, as statements about the method. Run: python -m pytest"""
import ast
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import Mock

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

import dreamer4
import train
from assets.run import Run
from dreamer4 import (Agent, Block, Cache, Config, Dream, Dynamics, LossNorm, Tokenizer, attend,
                      attention_masks, bootstrap_target, corrupt, frozen, generate, imagine,
                      lambda_returns, multi_token_targets, pmpo_loss, ramp_weight, rope,
                      sample_signal_and_step, shortcut_forcing_loss, symexp, symlog, two_hot,
                      two_hot_mean)

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # slow
# Several would only wait for each other on models so small, and ten times as long on a busy machine
torch.set_num_threads(1)
TINY = dict(image_size=(12, 20), action_spec=(3, 2), patch=8, latents=4, latent_channels=4,
            tokenizer_width=32, tokenizer_depth=4, tokenizer_heads=2, tokenizer_context=3, pack=2,
            width=32, depth=4, heads=4, kv_heads=2, registers=1, time_every=2, context=3, k_max=8,
            shortcut_every=2, head_width=32, bins=41, distances=3, tasks=2)
NETWORKS = pytest.mark.parametrize("name", ["encoder", "decoder", "dynamics"])
BINS = symexp(torch.linspace(-10, 10, 255))


def config(**changes):
    return Config(**TINY | changes)


def new_agent(**changes):
    """A tiny agent whose heads say something: they start at zero, where policies are uniform."""
    agent = Agent(config(**changes))
    for head in (agent.policy_head, agent.reward_head, agent.continue_head, agent.value_head):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.2)
    return agent


def new_batch(B=4, T=6):
    """Latents, actions, rewards, continues, as phase 2 gets them."""
    actions = torch.stack((torch.randint(0, 3, (B, T)), torch.randint(0, 2, (B, T))), -1)
    latents = torch.rand(B, T, 4, 4) * 2 - 1
    return latents, actions, torch.randn(B, T), (torch.rand(B, T) < 0.8).float()


def new_dynamics(B=4, T=6, **changes):
    """A tiny world model, with latents and actions for it."""
    return Dynamics(config(**changes)), *new_batch(B, T)[:2]


def record(module, name):
    """From now on, list the calls of a method: dicts of its arguments by name, and its "result"."""
    method, calls = getattr(module, name), []

    def recorded(*args, **kwargs):
        call = dict(zip(method.__code__.co_varnames[1:], args)) | kwargs
        calls.append(call | {"result": method(*args, **kwargs)})
        return calls[-1]["result"]

    setattr(module, name, recorded)
    return calls


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- Attention: the kernel, positions, who sees whom within a frame ------------------------------
class OnGPU(torch.Tensor):
    """A tensor on the CPU that takes the way of those on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("kind", [torch.Tensor, OnGPU])
@pytest.mark.parametrize("mask_shape", [None, (5, 7), (2, 1, 5, 7)])
def test_attention_with_grouped_queries_is_attention_with_repeated_keys(
        mask_shape, kind, monkeypatch):
    q, (k, v) = torch.randn(2, 5, 4, 8).transpose(1, 2), torch.randn(2, 2, 2, 7, 8)
    mask = (torch.rand(mask_shape) < 0.6) | (torch.arange(7) == 0) if mask_shape else None
    kernel = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    output = attend(q.as_subclass(kind), k, v, mask).as_subclass(torch.Tensor)
    heads = [[x.shape[1] for x in call.args] for call in kernel.call_args_list]
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    assert_close(output, kernel(q, *repeated, attn_mask=mask))
    # On a GPU, PyTorch has no fused kernel for a mask with fewer heads of keys than of queries.
    assert heads == ([[2, 2, 2]] if kind is OnGPU else [])


def test_norms_keep_the_precision_of_the_residual_stream_where_autocast_does_not(monkeypatch):
    norm, original = dreamer4.RMSNorm(8), F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *args: original(*args).float())  # autocast on CUDA
    assert norm(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_soft_cap_bounds_the_logits():
    q, k, values = 30 * torch.randn(1, 1, 4, 6), torch.randn(1, 1, 6, 6), torch.eye(6)[None, None]
    weights = torch.stack((attend(q, k, values), attend(q, k, values, softcap=2.0)))
    free, capped = (weights.amax(-1) / weights.amin(-1)).log().amax((1, 2, 3))
    assert free > 20 and 2 < capped < 4.001  # logits within ±2 differ by at most 4


def test_attention_over_time_depends_only_on_distances_whatever_the_norms_have_learned():
    q, k = torch.randn(2, 1, 8)
    queries = rope(q.expand(3, 8), torch.tensor([5, 105, 5]))
    keys = rope(k.expand(3, 8), torch.tensor([2, 102, 3]))
    score, same, other = (queries * keys).sum(-1)
    assert_close(score, same)
    assert (score - other).abs() > 1e-2
    block, x = Block(32, 4, 2, over_time=True), torch.randn(1, 6, 2, 32)
    pos, mask = torch.arange(6), torch.ones(6, 6).bool()
    torch.nn.init.normal_(block.q_norm.weight)  # a norm after RoPE would break this
    assert_close(block(x, mask, pos + 50)[0], block(x, mask, pos)[0], atol=1e-4, rtol=1e-4)


def test_masks_are_the_table_and_the_band():
    groups = (("world", 2), ("agent", 1))
    space, time = attention_masks(groups, torch.tensor([3, 4]), torch.arange(1, 5), context=3)
    assert space.int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert time.int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]


# Through all layers and frames, every token sees every token, except for one pair per network.
@pytest.mark.parametrize("net, blind", [("encoder", ("patch", "latent")),
                                        ("decoder", ("latent", "query")),
                                        ("transformer", ("world", "agent"))])
def test_who_sees_whom(net, blind):
    net = getattr(Dynamics(config()) if net == "transformer" else Tokenizer(config()), net)
    kinds = [kind for kind, count in net.groups for _ in range(count)]
    # with an empty first group all tokens are read
    net.groups = ((kinds[0], 0), *net.groups)
    x = torch.randn(1, 3, len(kinds), 32)
    for i, key in enumerate(kinds):
        changed = x.clone()
        changed[:, 0, i] = torch.randn(32)
        moved = (net(changed) - net(x)).abs().amax((0, 3))  # (T, S)
        for j, query in enumerate(kinds):
            right = moved[:, j] == 0 if (query, key) == blind else moved[:, j] > 1e-6
            assert right.all(), f"{query} {j} after a change of {key} {i} in frame 0"


# ---- Time: causal, banded, and the same in a stream ----------------------------------------------
def network(name, T, **changes):
    """A network as run(x, cache=None) -> list of outputs (B, T, ...), and an input (B, T, ...)."""
    tokenizer, dynamics = Tokenizer(config(**changes)), Dynamics(config(**changes))
    task = torch.randn(32)

    @torch.no_grad()
    def run(x, cache=None):
        if name == "encoder":
            return [tokenizer.encode(x, cache=cache)]
        if name == "decoder":
            return [tokenizer.reconstruct(x, cache)]
        # Actions and signal levels are read off the latents, to change and to stream with them.
        actions, tau = (x[:, :, 0, :2] > 0).long(), (x[:, :, 1, 0] > 0) * 0.5
        d = torch.full_like(tau, 0.25)
        return dynamics.denoise(x, tau, d, actions, task, cache, write=True)

    images, latents = torch.rand(2, T, 3, 12, 20), torch.rand(2, T, 4, 4) * 2 - 1
    return run, images if name == "encoder" else latents


def moved_by_frame(run, x, t):
    """How far each output moves in every frame when frame t of the input changes: list of (T,)."""
    changed = x.clone()
    changed[:, t] = x[:, t].roll(1, 0)  # frame t becomes that of the other video
    return [(a - b).flatten(2).abs().amax((0, 2)) for a, b in zip(run(changed), run(x))]


@NETWORKS
def test_frames_see_the_past_and_never_the_future(name):
    run, x = network(name, T=5)
    for t in range(5):
        for moved in moved_by_frame(run, x, t):
            assert (moved[:t] == 0).all() and (moved[t:t + 2] > 1e-4).all()


@pytest.mark.parametrize("C", [1, 3])
@NETWORKS
def test_a_time_layer_sees_exactly_the_last_C_frames(name, C):
    # A depth of 2 has one time layer.
    run, x = network(name, T=8, context=C, tokenizer_context=C, depth=2, tokenizer_depth=2)
    for moved in moved_by_frame(run, x, 2):
        assert (moved[2:2 + C] > 1e-5).all() and (moved[2 + C:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 2, 5])
@NETWORKS
def test_streaming_equals_the_full_sequence_also_after_eviction(name, chunk, C=3):
    (run, x), cache = network(name, T=4 * C), Cache()
    streamed = [run(part, cache) for part in x.split(chunk, 1)]
    for full, parts in zip(run(x), zip(*streamed)):
        assert (full - torch.cat(parts, 1)).abs().max() < 1e-4
    assert cache.frames == 4 * C
    assert all(k.shape[-2] == v.shape[-2] == C for k, v in cache.layers.values())


def test_passes_that_do_not_write_see_the_stream_and_leave_it_alone():
    dynamics, z, actions = new_dynamics(2, 9)
    task, cache, draft = torch.randn(32), Cache(), torch.randn(2, 9, 4, 4)
    labels = torch.full((2, 9), 0.5), torch.full((2, 9), 0.125), actions
    world, h = dynamics.denoise(z, *labels, task)
    for t in range(9):
        now = [x[:, t:t + 1] for x in labels]
        peek, _ = dynamics.denoise(draft[:, t:t + 1], *now, cache=cache)
        drafted = torch.cat((z[:, :t], draft[:, t:t + 1]), 1)
        full, _ = dynamics.denoise(drafted, *(x[:, :t + 1] for x in labels))
        assert_close(peek[:, 0], full[:, t], atol=1e-4, rtol=0)
        streamed = dynamics.denoise(z[:, t:t + 1], *now, task, cache, write=True)
        assert_close(streamed, (world[:, t:t + 1], h[:, t:t + 1]), atol=1e-4, rtol=0)


def test_residual_branches_start_so_small_that_their_sum_does_not_grow_with_depth():
    for depth in (2, 8):
        blocks = Dynamics(config(width=64, depth=depth)).transformer.blocks
        for layer in [layer for block in blocks for layer in (block.attn_out, block.mlp_out)]:
            variance = layer.weight.detach().var() * layer.in_features
            assert float(variance * 2 * depth) == pytest.approx(1, rel=0.2)


def test_every_parameter_is_trained_and_checkpointing_changes_no_gradient():
    dynamics, z, actions = new_dynamics(separate_images=0.0)
    draws, gradients = dynamics.draw(4, 6), []
    for dynamics.transformer.checkpointing in (False, True):
        loss = dynamics.loss(z, actions, draws)[0][0]
        gradients.append(torch.autograd.grad(loss, list(dynamics.parameters())))
    assert all(gradient.any() for gradient in gradients[0])
    assert_close(*gradients)


# ---- 1. Tokenizer --------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(12, 20), (16, 8), (5, 33)])
def test_images_of_any_size_are_padded_and_cropped_back(size):
    tokenizer, images = Tokenizer(config(image_size=size)), torch.rand(2, 3, 3, *size)
    patches = tokenizer.patchify(images)
    assert patches.shape == (2, 3, math.ceil(size[0] / 8) * math.ceil(size[1] / 8), 3 * 8 * 8)
    assert torch.equal(patches[0, 0, 0].view(3, 8, 8)[:, :5], images[0, 0, :, :5, :8])
    assert torch.equal(tokenizer.unpatchify(patches), images)
    latents = tokenizer.encode(images)
    assert latents.shape == (2, 3, 4, 4) and latents.abs().max() < 1
    output = tokenizer.decode(10 * latents)
    assert output.shape == images.shape and output.min() >= 0 and output.max() <= 1
    with pytest.raises(ValueError, match="wants 3 channels"):
        tokenizer.encode(torch.rand(1, 1, 3, 64, 64))


@torch.no_grad()
def test_masked_patches_are_replaced_by_the_learned_embedding():
    tokenizer, images = Tokenizer(config()), torch.rand(1, 2, 3, 12, 20)
    mask = (torch.arange(6) == 0).expand(1, 2, 6)  # hides the upper left 8 x 8 pixels
    latents, other = tokenizer.encode(images, mask), images.clone()
    other[..., :8, :8] = 0
    assert torch.equal(tokenizer.encode(other, mask), latents)  # hidden pixels do not count
    other[..., :8, 8:] = 0
    assert not torch.allclose(tokenizer.encode(other, mask), latents)  # the others do
    tokenizer.mask_token.neg_()  # the embedding stands in place of the hidden ones
    assert not torch.allclose(tokenizer.encode(images, mask), latents)


def test_masking_probability_is_uniform_per_image():
    tokenizer = Tokenizer(config(image_size=(256, 256)))
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    share = tokenizer.draw(60, 20).float().mean(-1)  # of 1024 patches, for each image
    assert_close(torch.quantile(share.flatten(), levels), 0.9 * levels, atol=0.04, rtol=0)
    assert share.max() < 0.96 and share.std(1).min() > 0.1  # the images of one video differ
    assert not tokenizer.draw(2, 2, mask_max=0.0).any()


def test_reconstruction_loss_covers_all_patches_hidden_or_not():
    tokenizer, images = Tokenizer(config()), torch.rand(2, 2, 3, 12, 20)
    for mask in (tokenizer.draw(2, 2), tokenizer.draw(2, 2, mask_max=0.0)):
        error = (tokenizer.reconstruct(tokenizer.encode(images, mask)) - images).square()
        assert_close(tokenizer(images, mask)[1]["mse"], error.mean())


def test_perceptual_loss_is_a_callable_that_is_trained_on():
    tokenizer, images = Tokenizer(config()), torch.rand(2, 3, 3, 12, 20)
    mask, weights = tokenizer.draw(2, 3), list(tokenizer.parameters())
    perceptual = torch.nn.L1Loss()
    output = tokenizer.reconstruct(tokenizer.encode(images, mask))
    mse = F.mse_loss(output, images)
    expected = perceptual(output.flatten(0, 1), images.flatten(0, 1))
    loss, metrics = tokenizer(images, mask, perceptual)
    assert_close(metrics["perceptual"], expected)
    gradients = torch.autograd.grad(loss, weights)
    assert all(gradient.any() for gradient in gradients)  # every parameter is trained
    both = mse / mse.detach() + 0.2 * expected / expected.detach()
    assert_close(gradients, torch.autograd.grad(both, weights), atol=1e-4, rtol=1e-3)
    assert "perceptual" not in tokenizer(images, mask)[1]


# ---- 2. Dynamics: signal levels, step sizes, shortcut forcing, generation ------------------------
def test_steps_are_powers_of_two_and_signals_lie_on_the_grid_of_their_step():
    tau, d = sample_signal_and_step((200, 200), 8)
    assert d.unique().tolist() == [1 / 8, 1 / 4, 1 / 2, 1]
    # k is uniform, the grid is 0, d, ..., 1 - d, and τ is uniform on it.
    for k in (1, 2, 4, 8):
        chosen = tau[d == 1 / k]
        levels, counts = chosen.unique(return_counts=True)
        assert abs(len(chosen) / d.numel() - 1 / 4) < 0.02
        assert levels.tolist() == [i / k for i in range(k)]
        assert (counts / len(chosen) - 1 / k).abs().max() < 0.02
    assert tau.std(0).min() > 0.1 and tau.std(1).min() > 0.1  # every frame draws anew
    assert [x.item() for x in sample_signal_and_step((), 1)] == [0, 1]


def test_every_signal_level_and_step_size_has_its_own_embedding_and_is_trained():
    dynamics, z, actions = new_dynamics(32, 8)
    tables = [dynamics.signal.weight, dynamics.step.weight]
    assert [len(table) for table in tables] == [8, 4]  # τ is 0 ... 7/8, d is 1, 1/2, 1/4, 1/8
    loss = dynamics.loss(z, actions, dynamics.draw(32, 8))[0][0]
    for gradient in torch.autograd.grad(loss, tables):
        assert gradient.any(1).all()
    for row, d in enumerate((1, 1 / 2, 1 / 4, 1 / 8)):
        tau = torch.arange(0, 1, d)[None]
        T = tau.numel()
        output, _ = dynamics.denoise(z[:1, :T], tau, torch.full((1, T), d), actions[:1, :T])
        gradients = torch.autograd.grad(output.sum(), tables)
        levels, steps = (gradient.any(1).nonzero().flatten().tolist() for gradient in gradients)
        assert levels == (tau[0] * 8).tolist() and steps == [row]


def test_corruption_and_ramp_weight():
    z1, tau = torch.full((1, 3, 2, 2), 8.0), torch.tensor([[0, 0.25, 1]])
    assert corrupt(z1, z1 / 2, tau)[0, :, 0, 0].tolist() == [4, 5, 8]
    assert_close(ramp_weight(tau[0]), torch.tensor([0.1, 0.325, 1]))


def test_shortcut_forcing_is_eq_7_in_velocities_with_both_terms_ramped_and_targets_without_gradient(
        k_max=8):
    weight = torch.tensor(0.7, dtype=torch.double, requires_grad=True)

    def f(z, tau, d):  # any function of all its arguments would do
        return torch.sin(weight * z + 2 * tau[..., None, None] - 3 * d[..., None, None])

    z1, noise = torch.randn(2, 8, 6, 3, 2).double()
    tau, d = (x.double() for x in sample_signal_and_step((8, 6), k_max))
    d[1::2] = 1 / k_max  # only the even rows bootstrap
    tau[1::2] = torch.randint(0, k_max, (4, 6)) / k_max
    loss, metrics = shortcut_forcing_loss(f, f, z1, noise, tau, d, k_max, slice(None, None, 2))
    t, step, fine = tau[..., None, None], d[..., None, None], d == 1 / k_max
    z = (1 - t) * noise + t * z1
    # Two half steps and their velocities.
    b1 = (f(z, tau, d / 2) - z) / (1 - t)
    z2 = z + b1 * step / 2
    b2 = (f(z2, tau + d / 2, d / 2) - z2) / (1 - t - step / 2)
    v = ((b1 + b2) / 2).detach()
    guess = f(z, tau, d)
    flow = (guess - z1).square()
    shortcut = (1 - t) ** 2 * ((guess - z) / (1 - t) - v).square()
    error = torch.where(step == 1 / k_max, flow, shortcut).mean((-2, -1))
    expected = ((0.9 * tau + 0.1) * error).mean()
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))
    parts = {"flow": error[fine].mean().detach(), "shortcut": error[~fine].mean().detach()}
    assert_close(metrics, parts)
    assert_close(bootstrap_target(f, z, tau, d, 1 / k_max)[~fine], (z + (1 - t) * v)[~fine])


@pytest.mark.parametrize("k_max", [1, 8])
def test_an_oracle_has_no_loss(k_max):
    z1, noise = torch.randn(2, 8, 6, 4, 4)
    tau, d = sample_signal_and_step((8, 6), k_max)
    assert shortcut_forcing_loss(lambda *_: z1, lambda *_: z1, z1, noise, tau, d, k_max)[0] < 1e-10


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_generation_with_an_oracle_returns_the_data_in_k_steps(k):
    (data, noise), calls = torch.randn(2, 1, 1, 4, 4), []

    def oracle(z, tau, d):
        assert_close(z, (1 - tau) * noise + tau * data)  # on the way from noise to data
        calls.append((tau, d))
        return data

    assert_close(generate(oracle, noise, k), data)
    assert calls == [(i / k, 1 / k) for i in range(k)]


def test_draw_bootstraps_every_nth_sequence_and_treats_a_share_as_images():
    draws = Dynamics(config(shortcut_every=4, separate_images=0.3, context_share=0.0)).draw(2000, 4)
    tau, d, others = draws["tau"], draws["d"], torch.arange(2000) % 4 != 0
    assert d[::4].unique().tolist() == [1 / 8, 1 / 4, 1 / 2, 1] and (tau % d == 0).all()
    assert (d[others] == 1 / 8).all() and (8 * tau[others]).unique().tolist() == list(range(8))
    assert abs(draws["separate"].float().mean() - 0.3) < 0.04
    assert draws["noise"].shape == (2000, 4, 4, 4) and abs(draws["noise"].std() - 1) < 0.02


@pytest.mark.parametrize("signal, k_max, level", [
    (0.9, 8, 7 / 8), (0.9, 64, 58 / 64), (0.9, 4, 3 / 4), (1, 8, 7 / 8)])
def test_a_share_of_the_frames_is_at_exactly_the_context_level_but_not_in_separate_images(
        signal, k_max, level):
    c = config(context_signal=signal, k_max=k_max, context_share=0.7)
    assert c.context_level == level  # it is the nearest level that has an embedding
    draws = Dynamics(c).draw(2000, 6)
    at_level = ((draws["tau"] == level) & (draws["d"] == 1 / k_max)).float().mean(1)
    bootstrap, separate = torch.arange(2000) % c.shortcut_every == 0, draws["separate"]
    # Some more frames of videos, and the only ones of separate images, are there by chance.
    for rows in (bootstrap, ~bootstrap):
        assert abs(at_level[rows & ~separate].mean() - 0.7) < 0.03 + 0.3 / k_max
        assert at_level[rows & separate].mean() < 1.5 / k_max


def test_actions_are_the_sum_of_their_lookups_and_unlabeled_ones_the_learned_embedding_alone():
    dynamics = Dynamics(config(action_spec=(3, 2, 4)))
    table, base = dynamics.action_table.weight, dynamics.action_base
    embedded = dynamics.embed_actions(torch.tensor([[[2, 0, 3], [-1, -1, -1], [0, 1, -1]]]))[0]
    expected = base + table[2] + table[3] + table[8], base, base + table[0] + table[4]
    assert_close(embedded, torch.stack(expected))


def test_the_action_that_led_to_a_frame_conditions_it_and_what_follows():
    dynamics, z, actions = new_dynamics(1, 4)
    tau, d, changed = torch.zeros(1, 4), torch.full((1, 4), 0.25), actions.clone()
    changed[:, 1, 1] = 1 - changed[:, 1, 1]
    moved = dynamics.denoise(z, tau, d, changed)[0] - dynamics.denoise(z, tau, d, actions)[0]
    assert (moved.abs().amax((0, 2, 3)) > 1e-4).tolist() == [False, True, True, True]


@torch.no_grad()
def test_latents_are_read_out_where_they_went_in():
    dynamics, z, actions = new_dynamics(1, 2)
    for block in dynamics.transformer.blocks:  # no layer moves anything
        block.attn_out.weight.zero_()
        block.mlp_out.weight.zero_()
    labels = torch.zeros(1, 2), torch.ones(1, 2), actions
    changed = z * torch.tensor([1, 1, -1, -1])[:, None]  # the second packed token
    moved = dynamics.denoise(z, *labels)[0] - dynamics.denoise(changed, *labels)[0]
    assert moved.abs().amax((0, 1)).bool().tolist() == [[False] * 4] * 2 + [[True] * 4] * 2


def test_separate_images_have_neither_past_nor_action_and_leave_the_others_alone():
    dynamics, z, actions = new_dynamics(3, 5)
    inputs = z, torch.full((3, 5), 0.5), torch.full((3, 5), 0.25), actions
    separate = torch.tensor([True, False, True])
    x, _ = dynamics.denoise(*inputs, separate=separate)
    videos, _ = dynamics.denoise(*inputs)
    images = dynamics.denoise(*(part.flatten(0, 1)[:, None] for part in inputs))[0].view_as(x)
    assert_close(x, torch.where(separate[:, None, None, None], images, videos))
    assert (images - videos)[:, 1:].abs().amax((1, 2, 3)).min() > 1e-3
    calls = record(dynamics, "denoise")
    dynamics.loss(z, actions, dynamics.draw(3, 5) | {"separate": separate})
    assert torch.equal(calls[-1]["actions"], torch.where(separate[:, None, None], -1, actions))
    assert torch.equal(calls[-1]["separate"], separate)


# ---- The agent token: reads everything (test_who_sees_whom), is seen by nothing, has heads -------
def test_the_world_model_is_blind_to_the_agent_token():
    dynamics, z, actions = new_dynamics()
    inputs = z, torch.full((4, 6), 0.5), torch.full((4, 6), 0.25), actions
    (x0, h0), (x1, h1) = (dynamics.denoise(*inputs, task) for task in torch.randn(2, 32))
    x, h = dynamics.denoise(*inputs, None)
    assert torch.equal(x0, x1)  # not by one bit
    assert_close(x, x0)  # other shapes may round otherwise
    assert h is None and (h0 - h1).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("term", ["policy", "reward", "continue_"])
def test_the_loss_of_every_head_trains_the_transformer_and_its_task_embedding(term, monkeypatch):
    agent, batch = new_agent(separate_images=0.0), new_batch()
    monkeypatch.setattr(agent.loss_norm, "forward", lambda losses: losses[term])  # this alone
    agent(*batch, agent.dynamics.draw(4, 6), task=1)[0].backward()
    assert agent.task.weight.grad.any(1).tolist() == [False, True]
    assert all(p.grad.any() for p in agent.dynamics.transformer.parameters())


# ---- Dreaming: context at its level, h from the finished frame, every action where it belongs ----
@pytest.mark.parametrize("k", [-1, 0, 3, 6, 16])
def test_dream_wants_a_power_of_two_up_to_k_max(k):
    with pytest.raises(ValueError, match=f"k = {k}"):
        Dream(Dynamics(config()), k=k)


@pytest.mark.parametrize("k", [1, 4])
def test_a_dreamed_frame_takes_k_passes_and_finished_frames_one_more_at_the_context_level_for_h(k):
    dynamics, z, actions = new_dynamics(64, 8)
    calls, dream = record(dynamics, "denoise"), Dream(dynamics, torch.randn(32), k)
    h_context = dream.reset(z, actions)
    frame, h = dream.step(torch.tensor([[2, 1]] * 64))
    context, *passes, last = calls
    for call, finished, state in (context, z, h_context), (last, frame[:, None], h):
        assert call["write"] and (call["tau"] == 7 / 8).all() and (call["d"] == 1 / 8).all()
        noise = (call["z"] - 7 / 8 * finished) * 8  # it is 7/8 frame and 1/8 noise
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        assert abs((noise * finished).mean()) < 0.1
        assert torch.equal(state, call["result"][1][:, -1])
    assert torch.equal(context["actions"], actions) and dream.cache.frames == 9
    labels = [(call["tau"][0, 0].item(), call["d"][0, 0].item()) for call in passes]
    assert labels == [(i / k, 1 / k) for i in range(k)]
    assert not any(call.get("write") or call.get("task_embedding") is not None for call in passes)
    assert all((call["actions"] == torch.tensor([2, 1])).all() for call in passes + [last])
    assert_close(frame, passes[-1]["result"][0][:, 0])  # the last step lands on its prediction


def test_the_first_dreamed_frame_depends_on_the_action_and_on_the_context():
    dynamics, z, actions = new_dynamics(1, 4)

    def first(z, action):
        dream = Dream(dynamics, k=2, generator=torch.Generator().manual_seed(0))
        assert dream.reset(z, actions) is None  # without an agent token there is no h
        return dream.step(torch.tensor([action]))[0]

    assert torch.equal(first(z, [0, 1]), first(z, [0, 1]))
    assert (first(z, [0, 1]) - first(z, [2, 1])).abs().max() > 1e-3
    assert (first(z, [0, 1]) - first(-z, [0, 1])).abs().max() > 1e-3


def test_the_temperature_scales_the_noise_that_dreamed_frames_start_from_and_nothing_else():
    agent, (z, actions, _, _) = new_agent(), new_batch()
    calls = record(agent.dynamics, "denoise")
    for temperature in (1.0, 1.5):
        generator = torch.Generator().manual_seed(0)
        imagine(agent, z, actions, 1, k=2, generator=generator, temperature=temperature)
    context, first, second, _, hot_context, hot_first, hot_second, _ = [c["z"] for c in calls]
    assert torch.equal(context, hot_context) and torch.equal(hot_first, 1.5 * first)
    assert (second - hot_second).abs().max() > 1e-3


def test_in_imagination_h_chooses_the_action_that_leads_to_the_next_frame(H=5):
    agent, (z, actions, _, _) = new_agent(), new_batch()
    denoise = record(agent.dynamics, "denoise")
    policy, sample = record(agent, "policy"), record(agent, "sample")
    rollout = imagine(agent, z, actions, horizon=H, k=2)
    h = rollout["h"]
    assert {name: tuple(x.shape) for name, x in rollout.items()} == {
        "h": (4, H + 1, 32), "actions": (4, H, 2), "z": (4, H, 4, 4), "rewards": (4, H),
        "continues": (4, H)}
    context, *finished = [call for call in denoise if call.get("write")]
    assert torch.equal(h[:, 0], context["result"][1][:, -1])
    # h_t chooses a_t, which leads to frame t + 1.
    for t in range(H):
        assert torch.equal(policy[t]["h"], h[:, t])
        assert torch.equal(sample[t]["logits"], policy[t]["result"])
        assert torch.equal(finished[t]["actions"][:, 0], rollout["actions"][:, t])
        assert torch.equal(finished[t]["result"][1][:, 0], h[:, t + 1])
    assert_close(rollout["rewards"], agent.reward(h[:, 1:]).detach())  # of arriving there
    assert_close(rollout["continues"], agent.continuation(h[:, 1:]).detach())
    assert not any(x.requires_grad for x in rollout.values())


# ---- 3. Agent: numbers as two-hot, targets, returns ----------------------------------------------
def test_symlog_and_symexp_are_inverse():
    x = torch.tensor([-2e4, -3.0, -1e-3, 0, 0.5, 1, 700])
    assert_close(symexp(symlog(x)), x)
    assert_close(symlog(torch.tensor([math.e - 1, 1 - math.e])), torch.tensor([1.0, -1.0]))


def test_two_hot_represents_every_value_and_its_own_bins_exactly():
    assert torch.equal(two_hot(BINS, BINS), torch.eye(255))
    assert torch.equal(two_hot(torch.tensor([1e9, -1e9]), BINS), torch.eye(255)[[254, 0]])
    x = torch.randn(1000) * 10 ** (torch.rand(1000) * 5 - 2)
    weights = two_hot(x, BINS)
    assert (weights >= 0).all() and ((weights > 0).sum(-1) <= 2).all()
    assert_close(weights.sum(-1), torch.ones(1000))
    assert_close(weights @ BINS, x.clamp(BINS[0], BINS[-1]), atol=1e-4, rtol=1e-4)


def test_two_hot_decodes_what_was_encoded_and_zero_from_new_heads():
    x = torch.tensor([-100.0, -1, 0, 0.3, 5, 2000])
    assert_close(two_hot_mean(two_hot(x, BINS).log(), BINS), x, atol=1e-4, rtol=1e-4)
    agent, h = Agent(config(bins=255)), torch.randn(3, 32)
    decoded = torch.stack((agent.reward(h), agent.value(h)))
    assert_close(decoded, torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_multi_token_targets_end_with_the_sequence():
    targets, valid = multi_token_targets(torch.tensor([[10, 11, 12, 13]]), 3)
    assert valid.int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert targets[0][valid].tolist() == [10, 11, 12, 11, 12, 13, 12, 13, 13]


def test_eq_9_clones_the_actions_that_follow_and_predicts_the_rewards_from_here_on(B=4, T=6, L=3):
    agent, (z, actions, rewards, continues) = new_agent(), new_batch(B, T)
    draws = agent.dynamics.draw(B, T)
    _, metrics = agent(z, actions, rewards, continues, draws, task=1)
    _, h = agent.dynamics.loss(z, actions, draws, agent.task.weight[1])
    policy, reward, continue_ = agent.policy_head(h), agent.reward_head(h), agent.continue_head(h)
    total = {"policy": 0, "reward": 0, "continue_": 0}
    for t in range(T):
        for n in range(min(L, T - t)):
            weights = two_hot(rewards[:, t + n], agent.bin_values)
            total["reward"] -= (weights * reward[:, t, n].log_softmax(-1)).sum()
            p = continue_[:, t, n, 0].sigmoid()
            total["continue_"] -= torch.where(continues[:, t + n] == 1, p, 1 - p).log().sum()
            if t + n + 1 < T:  # frame t + n + 1 carries a_{t+n}
                total["policy"] -= agent.log_prob(policy[:, t, n], actions[:, t + n + 1]).sum()
    for name in total:
        assert_close(metrics[name], total[name].detach() / (B * T * L))


def test_losses_can_be_measured_without_gradients():
    agent, batch = new_agent(), new_batch()
    draws = agent.dynamics.draw(4, 6)
    _, metrics = agent(*batch, draws)
    with torch.no_grad():
        assert_close(agent(*batch, draws)[1], metrics)


def test_lambda_returns_are_the_recursion():
    rewards, values, continues = torch.randn(2, 5), torch.randn(2, 6), torch.rand(2, 5)
    for H in (1, 5):
        expected = values[:, :H + 1].clone()  # the last return is the last value
        for t in reversed(range(H)):
            ahead = 0.2 * values[:, t + 1] + 0.8 * expected[:, t + 1]
            expected[:, t] = rewards[:, t] + 0.9 * continues[:, t] * ahead
        parts = rewards[:, :H], values[:, :H + 1], continues[:, :H]
        assert_close(lambda_returns(*parts, gamma=0.9, lam=0.8), expected[:, :H])
    assert torch.equal(lambda_returns(rewards, values, 0 * continues, 0.9, 0.8), rewards)  # all end


# ---- The policy and PMPO -------------------------------------------------------------------------
def categoricals(logits):
    parts = logits.split((3, 2), -1)
    return [Categorical(0.99 * part.softmax(-1) + 0.01 / part.shape[-1]) for part in parts]


def test_policy_is_a_product_of_categoricals():
    agent, logits, prior = Agent(config()), 2 * torch.randn(50, 5), 2 * torch.randn(50, 5)
    actions = torch.stack([part.sample() for part in categoricals(logits)], -1)
    expected = [part.log_prob(actions[:, i]) for i, part in enumerate(categoricals(logits))]
    assert_close(agent.log_prob(logits, actions), sum(expected))
    actions[:, 1] = -1  # an unlabeled component says nothing
    assert_close(agent.log_prob(logits, actions), expected[0])
    kl = sum(kl_divergence(p, q) for p, q in zip(categoricals(logits), categoricals(prior)))
    assert_close(agent.kl(logits, prior), kl)  # KL[policy || prior], not the reverse


def test_policy_acts_by_sampling_with_a_uniform_floor():
    agent, logits = Agent(config()), torch.tensor([0.0, 1, 2, 0, 1])
    actions = agent.sample(logits.expand(20000, 5))
    for i, part in enumerate(categoricals(logits)):
        assert (actions[:, i].bincount() / 20000 - part.probs).abs().max() < 0.02
    assert torch.corrcoef(actions.T.float())[0, 1].abs() < 0.03  # the components are independent
    certain = agent.log_policy(torch.tensor([100.0, 0, 0, 0, 100]))[0].exp()
    assert_close(certain, torch.tensor([1 - 0.02 / 3, 0.01 / 3, 0.01 / 3]))


def test_pmpo_by_hand():
    log_prob, advantage = torch.tensor([[-1.0, -2, -3, -4]]), torch.tensor([[5.0, 0, -0.1, 100]])
    kl, weight = torch.tensor([[1.0, 2, 3, 40]]), torch.tensor([[1.0, 1, 1, 0]])
    # D+ holds -1 and -2, D- holds -3, the last step comes after an imagined end.
    expected = torch.tensor((1 - 0.4) * -3.0 - 0.4 * -1.5 + 0.3 * 2.0)
    for scale in (torch.ones(4), torch.tensor([1e-3, 1, 1e3, 1])):  # only the sign counts
        loss = pmpo_loss(log_prob, scale * advantage, kl, weight, alpha=0.4, beta=0.3)
        assert_close(loss, expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pmpo_raises_good_actions_lowers_bad_ones_and_empty_sets_are_exactly_zero(sign):
    log_prob, zero, one = torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3), torch.ones(2, 3)
    loss = pmpo_loss(log_prob, sign * one, zero, one, 0.5, 0.3)  # nothing comes from the empty set
    assert_close(loss, -sign * 0.5 * log_prob.mean())
    assert_close(torch.autograd.grad(loss, log_prob)[0], -sign * 0.5 / 6 * one)
    loss = pmpo_loss(log_prob, sign * one, one, zero, 0.5, 0.3)  # all steps after an end
    assert loss == 0 and torch.equal(torch.autograd.grad(loss, log_prob)[0], zero)


def imagined(agent, rewards, continues):
    """A rollout with these rewards and continuations (B, H)."""
    z, actions, _, _ = new_batch(len(rewards))
    rollout = imagine(agent, z, actions, rewards.shape[1], k=1)
    return rollout | {"rewards": rewards, "continues": continues}


def test_an_action_is_credited_with_the_reward_at_the_frame_it_leads_to():
    agent = new_agent(gamma=0.0)
    torch.nn.init.zeros_(agent.value_head.layers[-1].weight)  # advantages are rewards
    rollout = imagined(agent, torch.tensor([[1.0, -1, 1]]), torch.ones(1, 3))
    _, metrics = agent.imagination_loss(rollout, frozen(agent.policy_head))
    log_prob = agent.log_prob(agent.policy(rollout["h"][:, :3]), rollout["actions"])[0].detach()
    assert_close(metrics["policy"], 0.5 * log_prob[1] - 0.5 * (log_prob[0] + log_prob[2]) / 2)
    assert_close(metrics["good"], torch.tensor(2 / 3))


def test_value_learns_returns_policy_leaves_the_prior_at_a_price_and_nothing_counts_after_the_end():
    agent, prior = new_agent(), frozen(new_agent().policy_head)
    continues = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    rollout = imagined(agent, torch.randn(3, 4), continues)
    # The action that led to an end counts, and the context itself may have ended.
    alive = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    alive = alive * agent.continuation(rollout["h"][:, :1]).detach()
    _, metrics = agent.imagination_loss(rollout, prior)
    values, h = agent.value(rollout["h"]), rollout["h"][:, :4]
    returns = lambda_returns(rollout["rewards"], values, continues, 0.997, 0.95)
    logits = agent.policy(h)
    log_prob, kl = agent.log_prob(logits, rollout["actions"]), agent.kl(logits, prior(h)[:, :, 0])
    policy = pmpo_loss(log_prob, returns - values[:, :4], kl, alive, 0.5, 0.3)
    log_p = agent.value_head(h)[:, :, 0].log_softmax(-1)
    value = -((two_hot(returns, agent.bin_values) * log_p).sum(-1) * alive).mean()
    assert_close((metrics["policy"], metrics["value"]), (policy.detach(), value.detach()))
    for weight in (0.0, 1.0):  # a weight of 0 trains the value first, alone
        assert_close(agent.imagination_loss(rollout, prior, weight)[0], weight * policy + value)


def test_imagination_trains_the_policy_and_the_value_and_nothing_else():
    agent, prior = new_agent(), new_agent().policy_head  # not even a prior that could learn
    rollout = imagined(agent, torch.randn(2, 4), torch.ones(2, 4))
    agent.imagination_loss(rollout, prior)[0].backward()
    trained = [name for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in trained} == {"policy_head", "value_head"}
    assert all(p.grad is None for p in prior.parameters())


# ---- Training ------------------------------------------------------------------------------------
def test_loss_terms_of_any_scale_weigh_the_same():
    norm, (x, y) = LossNorm("big", "small"), torch.ones(2, requires_grad=True).unbind()
    plus, minus = torch.tensor(1.0), torch.tensor(-1.0)
    for _ in range(3):  # from the first step on
        loss = norm({"big": 1e6 * x, "small": -1e-3 * y})
        assert_close(loss, torch.tensor(0.0))  # 1 and -1, divided by root mean squares
        assert_close(torch.autograd.grad(loss, (x, y), retain_graph=True), (plus, minus))
    norm.eval()  # in evaluation the scale stays
    for _ in range(2):
        assert_close(norm({"big": 3e6 * x, "small": 1e-3 * y}), torch.tensor(4.0))


def overfit(model, steps, *batch):
    """Metrics of the first and of the last of some AdamW steps on one batch."""
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, metrics = model(*batch)
        loss.backward()
        optimizer.step()
        history.append(metrics)
    return history[0], history[-1]


def test_tokenizer_overfits_one_batch():
    images = F.interpolate(torch.rand(6, 3, 3, 5), size=(12, 20)).view(2, 3, 3, 12, 20)
    tokenizer = Tokenizer(config(latent_channels=16))
    first, last = overfit(tokenizer, 120, images, tokenizer.draw(2, 3, mask_max=0.0))
    assert last["mse"] < 0.1 * first["mse"]


def test_agent_and_world_model_overfit_one_batch():
    agent = Agent(config(separate_images=0.0))
    first, last = overfit(agent, 80, *new_batch(), agent.dynamics.draw(4, 6))
    for name in ("dynamics", "policy", "reward", "continue_"):
        assert last[name] < 0.5 * first[name], name


# ---- The module on its own -----------------------------------------------------------------------
@pytest.mark.parametrize("field, value", [
    ("image_size", (64,)), ("action_spec", ()), ("action_spec", (3, 0)), ("k_max", 6), ("k_max", 0),
    ("latents", 5), ("width", 30), ("width", 12), ("tokenizer_width", 33), ("tokenizer_width", 6),
    ("heads", 3), ("heads", 0), ("tokenizer_heads", 0), ("kv_heads", 3), ("kv_heads", 0),
    ("context", 0), ("tokenizer_context", 0), ("pack", 0), ("shortcut_every", 0), ("time_every", 0),
    ("distances", 0), ("bins", 1), ("patch", 0), ("context_signal", -0.5)])
def test_config_refuses_what_cannot_work_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})


def test_module_imports_torch_and_the_standard_library_only():
    imported = set()
    for node in ast.walk(ast.parse(Path(dreamer4.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}


ALONE = """
import sys; sys.path.insert(0, ".")
import torch
from dreamer4 import *
c = Config(image_size=(16, 16), latents=4, tokenizer_width=24, width=32, depth=4, head_width=16)
images, actions = torch.rand(2, 5, 3, 16, 16), torch.randint(0, 5, (2, 5, 2))
tokenizer, agent = Tokenizer(c), Agent(c)
def train(model, loss):
    loss.backward()
    torch.optim.AdamW(model.parameters()).step()
train(tokenizer, tokenizer(images, tokenizer.draw(2, 5))[0])
z = tokenizer.encode(images).detach()
train(agent.dynamics, agent.dynamics(z, actions, agent.dynamics.draw(2, 5))[0])
train(agent, agent(z, actions, torch.randn(2, 5), torch.ones(2, 5), agent.dynamics.draw(2, 5))[0])
rollout = imagine(agent, z, actions, horizon=3)
train(agent, agent.imagination_loss(rollout, frozen(agent.policy_head))[0])
assert tokenizer.decode(rollout["z"]).shape == (2, 3, 3, 16, 16)
print(tuple(agent.sample(agent.policy(agent.dream().reset(z, actions))).shape))
"""


def test_a_copy_of_the_module_in_an_empty_folder_trains_imagines_and_acts(tmp_path):
    shutil.copy(dreamer4.__file__, tmp_path)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 2)", done.stderr


# --------------------------------------------------------------------------------------------------
# The script: all phases run once, in a process of their own; tests look at what that left or go on

ALL = ("--preset", "tiny", "--rounds", 2, "--round_episodes", 2)


def start(*arguments, env={}):
    """python with these arguments and environment variables, in a process of its own."""
    root = str(Path(train.__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root} | env
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The run folder of the tiny preset, two rounds; what it printed is in the file stdout.

    One for all test files and processes: the first that needs it makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    printed, deadline = folder / "stdout", time.monotonic() + 300
    try:
        folder.mkdir()
        process = start(train.__file__, *ALL, "--run", folder)
        stdout, stderr = process.communicate(timeout=300)
        printed.write_text(stdout)
        assert process.returncode == 0, stdout + stderr
    except FileExistsError:
        while not printed.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def only_with_m_slow(request):
    wanted = request.config.getoption("-m")
    if request.node.get_closest_marker("slow") and "slow" not in wanted:
        pytest.skip("takes minutes; python -m pytest -m slow")


@pytest.fixture(autouse=True)
def signals():
    """main() handles signals: undo that."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    train.STOP.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def main(*arguments):
    train.main([*map(str, arguments)])


def as_flags(settings):
    texts = {name: "x".join(map(str, value)) if isinstance(value, tuple) else value
             for name, value in settings.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def error(capsys, work, *words):
    """work() ends with exit code 2 and one line on stderr, in which the words are."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        work()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(str(word) in lines[0] for word in words), lines[0]


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def load(folder, name):
    return torch.load(Path(folder) / name, weights_only=True)


def load_run(folder):
    """The run in this folder, as a phase gets it."""
    state = load(folder, "agent.pt")
    cfg = train.TrainConfig(**state["config"])
    return Run(folder, cfg, state["seed"], json.loads(state["actions"]), "tiny")


def differences(a, b, name=""):
    """Where two checkpoints differ, by so much as a bit; their configs aside."""
    if isinstance(a, (dict, list, tuple)) and len(a) == len(b):
        keys = a if isinstance(a, dict) else range(len(a))
        return [place for key in keys if key != "config"
                for place in differences(a[key], b[key], f"{name}.{key}")]
    equal = torch.equal(a, b) if torch.is_tensor(a) else a == b
    return [] if equal else [name]


def read_episodes(folder):
    """The episodes of a run: {seed: arrays}."""
    paths = (Path(folder) / "data").glob("*.npz")
    return {int(path.stem): dict(np.load(path, allow_pickle=False)) for path in paths}


def test_the_run_folder_holds_what_was_promised_and_nothing_temporary(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith("latents-")}
    assert names == set("""config.json metrics.jsonl data tokenizer.pt dynamics.pt agent.pt
        eval.json tokenizer.png dynamics.gif agent.gif dream.gif policy.gif episodes.csv
        stdout""".split())
    assert not list(finished.rglob(".*"))
    assert imageio.imread(finished / "tokenizer.png").shape[-1] == 3
    # at twice their size; truth above dream, but the policy's track beside its reconstruction
    for name, height in {"dynamics": 256, "agent": 256, "dream": 256, "policy": 128}.items():
        frames = imageio.imread(finished / f"{name}.gif", index=None)
        assert len(frames) > 20 and frames.shape[1] == height
        assert len({frame.tobytes() for frame in frames}) > 10


def test_in_a_new_round_policy_and_value_go_on_beside_a_new_clone_and_dreams_are_hotter(
        copied, monkeypatch):
    before, run = load(copied, "agent.pt"), load_run(copied)
    run.round = before["round"] + 1
    train.train_agent(run)
    state = load(copied, "agent.pt")
    assert state["phase"] == "agent" and not differences(state["heads"], before["heads"])
    _, agent, cloned = run.load_agent(copied / "agent.pt")
    assert differences(agent.policy_head.state_dict(), cloned.state_dict())
    imagine, temperatures = train.imagine, []

    def imagine_and_note(*args, temperature, **kwargs):
        temperatures.append(temperature)
        return imagine(*args, temperature=temperature, **kwargs)

    monkeypatch.setattr(train, "imagine", imagine_and_note)
    run.cfg.policy_lr, run.cfg.rounds, run.cfg.temperature = 0.0, 4, 3.0
    train.train_imagination(run)
    assert not differences(load(copied, "agent.pt")["heads"], before["heads"])
    # in the third of four rounds
    assert set(temperatures) == {1 + (3 - 1) * 3 / 4}


def test_masking_ramps_up_in_the_first_round_and_is_there_from_the_start_later(
        copied, monkeypatch):
    run, draw, drawn = load_run(copied), Tokenizer.draw, []

    def draw_and_note(self, B, T, mask_max, **kwargs):
        drawn.append(mask_max)
        return draw(self, B, T, mask_max, **kwargs)

    monkeypatch.setattr(Tokenizer, "draw", draw_and_note)
    run.cfg.tokenizer_steps, run.cfg.mask_ramp, run.cfg.mask_max = 4, 0.5, 0.8
    (copied / "tokenizer.pt").unlink()
    for run.round, ramp in [(0, [0, 0.4, 0.8, 0.8]), (1, [0.8] * 4)]:
        drawn.clear()
        train.train_tokenizer(run)
        assert drawn == pytest.approx(ramp)


def test_the_first_rollouts_of_a_round_train_the_value_and_not_the_policy(copied):
    before, run = load(copied, "agent.pt")["heads"], load_run(copied)
    run.round = 2
    train.train_agent(run)
    run.cfg.value_steps = run.cfg.imagination_steps
    train.train_imagination(run)
    after = load(copied, "agent.pt")["heads"]
    changed = {name.split("_")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"value"}


def test_the_cloned_policy_is_the_one_before_imagination(copied):
    _, agent, cloned = load_run(copied).load_agent(copied / "agent.pt")
    state = load(copied, "agent.pt")

    def is_saved(head, name, entry):
        weights = {f"{name}.{key}": x for key, x in head.state_dict().items()}
        return all(torch.equal(x, state[entry][name]) for name, x in weights.items())

    assert is_saved(cloned, "policy_head", "ema")
    assert not is_saved(cloned, "policy_head", "heads")
    assert is_saved(agent.policy_head, "policy_head", "heads")
    assert is_saved(agent.value_head, "value_head", "heads")


# --------------------------------------------------------------------------------------------------
# Policies

def random_actions(seed, T=400, count=8, **changes):
    """What RandomPolicy does in T steps of `count` episodes: (T, count, A)."""
    cfg = train.TrainConfig(**{"action_spec": (999, 999), "hold": 3} | changes)
    policy = train.RandomPolicy(cfg, seed)
    policy.reset(range(count))
    return np.stack([policy.act(None, None) for _ in range(T)])


def durations(actions):
    """How long every action is held, an array for each of the episodes; actions (T, count)."""
    edges = [np.flatnonzero(np.diff(row, prepend=-1, append=-1)) for row in actions.T]
    # the last one is cut short
    return [np.diff(edge)[:-1] for edge in edges]


def test_random_actions_are_held_for_a_while_or_change_in_every_step():
    actions = random_actions(0, uniform_share=0.0)
    # every component for itself
    for i in (0, 1):
        held = np.concatenate(durations(actions[..., i]))
        shares = np.bincount(held, minlength=4)[1:4] / len(held)
        assert np.abs(shares - 1 / 3).max() < 0.06
    changes = np.diff(actions[:, 0], axis=0) != 0
    assert (changes[:, 0] != changes[:, 1]).any()
    mixed = random_actions(0, T=60, count=400, uniform_share=0.25)
    are_held = [held.max() > 1 for held in durations(mixed[..., 0])]
    assert abs(np.mean(are_held) - 0.75) < 0.08


def test_random_actions_cover_the_space_and_follow_from_the_seed():
    actions = random_actions(0, action_spec=(5, 3))
    for i, n in enumerate((5, 3)):
        shares = np.bincount(actions[..., i].ravel(), minlength=n) / actions[..., i].size
        assert np.abs(shares - 1 / n).max() < 0.05
    assert np.array_equal(actions, random_actions(0, action_spec=(5, 3)))
    assert not np.array_equal(actions, random_actions(1, action_spec=(5, 3)))


def test_the_agent_acts_on_what_it_saw_and_on_the_action_that_led_there():
    cfg = train.TrainConfig(**dataclasses.asdict(config(image_size=(8, 8), action_spec=(3, 2))))
    tokenizer, agent = frozen(Tokenizer(cfg)), frozen(new_agent(image_size=(8, 8)))
    policy = train.AgentPolicy(tokenizer, agent, cfg, seed=0)
    passes = record(agent.dynamics, "denoise")
    frames = np.random.default_rng(0).integers(0, 256, (5, 2, 8, 8, 3), np.uint8)
    given = [np.full((2, 2), -1, np.int16)]
    policy.reset([0, 1])
    for frame in frames:
        given.append(policy.act(frame, given[-1]))
    actions = torch.cat([call["actions"] for call in passes], 1)
    assert torch.equal(actions, torch.as_tensor(np.stack(given[:-1], 1)))
    # latents are noisy, at the context level
    z = tokenizer.encode(train.to_images(frames.swapaxes(0, 1), "cpu"))
    seen = torch.cat([call["z"] for call in passes], 1)
    assert torch.corrcoef(torch.stack((z.flatten(), seen.flatten())))[0, 1] > 0.9
    explorer = train.AgentPolicy(tokenizer, agent, cfg, 0, random_share=1.0)
    explorer.reset([0, 1])
    assert explorer.act(frames[0], given[0]).max() < 3 and len(passes) == 6


# --------------------------------------------------------------------------------------------------
# Sizes and the README

def test_every_nth_batch_is_long_and_has_the_same_number_of_frames():
    cfg = train.TrainConfig(batch_size=16, short_length=12, long_length=48, long_every=3,
                            shortcut_every=4)
    shapes = [cfg.sequence_shapes(step) for step in range(4)]
    assert shapes == [(4, 48), (16, 12), (16, 12), (4, 48)]
    # in whole groups, of which one sequence bootstraps
    cfg.long_length = 36
    assert cfg.sequence_shapes(0) == (4, 36)


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_describe_models_that_can_be_built(preset):
    cfg = train.TrainConfig(**train.PRESETS[preset])
    with torch.device("meta"):
        Tokenizer(cfg), Agent(cfg)
    assert cfg.tokenizer_length > cfg.tokenizer_context
    assert cfg.long_length > cfg.context
    assert cfg.k <= cfg.k_max


def test_the_code_reaches_the_size_of_the_paper(capsys):
    main("--preset", "paper", "--phase", "bench")
    sizes = json.loads(capsys.readouterr().out)
    assert 3.5e8 < sizes["tokenizer_parameters"] < 4.5e8
    assert 1.4e9 < sizes["dynamics_parameters"] < 1.8e9
    error(capsys, lambda: main("--preset", "paper", "--phase", "bench", "--width", 30), "width")


README = (Path(train.__file__).parent / "README.md").read_text()


def test_the_code_of_the_readme_runs_and_its_episode_is_one(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    blocks += re.findall(r"`(np\.savez_compressed\(.*?)`", README, re.S)
    assert len(blocks) == 2
    (tmp_path / "runs/mine/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {"np": np, "frames": np.zeros((9, 64, 64, 3), np.uint8),
                     "actions": np.full((9, 2), -1, np.int16), "rewards": np.zeros(9, np.float32)})
    [path] = tmp_path.rglob("*.npz")
    assert len(train.load_episode(path, train.TrainConfig())["frames"]) == 9
