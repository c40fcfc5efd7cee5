"""Dreamer 4 in one module: tokenizer, world model, agent, imagination. Needs torch and nothing else.

Source: Hafner, Yan, Lillicrap, "Training Agents Inside of Scalable World Models", arXiv:2509.24527.

1. A causal TOKENIZER, trained as a masked autoencoder, turns every frame into N latent tokens.
2. A transformer DYNAMICS model learns by shortcut forcing to denoise the latents of the next frame in a
   few steps, given actions. An AGENT token reads it out: behaviour cloning, rewards, continuation.
3. The policy improves by PMPO on rollouts that the world model and the policy dream up together.

The token block of frame t, in the dynamics (time runs across blocks, one block per frame):

      what led here    noise level       the frame itself        memory        the reader
    [ action a_{t-1} | signal τ, step d | latents z̃_t ......... | registers | agent ] -> ẑ1, h_t
      S_a = 1          1                  N / pack                S_r         1 (nothing attends to it)

Time convention: block t carries a_{t-1}; r_t and c_t belong to ARRIVING at frame t; h_t chooses a_t.

Shapes: B batch, T time, S tokens per frame, D width, P patches, N latent tokens, Z channels of a latent token,
A action components, K denoising steps, C context frames, H horizon, L multi-token distances. Inside attention
only: N sequences, H query heads, G key heads, L queries, U keys, E channels of a head.
Signal level τ: 0 is pure noise z0, 1 the clean latents z1, z̃ lies between them, ẑ1 is the prediction of z1: these
subscripts are levels, not frames. Step size d: 1/K.

    eq. 4   sample_signal_and_step        eq. 9   Agent.forward (multi_token_targets)
    eq. 5   Tokenizer.forward             eq. 10  lambda_returns
    eq. 6   corrupt                       eq. 11  pmpo_loss
    eq. 7   shortcut_forcing_loss         Alg. 1, phase 3   imagine
    eq. 8   ramp_weight                   sampling          generate, Dream

Deliberate deviations from the paper, each with its reason:
- RoPE over time only, learned embeddings over the tokens of a frame: the simplest positions that stream.
- No attention soft cap by default (QK-norm alone was stable); `softcap` turns it on.
- Perceptual loss is an optional callable: LPIPS needs pretrained weights.
- Every `shortcut_every`-th sequence trains the bootstrap, the others train d_min: 30 % less compute for nearly
  the same shortcut (as in shortcut models, where a quarter of the batch bootstraps).
- Context signal level snaps to the grid of d_min, so that the frames have exactly the level of their label.
- A share of the frames enters training at the context level. In use the whole past is at this level, and the heads
  are applied there; with τ drawn evenly for every frame, training would hardly ever see a past so clean.
- Dreams may start from noise of a higher temperature than 1: a model that is surer than it should be flatters the
  policy (World Models, 2018, raises the temperature of its dreams, too).
- Continuous actions are binned and looked up: one kind of action space, a tuple of categoricals.
- A continuation head is trained beside the reward head; categoricals mix in 1 % uniform (Dreamer 3).
- Sequences treated as separate images lose their action too: no action led to an image.
- Phase 3 divides no loss by its RMS: policy and value head share no parameters, and Adam scales each one's steps.
- Two-hot bins span ±symexp(10), not ±symexp(20): far bins turn tiny leaked probabilities into big errors.
"""
import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Architecture and losses: what a checkpoint carries. The paper gives few sizes; 'ours' marks choices."""
    image_size: tuple[int, ...] = (64, 64)  # frame height and width in pixels (paper: 360 x 640)
    action_spec: tuple[int, ...] = (5, 5)   # categories of each action component; set by the environment
    # tokenizer (section 3.1)
    patch: int = 8                  # side of a square patch in pixels (paper: 16)
    latents: int = 16               # latent tokens per frame, N (paper: 512)
    latent_channels: int = 16       # channels of a latent token, Z (paper: 16)
    tokenizer_width: int = 192      # width of encoder and decoder (ours)
    tokenizer_depth: int = 4        # layers in the encoder, and again in the decoder; time as in time_every (ours)
    tokenizer_heads: int = 6        # attention heads of encoder and decoder (ours)
    tokenizer_context: int = 4      # frames that the tokenizer's time attention sees (ours)
    mask_max: float = 0.9           # masked autoencoding: p ~ U(0, mask_max) per image (paper)
    # dynamics (section 3.2)
    pack: int = 2                   # neighbouring latents packed into one wider token (paper: 2)
    width: int = 256                # width of the dynamics transformer (ours)
    depth: int = 8                  # layers of the dynamics transformer (ours)
    heads: int = 4                  # query heads (ours)
    kv_heads: int = 2               # key/value heads, grouped-query attention (paper: GQA, sizes not given)
    registers: int = 2              # register tokens per frame (paper: for temporal consistency)
    time_every: int = 4             # every 4th layer attends over time, the others over a frame (paper)
    context: int = 16               # frames that time attention sees, C (paper: 192)
    k_max: int = 8                  # finest number of denoising steps, 1 / d_min (ours; not given)
    shortcut_every: int = 4         # every n-th sequence trains steps larger than d_min (ours; paper: all)
    separate_images: float = 0.3    # share of sequences treated as images without a past (paper)
    context_signal: float = 0.9     # signal level of past frames in use: 10 % noise (paper)
    context_share: float = 0.75     # share of frames that enter training at context_signal (ours; paper: 0)
    softcap: float = 0.0            # soft cap of attention logits, 0 = off (paper: on)
    checkpointing: bool = False     # recompute activations in the backward pass: slower, less memory
    # agent (section 3.3)
    tasks: int = 1                  # task embeddings (ours: one task)
    distances: int = 8              # multi-token prediction, n = 0 ... L-1 (paper: 8)
    head_width: int = 256           # hidden units of a head (ours)
    bins: int = 255                 # two-hot bins, evenly spaced in symlog space (Dreamer 3)
    unimix: float = 0.01            # uniform share mixed into the policy's categoricals (Dreamer 3)
    gamma: float = 0.997            # discount (paper)
    lam: float = 0.95               # λ of the returns (Dreamer 3; the paper gives none)
    alpha: float = 0.5              # PMPO: weight of the good set (paper)
    beta: float = 0.3               # PMPO: weight of the KL to the cloned prior (paper)
    least = {"registers": 0, "bins": 2}             # not a field: smallest values of the integers, if not 1

    def __post_init__(self):
        self.image_size, self.action_spec = tuple(self.image_size), tuple(self.action_spec)
        for field in fields(self):
            if field.type is int and getattr(self, field.name) < self.least.get(field.name, 1):
                raise ValueError(f"config: {field.name} must be at least {self.least.get(field.name, 1)}")
        for ok, what in [
            (len(self.image_size) == 2 and min(self.image_size) > 0, "image_size must be height and width"),
            (len(self.action_spec) > 0 and min(self.action_spec) > 0, "action_spec must list category counts"),
            (self.k_max & (self.k_max - 1) == 0, "k_max must be a power of two"),
            (self.depth >= self.time_every, "depth must be at least time_every, or no layer attends over time"),
            (self.latents % self.pack == 0, "latents must be a multiple of pack"),
            (self.heads % self.kv_heads == 0, "heads must be a multiple of kv_heads"),
            (self.width % (2 * self.heads) == 0, "width must be a multiple of 2 heads (RoPE turns pairs)"),
            (self.tokenizer_width % (2 * self.tokenizer_heads) == 0,
             "tokenizer_width must be a multiple of 2 tokenizer_heads (RoPE turns pairs)"),
            (0 <= self.context_signal <= 1, "context_signal must lie in [0, 1]"),
            (0 <= self.context_share < 1, "context_share must lie in [0, 1), or no frame is left to denoise"),
        ]:
            if not ok:
                raise ValueError(f"config: {what}")

    @property
    def context_level(self):
        """context_signal on the grid of d_min, where the embedding of τ has an entry; in [0, 1 - d_min]."""
        return min(round(self.context_signal * self.k_max), self.k_max - 1) / self.k_max


# ---------------------------------------------------------------------------------------------------------
# Transformer over space and time (section 3.4)

def rope(x, pos, base=10000.0):
    """Rotary position embedding: rotates channel pairs of x (..., T, E) by the frame index pos (T,).

    Frame indices are absolute in the video, also in a stream, so that keys can be cached after rotation.
    """
    E = x.shape[-1]
    freq = base ** (-torch.arange(0, E, 2, device=x.device, dtype=torch.float32) / E)
    angle = pos.float()[:, None] * freq                                          # (T, E/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# Who sees whom within a frame (section 3.1 and 3.3). Rows look at columns:
#   encoder   patch  latent      decoder   latent  query      dynamics   world  agent
#   patch       x                latent      x                world        x
#   latent      x      x         query       x       x        agent        x      x
# "world" = action, signal, latents, registers: nothing may see the agent token, or the world model could
# learn to depend on the task.
SEES = {"patch": ("patch",), "latent": ("patch", "latent"), "query": ("latent", "query"),
        "world": ("world",), "agent": ("world", "agent")}


def attention_masks(groups, query_pos, key_pos, context):
    """Both masks of a transformer; True = may attend (sections 3.1 and 3.4).

    groups: ((name, tokens), ...) in the order of the frame's tokens; query_pos (T,), key_pos (U,): frame
    indices. Returns space (S, S), from the table above, and time (T, U), causal and banded: frame t sees
    the C frames t-C+1 ... t at its own token position.
    """
    table = torch.tensor([[key in SEES[query] for key, _ in groups] for query, _ in groups])
    counts = torch.tensor([count for _, count in groups])
    space = table.repeat_interleave(counts, 0).repeat_interleave(counts, 1)          # on the CPU: a GPU would wait
    age = query_pos[:, None] - key_pos[None, :]
    return space.to(age.device, non_blocking=True), (age >= 0) & (age < context)


def attend(q, k, v, mask=None, softcap=0.0):
    """Attention with grouped queries: q (N, H, L, E), k and v (N, G, U, E), mask (L, U) or (N, 1, L, U).

    Chooses between two forms of the same function: the fused kernel on GPUs, plain matrix products on CPUs,
    where the fused one takes four times as long forward and backward in bfloat16 (92 ms against 22 for
    (128, 8, 80, 32) on two cores). The soft cap needs the plain form anyway.
    """
    N, H, L, E = q.shape
    G = k.shape[1]
    # queries that share a key are stacked as rows: PyTorch's own grouped queries, together with a mask, would leave
    # the fused kernels, and hold all scores in float32
    q = q.reshape(N, G, H // G * L, E)
    if mask is not None:
        mask = torch.cat([mask] * (H // G), -2)
    if q.is_cuda and not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(N, H, L, E)
    scores = (q * E ** -0.5) @ k.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    # on CPU and CUDA, softmax over bfloat16 keeps its maximum and sum in float32
    return (scores.softmax(-1) @ v).view(N, H, L, E)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, its statistics in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        weight = self.weight.to(x.dtype)                            # same dtype: the fused path
        return F.rms_norm(x, weight.shape, weight, 1e-6).to(x.dtype)           # autocast on CUDA gives float32


class Block(nn.Module):
    """One layer: attention over space or over time, then SwiGLU, each pre-normalized and residual."""

    def __init__(self, width, heads, kv_heads, over_time, softcap=0.0):
        super().__init__()
        self.heads, self.kv_heads, self.over_time, self.softcap = heads, kv_heads, over_time, softcap
        head_dim = width // heads
        hidden = math.ceil(width * 8 / 3 / 32) * 32             # SwiGLU has three matrices: 8/3 instead of 4
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)    # before RoPE, never after
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x, mask, pos=None, past=None):
        """x (B, T, S, D) -> the same shape, and for time layers the keys and values seen (B, S, G, U, E)."""
        B, T, S, D = x.shape
        # linear layers see contiguous (B, T, S, D); attention runs over S, or over T: the axis before the last
        order = (0, 2, 3, 1, 4) if self.over_time else (0, 1, 3, 2, 4)
        qkv = self.qkv(self.norm1(x)).view(B, T, S, -1, D // self.heads).permute(order).flatten(0, 1)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)                # (N, H or G, L, E)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.over_time:
            q, k = rope(q, pos), rope(k, pos)
            if past is not None:        # without the agent token, a frame's last, its cached keys are left out
                k, v = (torch.cat((old[:, :S].flatten(0, 1), new), 2) for old, new in zip(past, (k, v)))
        y = attend(q, k, v, mask, self.softcap).unflatten(0, (B, -1))
        y = y.permute((0, 3, 1, 2, 4) if self.over_time else (0, 1, 3, 2, 4)).reshape(x.shape)
        x = x + self.attn_out(y)
        gate, value = self.mlp_in(self.norm2(x)).chunk(2, -1)
        x = x + self.mlp_out(F.silu(gate) * value)
        return x, ((k.unflatten(0, (B, S)), v.unflatten(0, (B, S))) if self.over_time else None)


class Cache:
    """KV cache: layer index -> keys and values (B, S, G, U, E) of the last C frames; frames: how many went in."""

    def __init__(self):
        self.frames, self.layers = 0, {}


class Transformer(nn.Module):
    """Space layers and, every `time_every` layers, a causal banded time layer (section 3.4)."""

    def __init__(self, width, depth, heads, kv_heads, groups, context, config):
        super().__init__()
        self.groups, self.context, self.checkpointing = groups, context, config.checkpointing
        self.blocks = nn.ModuleList(
            Block(width, heads, kv_heads, i % config.time_every == config.time_every - 1, config.softcap)
            for i in range(depth))
        for block in self.blocks:
            for layer in (block.qkv, block.mlp_in):
                nn.init.normal_(layer.weight, std=width ** -0.5)
            for layer in (block.attn_out, block.mlp_out):     # residual branches start small: variance 1 in sum
                nn.init.normal_(layer.weight, std=(2 * depth * layer.in_features) ** -0.5)

    def forward(self, x, cache=None, write=True, separate=None):
        """x (B, T, S, D) -> (B, T, S, D).

        cache: the frames of x continue the stream held there (None: they start one); write=False looks at
        the stream without joining it, as the passes over half-denoised frames must. separate (B,) bool:
        sequences whose frames see no past.
        """
        B, T, S, D = x.shape
        start = cache.frames if cache else 0
        pos = torch.arange(start, start + T, device=x.device)
        keys = torch.arange(max(0, start - self.context), start + T, device=x.device)    # what the cache kept, and x
        groups = self.groups if S == sum(n for _, n in self.groups) else self.groups[:-1]   # no agent token
        space, time = attention_masks(groups, pos, keys, self.context)
        if len(groups) == 1:
            space = None                                                # every token sees every token
        if separate is not None:
            alone = torch.eye(T, dtype=torch.bool, device=x.device)
            time = torch.where(separate[:, None, None], alone, time)                       # (B, T, T)
            time = time[:, None].expand(B, S, T, T).reshape(B * S, 1, T, T)
        for i, block in enumerate(self.blocks):
            past = cache.layers.get(i) if cache else None
            arguments = (x, time, pos, past) if block.over_time else (x, space)
            if self.checkpointing and torch.is_grad_enabled():
                x, seen = torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, seen = block(*arguments)
            if cache and write and seen:
                cache.layers[i] = tuple(part[..., -self.context:, :] for part in seen)     # evict the oldest
        if cache and write:
            cache.frames += T
        return x


def learned(*shape):
    """A learned embedding. Smaller ones drown beside the patch embeddings, whose entries are about 1."""
    return nn.Parameter(torch.randn(shape) * 0.5)


def linear(inputs, outputs, zero=False):
    """A linear layer that keeps the variance of its inputs, or starts at zero (output layers)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.0 if zero else inputs ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


