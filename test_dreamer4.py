"""Tests of dreamer4.py and train.py, as statements about the method. Run: python -m pytest"""
import ast
import dataclasses
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

import dreamer4
import train
from dreamer4 import (Agent, Block, Cache, Config, Dream, Dynamics, LossNorm, Tokenizer, attend,
                      Transformer, frozen, generate, imagine, lambda_returns, pmpo_loss,
                      sample_signal_and_step, symexp, two_hot, two_hot_mean)

# Several would only wait for each other on models so small, and ten times as long on a busy machine
torch.set_num_threads(1)
# NumPy's warnings are faults; slow is a mark that pytest need not know
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
ROOT = Path(train.__file__).parent
TINY = dict(image_size=(12, 20), action_spec=(3, 2), patch=8, latents=4, latent_channels=4,
            tokenizer_width=32, tokenizer_depth=4, tokenizer_heads=2, tokenizer_context=3, pack=2,
            width=32, depth=4, heads=4, kv_heads=2, registers=1, time_every=2, context=3, k_max=8,
            shortcut_every=2, head_width=32, bins=41, distances=3, tasks=2)
NETWORKS = pytest.mark.parametrize("name", ["encoder", "decoder", "dynamics", "agent"])
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


def learn(model, steps, rate, measure):
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=rate), []
    for step in range(steps):
        loss, metrics = measure(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(metrics)
    return history


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- Attention: the kernel, positions, who sees whom within a frame ------------------------------
class OnGPU(torch.Tensor):
    """A tensor on the CPU that takes the way of those on a GPU."""
    is_cuda = True


@pytest.mark.parametrize("kind", [torch.Tensor, OnGPU])
@pytest.mark.parametrize("shape", [None, (5, 7), (2, 1, 5, 7)])
def test_grouped_queries_are_attention_with_repeated_keys(shape, kind):
    q, (k, v) = torch.randn(2, 5, 4, 8).transpose(1, 2), torch.randn(2, 2, 2, 7, 8)
    mask = (torch.rand(shape) < 0.6) | (torch.arange(7) == 0) if shape else None
    output = attend(q.as_subclass(kind), k, v, mask).as_subclass(torch.Tensor)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    assert_close(output, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_attention_over_time_depends_only_on_distances_whatever_the_norms_have_learned():
    block, x, pos = Block(32, 4, 2, over_time=True), torch.randn(1, 6, 2, 32), torch.arange(6)
    mask = torch.ones(6, 6).bool()
    torch.nn.init.normal_(block.q_norm.weight)  # a norm after RoPE would break this
    y, shifted, stretched = (block(x, mask, pos) for pos in (pos, pos + 50, 2 * pos))
    assert_close(shifted, y, atol=1e-4, rtol=1e-4)
    assert (stretched - y).abs().max() > 1e-2


def network(name, T, **changes):
    """run(x, cache=None) -> outputs (B, T, ...) in a list, an input (B, T, ...), transformer."""
    tokenizer, dynamics = Tokenizer(config(**changes)), Dynamics(config(**changes))
    x, task = torch.rand(2, T, 4, 4) * 2 - 1, torch.randn(32) if name == "agent" else None

    def run(x, cache=None):
        if name in ("encoder", "decoder"):
            process = tokenizer.encode if name == "encoder" else tokenizer.reconstruct
            return [process(x, cache=cache)]
        # Actions and signal levels are read off the latents, to change and to stream with them.
        actions, tau = (x[:, :, 0, :2] > 0).long(), (x[:, :, 1, 0] > 0) * 0.5
        outputs = dynamics.denoise(x, tau, torch.full_like(tau, 0.25), actions, task, cache)
        if cache is not None:
            cache.frames += x.shape[1]
        return [output for output in outputs if output is not None]

    x = torch.rand(2, T, 3, 12, 20) if name == "encoder" else x
    return run, x, getattr(tokenizer, name, dynamics.transformer)


# Through all layers and frames, every token sees every token, except for one pair per network.
@pytest.mark.parametrize("name, blind", [("encoder", ("patch", "latent")),
                                         ("decoder", ("latent", "query")),
                                         ("agent", ("world", "agent"))])
@torch.no_grad()
def test_who_sees_whom(name, blind):
    run, x, net = network(name, T=3)
    calls = record(net, "forward")
    run(x)
    groups, x = calls[0]["groups"], torch.randn(1, *calls[0]["x"].shape[1:])
    kinds = [kind for kind, count in groups for _ in range(count)]
    for i, key in enumerate(kinds):
        changed = x.clone()
        changed[:, 0, i] = torch.randn(32)
        moved = (net(changed, groups) - net(x, groups)).abs().amax((0, 3))  # (T, S)
        for j, query in enumerate(kinds):
            right = moved[:, j] == 0 if (query, key) == blind else moved[:, j] > 1e-6
            assert right.all(), f"{query} {j} after a change of {key} {i} in frame 0"


# All layers are over time, the last one, the one before it, none.
@pytest.mark.parametrize("time_every, depth", [(1, 2), (2, 2), (2, 3), (3, 2)])
def test_tokens_that_nobody_reads_are_seen_all_the_same(time_every, depth):
    net, x = Transformer(32, depth, 4, 2, 3, time_every), torch.randn(2, 5, 6, 32)
    for groups in ((("world", 6),), (("latent", 4), ("query", 2)), (("patch", 4), ("latent", 2))):
        assert_close(net(x, groups, unread=4), net(x, groups)[:, :, 4:])


# ---- Time: causal, banded, and the same in a stream ----------------------------------------------
@pytest.mark.parametrize("C", [1, 3])
@NETWORKS
def test_a_time_layer_sees_exactly_the_last_C_frames(name, C):
    run, x, _ = network(name, T=8, context=C, tokenizer_context=C, depth=2, tokenizer_depth=2)
    changed = x.clone()
    changed[:, 2] = x[:, 2].roll(1, 0)  # frame 2 becomes that of the other video
    for output, other in zip(run(x), run(changed)):
        moved = (output - other).flatten(2).abs().amax((0, 2))
        assert (moved[2:2 + C] > 1e-5).all() and moved[:2].sum() == moved[2 + C:].sum() == 0


@pytest.mark.parametrize("chunk", [1, 2, 5])
@NETWORKS
@torch.no_grad()
def test_streaming_equals_the_full_sequence_also_after_eviction(name, chunk, C=3):
    (run, x, _), cache, streamed, rings = network(name, T=4 * C), Cache(), [], set()
    for part in x.split(chunk, 1):
        streamed.append(run(part, cache))
        rings.add(tuple((ring.data_ptr(), *ring.shape) for ring in cache.layers.values()))
    for full, parts in zip(run(x), zip(*streamed)):
        assert (full - torch.cat(parts, 1)).abs().max() < 1e-4
    assert cache.frames == 4 * C and len(rings) == 1  # they stay what they are
    assert [ring.shape[-2] for ring in cache.layers.values()] == [C, C]


@torch.no_grad()
def test_passes_that_are_not_counted_see_the_stream_and_leave_no_trace():
    dynamics, z, actions = new_dynamics(2, 9)
    labels = torch.full((2, 9), 0.5), torch.full((2, 9), 0.125), actions
    task, cache, untouched, drafts = torch.randn(32), Cache(), Cache(), torch.randn(2, 9, 4, 4)
    for t in range(9):
        now, draft = [x[:, t:t + 1] for x in labels], drafts[:, t:t + 1]
        if t:  # as in use: half-denoised frames come without the agent token, finished ones with it
            peek, _ = dynamics.denoise(draft, *now, cache=cache)
            drafted = torch.cat((z[:, :t], draft), 1)
            full, _ = dynamics.denoise(drafted, *(x[:, :t + 1] for x in labels))
            assert_close(peek[:, 0], full[:, t], atol=1e-4, rtol=0)
        pair = [dynamics.denoise(z[:, t:t + 1], *now, task, c) for c in (cache, untouched)]
        assert all(torch.equal(*outputs) for outputs in zip(*pair))
        cache.frames += 1
        untouched.frames += 1
    assert all(torch.equal(ring, untouched.layers[i]) for i, ring in cache.layers.items())


def test_every_parameter_is_trained_as_is_every_level_and_size():
    dynamics, z, actions = new_dynamics(32, 8)
    tables, draws = [dynamics.signal.weight, dynamics.step.weight], dynamics.draw(32, 8)
    assert [len(table) for table in tables] == [8, 4]  # τ is 0 ... 7/8, d is 1, 1/2, 1/4, 1/8
    loss = dynamics.loss(z, actions, draws)[0][0]
    gradients = torch.autograd.grad(loss, [*tables, *dynamics.parameters()])
    assert all(gradient.any() for gradient in gradients)
    assert all(gradient.any(1).all() for gradient in gradients[:2])


# ---- 1. Tokenizer --------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(12, 20), (16, 8), (5, 33)])
def test_images_of_any_size_are_padded_and_cropped_back_and_others_are_refused(size):
    tokenizer, images = Tokenizer(config(image_size=size)), torch.rand(2, 3, 3, *size)
    patches = tokenizer.patchify(images)
    assert torch.equal(patches[0, 0, 0].view(3, 8, 8)[:, :5], images[0, 0, :, :5, :8])
    assert torch.equal(tokenizer.unpatchify(patches), images)
    latents = tokenizer.encode(images)
    output = tokenizer.decode(10 * latents)
    assert latents.abs().max() < 1 and output.shape == images.shape
    assert output.min() >= 0 and output.max() <= 1
    for wrong in (torch.rand(1, 1, 3, 64, 64), images.mul(255).byte(), images[:, :, :2]):
        with pytest.raises(ValueError, match="images"):
            tokenizer.encode(wrong)


@torch.no_grad()
def test_masked_patches_are_a_uniform_share_per_image_and_replaced_by_the_learned_embedding():
    tokenizer, images = Tokenizer(config()), torch.rand(1, 2, 3, 12, 20)
    mask = (torch.arange(6) == 0).expand(1, 2, 6)  # hides the upper left 8 x 8 pixels
    latents, other = tokenizer.encode(images, mask), images.clone()
    other[..., :8, :8] = 0
    assert torch.equal(tokenizer.encode(other, mask), latents)  # hidden pixels do not count
    tokenizer.mask_token.neg_()  # the embedding stands in their place
    assert not torch.allclose(tokenizer.encode(images, mask), latents)
    tokenizer = Tokenizer(config(image_size=(256, 256)))
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    share = tokenizer.draw(60, 20).float().mean(-1)  # of 1024 patches, for each image
    assert_close(torch.quantile(share.flatten(), levels), 0.9 * levels, atol=0.04, rtol=0)
    assert share.max() < 0.96 and share.std(1).min() > 0.1  # the images of one video differ


def test_reconstruction_covers_all_patches_beside_a_perceptual_loss_that_is_a_callable():
    tokenizer, images = Tokenizer(config()), torch.rand(2, 3, 3, 12, 20)
    mask, weights = tokenizer.draw(2, 3), list(tokenizer.parameters())
    output = tokenizer.reconstruct(tokenizer.encode(images, mask))
    mse, l1 = F.mse_loss(output, images), F.l1_loss(output, images)
    loss, metrics = tokenizer(images, mask, F.l1_loss)
    assert_close(metrics, {"mse": mse.detach(), "perceptual": l1.detach()})
    gradients = torch.autograd.grad(loss, weights)
    expected = torch.autograd.grad(mse / mse.detach() + 0.2 * l1 / l1.detach(), weights)
    assert_close(gradients, expected, atol=1e-4, rtol=1e-3)
    assert all(x.any() for x in gradients)  # every parameter is trained


# ---- 2. Dynamics: signal levels, step sizes, shortcut forcing, generation ------------------------
def test_steps_are_powers_of_two_and_signals_lie_on_the_grid_of_their_step():
    tau, d = sample_signal_and_step((200, 200), 8)
    assert d.unique().tolist() == [1 / 8, 1 / 4, 1 / 2, 1]
    # k is uniform, the grid is 0, d, ..., 1 - d, and τ is uniform on it.
    for k in (1, 2, 4, 8):
        levels, counts = tau[d == 1 / k].unique(return_counts=True)
        assert abs(counts.sum() / d.numel() - 1 / 4) < 0.02
        assert levels.tolist() == [i / k for i in range(k)]
        assert (counts / counts.sum() - 1 / k).abs().max() < 0.02
    assert tau.std(0).min() > 0.1 and tau.std(1).min() > 0.1  # every frame draws anew


@pytest.mark.parametrize("k_max", [1, 8])
def test_shortcut_forcing_is_eq_7_in_velocities_both_terms_ramped_targets_without_gradient(k_max):
    dynamics, z1, actions = new_dynamics(8, k_max=k_max, context_share=0.3)
    weight = torch.tensor(0.7, dtype=torch.double, requires_grad=True)

    def f(z, tau, d, *args, **kwargs):  # any function of all its arguments would do
        return torch.sin(weight * z + 2 * tau[..., None, None] - 3 * d[..., None, None])

    dynamics.denoise = lambda *args, **kwargs: (f(*args, **kwargs), None)
    draws = {name: x.double() if x.dim() > 1 else x for name, x in dynamics.draw(8, 6).items()}
    valid, z1 = torch.arange(6) < torch.randint(2, 7, (8, 1)), z1.double()
    (loss, metrics), _ = dynamics.loss(z1, actions, draws, valid=valid)
    tau, d, fine = draws["tau"], draws["d"], draws["d"] == 1 / k_max
    t, step = tau[..., None, None], d[..., None, None]
    z = (1 - t) * draws["noise"] + t * z1
    # Two half steps and their velocities.
    b1 = (f(z, tau, d / 2) - z) / (1 - t)
    z2 = z + b1 * step / 2
    b2 = (f(z2, tau + d / 2, d / 2) - z2) / (1 - t - step / 2)
    v = ((b1 + b2) / 2).detach()
    guess = f(z, tau, d)
    flow = (guess - z1).square()
    shortcut = (1 - t) ** 2 * ((guess - z) / (1 - t) - v).square()
    error = torch.where(step == 1 / k_max, flow, shortcut).mean((-2, -1)) * valid
    expected = ((0.9 * tau + 0.1) * error).mean()
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))
    parts = {"flow": error[fine & valid].mean(), "shortcut": error[~fine & valid].mean()}
    assert_close(metrics, {name: x.detach().nan_to_num() for name, x in parts.items()})


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_generation_with_an_oracle_returns_the_data_in_k_steps(k):
    (data, noise), calls = torch.randn(2, 1, 1, 4, 4), []

    def oracle(z, tau, d):
        assert_close(z, (1 - tau) * noise + tau * data)  # on the way from noise to data
        calls.append((tau, d))
        return data

    assert_close(generate(oracle, noise, k), data)
    assert calls == [(i / k, 1 / k) for i in range(k)]


@pytest.mark.parametrize("signal, k_max, level", [
    (0.9, 8, 7 / 8), (0.9, 64, 58 / 64), (0.9, 4, 3 / 4), (1, 8, 7 / 8)])
def test_shares_bootstrap_are_images_and_are_at_the_context_level(signal, k_max, level):
    draws = Dynamics(config(shortcut_every=4, context_share=0.0)).draw(2000, 4)
    tau, d, others = draws["tau"], draws["d"], torch.arange(2000) % 4 != 0
    assert d[::4].unique().tolist() == [1 / 8, 1 / 4, 1 / 2, 1] and (tau % d == 0).all()
    assert (d[others] == 1 / 8).all() and (8 * tau[others]).unique().tolist() == list(range(8))
    assert abs(draws["separate"].float().mean() - 0.3) < 0.04
    dynamics = Dynamics(config(context_signal=signal, k_max=k_max, context_share=0.7))
    assert dynamics.config.context_level == level  # the nearest one that has an embedding
    draws = dynamics.draw(2000, 6)
    at_level = ((draws["tau"] == level) & (draws["d"] == 1 / k_max)).float().mean(1)
    # Some more frames of videos, and the only ones of separate images, are there by chance.
    for rows in (torch.arange(2000) % 2 == 0, torch.arange(2000) % 2 == 1):
        assert abs(at_level[rows & ~draws["separate"]].mean() - 0.7) < 0.03 + 0.3 / k_max
        assert at_level[rows & draws["separate"]].mean() < 1.5 / k_max