class LossNorm(nn.Module):
    """Divides every loss term by a running estimate of its root mean square (section 3), then adds up."""

    def __init__(self, *names, decay=0.99):
        super().__init__()
        self.decay = decay
        for name in names:
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))              # bias correction, as in Adam: 1 - decay^n

    def forward(self, losses, weights={}):
        """losses: name -> scalar; weights: name -> factor after the division, 1 if left out. Returns a scalar."""
        with torch.no_grad():
            values = torch.stack([loss.detach().float() for loss in losses.values()])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(values)                    # the estimate of the whole batch
                values = values / torch.distributed.get_world_size()
            if self.training:
                self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
                for name, value in zip(losses, values):
                    getattr(self, name).lerp_(value.square(), 1 - self.decay)
            weight = self.weight.clamp(min=1e-8)
        return sum(weights.get(name, 1.0) * loss / (getattr(self, name) / weight).sqrt().clamp(min=1e-8)
                   for name, loss in losses.items())


# ---------------------------------------------------------------------------------------------------------
# 1. Causal tokenizer (section 3.1)

class Tokenizer(nn.Module):
    """Masked autoencoder from video frames to latent tokens in (-1, 1), causal in time."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, N, p = config.tokenizer_width, config.latents, config.patch
        self.grid = tuple(math.ceil(side / p) for side in config.image_size)
        P = self.grid[0] * self.grid[1]
        self.patch_in, self.patch_out = linear(3 * p * p, D), linear(D, 3 * p * p)
        self.patch_pos, self.mask_token, self.latent_tokens = learned(P, D), learned(D), learned(N, D)
        self.queries, self.latent_pos = learned(P, D), learned(N, D)
        heads = config.tokenizer_heads
        self.encoder = Transformer(D, config.tokenizer_depth, heads, heads,
                                   (("patch", P), ("latent", N)), config.tokenizer_context, config)
        self.decoder = Transformer(D, config.tokenizer_depth, heads, heads,
                                   (("latent", N), ("query", P)), config.tokenizer_context, config)
        # without the norm before the bottleneck, tanh saturates
        self.to_latent = nn.Sequential(RMSNorm(D), linear(D, config.latent_channels))
        self.from_latent, self.out_norm = linear(config.latent_channels, D), RMSNorm(D)
        self.loss_norm = LossNorm("mse", "perceptual")

    def patchify(self, images):
        """images (B, T, 3, H, W) -> patches (B, T, P, 3 p p); H and W are zero-padded to multiples of p."""
        B, T, channels, H, W = images.shape
        if channels != 3 or (H, W) != self.config.image_size:
            raise ValueError(f"images are (B, T, {channels}, {H}, {W}); "
                             f"this tokenizer wants 3 channels at {self.config.image_size}")
        p, (rows, cols) = self.config.patch, self.grid
        images = F.pad(images, (0, cols * p - W, 0, rows * p - H))
        return F.pixel_unshuffle(images, p).flatten(-2).mT.contiguous()

    def unpatchify(self, patches):
        """patches (B, T, P, 3 p p) -> images (B, T, 3, H, W), the padding cropped away."""
        H, W = self.config.image_size
        return F.pixel_shuffle(patches.mT.unflatten(-1, self.grid), self.config.patch)[..., :H, :W]

    def draw(self, B, T, mask_max=None, device=None):
        """Masked autoencoding: which patches to hide (B, T, P), p ~ U(0, mask_max) for each image."""
        mask_max = self.config.mask_max if mask_max is None else mask_max
        p = torch.rand(B, T, 1, device=device) * mask_max
        return torch.rand(B, T, self.patch_pos.shape[0], device=device) < p

    def encode(self, images, mask=None, cache=None):
        """images (B, T, 3, H, W) in [0, 1] -> latents (B, T, N, Z) in (-1, 1), float32.

        mask (B, T, P) bool: patches replaced by the learned mask embedding, in training only. With a cache
        the frames continue a stream.
        """
        B, T = images.shape[:2]
        N, D = self.latent_tokens.shape
        x = self.patch_in(self.patchify(images.to(self.mask_token.dtype) * 2 - 1))
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + self.patch_pos.to(x.dtype)
        x = torch.cat((x, self.latent_tokens.to(x.dtype).expand(B, T, N, D)), 2)
        x = self.encoder(x, cache)[:, :, -N:]
        return torch.tanh(self.to_latent(x).float())

    def reconstruct(self, latents, cache=None):
        """As decode, but unclamped, for the loss."""
        B, T, N, Z = latents.shape
        x = self.from_latent(latents.to(self.mask_token.dtype))
        x = x + self.latent_pos.to(x.dtype)
        x = torch.cat((x, self.queries.to(x.dtype).expand(B, T, *self.queries.shape)), 2)
        x = self.decoder(x, cache)[:, :, N:]
        return self.unpatchify((self.patch_out(self.out_norm(x)).float() + 1) / 2)

    def decode(self, latents, cache=None):
        """latents (B, T, N, Z) -> images (B, T, 3, H, W) in [0, 1], float32."""
        return self.reconstruct(latents, cache).clamp(0, 1)

    def forward(self, images, mask, perceptual=None):
        """Eq. 5: MSE over ALL patches + 0.2 perceptual, each RMS-normalized. Returns (loss, metrics).

        images (B, T, 3, H, W) in [0, 1]; mask from draw(); perceptual: callable (reconstruction, images),
        both (B T, 3, H, W), the reconstruction unclamped, -> scalar, for example LPIPS.
        """
        output = self.reconstruct(self.encode(images, mask))
        losses = {"mse": F.mse_loss(output, images)}
        if perceptual is not None:
            losses["perceptual"] = perceptual(output.flatten(0, 1), images.flatten(0, 1))
        metrics = {name: loss.detach() for name, loss in losses.items()}
        return self.loss_norm(losses, {"perceptual": 0.2}), metrics


# ---------------------------------------------------------------------------------------------------------
# 2. Interactive dynamics (section 3.2)

def sample_signal_and_step(shape, k_max, device=None):
    """Eq. 4: d = 1/k, k uniform over {1, 2, 4, ..., k_max}; τ uniform over {0, d, 2d, ..., 1 - d}.

    Returns (τ, d), two float tensors of the shape, drawn independently for every entry (every frame).
    """
    k = 2 ** torch.randint(0, k_max.bit_length(), shape, device=device)
    d = 1.0 / k
    return (torch.rand(shape, device=device) * k).floor() * d, d


def corrupt(z1, noise, tau):
    """Eq. 6: z̃ = (1 - τ) z0 + τ z1. z1, noise (B, T, N, Z); τ (B, T)."""
    tau = tau[..., None, None]
    return (1 - tau) * noise + tau * z1


def ramp_weight(tau):
    """Eq. 8: w(τ) = 0.9 τ + 0.1. Frames with more signal can teach more detail."""
    return 0.9 * tau + 0.1


def bootstrap_target(denoise, z, tau, d, d_min):
    """Where two half steps lead, as the clean latents that one step of size d should predict (eq. 7).

    denoise(z̃, τ, d) -> ẑ1; z (B, T, N, Z); τ, d (B, T). Frames at d_min only serve as context, at their own level;
    their result is not used.
    Velocity of a half step: b = (ẑ1 - z̃) / (1 - τ). The target in x-space is z̃ + (1 - τ) (b′ + b″) / 2, so that
    the plain squared error in x-space is exactly (1 - τ)² ‖(ẑ1 - z̃)/(1 - τ) - (b′ + b″)/2‖².
    """
    expand = lambda x: x[..., None, None]
    half = torch.where(d > d_min, d / 2, 0.0)
    step = (d / 2).clamp(min=d_min)
    b1 = (denoise(z, tau, step) - z) / expand(1 - tau)
    z2, tau2 = z + b1 * expand(half), tau + half
    b2 = (denoise(z2, tau2, step) - z2) / expand(1 - tau2)
    return z + expand(1 - tau) * (b1 + b2) / 2


def shortcut_forcing_loss(denoise, half_step, z1, noise, tau, d, k_max, rows=slice(None)):
    """Eq. 7 with x-prediction, ramp weight (eq. 8) and bootstrap. Returns (loss, metrics).

    denoise(z̃, τ, d) -> ẑ1: the network on all sequences; half_step: the same on the sequences `rows` alone, those
    in which d > d_min occurs: only they pay for the bootstrap.
    z1 clean latents, noise ~ N(0, I) (B, T, N, Z); τ, d (B, T) from sample_signal_and_step.
    """
    d_min = 1 / k_max
    z = corrupt(z1, noise, tau)                                        # 1. noise every frame (eq. 6)
    with torch.no_grad():                                              # 2. targets: the data, but where d > d_min
        two = bootstrap_target(half_step, z[rows], tau[rows], d[rows], d_min)               # two half steps
        target = z1.clone()
        target[rows] = torch.where((d[rows] > d_min)[..., None, None], two, z1[rows])
    error = (denoise(z, tau, d) - target).square().mean((-2, -1))      # 3. predict (B, T)
    loss = (ramp_weight(tau) * error).mean()                           # 4. weigh, the same for both terms
    with torch.no_grad():
        fine = (d <= d_min).float()
        mean = lambda mask: (error * mask).sum() / mask.sum().clamp(min=1)
        metrics = {"flow": mean(fine), "shortcut": mean(1 - fine)}
    return loss, metrics


@torch.no_grad()
def generate(denoise, z, k):
    """K Euler steps of size d = 1/K from noise z to data (section 3.2). denoise(z̃, τ, d) -> ẑ1, τ and d floats.

    At τ = 1 - d the update lands exactly on the prediction: no evaluation at τ = 1 is missing.
    """
    for i in range(k):
        tau, d = i / k, 1 / k
        z = z + (denoise(z, tau, d) - z) / (1 - tau) * d
    return z


class Dynamics(nn.Module):
    """Denoises the latents of every frame of a video, given actions and the frames before."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, packed_channels, k_max = config.width, config.latent_channels * config.pack, config.k_max
        self.packed = config.latents // config.pack
        self.register_buffer("offsets", torch.tensor((0,) + config.action_spec[:-1]).cumsum(0), persistent=False)
        self.action_table = nn.Embedding(sum(config.action_spec), D)   # one lookup table for all components
        self.action_base = learned(D)                                  # all that an unlabeled frame gets
        self.signal = nn.Embedding(k_max, D // 2)                      # τ = 0, d_min, ..., 1 - d_min
        self.step = nn.Embedding(k_max.bit_length(), D - D // 2)       # d = 1, 1/2, ..., d_min = 1 / k_max
        self.latent_in, self.latent_pos = linear(packed_channels, D), learned(self.packed, D)
        self.registers = learned(config.registers, D)
        world = 2 + self.packed + config.registers
        self.transformer = Transformer(D, config.depth, config.heads, config.kv_heads,
                                       (("world", world), ("agent", 1)), config.context, config)
        self.out_norm, self.latent_out = RMSNorm(D), linear(D, packed_channels)
        for table in (self.action_table, self.signal, self.step):
            nn.init.normal_(table.weight, std=0.5)
        self.loss_norm = LossNorm("dynamics")

    def embed_actions(self, actions):
        """actions (B, T, A) int, -1 = unknown -> (B, T, D): sum of lookups + learned embedding."""
        known = actions >= 0
        lookups = self.action_table(actions.clamp(min=0).long() + self.offsets) * known[..., None]
        return lookups.sum(-2) + self.action_base

    def denoise(self, z, tau, d, actions, task_embedding=None, cache=None, write=False, separate=None):
        """One pass over noisy latents. Returns ẑ1 (B, T, N, Z) float32, and h (B, T, D) or None.

        z (B, T, N, Z); τ, d (B, T) on the grids of eq. 4; actions (B, T, A): block t carries a_{t-1}.
        task_embedding (D,) or (B, D): puts the agent token into every block and returns its output h.
        cache, write, separate: see Transformer.forward; here nothing is written unless asked for.
        """
        B, T, N, Z = z.shape
        D = self.config.width
        signal = self.signal((tau * self.config.k_max).round().long())
        step = self.step((-torch.log2(d)).round().long())
        latents = self.latent_in(z.to(self.latent_in.weight.dtype).reshape(B, T, self.packed, -1))
        dtype = latents.dtype                        # bfloat16 under autocast: the residual stream stays there
        blocks = [self.embed_actions(actions)[:, :, None], torch.cat((signal, step), -1)[:, :, None],
                  latents + self.latent_pos.to(dtype), self.registers.expand(B, T, -1, D)]
        if task_embedding is not None:
            blocks.append(task_embedding.expand(B, D)[:, None, None].expand(B, T, 1, D))
        x = self.transformer(torch.cat([part.to(dtype) for part in blocks], 2), cache, write, separate)
        output = self.latent_out(self.out_norm(x[:, :, 2:2 + self.packed])).float()
        return output.reshape(B, T, N, Z), (None if task_embedding is None else x[:, :, -1])

    def draw(self, B, T, device=None):
        """Everything random in one training step, for a batch of B sequences, as a dict of tensors.

        tau, d (B, T); noise (B, T, N, Z); separate (B,) bool. Every `shortcut_every`-th sequence follows
        eq. 4; in the others d = d_min, and τ is uniform over its grid. In all but separate images a share
        of the frames is at the context level instead, as the past is in use.
        """
        c, K = self.config, self.config.k_max
        tau, d = sample_signal_and_step((B, T), K, device)
        shortcut = (torch.arange(B, device=device) % c.shortcut_every == 0)[:, None]
        fine = torch.randint(0, K, (B, T), device=device) / K
        separate = torch.rand(B, device=device) < c.separate_images
        as_context = (torch.rand(B, T, device=device) < c.context_share) & ~separate[:, None]
        return {"tau": torch.where(as_context, c.context_level, torch.where(shortcut, tau, fine)),
                "d": torch.where(shortcut & ~as_context, d, 1 / K),
                "noise": torch.randn(B, T, c.latents, c.latent_channels, device=device), "separate": separate}

    def loss(self, z1, actions, draws, task_embedding=None):
        """Eq. 7 on latents z1 (B, T, N, Z), actions (B, T, A). Returns (loss, metrics), h (B, T, D) or None."""
        separate, h, rows = draws["separate"], None, slice(None, None, self.config.shortcut_every)
        actions = torch.where(separate[:, None, None], -1, actions)     # an image has no action that led to it

        def denoise(z, tau, d):
            nonlocal h
            x, h = self.denoise(z, tau, d, actions, task_embedding, separate=separate)
            return x

        half_step = lambda z, tau, d: self.denoise(z, tau, d, actions[rows], separate=separate[rows])[0]
        return shortcut_forcing_loss(denoise, half_step, z1, draws["noise"], draws["tau"], draws["d"],
                                     self.config.k_max, rows), h

    def forward(self, z1, actions, draws):
        """Eq. 7, RMS-normalized: the training loss of phase 1. Returns (loss, metrics)."""
        (loss, metrics), _ = self.loss(z1, actions, draws)
        return self.loss_norm({"dynamics": loss}), {"dynamics": loss.detach(), **metrics}


class Dream:
    """The world model with the interface of an environment: the one way in which frames are generated.

    Imagination, evaluation in the real environment, GIFs and interactive play all use it. Finished frames,
    real or dreamed, enter the KV cache at the context level by an extra pass that also yields h_t.
    """

    def __init__(self, dynamics, task_embedding=None, k=4, generator=None, temperature=1.0):
        """task_embedding (D,) or (B, D), or None: no h; k denoising steps, a power of two up to k_max;
        temperature: standard deviation of the noise that a dreamed frame starts from."""
        if k < 1 or k & (k - 1) or k > dynamics.config.k_max:
            raise ValueError(f"k = {k}: the denoising steps must be a power of two up to k_max = "
                             f"{dynamics.config.k_max}")
        self.dynamics, self.task_embedding, self.k, self.generator = dynamics, task_embedding, k, generator
        self.temperature, self.cache = temperature, Cache()

    def reset(self, z, actions):
        """Start from a context. z (B, T, N, Z), actions (B, T, A) as in observe. Returns h_T (B, D) or None."""
        self.cache = Cache()
        h = self.observe(z, actions)
        return None if h is None else h[:, -1]

    @torch.no_grad()
    def observe(self, z, actions):
        """Append finished frames z (B, T, N, Z), each led to by its action (B, T, A). Returns h (B, T, D) or
        None."""
        c = self.dynamics.config
        tau = torch.full(z.shape[:2], c.context_level, device=z.device)
        d = torch.full_like(tau, 1 / c.k_max)
        noise = torch.randn(z.shape, device=z.device, generator=self.generator)
        z = corrupt(z, noise, tau)
        return self.dynamics.denoise(z, tau, d, actions, self.task_embedding, self.cache, write=True)[1]

    def step(self, action):
        """Dream the frame that the action (B, A) leads to. Returns z (B, N, Z) and h (B, D) or None."""
        c, B, action = self.dynamics.config, len(action), action[:, None]
        full = lambda value: torch.full((B, 1), value, device=action.device)
        denoise = lambda z, tau, d: self.dynamics.denoise(z, full(tau), full(d), action, cache=self.cache)[0]
        noise = torch.randn(B, 1, c.latents, c.latent_channels, device=action.device, generator=self.generator)
        z = generate(denoise, self.temperature * noise, self.k)
        h = self.observe(z, action)
        return z[:, 0], (None if h is None else h[:, 0])


# ---------------------------------------------------------------------------------------------------------
# 3. Agent (section 3.3)

def symlog(x):
    """sign(x) ln(1 + |x|): compresses large values of either sign (Dreamer 3)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x):
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def two_hot(x, bins):
    """x (...) -> weights (..., len(bins)) on the two bins around x, so that weights @ bins = x (Dreamer 3).

    bins: ascending values. x beyond the outer bins counts as the outer bin.
    """
    x = x.clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, x.contiguous()).clamp(1, len(bins) - 1)
    low, high = bins[above - 1], bins[above]
    weight = ((x - low) / (high - low))[..., None]
    one_hot = lambda index: F.one_hot(index, len(bins)).to(x.dtype)
    return one_hot(above - 1) * (1 - weight) + one_hot(above) * weight


def two_hot_mean(logits, bins):
    """Expected value (...) of logits (..., len(bins)), in float32.

    Sums mirrored bins first: they cancel, so that equal logits give exactly 0."""
    weighted = logits.float().softmax(-1) * bins
    return (weighted + weighted.flip(-1)).sum(-1) / 2


def multi_token_targets(x, distances):
    """Targets n = 0 ... L-1 steps ahead. x (B, T, ...) -> (B, T, L, ...) and valid (T, L) bool.

    Entry [:, t, n] is x[:, t + n]; where t + n runs past the end of the sequence, valid is False.
    """
    T = x.shape[1]
    ahead = torch.arange(T, device=x.device)[:, None] + torch.arange(distances, device=x.device)
    return x[:, ahead.clamp(max=T - 1)], ahead < T


def lambda_returns(rewards, values, continues, gamma, lam):
    """Eq. 10: R_t = r_{t+1} + γ c_{t+1} ((1 - λ) v_{t+1} + λ R_{t+1}), R_H = v_H.

    rewards, continues (B, H) of frames 1 ... H; values (B, H + 1) of frames 0 ... H -> R (B, H) of frames 0 ... H-1.
    """
    returns, last = [], values[:, -1]
    for t in reversed(range(rewards.shape[1])):
        last = rewards[:, t] + gamma * continues[:, t] * ((1 - lam) * values[:, t + 1] + lam * last)
        returns.append(last)
    return torch.stack(returns[::-1], 1)


def pmpo_loss(log_prob, advantage, kl, weight, alpha, beta):
    """Eq. 11: (1 - α) mean over D- of ln π - α mean over D+ of ln π + β mean KL[π || prior].

    D+ = {advantage >= 0}, D- the rest: only the sign counts. All inputs (B, H); weight in [0, 1]: the
    probability that the dream still goes on. An empty set contributes exactly zero. Returns a scalar.
    """
    good = weight * (advantage >= 0)
    bad = weight * (advantage < 0)
    mean = lambda x, w: (x * w).sum() / w.sum().clamp(min=1e-8)
    return (1 - alpha) * mean(log_prob, bad) - alpha * mean(log_prob, good) + beta * mean(kl, weight)


class Head(nn.Module):
    """A small MLP on h_t with one output per prediction distance: (..., D) -> (..., L, outputs), float32."""

    def __init__(self, width, hidden, distances, outputs):
        super().__init__()
        self.distances, self.outputs = distances, outputs
        self.layers = nn.Sequential(RMSNorm(width), linear(width, hidden), RMSNorm(hidden), nn.SiLU(),
                                    linear(hidden, distances * outputs, zero=True))

    def forward(self, h):
        h = h.to(self.layers[1].weight.dtype)
        return self.layers(h).float().unflatten(-1, (self.distances, self.outputs))


class Agent(nn.Module):
    """The world model with an agent token and its heads: policy, reward, continuation, value."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, W, L = config.width, config.head_width, config.distances
        self.dynamics = Dynamics(config)
        self.task = nn.Embedding(config.tasks, D)
        nn.init.normal_(self.task.weight, std=0.5)
        self.policy_head = Head(D, W, L, sum(config.action_spec))
        self.reward_head = Head(D, W, L, config.bins)
        self.continue_head = Head(D, W, L, 1)
        self.value_head = Head(D, W, 1, config.bins)
        self.register_buffer("bin_values", symexp(torch.linspace(-10, 10, config.bins)), persistent=False)
        self.loss_norm = LossNorm("dynamics", "policy", "reward", "continue_")

    def dream(self, k=4, task=0, generator=None, temperature=1.0):
        """A fresh Dream with this agent's token in it."""
        return Dream(self.dynamics, self.task.weight[task], k, generator, temperature)

    # --- the policy: a product of categoricals

    def log_policy(self, logits):
        """logits (..., sum of categories) -> one tensor of log-probabilities per action component."""
        u = self.config.unimix
        return [torch.log((1 - u) * part.float().softmax(-1) + u / part.shape[-1])
                for part in logits.split(self.config.action_spec, -1)]

    def policy(self, h):
        """h (..., D) -> logits (..., sum of categories) of the action to take now, a_t."""
        return self.policy_head(h)[..., 0, :]

    def sample(self, logits, generator=None):
        """logits (B, sum of categories) -> actions (B, A) int64. The policy acts by sampling, always."""
        return torch.stack([torch.multinomial(part.exp(), 1, generator=generator)[..., 0]
                            for part in self.log_policy(logits)], -1)

    def log_prob(self, logits, actions):
        """ln π(a) (...) of actions (..., A); components that are -1 (unlabeled) count as 0."""
        actions = actions.long()
        return sum(part.gather(-1, actions[..., i, None].clamp(min=0))[..., 0] * (actions[..., i] >= 0)
                   for i, part in enumerate(self.log_policy(logits)))

    def kl(self, logits, prior_logits):
        """KL[π || prior] (...), the reverse KL that eq. 11 penalizes."""
        return sum((p.exp() * (p - q)).sum(-1)
                   for p, q in zip(self.log_policy(logits), self.log_policy(prior_logits)))

    # --- what h_t says about frame t

    def reward(self, h):
        """Expected reward (...) received on arriving at the frame of h (..., D)."""
        return two_hot_mean(self.reward_head(h)[..., 0, :], self.bin_values)

    def continuation(self, h):
        """Probability (...) that the frame of h (..., D) is not terminal."""
        return self.continue_head(h)[..., 0, 0].sigmoid()

    def value(self, h):
        """Expected λ-return (...) from the frame of h (..., D) on."""
        return two_hot_mean(self.value_head(h)[..., 0, :], self.bin_values)

    # --- phase 2 (eq. 9)

    def forward(self, z1, actions, rewards, continues, draws, task=0):
        """Eq. 9 beside eq. 7, every term RMS-normalized. Returns (loss, metrics).

        z1 (B, T, N, Z); actions (B, T, A): the action that LED to frame t; rewards, continues (B, T) of frame t;
        draws from dynamics.draw(); task: an index, or (B,) of them. h_t learns a_{t+n}, r_{t+n} and c_{t+n} for
        n = 0 ... L-1.
        """
        (dynamics, metrics), h = self.dynamics.loss(z1, actions, draws, self.task.weight[task])
        led_from = torch.cat((actions[:, 1:], torch.full_like(actions[:, :1], -1)), 1)    # a_t leaves frame t
        (actions, valid), (rewards, _), (continues, _) = (
            multi_token_targets(x, self.config.distances) for x in (led_from, rewards, continues))
        mean = lambda loss: (loss * valid).mean()  # over all B T L: shards of a batch weigh the same
        policy = mean(-self.log_prob(self.policy_head(h), actions))
        reward = mean(-(two_hot(rewards, self.bin_values) * self.reward_head(h).log_softmax(-1)).sum(-1))
        continue_ = mean(F.binary_cross_entropy_with_logits(self.continue_head(h)[..., 0], continues, reduction="none"))
        losses = {"dynamics": dynamics, "policy": policy, "reward": reward, "continue_": continue_}
        metrics = metrics | {name: loss.detach() for name, loss in losses.items()}
        return self.loss_norm(losses), metrics

    # --- phase 3 (eq. 10 and 11)

    def imagination_loss(self, rollout, prior, policy_weight=1.0):
        """PMPO for the policy, two-hot cross-entropy for the value. Returns (loss, metrics).

        rollout: from imagine(); prior: frozen copy of the cloned policy head. The transformer is frozen, so the
        heads train on the stored h and no graph of the rollout is needed. policy_weight 0 trains the value
        alone, until its advantages mean something.
        """
        c, h = self.config, rollout["h"]
        with torch.no_grad():
            values = self.value(h)                                                         # (B, H + 1)
            returns = lambda_returns(rollout["rewards"], values, rollout["continues"], c.gamma, c.lam)
            advantage = returns - values[:, :-1]
            alive = torch.cat((self.continuation(h[:, :1]), rollout["continues"]), 1).cumprod(1)
            weight = alive[:, :-1]                                                         # (B, H)
            prior_logits = prior(h[:, :-1])[..., 0, :]
        logits = self.policy(h[:, :-1])
        kl = self.kl(logits, prior_logits)
        policy = pmpo_loss(self.log_prob(logits, rollout["actions"]), advantage, kl, weight, c.alpha, c.beta)
        log_p = self.value_head(h[:, :-1])[..., 0, :].log_softmax(-1)
        value = -((two_hot(returns, self.bin_values) * log_p).sum(-1) * weight).mean()
        entropy = -sum((p.exp() * p).sum(-1) for p in self.log_policy(logits)).mean()
        metrics = {"policy": policy, "value": value, "kl": kl.mean(), "entropy": entropy,
                   "good": (advantage >= 0).float().mean(), "advantage_std": advantage.std(),
                   "reward": rollout["rewards"].mean(), "return": returns[:, 0].mean()}
        return policy_weight * policy + value, {name: number.detach() for name, number in metrics.items()}


@torch.no_grad()
def imagine(agent, z, actions, horizon, k=4, task=0, generator=None, temperature=1.0):
    """Roll world model and policy forward together from a context (Algorithm 1, phase 3).

    z (B, T, N, Z), actions (B, T, A): dataset context; task: index of its embedding; the rest as in Dream. Returns
    h (B, H + 1, D) of frames 0 ... H (frame 0 is the last of the context), actions (B, H, A) taken at frames
    0 ... H-1, rewards, continues (B, H) of frames 1 ... H, z (B, H, N, Z).
    """
    dream = agent.dream(k, task, generator, temperature)
    h = [dream.reset(z, actions)]
    taken, dreamed = [], []
    for _ in range(horizon):
        taken.append(agent.sample(agent.policy(h[-1]), generator))
        frame, state = dream.step(taken[-1])
        dreamed.append(frame)
        h.append(state)
    h = torch.stack(h, 1).float()
    return {"h": h, "actions": torch.stack(taken, 1), "z": torch.stack(dreamed, 1),
            "rewards": agent.reward(h[:, 1:]), "continues": agent.continuation(h[:, 1:])}


def frozen(module):
    """A copy for use, not for training: evaluation mode, no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)