def test_actions_are_sums_of_lookups_and_condition_the_frame_they_led_to_and_what_follows():
    dynamics = Dynamics(config(action_spec=(3, 2, 4)))
    table, base = dynamics.action_table.weight, dynamics.action_base
    embedded = dynamics.embed_actions(torch.tensor([[[2, 0, 3], [-1, -1, -1], [0, 1, -1]]]))[0]
    expected = base + table[2] + table[3] + table[8], base, base + table[0] + table[4]
    assert_close(embedded, torch.stack(expected))  # unknown ones are the learned embedding alone
    with pytest.raises(RuntimeError, match="action_spec"):
        dynamics.embed_actions(torch.tensor([[[0, 2, 0]]]))  # it would read the next one's table
    dynamics, z, actions = new_dynamics(1, 4)
    tau, d, changed = torch.zeros(1, 4), torch.full((1, 4), 0.25), actions.clone()
    changed[:, 1, 1] = 1 - changed[:, 1, 1]
    moved = dynamics.denoise(z, tau, d, changed)[0] - dynamics.denoise(z, tau, d, actions)[0]
    assert (moved.abs().amax((0, 2, 3)) > 1e-4).tolist() == [False, True, True, True]


def test_separate_images_have_neither_past_nor_action_and_leave_the_others_alone():
    dynamics, z, actions = new_dynamics(3, 5)
    inputs = z, torch.full((3, 5), 0.5), torch.full((3, 5), 0.25), actions
    separate = torch.tensor([True, False, True])
    x, _ = dynamics.denoise(*inputs, separate=separate)
    videos, _ = dynamics.denoise(*inputs)
    images = dynamics.denoise(*(part.flatten(0, 1)[:, None] for part in inputs))[0].view_as(x)
    assert_close(x, torch.where(separate[:, None, None, None], images, videos))
    calls, alone = record(dynamics, "denoise"), torch.where(separate[:, None, None], -1, actions)
    dynamics.loss(z, actions, dynamics.draw(3, 5) | {"separate": separate})
    for call, n in zip(calls, (2, 2, 1), strict=True):  # half steps of every second sequence
        assert torch.equal(call["actions"], alone[::n])
        assert torch.equal(call["separate"], separate[::n])


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
@pytest.mark.parametrize("k", [1, 4])
def test_a_dreamed_frame_takes_k_passes_and_finished_frames_one_more_at_the_context_level_for_h(k):
    dynamics, z, actions = new_dynamics(64, 8)
    calls = record(dynamics, "denoise")
    dream, action = Dream(dynamics, torch.randn(32), k, None, 1.5), torch.tensor([[2, 1]] * 64)
    h_context = dream.reset(z, actions)
    frame, h = dream.step(action)
    context, *passes, last = calls
    for call, finished, state in (context, z, h_context), (last, frame[:, None], h):
        assert (call["tau"] == 7 / 8).all() and (call["d"] == 1 / 8).all()
        noise = (call["z"] - 7 / 8 * finished) * 8  # it is 7/8 frame and 1/8 noise
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        assert abs((noise * finished).mean()) < 0.1
        assert torch.equal(state, call["result"][1][:, -1])
    assert torch.equal(context["actions"], actions) and dream.cache.frames == 9
    labels = [(call["tau"][0, 0].item(), call["d"][0, 0].item()) for call in passes]
    assert labels == [(i / k, 1 / k) for i in range(k)]
    assert abs(passes[0]["z"].std() - 1.5) < 0.1  # of the temperature
    assert not any(call.get("task_embedding") is not None for call in passes)
    assert all(torch.equal(call["actions"], action[:, None]) for call in passes + [last])
    assert_close(frame, passes[-1]["result"][0][:, 0])  # the last step lands on its prediction
    for wrong in (-1, 0, 3, 16):
        with pytest.raises(ValueError, match=f"k = {wrong}"):
            Dream(dynamics, k=wrong)


def test_in_imagination_h_chooses_the_action_that_leads_to_the_next_frame(H=5):
    agent = new_agent()
    calls = record(agent.dynamics, "denoise"), record(agent, "policy"), record(agent, "sample")
    rollout = imagine(agent, *new_batch()[:2], horizon=H, k=2)
    h, (denoise, policy, sample) = rollout["h"], calls
    assert h.shape == (4, H + 1, 32) and rollout["z"].shape == (4, H, 4, 4)
    context, *finished = [call for call in denoise if call["result"][1] is not None]
    assert torch.equal(h[:, 0], context["result"][1][:, -1])
    for t in range(H):  # h_t chooses a_t, which leads to frame t + 1
        for pair in [(policy[t]["h"], h[:, t]), (sample[t]["logits"], policy[t]["result"]),
                     (finished[t]["actions"][:, 0], rollout["actions"][:, t]),
                     (finished[t]["result"][1][:, 0], h[:, t + 1])]:
            assert torch.equal(*pair)
    assert_close(rollout["rewards"], agent.reward(h[:, 1:]).detach())  # of arriving there
    assert_close(rollout["continues"], agent.continuation(h[:, 1:]).detach())


# ---- 3. Agent: numbers as two-hot, targets, returns ----------------------------------------------
def test_two_hot_represents_every_value_and_its_own_bins_exactly():
    assert torch.equal(two_hot(BINS, BINS), torch.eye(255))
    assert torch.equal(two_hot(torch.tensor([1e9, -1e9]), BINS), torch.eye(255)[[254, 0]])
    x = torch.randn(1000) * 10 ** (torch.rand(1000) * 5 - 2)
    weights = two_hot(x, BINS)
    assert (weights >= 0).all() and ((weights > 0).sum(-1) <= 2).all()
    assert_close(weights @ BINS, x.clamp(BINS[0], BINS[-1]), atol=1e-4, rtol=1e-4)
    assert_close(two_hot_mean(weights.log(), BINS), weights @ BINS, atol=1e-4, rtol=1e-4)
    agent, h = Agent(config(bins=255)), torch.randn(3, 32)
    assert agent.reward(h).abs().max() < 1e-6 and torch.equal(agent.bin_values, BINS)


def test_eq_9_clones_the_actions_that_follow_and_predicts_the_rewards_from_here_on(B=4, T=6, L=3):
    agent, (z, actions, rewards, continues) = new_agent(), new_batch(B, T)
    draws, total = agent.dynamics.draw(B, T), {"policy": 0, "reward": 0, "continue_": 0}
    _, metrics = agent(z, actions, rewards, continues, draws, task=1)
    _, h = agent.dynamics.loss(z, actions, draws, agent.task.weight[1])
    policy, reward, continue_ = agent.policy_head(h), agent.reward_head(h), agent.continue_head(h)
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


def test_lambda_returns_are_the_recursion():
    rewards, values, continues = torch.randn(2, 5), torch.randn(2, 6), torch.rand(2, 5)
    expected = values.clone()  # the last return is the last value
    for t in reversed(range(5)):
        ahead = 0.2 * values[:, t + 1] + 0.8 * expected[:, t + 1]
        expected[:, t] = rewards[:, t] + 0.9 * continues[:, t] * ahead
    assert_close(lambda_returns(rewards, values, continues, 0.9, 0.8), expected[:, :5])


def categoricals(logits):
    parts = logits.split((3, 2), -1)
    return [Categorical(0.99 * part.softmax(-1) + 0.01 / part.shape[-1]) for part in parts]


def test_policy_is_a_product_of_categoricals_with_a_uniform_floor_and_acts_by_sampling():
    agent, logits, prior = Agent(config()), 2 * torch.randn(50, 5), 2 * torch.randn(50, 5)
    actions = torch.stack([part.sample() for part in categoricals(logits)], -1)
    expected = [part.log_prob(actions[:, i]) for i, part in enumerate(categoricals(logits))]
    assert_close(agent.log_prob(logits, actions), sum(expected))
    actions[:, 1] = -1  # an unlabeled component says nothing
    assert_close(agent.log_prob(logits, actions), expected[0])
    kl = sum(kl_divergence(p, q) for p, q in zip(categoricals(logits), categoricals(prior)))
    assert_close(agent.kl(logits, prior), kl)  # KL[policy || prior], not the reverse
    actions = agent.sample(logits[:1].expand(20000, 5))
    for i, part in enumerate(categoricals(logits[0])):
        assert (actions[:, i].bincount(minlength=3 - i) / 20000 - part.probs).abs().max() < 0.02


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])  # only the sign of the advantage counts
def test_pmpo_by_hand_where_an_empty_set_is_exactly_zero(scale):
    log_prob = torch.tensor([[-1.0, -2, -3, -4]], requires_grad=True)
    advantage, kl = scale * torch.tensor([[5.0, 0, -0.1, 9]]), torch.tensor([[1.0, 2, 3, 40]])
    alive, one = torch.tensor([[1.0, 1, 1, 0]]), torch.ones(1, 4)
    # D+ holds -1 and -2, D- holds -3, the last step comes after an imagined end.
    loss = pmpo_loss(log_prob, advantage, kl, alive, alpha=0.4, beta=0.3)
    assert_close(loss, torch.tensor((1 - 0.4) * -3.0 - 0.4 * -1.5 + 0.3 * 2.0))
    for sign, factor in ((1, -0.4), (-1, 0.6)):  # raises good actions, lowers bad ones
        loss = pmpo_loss(log_prob, sign * scale * one, 0 * one, one, 0.4, 0.3)
        assert_close(torch.autograd.grad(loss, log_prob)[0], factor / 4 * one)
        loss = pmpo_loss(log_prob, sign * one, one, 0 * one, 0.4, 0.3)  # all after an end
        assert loss == 0 and not torch.autograd.grad(loss, log_prob)[0].any()


def test_value_learns_returns_policy_leaves_the_prior_at_a_price_and_nothing_counts_after_the_end():
    agent, prior = new_agent(), new_agent().policy_head  # not even a prior that could learn does
    continues = torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    rollout = imagine(agent, *new_batch(3)[:2], horizon=4, k=1)
    rollout |= {"rewards": torch.randn(3, 4), "continues": continues}
    # The action that led to an end counts, and the context itself may have ended.
    alive = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    alive = alive * agent.continuation(rollout["h"][:, :1]).detach()
    values, h = agent.value(rollout["h"]).detach(), rollout["h"][:, :4]
    returns = lambda_returns(rollout["rewards"], values, continues, 0.997, 0.95)
    logits = agent.policy(h)
    log_prob, kl = agent.log_prob(logits, rollout["actions"]), agent.kl(logits, prior(h)[:, :, 0])
    policy = pmpo_loss(log_prob, returns - values[:, :4], kl, alive, 0.5, 0.3)
    log_p = agent.value_head(h)[:, :, 0].log_softmax(-1)
    value = -((two_hot(returns, agent.bin_values) * log_p).sum(-1) * alive).mean()
    for weight in (0.0, 1.0):  # a weight of 0 trains the value first, alone
        loss, metrics = agent.imagination_loss(rollout, prior, weight)
        assert_close(loss, weight * policy + value)
        assert_close((metrics["policy"], metrics["value"]), (policy.detach(), value.detach()))
    loss.backward()
    trained = [name for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[0] for name in trained} == {"policy_head", "value_head"}
    assert all(p.grad is None for p in prior.parameters())


def test_loss_terms_of_any_scale_weigh_the_same():
    norm, (x, y) = LossNorm("big", "small"), torch.ones(2, requires_grad=True).unbind()
    for _ in range(3):  # from the first step on: 1 and -1, divided by root mean squares
        loss = norm({"big": 1e6 * x, "small": -1e-3 * y})
        gradients = torch.autograd.grad(loss, (x, y), retain_graph=True)
        assert_close((loss, *gradients), (*torch.tensor([0.0, 1, -1]),))
    norm.half().eval()  # in evaluation the scale stays, which half precision could not hold
    for _ in range(2):
        assert_close(norm({"big": 3e6 * x, "small": 1e-3 * y}), torch.tensor(4.0))


@pytest.mark.parametrize("new", [Tokenizer, Dynamics, Agent])
def test_padding_at_the_end_costs_nothing_whatever_is_in_it(new, B=4, T=6):
    model, lengths = new(config(separate_images=0.0)), [6, 2, 3, 5]
    valid, draws = torch.arange(T) < torch.tensor(lengths)[:, None], Dynamics(config()).draw(B, T)

    def measure(valid, draws, images, mask, *batch):
        inputs = {Tokenizer: (images, mask), Dynamics: (*batch[:2], draws),
                  Agent: (*batch, draws)}[new]
        return model(*inputs, valid=valid)[1]

    batch = torch.rand(B, T, 3, 12, 20), Tokenizer(config()).draw(B, T), *new_batch(B, T)
    metrics = measure(valid, draws, *batch)
    # A mean over all frames of the batch: the sum over what the sequences are without padding.
    total = dict.fromkeys(metrics.keys() - {"flow", "shortcut"}, 0)
    for i, length in enumerate(lengths):
        part = {key: x[i:i + 1, :length] if x.dim() > 1 else x[i:i + 1] for key, x in draws.items()}
        alone = measure(None, part, *(x[i:i + 1, :length] for x in batch))
        total = {key: x + alone[key] * length / (B * T) for key, x in total.items()}
    assert_close(total, {key: metrics[key] for key in total})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_models_of_every_precision_train_and_their_bins_stay_exact(dtype):
    tokenizer, agent = Tokenizer(config()).to(dtype), new_agent().to(dtype)
    tokenizer_loss, _ = tokenizer(torch.rand(2, 3, 3, 12, 20), tokenizer.draw(2, 3))
    agent_loss, _ = agent(*new_batch(), agent.dynamics.draw(4, 6))
    rollout = imagine(agent, *new_batch()[:2], horizon=2, k=2)
    policy_loss, _ = agent.imagination_loss(rollout, frozen(agent.policy_head))
    (tokenizer_loss + agent_loss + policy_loss).backward()
    for p in (*tokenizer.parameters(), *agent.parameters()):
        assert p.dtype == dtype and p.grad.isfinite().all()
    assert torch.equal(agent.float().bin_values, symexp(torch.linspace(-10, 10, 41)))


@pytest.mark.parametrize("steps, terms", [
    (100, {"mse": 0.15}), (80, dict.fromkeys(("dynamics", "policy", "reward", "continue_"), 0.5))])
def test_one_batch_can_be_learned_by_heart(steps, terms):
    model, images = Tokenizer(config(latent_channels=16)), torch.rand(6, 3, 3, 5)
    images = F.interpolate(images, size=(12, 20)).view(2, 3, 3, 12, 20)
    batch = images, model.draw(2, 3, mask_max=0.0)
    if "dynamics" in terms:
        model = Agent(config(separate_images=0.0))
        batch = *new_batch(), model.dynamics.draw(4, 6)
    history = learn(model, steps, 3e-3, lambda step: model(*batch))
    assert all(history[-1][term] < share * history[0][term] for term, share in terms.items())


@pytest.mark.parametrize("field, value", [
    ("image_size", (64,)), ("image_size", (0, 64)), ("action_spec", ()), ("action_spec", (3, 0)),
    ("k_max", 6), ("latents", 5), ("width", 30), ("width", 12), ("width", math.nan), ("bins", 1),
    ("tokenizer_width", 33), ("tokenizer_width", 6), ("heads", 3), ("kv_heads", 3), ("depth", 1),
    ("context_share", 1.0), *((field.name, value) for field in dataclasses.fields(Config)
                              for value in {int: [0], float: [-0.01, 1.01, math.nan]}.get(
        field.type, []) if (field.name, value) != ("beta", 1.01))])
def test_config_refuses_what_cannot_work_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        config(**{field: value})


# ---- The script, in an environment that says in its pictures what happened -----------------------
class Dot(gym.Env):
    """Shows the steps taken and the last action; the seed is the step in which it ends."""
    action_space, metadata = Discrete(5), {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None, seen=(16, 16, 3), picture="(t, a, 7)", reward="1.0 + a"):
        self.observation_space = Box(0, 255, seen, np.uint8)
        self.picture, self.reward = picture, reward

    def value(self, text):
        return eval(text, {"np": np, "t": self.t, "a": self.a})

    def render(self):
        return (color := self.value(self.picture)) and np.full((16, 16, 3), color, np.uint8)

    def look(self):
        shape = self.observation_space.shape
        return self.render() if shape == (16, 16, 3) else np.zeros(shape, np.uint8)

    def reset(self, seed=None, options=None):
        self.t, self.a, self.end = 0, 99, seed
        return self.look(), {}

    def step(self, action):
        self.t, self.a = self.t + 1, action
        return self.look(), self.value(self.reward), self.t == self.end, False, {}


gym.register("Dot-v0", Dot)
gym.register("Plain-v0", lambda: Dot())  # it knows no render_mode
TOY = dict(
    preset="tiny", env="test_dreamer4:Dot-v0", image_size=(16, 16), episode_frames=12, depth=2,
    time_every=2, rounds=2, round_episodes=2, batch_size=8, shortcut_every=2, tokenizer_steps=5,
    dynamics_steps=5, agent_steps=4, imagination_steps=5, value_steps=1, temperature=1.5)
FLAGS = ["--device=cpu", *[f"--{name}={'x'.join(map(str, x)) if isinstance(x, tuple) else x}"
                           for name, x in TOY.items()]]


def toy(**changes):
    return train.TrainConfig(**train.PRESETS["tiny"] | TOY | {"action_spec": (5,)} | changes)


def new_run(folder, cfg=None, round=0):
    flags = SimpleNamespace(run=folder, device="cpu", checkpoint=None)
    run = train.Run(flags, cfg or toy())
    run.round = round
    return run


def main(*arguments):
    train.main([*map(str, arguments)])


def start(*arguments, **options):
    """python with these arguments, in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def fork(*arguments):
    """main() in a process that has nothing to import -> the process, what it prints."""
    reader, writer = os.pipe()

    def work():
        sys.stdout = open(writer, "w", buffering=1)
        main(*arguments)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    os.close(writer)
    return process, open(reader)


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(arguments, words): train.py ends with code 2 and one line, in which the words are."""
    def check(arguments, words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as noise, pytest.raises(SystemExit) as end:
            warnings.simplefilter("ignore", DeprecationWarning)
            runpy.run_path(train.__file__, run_name="__main__")
        lines = capsys.readouterr().err.splitlines() + [str(x.message) for x in noise]
        assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(word in lines[0] for word in words.split()), lines

    return check


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def load(folder, name):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The run of a copy of the two files in an empty folder: one for all test processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    printed, deadline = folder / "printed", time.monotonic() + 300
    try:
        folder.mkdir()
        for name in ("dreamer4.py", "train.py"):
            shutil.copy(ROOT / name, folder)
        process = start("train.py", "--preset", "tiny", cwd=folder)
        output = process.communicate(timeout=300)
        (folder / "output").write_text(json.dumps([process.returncode, *output]))
        (folder / "output").rename(printed)
    except FileExistsError:
        while not printed.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    return folder / "runs/default"


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    main(*FLAGS, "--run", folder)
    return folder


@pytest.fixture
def copied(toy_run, tmp_path):
    return Path(shutil.copytree(toy_run, tmp_path / "copy"))


def test_a_copy_of_the_two_files_in_an_empty_folder_runs_to_its_end_and_imports_little(finished):
    wanted = {"dreamer4", "torch", "numpy", "gymnasium", "imageio"}
    for module, names in ((dreamer4, {"torch"}), (train, wanted)):
        nodes = ast.walk(ast.parse(Path(module.__file__).read_text()))
        imports = [x for x in nodes if isinstance(x, (ast.Import, ast.ImportFrom))]
        found = {getattr(x, "module", x.names[0].name).split(".")[0] for x in imports}
        assert found - sys.stdlib_module_names == names
    code, stdout, stderr = json.loads((finished.parent.parent / "printed").read_text())
    assert (code, stderr) == (0, "")
    assert {path.name for path in finished.iterdir()} == set("""config.json metrics.jsonl .lock data
        latents tokenizer.pt dynamics.pt agent.pt eval.json episodes.csv tokenizer.gif dynamics.gif
        agent.gif dream.gif policy.gif""".split())
    # at three times their size: truth above dream, but beside its reconstruction
    for name, shape in {"tokenizer": (192, 384), "dynamics": (384, 768), "agent": (384, 768),
                        "dream": (384, 768), "policy": (192, 384)}.items():
        frames = imageio.imread(finished / f"{name}.gif", index=None)
        assert len({frame.tobytes() for frame in frames}) > 10 and frames.shape[1:3] == shape
    result, settings = (json.loads((finished / f"{x}.json").read_text())
                        for x in ("eval", "config"))
    assert json.loads(stdout.splitlines()[-1]) == result and len(result) == 3 * 3 + 3
    rows = [row.split(",") for row in (finished / "episodes.csv").read_text().splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        [policy, str(10 ** 9 + i)] for policy in ("random", "bc", "return") for i in (0, 1)]
    returns = [float(row[2]) for row in rows[-2:]]
    assert result["return_mean"] == pytest.approx(np.mean(returns), rel=1e-3)
    phases = [json.loads(line)["phase"] for line in (finished / "metrics.jsonl").open()]
    assert [*dict.fromkeys(phases)] == [*train.PHASES[:5]]
    # two components, of which gas and brake are one; rewards of -0.4 and 3 need no scale
    assert settings["action_spec"] == [5, 5] and settings["action_repeat"] == 4
    assert settings["reward_scale"] == load(finished, "agent.pt")["config"]["reward_scale"] == 1
    episode = np.load(finished / "data/0000000005.npz")
    assert {name: (x.shape, x.dtype) for name, x in episode.items()} == {
        "frames": ((40, 64, 64, 3), np.uint8), "actions": ((40, 2), np.int16),
        "rewards": ((40,), np.float32), "terminal": ((), np.bool_)}


def test_muon_goes_downhill_as_far_along_every_singular_vector():
    p = torch.nn.Parameter(torch.zeros(20, 6))
    p.grad, optimizer = torch.randn(20, 6), train.Muon([p], torch.float32)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    u, lengths, v = torch.linalg.svd(p.grad, full_matrices=False)
    steps = -(u.T @ p.detach() @ v.T) / (0.1 * 0.4 * 20 ** 0.5)
    assert_close(steps, torch.eye(6), atol=0.35, rtol=0)


# ---- Rounds, exact resume, several processes -----------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("name, dtype", [("avx512_bf16", torch.bfloat16),
                                         ("avx512_bw", torch.float32)])
def test_bfloat16_is_for_cpus_with_instructions_for_it(tmp_path, monkeypatch, name, dtype):
    # AVX512 alone only emulates it, at a quarter of float32's rate
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True})
    assert new_run(tmp_path).dtype == dtype


def test_blocks_are_compiled_for_long_phases_if_there_is_a_compiler(tmp_path, monkeypatch):
    from torch._inductor import config as inductor
    if not train.can_compile("cpu"):
        pytest.skip("needs a C++ compiler")
    cfg = toy(tokenizer_steps=200, dynamics_steps=199)
    run, model = new_run(tmp_path, cfg), torch.nn.Sequential(Block(32, 4, 2, over_time=False))
    (block,), x = model, torch.randn(2, 3, 5, 32)
    y = block(x, None)
    assert not run.compile("dynamics", model) and not block._compiled_call_impl
    assert run.compile("tokenizer", model) and block._compiled_call_impl
    assert_close(block(x, None), y)
    torch._dynamo.reset()
    train.can_compile.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-compiler",))
    assert not run.compile("tokenizer", model)


def test_a_new_round_goes_on_with_policy_and_value_beside_a_new_clone_and_in_hotter_dreams(
        copied, monkeypatch):
    before, temperatures, masked = load(copied, "agent.pt")["heads"], [], []
    imagination, draw = train.imagine, Tokenizer.draw
    monkeypatch.setattr(train, "imagine", lambda *args, temperature: temperatures.append(
        temperature) or imagination(*args, temperature=temperature))
    monkeypatch.setattr(Tokenizer, "draw", lambda self, B, T, mask_max: masked.append(
        mask_max) or draw(self, B, T, mask_max))
    cfg = toy(rounds=4, temperature=3.0, value_steps=5, tokenizer_steps=4, mask_max=0.8)
    for i in (0, 2):
        run = new_run(copied, cfg, round=i)
        train.train_tokenizer(run)
    assert masked == pytest.approx([0, 0.4, 0.8, 0.8] + [0.8] * 4)
    train.train_agent(run)
    state, (_, agent, clone) = load(copied, "agent.pt"), run.load_agent()
    for name, x in before.items():
        assert torch.equal(state["heads"][name], x) and torch.equal(agent.state_dict()[name], x)
        assert not torch.equal(state["ema"][name], x)
    for name, x in clone.policy_head.state_dict().items():
        assert torch.equal(x, state["ema"][f"policy_head.{name}"])
    train.train_imagination(run)
    # in the third of four rounds; training the value only leaves the policy at its prior
    assert set(temperatures) == {1 + (3 - 1) * 3 / 4}
    assert json.loads((copied / "metrics.jsonl").read_text().splitlines()[-1])["kl"] == 0
    after = load(copied, "agent.pt")["heads"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"value_head"}


@pytest.mark.slow  # once in every phase, but with -m slow six times
def test_a_run_killed_at_random_moments_of_all_phases_gives_the_same_bits(
        toy_run, tmp_path, refused, capsys, pytestconfig):
    folder, rng, killed = tmp_path / "run", np.random.default_rng(), []
    times = 6 if pytestconfig.getoption("-m") == "slow" else 1
    begins = [f"[{phase}] round {i} on" for i in (0, 1) for phase in train.TRAINERS]
    begins = ["", *begins[:4], "[imagination] step", *begins[4:], "[dream]"]
    for i in sorted([*range(len(begins))] * times):
        process, printed = fork(*FLAGS, "--run", folder, "--save_seconds", 0)
        while (text := printed.readline() if i else "") and not text.startswith((*begins[i:],)):
            pass
        if len(killed) == times:  # it trains
            refused([*FLAGS, "--run", folder], f"another process {folder}")
        time.sleep(rng.uniform(0, 0.4))
        killed.append(process.is_alive())
        process.kill()
        process.join()
    assert sum(killed) > 5
    main(*FLAGS, "--run", folder)
    for name in set(train.FILES.values()):
        killed, whole = ({key: x for key, x in load(root, name).items() if key != "config"}
                         for root in (folder, toy_run))
        assert killed.pop("phase") == whole.pop("phase")
        assert_close(killed, whole, rtol=0, atol=0)
    killed, whole = ({path: x for path, x in contents(root).items() if path.suffix in (
        ".npz", ".npy", ".gif", ".csv") or path.name == "eval.json"} for root in (folder, toy_run))
    assert killed == whole and len(whole) == 8 + 8 + 5 + 2
    before = contents(folder)
    main("--run", folder)
    assert contents(folder) == before and "[evaluate] finished" in capsys.readouterr().out


def test_two_processes_equal_one_here_with_recorded_data(tmp_path):
    one, two = (small_data(tmp_path / name, [9, 5, 2, 30], [True, False, True, False]).run.folder
                for name in ("one", "two"))
    # by their own clocks, one would save before the other
    flags = [*FLAGS, "--env=", "--action_spec=5", "--save_seconds", 0.3]
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--",
                    train.__file__, *flags, "--run", two)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and stdout.count("2 process(es)") == 4, stderr
    main(*flags, "--run", one)
    for name in set(train.FILES.values()):
        a, b = (torch.cat([x.flatten() for x in load(folder, name)["model"].values()])
                for folder in (one, two))
        assert (a - b).norm() < (1e-3 if "bfloat16" in stdout else 1e-5) * a.norm(), name


# ---- Errors: one line, and nothing has changed ---------------------------------------------------
# what is missing in a finished run, or other arrays of its first episode; flags; words of the line
@pytest.mark.parametrize("change, flags, words", [
    ("*", "--phase tokenizer", "holds 0 episodes --phase collect"),
    ("*.pt", "--phase dynamics", "tokenizer.pt --phase tokenizer"),
    ("[ad]*.pt", "--phase agent", "dynamics.pt --phase dynamics"),
    ("agent.pt", "--phase imagination", "agent.pt --phase agent"),
    ("agent.pt", "--phase evaluate", "agent.pt --phase agent"),
    ("agent.pt", "--phase agent", "dynamics.pt tokenizer.pt"),
    ("-", "--width 64", "width 64 32 .pt"), ("config.json", "--latents 4", "latents 4 8 .pt"),
    ("-", "--env test_dreamer4:Plain-v0", "--env test_dreamer4:Dot-v0"),
    ("-", "--action_spec 3", "--action_spec (3,) [5]"), ("-", "--seed 1", "--seed"),
    ("-", "--gamma 1.5", "gamma"), ("-", "--rewarded_share nan", "rewarded_share"),
    ("-", "--tokenizer_lr 7", "tokenizer_lr"), ("-", "--horizon 0", "horizon"), ("-", "--k 3", "k"),
    ("-", "--compile yes", "compile auto true false"),
    ("*", '--env_kwargs {"seen":[2],"picture":"None"}', "picture (H, W, 3)"),
    ("*", '--env_kwargs {"picture":"(7,7,7)"}', "same picture --env"),
    *[("*", f'--env_kwargs {{"reward":"{reward}"}}', "reward") for reward in (
        "np.ones(2)", "None", "np.nan")],
    ("*", '--env_kwargs {"nonsense":1}', "nonsense"),
    ("*", "--env Nowhere-v0", "Nowhere package:id"), ("-", "--checkpoint a.pt", "a.pt"),
    ({"rewards": np.full(12, np.nan, np.float32)}, "--phase dynamics", "0.npz rewards finite"),
    ({"frames": None, "seen": 0}, "--phase dynamics", "0.npz seen frames actions rewards terminal"),
    ({"frames": np.zeros((12, 8, 8, 3), np.uint8)}, "--phase dynamics", "0.npz frames 16"),
    ({"frames": np.zeros((12, 16, 16, 3))}, "--phase dynamics", "0.npz frames float64 uint8"),
    ({"actions": np.full((12, 1), 5, np.int16)}, "--phase dynamics", "0.npz actions (5,)")],
    ids=str)
def test_what_cannot_work_is_refused(copied, refused, change, flags, words):
    is_episode = isinstance(change, dict)
    for path in copied.glob("[ad]*.pt" if is_episode else change):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if is_episode:
        arrays = dict(np.load(copied / "data/0000000000.npz")) | change
        arrays = {name: x for name, x in arrays.items() if x is not None}
        np.savez(copied / "data/0000000000.npz", **arrays)
    before = contents(copied)
    refused([*FLAGS, *flags.split(), "--run", copied], words)
    assert contents(copied) == before


def test_a_loss_that_is_not_finite_ends_a_phase_and_leaves_its_last_checkpoint(
        copied, refused, monkeypatch):
    (copied / "tokenizer.pt").unlink()
    losses, mse = iter([1, 1, math.inf]), F.mse_loss
    monkeypatch.setattr(F, "mse_loss", lambda a, b: mse(a, b) * next(losses))
    flags = ["--phase", "tokenizer", "--save_seconds", 0, "--run", copied]
    refused([*FLAGS, *flags], "not finite tokenizer_lr")
    state = load(copied, "tokenizer.pt")
    assert state["step"] == 2 and all(x.isfinite().all() for x in state["model"].values())


def test_an_evaluation_finds_out_first_that_it_may_not_write(copied, monkeypatch):
    (copied / "episodes.csv").unlink(missing_ok=True)
    (copied / "episodes.csv").mkdir()
    # it does not come so far as to play
    monkeypatch.setattr(train, "play", None)
    with pytest.raises(OSError):
        main("--phase", "evaluate", "--run", copied)


def test_a_checkpoint_alone_is_enough_without_optimizers_in_half_precision(toy_run, tmp_path):
    state = load(toy_run, "agent.pt")
    small = {name: state[name] for name in ("phase", "round", "step", "config")}
    for name in ("tokenizer", "ema", "heads"):
        small[name] = {key: x.half() for key, x in state[name].items()}
    torch.save(small, tmp_path / "small.pt")
    flags = ("--checkpoint", tmp_path / "small.pt", "--run", tmp_path / "new", "--device", "cpu")
    main("--phase", "evaluate", "--eval_episodes", 1, *flags)
    main("--phase", "dream", *flags)
    assert len(list((tmp_path / "new").iterdir())) == 4  # the video, and three of the evaluation


# ---- Environments and policies -------------------------------------------------------------------
def test_actions_and_rewards_stand_at_the_frame_they_led_to():
    cfg = toy(action_repeat=2, envs=3, episode_frames=9)
    policy = train.RandomPolicy(cfg, 0)
    calls = record(policy, "act")
    episodes = dict(train.play(cfg, policy, [7, 8, 99, 3, 16]))
    for i, call in enumerate(calls):  # it is told what led to these frames, at first nothing
        led_here = -1 if i in (0, 8) else calls[i - 1]["result"]
        assert (call["actions"] == led_here).all() and call["frames"].shape == (3, 16, 16, 3)
    found = {seed: (len(e["frames"]), bool(e["terminal"])) for seed, e in episodes.items()}
    assert found == {7: (5, True), 8: (5, True), 99: (9, False), 3: (3, True), 16: (9, True)}
    for seed, e in episodes.items():
        steps, last = e["frames"][:, 0, 0, :2].T.astype(int)
        assert steps.tolist() == [min(2 * t, seed) for t in range(len(steps))]
        assert last[0] == 99 and e["actions"][0] == -1 and e["rewards"][0] == 0
        assert e["actions"][1:, 0].tolist() == last[1:].tolist()
        # rewards of repeated actions are summed
        assert e["rewards"][1:].tolist() == (np.diff(steps) * (1 + last[1:])).tolist()


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("env, kwargs", [
    ("Dot-v0", {}), ("Dot-v0", {"seen": [9, 9, 3]}), ("Dot-v0", {"seen": [2]}), ("Plain-v0", {}),
    ("Dot-v0", {"reward": "np.ones(1) * (1 + a)"})], ids=str)
def test_an_environment_shows_its_picture_and_its_reward_is_one_number(env, kwargs, repeat):
    cfg = toy(env=env, env_kwargs=json.dumps(kwargs), action_repeat=repeat, image_size=(8, 24))
    env = train.PixelEnv(cfg)
    frame, _ = env.reset(seed=99)
    assert frame.shape == (8, 24, 3) and (frame == (0, 99, 7)).all()
    frame, reward, *_ = env.step(np.array([3]))
    assert (frame == (repeat, 3, 7)).all() and reward == 4 * repeat and np.ndim(reward) == 0


@pytest.mark.parametrize("space, sizes, low, high", [
    (Box(np.float32([-1, 0]), np.float32([1, 10])), (5, 5), [-1, 0], [1, 10]),
    (Box(-3, 9, (2, 1), np.int64), (5, 5), [[-3], [-3]], [[9], [9]]),
    (Discrete(4, start=2), (4,), 2, 5),
    (MultiDiscrete([3, 7], start=[0, 5]), (3, 7), [0, 5], [2, 11]),
    (MultiDiscrete([[2, 3], [4, 5]]), (2, 3, 4, 5), [[0, 0], [0, 0]], [[1, 2], [3, 4]])], ids=str)
def test_every_action_space_is_a_tuple_of_categories_and_back(space, sizes, low, high):
    assert train.action_sizes(space, 5) == sizes
    for indices, end in ((np.zeros(len(sizes), int), low), (np.array(sizes) - 1, high)):
        action = train.to_action(space, indices, 5)
        assert np.array_equal(action, end) and space.contains(action)
    if isinstance(space, Box):
        middle = train.to_action(space, np.full(2, 2), 5)
        assert np.array_equal(middle, (space.low + space.high) / 2)
    with pytest.raises(ValueError, match="bounded"):
        train.action_sizes(Box(-np.inf, 1, (2,)), 5)


def test_random_actions_are_held_cover_the_space_and_follow_from_the_seed():
    def play(seed, T=400, count=8, **changes):
        policy = train.RandomPolicy(toy(**changes), seed)
        policy.reset(range(count))
        return np.stack([policy.act(None, None) for _ in range(T)])

    def durations(actions):
        return [np.diff(np.flatnonzero(np.diff(row, prepend=-1))) for row in actions.T]

    actions = play(0, action_spec=(999, 999), hold=3, uniform_share=0.0)
    held = np.concatenate(durations(actions.reshape(400, -1)))
    assert np.abs(np.bincount(held, minlength=4)[1:4] / len(held) - 1 / 3).max() < 0.06
    mixed = durations(play(0, 60, 400, action_spec=(999,), hold=3, uniform_share=0.25)[..., 0])
    assert abs(np.mean([held.max() > 1 for held in mixed]) - 0.75) < 0.08
    one, same, other = (play(seed, action_spec=(5, 3)) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.abs(np.histogram2d(*one.reshape(-1, 2).T, (5, 3))[0] / 3200 - 1 / 15).max() < 0.02


def test_the_agent_acts_on_what_it_saw_and_on_the_action_that_led_there():
    cfg = toy(**dataclasses.asdict(config(image_size=(8, 8))))
    tokenizer, agent = frozen(Tokenizer(cfg)), frozen(new_agent(image_size=(8, 8)))
    policy, passes = train.AgentPolicy(tokenizer, agent, cfg, 0), record(agent.dynamics, "denoise")
    frames = np.random.default_rng(0).integers(0, 256, (5, 2, 8, 8, 3), np.uint8)
    given = [np.full((2, 2), -1, np.int16)]
    policy.reset([0, 1])
    for frame in frames:
        given.append(policy.act(frame, given[-1]))
    actions, seen = (torch.cat([call[name] for call in passes], 1) for name in ("actions", "z"))
    assert torch.equal(actions, torch.as_tensor(np.stack(given[:-1], 1)))
    z = tokenizer.encode(train.to_images(frames.swapaxes(0, 1), "cpu"))
    assert torch.corrcoef(torch.stack((z.flatten(), seen.flatten())))[0, 1] > 0.9
    explorer = train.AgentPolicy(tokenizer, agent, cfg, 0, random_share=1.0)
    explorer.reset([0, 1])
    assert explorer.act(frames[0], given[0]).max() < 3 and len(passes) == 6


# ---- Data: windows, rewards, latents -------------------------------------------------------------
def small_data(folder, lengths, terminals=None, reward=lambda i, t: t == 5, round=0, **changes):
    """Frame t of episode i shows (i, t, 0), its action is t % 5, its latents are (i, t)."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for i, (T, terminal) in enumerate(zip(lengths, terminals or [False] * len(lengths))):
        t, frames = np.arange(T), np.zeros((T, 16, 16, 3), np.uint8)
        frames[..., 0], frames[..., 1] = i % 256, t[:, None, None]
        rewards = [reward(i, t) if t else 0 for t in range(T)]
        np.savez(folder / f"data/{i:03d}.npz", frames=frames, terminal=np.array(terminal),
                 actions=np.where(t == 0, -1, t % 5)[:, None].astype(np.int16),
                 rewards=np.array(rewards, np.float32))
    data = train.Data(new_run(folder, toy(**changes), round))
    for i, e in enumerate(data.episodes):
        e["latents"] = np.stack(np.broadcast_arrays(i, np.arange(len(e["rewards"]))), -1)
    return data


def sample(data, *args, seed=0, **kwargs):
    return data.sample(np.random.default_rng(seed), *args, **kwargs)


def geometric(count, p=0.1, longest=40):
    """Lengths of episodes that end with probability p in every step, and whether they did."""
    steps = np.random.default_rng(0).geometric(p, count)
    return (np.minimum(steps, longest - 1) + 1).tolist(), (steps < longest).tolist()


@pytest.mark.parametrize("T", [1, 6, 50])
def test_windows_are_aligned_and_every_frame_of_every_episode_is_as_likely(tmp_path, T, B=6000):
    lengths, ends = geometric(60)
    data = small_data(tmp_path, lengths, ends, lambda i, t: t)
    lengths, ends = np.array(lengths), np.array(ends)
    batch = sample(data, B, T, ["frames", "latents", "actions", "rewards"])
    valid, (episode, t) = batch["valid"], batch["latents"].transpose(2, 0, 1)
    assert valid[:, 0].all() and (valid[:, 1:] <= valid[:, :-1]).all()  # padding is at the end
    assert (episode == episode[:, :1])[valid].all() and (np.diff(t) == 1)[valid[:, 1:]].all()
    assert (batch["frames"][:, :, 3, 3, :2] == batch["latents"]).all()
    assert (batch["rewards"] == t).all()
    assert (batch["actions"][..., 0] == np.where(t > 0, t % 5, -1)).all()
    is_end = ends[episode] & (t == lengths[episode] - 1)
    assert (batch["continues"] == ~is_end)[valid].all()
    # Of B windows, those that hold a certain frame; none is of an episode that is held out.
    counts = [np.bincount(t[valid & (episode == i)], minlength=n) for i, n in enumerate(lengths)]
    assert not np.concatenate(counts[::10]).any()
    counts = np.concatenate([x for i, x in enumerate(counts) if i % 10])
    mean = B * T / sum(len(e["rewards"]) + T - 1 for e in data.train)
    assert abs(counts - mean).max() < 4.5 * mean ** 0.5
    share = sum(e["terminal"] for e in data.train) / len(counts)
    assert is_end[valid].mean() == pytest.approx(share, rel=0.12)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_contexts_of_dreams_are_whole_and_go_on(tmp_path, share):
    lengths, ends = geometric(100)
    data = small_data(tmp_path, lengths, ends, lambda i, t: t % 3 == 0)
    batch = sample(data, 3000, 6, ["latents", "actions"], share, is_context=True)
    episode, t = batch["latents"].transpose(2, 0, 1)
    assert batch["valid"].all() and (batch["continues"] == 1).all()
    assert (episode == episode[:, :1]).all() and (np.diff(t) == (t[:, 1:] > 0)).all()
    assert (np.diff(t) == 0).any() and (np.diff(t) == 1).all(1).any()
    assert (batch["actions"][..., 0] == np.where(t > 0, t % 5, -1)).all()
    # the last frame, but not a terminal one
    assert (t[:, -1] < np.array(lengths)[episode[:, -1]] - np.array(ends)[episode[:, -1]]).all()


def test_shares_of_the_windows_hold_an_unusual_reward_or_are_from_the_newest_episodes(tmp_path):
    # 99 episodes train, of which one is rewarded; time costs a little
    data = small_data(tmp_path / "a", [50] * 110, None, lambda i, t: 3 if (i, t) == (8, 20) else -1)
    for share in (0.0, 0.3, 1.0):
        found = sample(data, 2000, 4, ["rewards"], share)["rewards"] == 3
        assert abs(found.any(1).mean() - share) < 0.03
    assert abs(found.mean(0) - 0.25).max() < 0.05  # at any place in the window
    for i, share in [(0, 4 / 36), (1, 0.5 + 0.5 * 4 / 36)]:
        data = small_data(tmp_path / "b", [30] * 40, round=i, round_episodes=4, recent_share=0.5)
        newest = sample(data, 2000, 5, ["latents"])["latents"][:, 0, 0] >= 36
        assert newest.mean() == pytest.approx(share, abs=0.03)


def test_the_continuation_is_calibrated(tmp_path):
    data = small_data(tmp_path, *geometric(800), reward=lambda i, t: 1)
    agent, z = Agent(data.run.cfg), torch.randn(1, 1, 8, 8)

    def measure(step):
        batch = sample(data, 32, 8, ["actions", "rewards"], seed=step)
        batch = {name: torch.as_tensor(x) for name, x in batch.items()}
        return agent(z.expand(32, 8, -1, -1), **batch, draws=agent.dynamics.draw(32, 8))

    learn(agent, 100, 2e-3, measure)
    h = agent.dream(k=1).observe(z.expand(64, 30, -1, -1), torch.randint(0, 5, (64, 30, 1)))
    assert abs(agent.continuation(h)[:, 1:].mean() - 0.9) < 0.03


@pytest.mark.parametrize("rewards, scale", [
    ([-0.4] * 9 + [3], 1), ([1e-4], 1e-4), ([1e5, 2e5], 1e5), ([0], 1), ([0] * 99 + [-50], 100)])
def test_rewards_are_divided_by_a_power_of_ten_near_their_size(tmp_path, rewards, scale):
    batches = []
    for factor in (1, 1e-4, 1e5):
        data = small_data(tmp_path, [101] * 12, None,
                          lambda i, t: factor * rewards[t % len(rewards)])
        assert data.scale == pytest.approx(scale * factor if any(rewards) else 1)
        batches.append(sample(data, 20, 6, ["rewards"], 0.5)["rewards"] / data.scale)
    assert np.allclose(batches[1:], batches[0])


@pytest.mark.parametrize("reward, terminal, warns", [
    (0, False, True), (0, True, True), (1, False, True), (0.1, False, True), (1, True, False)])
def test_equal_returns_are_warned_of(tmp_path, capsys, reward, terminal, warns):
    data = small_data(tmp_path, [30, 23, 37], [terminal] * 3, lambda *_: reward, reward_scale=1.0)
    for e in data.episodes:
        e["latents"] = np.random.rand(len(e["rewards"]), 8, 8)
    train.report_rewards(data.run, frozen(Agent(data.run.cfg)), data)
    assert ("all returns are equal" in capsys.readouterr().out) == warns


def test_latents_are_made_once_for_every_tokenizer_and_episode(tmp_path, monkeypatch):
    made, encode = [], train.encode
    monkeypatch.setattr(train, "encode", lambda *args: made.append(0) or encode(*args))
    first, second = Tokenizer(toy()), Tokenizer(toy())
    for tokenizer, lengths, count in [
            (first, [9, 9, 5], 3), (first, [9, 9, 5], 0), (first, [9, 7, 5], 1),
            (second, [9, 7, 5], 3), (second, [9, 7, 5], 0)]:
        data, _ = small_data(tmp_path, lengths), made.clear()
        for path in (tmp_path / "data").iterdir():
            os.utime(path, (0, 0))  # no newer than any latents
        data.encode(tokenizer.state_dict())
        assert len(made) == count and len(list((tmp_path / "latents").iterdir())) == 3
        for e in data.episodes:
            assert np.array_equal(e["latents"], encode(frozen(tokenizer), e["frames"]))


def test_presets_can_be_built_and_every_nth_batch_is_long_with_as_many_frames_in_whole_groups():
    for preset in train.PRESETS.values():
        cfg = train.TrainConfig(**preset)
        with torch.device("meta"):
            Tokenizer(cfg), Agent(cfg)
        assert cfg.tokenizer_length > cfg.tokenizer_context and cfg.long_length > cfg.context
    cfg = toy(batch_size=16, short_length=12, long_length=48, long_every=3, shortcut_every=4)
    assert [cfg.sequence_shapes(i) for i in range(4)] == [(4, 48), (16, 12), (16, 12), (4, 48)]
    cfg.long_length = 36
    assert cfg.sequence_shapes(0) == (4, 36)


def test_the_code_of_the_readme_runs_and_its_episode_is_one(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```|`(np\.savez_compressed\(.*?)`", text, re.S)
    assert [bool(block) for block, _ in blocks] == [True, False]
    (tmp_path / "runs/mine/data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for block in map("".join, blocks):
        exec(block, {"np": np, "frames": np.zeros((9, 64, 64, 3), np.uint8),
                     "actions": np.full((9, 2), -1, np.int16), "rewards": np.zeros(9, np.float32)})
    [path] = tmp_path.rglob("*.npz")
    assert len(train.load_episode(path, train.TrainConfig())["frames"]) == 9
