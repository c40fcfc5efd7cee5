"""Dreamer 4 in one module: tokenizer, world model, agent, imagination. Needs nothing but torch.

Source: Hafner, Yan, Lillicrap, "Training Agents Inside of Scalable World Models", arXiv:2509.24527.

1. A causal TOKENIZER, trained as a masked autoencoder, turns every frame into N latent tokens.
2. A transformer DYNAMICS model learns by shortcut forcing to denoise the latents of the next frame
   in few steps, given actions. An AGENT token reads out cloned actions, rewards, continuation.
3. The policy improves by PMPO on rollouts that world model and policy dream up together.

The token block of frame t, in the dynamics (time runs across blocks, one block per frame):

      what led here    noise level         memory      the frame itself        the reader
    [ action a_{t-1} | signal τ, step d | registers | latents z̃_t ......... | agent ] -> ẑ1, h_t
      S_a = 1          1                  S_r         N / pack                1 (nothing sees it)

Time: block t carries a_{t-1}; r_t and c_t belong to ARRIVING at frame t; h_t chooses a_t.
Shapes: B batch, T time, S tokens per frame, D width, P patches, N latent tokens, Z channels of a
latent token, A action components, K denoising steps, C context frames, H horizon, L multi-token
distances. Inside attention: R sequences, J query heads, G key heads, Q queries, U keys, E channels
of a head. Signal level τ: 0 is pure noise z0, 1 the clean latents z1, z̃ lies between, ẑ1 is the
prediction of z1: these subscripts are levels, not frames. Step size d: 1/K.

    eq. 4   sample_signal_and_step        eq. 9   Agent.forward (multi_token_targets)
    eq. 5   Tokenizer.forward             eq. 10  lambda_returns
    eq. 6   corrupt                       eq. 11  pmpo_loss
    eq. 7   Dynamics.loss                 Alg. 1, phase 3   imagine
    eq. 8   ramp_weight                   sampling          generate, Dream

Deliberate deviations from the paper, each with its reason:
- RoPE over time only, learned embeddings over the tokens of a frame: the simplest that streams.
- No soft cap of attention logits: QK-norm alone was stable.
- Perceptual loss is an optional callable: LPIPS needs pretrained weights.
- Every `shortcut_every`-th sequence trains the bootstrap, the others train d_min: 30 % less compute
  for nearly the same shortcut (as in shortcut models, where a quarter of the batch bootstraps).
- Context signal level snaps to the grid of d_min: frames have exactly the level of their label.
- A share of the frames enters training at the context level: in use the whole past is there, and
  the heads are applied there; with τ drawn evenly, training would hardly ever see a past so clean.
- Dreams may start from noise of a higher temperature than 1: a model that is surer than it should
  be flatters the policy (World Models, 2018, raises the temperature of its dreams, too).
- Continuous actions are binned and looked up: one kind of action space, a tuple of categoricals.
- A continuation head is trained beside the reward head; policies mix in 1 % uniform (Dreamer 3).
- Sequences treated as separate images lose their action too: no action led to an image.
- Phase 3 divides no loss by its RMS: its two heads share no parameters, Adam scales their steps.
- Two-hot bins span ±symexp(10), not ±symexp(20): far bins turn leaked probability into big errors.
"""
import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Architecture and losses: what a checkpoint carries. 'ours' marks what is not the paper's.
    Values that cannot work raise a ValueError that names the field."""
    image_size: tuple[int, ...] = (64, 64)  # frame height and width in pixels (paper: 360 x 640)
    action_spec: tuple[int, ...] = (5, 5)   # categories of each action component; set by the env
    # tokenizer (section 3.1)
    patch: int = 8                # side of a square patch in pixels (paper: 16)
    latents: int = 16             # latent tokens per frame, N (paper: 512)
    latent_channels: int = 16     # channels of a latent token, Z (paper: 16)
    tokenizer_width: int = 192    # width of encoder and decoder (ours)
    tokenizer_depth: int = 4      # layers of encoder and decoder each; see time_every (ours)
    tokenizer_heads: int = 6      # attention heads of encoder and decoder (ours)
    tokenizer_context: int = 4    # frames that the tokenizer's time attention sees (ours)
    mask_max: float = 0.9         # masked autoencoding: p ~ U(0, mask_max) per image (paper)
    # dynamics (section 3.2)
    pack: int = 2                 # neighbouring latents packed into one wider token (paper: 2)
    width: int = 256              # width of the dynamics transformer (ours)
    depth: int = 8                # layers of the dynamics transformer (ours)
    heads: int = 4                # query heads (ours)
    kv_heads: int = 2             # key/value heads, grouped-query attention (paper gives no sizes)
    registers: int = 2            # register tokens per frame (paper: for temporal consistency)
    time_every: int = 4           # every n-th layer is over time, others over a frame (paper: 4)
    context: int = 16             # frames that time attention sees, C (paper: 192)
    k_max: int = 8                # finest number of denoising steps, 1 / d_min (ours; not given)
    shortcut_every: int = 4       # every n-th sequence trains steps above d_min (ours; paper: all)
    separate_images: float = 0.3  # share of sequences treated as images without a past (paper)
    context_signal: float = 0.9   # signal level of past frames in use: 10 % noise (paper)
    context_share: float = 0.75   # share of training frames at context_signal (ours; paper: 0)
    # agent (section 3.3)
    tasks: int = 1                # task embeddings (ours: one task)
    distances: int = 8            # multi-token prediction, n = 0 ... L-1 (paper: 8)
    head_width: int = 256         # hidden units of a head (ours)
    bins: int = 255               # two-hot bins, evenly spaced in symlog space (Dreamer 3)
    unimix: float = 0.01          # uniform share mixed into the policy's categoricals (Dreamer 3)
    gamma: float = 0.997          # discount (paper)
    lam: float = 0.95             # λ of the returns (Dreamer 3; the paper gives none)
    alpha: float = 0.5            # PMPO: weight of the good set (paper)
    beta: float = 0.3             # PMPO: weight of the KL to the prior policy (paper)

    def __post_init__(self, unbounded=("beta",)):
        # A checkpoint or a command line may bring lists.
        self.image_size, self.action_spec = tuple(self.image_size), tuple(self.action_spec)
        # Counts are at least 1 (0 if that is the default); shares, discounts, rates in [0, 1].
        for field in [field for field in fields(self) if field.type is not str]:
            value, is_share = getattr(self, field.name), field.type is float
            low = 0 if is_share or field.default == 0 else 1
            high = 1 if is_share and field.name not in unbounded else math.inf
            # NaN lies nowhere.
            if not all(low <= x <= high for x in torch.tensor(value).flatten().tolist()):
                raise ValueError(f"config: {field.name} is {value}, must be in {low} ... {high}")
        for ok, what in [
            (len(self.image_size) == 2, "image_size must be height and width"),
            (self.action_spec, "action_spec must list category counts"),
            (self.bins > 1, "bins must be at least 2"),
            (self.k_max & (self.k_max - 1) == 0, "k_max must be a power of two"),
            (self.depth >= self.time_every, "depth must be at least time_every, for a time layer"),
            (self.latents % self.pack == 0, "latents must be a multiple of pack"),
            (self.heads % self.kv_heads == 0, "heads must be a multiple of kv_heads"),
            (self.width % (2 * self.heads) == 0, "width must be a multiple of 2 heads, for RoPE"),
            (self.tokenizer_width % (2 * self.tokenizer_heads) == 0,
             "tokenizer_width must be a multiple of 2 tokenizer_heads, for RoPE"),
            (self.context_share < 1, "context_share must be below 1, to leave frames to denoise"),
        ]:
            if not ok:
                raise ValueError(f"config: {what}")

    @property
    def context_level(self):
        """context_signal on the grid of d_min, where τ has an embedding; in [0, 1 - d_min]."""
        return min(round(self.context_signal * self.k_max), self.k_max - 1) / self.k_max


# ---- Transformer over space and time (section 3.4) -----------------------------------------------

def rope(x, pos, base=10000.0):
    """Rotary position embedding: turns channel pairs of x (..., T, E) by the frame index pos (T,).
    Frame indices are absolute in the video, also in a stream: keys can be cached after rotation."""
    E = x.shape[-1]
    freq = base ** (-torch.arange(0, E, 2, device=x.device, dtype=torch.float32) / E)
    angle = pos.float()[:, None] * freq  # (T, E/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# Who sees whom within a frame (section 3.1 and 3.3). Rows look at columns:
#   encoder   patch  latent      decoder   latent  query      dynamics   world  agent
#   patch       x                latent      x                world        x
#   latent      x      x         query       x       x        agent        x      x
# "world" = action, signal, latents, registers: nothing may see the agent token, or the world model
# could learn to depend on the task.
SEES = {"patch": ("patch",), "latent": ("patch", "latent"), "query": ("latent", "query"),
        "world": ("world",), "agent": ("world", "agent")}


def attention_masks(groups, query_pos, key_pos, context):
    """Both masks of a transformer; True = may attend (sections 3.1 and 3.4).
    groups: ((name, tokens), ...) in the order of the frame's tokens; query_pos (T,), key_pos (U,):
    frame indices. Returns space (S, S), from the table above, and time (T, U), a causal band."""
    table = torch.tensor([[key in SEES[query] for key, _ in groups] for query, _ in groups])
    # Expanded on the CPU: repeats by counts that lie on a GPU would have to wait for them.
    counts = torch.tensor([count for _, count in groups])
    space = table.repeat_interleave(counts, 0).repeat_interleave(counts, 1)  # (S, S)
    space = space.to(query_pos.device, non_blocking=True)
    # Frame t sees the C frames t-C+1 ... t, at its own token position; none is before frame 0.
    age = query_pos[:, None] - key_pos[None, :]  # (T, U)
    return space, (age >= 0) & (age < context) & (key_pos >= 0)


def attend(q, k, v, mask=None):
    """Grouped queries: q (R, J, Q, E), k, v (R, G, U, E), mask (Q, U) or (R, 1, Q, U) -> as q."""
    R, J, Q, E = q.shape
    G = k.shape[1]
    # Queries that share a key are stacked as rows: PyTorch's own grouped queries, together with a
    # mask, would leave the fused kernels, and hold all scores in float32.
    q = q.reshape(R, G, J // G * Q, E)
    if mask is not None:
        mask = torch.cat([mask] * (J // G), -2)
    # Two forms of the same function: the fused kernel on GPUs, plain matrix products on CPUs, where
    # that kernel takes four times as long, forward and backward in bfloat16.
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(R, J, Q, E)
    scores = (q * E ** -0.5) @ k.mT  # (R, G, J/G Q, U)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    # On CPU and CUDA, softmax over bfloat16 keeps its maximum and sum in float32.
    return (scores.softmax(-1) @ v).view(R, J, Q, E)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, its statistics in float32."""
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        # Only a weight of the input's dtype stays on the fused path, and only the second conversion
        # keeps that dtype under autocast on CUDA, which returns float32.
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, 1e-6).to(x.dtype)


class Block(nn.Module):
    """One layer: attention over space or time, then SwiGLU, each pre-normalized and residual."""
    def __init__(self, width, heads, kv_heads, over_time):
        super().__init__()
        self.heads, self.kv_heads, self.over_time = heads, kv_heads, over_time
        head_dim = width // heads
        # SwiGLU has three matrices instead of two: a factor of 8/3 instead of 4 keeps their size.
        hidden = math.ceil(width * 8 / 3 / 32) * 32
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False)
        # Before RoPE: the norm's weights, if applied after it, would tie scores to positions.
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp_in = nn.Linear(width, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x, mask, pos=None, ring=None, unread=0):
        """x (B, T, S, D) -> the same without the first `unread` tokens of every frame, which space
        layers can leave out; mask, for space layers (S, S) or None, for time layers (T, U) or
        (B, 1, T, U); pos (T,): frame indices; ring: of a Cache, which takes in x."""
        B, T, S, D = x.shape
        # Linear layers see contiguous (B, T, S, D). Attention runs over the axis before the last:
        # frames (one sequence per token position) or tokens (one sequence per frame).
        qkv = self.qkv(self.norm1(x)).view(B, T, S, -1, D // self.heads)
        qkv = qkv.permute((0, 2, 3, 1, 4) if self.over_time else (0, 1, 3, 2, 4))
        # (R, J + 2 G, Q, E), split into (R, J, Q, E) and twice (R, G, Q, E)
        q, k, v = qkv.flatten(0, 1).split((self.heads, self.kv_heads, self.kv_heads), 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.over_time:
            q, k = rope(q, pos), rope(k, pos)
            # A mask with a batch axis (B, 1, T, U) holds for all S tokens of its sequence.
            mask = mask if mask.dim() == 2 else mask.repeat_interleave(S, 0)
        if ring is not None:
            # The past, then what is new, whose last C frames go into their slots.
            C, new = ring.shape[-2], torch.stack((k, v))  # (2, R, G, T, E)
            k, v = torch.cat((ring.flatten(1, 2), new), 3)  # (R, G, U, E) each
            ring[..., pos[-C:] % C, :] = new[..., -C:, :].unflatten(1, (B, S)).detach()
        if unread:
            # What nobody reads is seen, but sees nothing.
            q, x = q[..., unread:, :], x[:, :, unread:]
            mask = None if mask is None else mask[unread:]
        y = attend(q, k, v, mask).unflatten(0, (B, -1))
        y = y.permute((0, 3, 1, 2, 4) if self.over_time else (0, 1, 3, 2, 4))
        x = x + self.attn_out(y.flatten(-2))
        gate, value = self.mlp_in(self.norm2(x)).chunk(2, -1)
        return x + self.mlp_out(F.silu(gate) * value)


class Cache:
    """KV cache of one stream through one transformer. layers: for every time layer a ring of the
    keys and values of the last C frames, (2, B, S, G, C, E), where frame t lies in slot t modulo C.
    frames: how many are finished; who calls the transformer counts them. A pass over one more frame
    writes its slot, which the next pass over it, less noisy, overwrites."""
    def __init__(self):
        self.frames, self.layers = 0, {}


class Transformer(nn.Module):
    """Space layers and, every `time_every` layers, a causal banded time layer (section 3.4)."""
    def __init__(self, width, depth, heads, kv_heads, context, time_every):
        super().__init__()
        self.context, self.blocks = context, nn.ModuleList()
        for i in range(depth):
            over_time = i % time_every == time_every - 1
            self.blocks.append(Block(width, heads, kv_heads, over_time))
        for block in self.blocks:
            for layer in (block.qkv, block.mlp_in):
                nn.init.normal_(layer.weight, std=width ** -0.5)
            # All 2 * depth residual branches start small: their variances sum to 1.
            for layer in (block.attn_out, block.mlp_out):
                nn.init.normal_(layer.weight, std=(2 * depth * layer.in_features) ** -0.5)

    def forward(self, x, groups, unread=0, cache=None, separate=None):
        """x (B, T, S, D) -> the same without the first `unread` tokens of every frame.
        groups: as in attention_masks; cache: the stream that the frames of x continue (None: they
        start one); separate (B,) bool: sequences whose frames see no past."""
        B, T, S, D = x.shape
        start, C = 0 if cache is None else cache.frames, self.context
        query_pos = key_pos = torch.arange(start, start + T, device=x.device)
        if cache is not None:
            # The last frame before `start` in every slot; negative: none yet.
            slots = torch.arange(C, device=x.device)
            key_pos = torch.cat((start - 1 - (start - 1 - slots) % C, query_pos))
        space, time = attention_masks(groups, query_pos, key_pos, C)
        # Where every token sees every token, attention is faster without a mask.
        space = None if len(groups) == 1 else space
        if separate is not None:
            alone = torch.eye(T, dtype=torch.bool, device=x.device)
            time = torch.where(separate[:, None, None, None], alone, time)  # (B, 1, T, T)
        # After the last layer over space, tokens do not mix: it leaves out what nobody reads.
        last = max((i for i, block in enumerate(self.blocks) if not block.over_time), default=-1)
        for i, block in enumerate(self.blocks):
            ring, left_out = None, unread if i == last else 0
            if cache is not None and block.over_time:
                size = (2, B, x.shape[2], block.kv_heads, C, D // block.heads)
                # A pass without the agent token, the last of a frame, leaves out its slots.
                ring = cache.layers.setdefault(i, x.new_zeros(size))[:, :, :x.shape[2]]
            mask = time if block.over_time else space
            x = block(x, mask, query_pos, ring, left_out)
        return x[:, :, unread - S:]


def learned_embedding(*shape):
    """A parameter of this shape. Smaller entries would drown beside patch embeddings of about 1."""
    return nn.Parameter(torch.randn(shape) * 0.5)


def linear(inputs, outputs, zero=False):
    """A linear layer that keeps the variance of its inputs, or starts at zero (output layers)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.0 if zero else inputs ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


class LossNorm(nn.Module):
    """Divides every loss by a running root mean square (section 3), then adds up."""
    def __init__(self, *names, decay=0.99):
        super().__init__()
        self.decay = decay
        for name in names:
            self.register_buffer(name, torch.zeros(()))
        # The averages start at 0: this is the bias correction of Adam, 1 - decay^n.
        self.register_buffer("weight", torch.zeros(()))

    def _apply(self, fn, recurse=True):
        # Running averages go where the model goes, but stay in float32.
        return super()._apply(lambda x: fn(x) if x.is_meta else x.to(fn(x).device), recurse)

    def forward(self, losses, weights={}):
        """Scalar from losses: name -> scalar, weights: name -> factor after the division (or 1)."""
        with torch.no_grad():
            values = torch.stack([loss.detach().float() for loss in losses.values()])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # Every process needs the estimate of the whole batch, or they would drift apart.
                torch.distributed.all_reduce(values)
                values = values / torch.distributed.get_world_size()
            if self.training:
                self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
                for name, value in zip(losses, values):
                    getattr(self, name).lerp_(value.square(), 1 - self.decay)
            weight = self.weight.clamp(min=1e-8)
        rms = {name: (getattr(self, name) / weight).sqrt().clamp(min=1e-8) for name in losses}
        return sum(weights.get(name, 1.0) * loss / rms[name] for name, loss in losses.items())


# ---- 1. Causal tokenizer (section 3.1) -----------------------------------------------------------

class Tokenizer(nn.Module):
    """Masked autoencoder from video frames to latent tokens in (-1, 1), causal in time."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        D, N, p = config.tokenizer_width, config.latents, config.patch
        self.grid = tuple(math.ceil(side / p) for side in config.image_size)
        P = self.grid[0] * self.grid[1]
        self.patch_in, self.patch_out = linear(3 * p * p, D), linear(D, 3 * p * p)
        self.patch_pos, self.mask_token = learned_embedding(P, D), learned_embedding(D)
        self.latent_tokens = learned_embedding(N, D)
        self.queries, self.latent_pos = learned_embedding(P, D), learned_embedding(N, D)
        heads, context = config.tokenizer_heads, config.tokenizer_context
        size = (D, config.tokenizer_depth, heads, heads, context, config.time_every)
        self.encoder, self.decoder = Transformer(*size), Transformer(*size)
        # Without the norm before the bottleneck, tanh saturates.
        self.to_latent = nn.Sequential(RMSNorm(D), linear(D, config.latent_channels))
        self.from_latent, self.out_norm = linear(config.latent_channels, D), RMSNorm(D)
        self.loss_norm = LossNorm("mse", "perceptual")

    def patchify(self, images):
        """images (B, T, 3, H, W) -> patches (B, T, P, 3 p p); zero-pads H and W to multiples of p.
        Raises ValueError for other channels or sizes than those of the config."""
        B, T, channels, H, W = images.shape
        if channels != 3 or (H, W) != self.config.image_size:
            raise ValueError(f"images are (B, T, {channels}, {H}, {W}); "
                             f"this tokenizer wants 3 channels at {self.config.image_size}")
        p, (rows, columns) = self.config.patch, self.grid
        images = F.pad(images, (0, columns * p - W, 0, rows * p - H))
        # (B, T, 3 p p, rows, columns) -> (B, T, 3 p p, P) -> (B, T, P, 3 p p)
        return F.pixel_unshuffle(images, p).flatten(-2).mT.contiguous()

    def unpatchify(self, patches):
        """patches (B, T, P, 3 p p) -> images (B, T, 3, H, W), the padding cropped away."""
        H, W = self.config.image_size
        patches = patches.mT.unflatten(-1, self.grid)  # (B, T, 3 p p, rows, columns)
        return F.pixel_shuffle(patches, self.config.patch)[..., :H, :W]

    def draw(self, B, T, mask_max=None, device=None):
        """Masked autoencoding: which patches to hide (B, T, P), p ~ U(0, mask_max) per image."""
        mask_max = self.config.mask_max if mask_max is None else mask_max
        p = torch.rand(B, T, 1, device=device) * mask_max
        return torch.rand(B, T, len(self.patch_pos), device=device) < p

    def encode(self, images, mask=None, cache=None):
        """images (B, T, 3, H, W) in [0, 1] -> latents (B, T, N, Z) in (-1, 1), float32.
        mask (B, T, P) bool: patches replaced by the learned mask embedding, in training only;
        cache: the stream that the frames continue."""
        (B, T), P, N = images.shape[:2], len(self.patch_pos), len(self.latent_tokens)
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], not {images.dtype}")
        images = images.to(self.mask_token.dtype) * 2 - 1
        x = self.patch_in(self.patchify(images))  # (B, T, P, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + self.patch_pos.to(x.dtype)
        latents = self.latent_tokens.to(x.dtype).expand(B, T, -1, -1)
        x = torch.cat((x, latents), 2)
        groups = (("patch", P), ("latent", N))
        x = self.encoder(x, groups, unread=P, cache=cache)  # (B, T, N, D)
        if cache is not None:
            cache.frames += T
        return torch.tanh(self.to_latent(x).float())

    def reconstruct(self, latents, cache=None):
        """As decode, but unclamped: the loss needs a gradient beyond [0, 1], too."""
        B, T, N, Z = latents.shape
        x = self.from_latent(latents.to(self.mask_token.dtype))  # (B, T, N, D)
        x = x + self.latent_pos.to(x.dtype)
        queries = self.queries.to(x.dtype).expand(B, T, -1, -1)
        x = torch.cat((x, queries), 2)
        groups = (("latent", N), ("query", len(self.queries)))
        x = self.decoder(x, groups, unread=N, cache=cache)  # (B, T, P, D)
        if cache is not None:
            cache.frames += T
        patches = self.patch_out(self.out_norm(x)).float()
        return self.unpatchify((patches + 1) / 2)

    def decode(self, latents, cache=None):
        """latents (B, T, N, Z) -> images (B, T, 3, H, W) in [0, 1], float32."""
        return self.reconstruct(latents, cache).clamp(0, 1)

    def forward(self, images, mask, perceptual=None, valid=None):
        """Eq. 5: MSE over ALL patches + 0.2 perceptual, each RMS-normalized: (loss, metrics).
        images (B, T, 3, H, W) in [0, 1]; mask from draw(); perceptual: callable (reconstruction,
        images), both (B T, 3, H, W), the reconstruction unclamped, -> scalar, for example LPIPS;
        valid (B, T) bool: False for padding, which costs nothing."""
        output = self.reconstruct(self.encode(images, mask))
        if valid is not None:
            # Black in both.
            output, images = (x * valid[..., None, None, None] for x in (output, images))
        losses = {"mse": F.mse_loss(output, images)}
        if perceptual is not None:
            losses["perceptual"] = perceptual(output.flatten(0, 1), images.flatten(0, 1))
        metrics = {name: loss.detach() for name, loss in losses.items()}
        return self.loss_norm(losses, {"perceptual": 0.2}), metrics


# ---- 2. Interactive dynamics (section 3.2) -------------------------------------------------------

def sample_signal_and_step(shape, k_max, device=None):
    """Eq. 4: d = 1/k, k uniform over {1, 2, 4, ..., k_max}; τ uniform over {0, d, 2d, ..., 1 - d}.
    Returns (τ, d), two float tensors of the shape, drawn independently for every entry (frame)."""
    k = 2 ** torch.randint(0, k_max.bit_length(), shape, device=device)
    d = 1.0 / k
    tau = (torch.rand(shape, device=device) * k).floor() * d
    return tau, d


def corrupt(z1, noise, tau):
    """Eq. 6: z̃ = (1 - τ) z0 + τ z1. z1, noise (B, T, N, Z); τ (B, T)."""
    tau = tau[..., None, None]
    return (1 - tau) * noise + tau * z1


def ramp_weight(tau):
    """Eq. 8: w(τ) = 0.9 τ + 0.1. Frames with more signal can teach more detail."""
    return 0.9 * tau + 0.1


def weighted_mean(x, weight):
    """Mean of x with weights of the same shape. An empty set gives exactly zero, not NaN."""
    return (x * weight).sum() / weight.sum().clamp(min=1e-8)


def bootstrap_target(denoise, z, tau, d, d_min):
    """Where two half steps lead, as the clean latents that one step of size d should hit (eq. 7).
    denoise(z̃, τ, d) -> ẑ1; z (B, T, N, Z); τ, d (B, T). The result at d_min is not to be used."""
    # A frame at d_min has no half step: it is there for the others, and stays (half = 0).
    half = torch.where(d > d_min, d / 2, 0.0)
    step = (d / 2).clamp(min=d_min)
    tau2 = tau + half
    left, left2, half = (x[..., None, None] for x in (1 - tau, 1 - tau2, half))  # (B, T, 1, 1)
    # The velocities of the two half steps, b = (ẑ1 - z̃) / (1 - τ).
    b1 = (denoise(z, tau, step) - z) / left
    z2 = z + b1 * half
    b2 = (denoise(z2, tau2, step) - z2) / left2
    # With this target the plain squared error in x-space is exactly the paper's
    # (1 - τ)² ‖(ẑ1 - z̃)/(1 - τ) - (b′ + b″)/2‖².
    return z + left * (b1 + b2) / 2


@torch.no_grad()
def generate(denoise, z, k):
    """K Euler steps of size d = 1/K from noise z (B, T, N, Z) to data (section 3.2).
    denoise(z̃, τ, d) -> ẑ1; τ, d (B, T)."""
    d = torch.full(z.shape[:2], 1 / k, device=z.device)
    for i in range(k):
        velocity = (denoise(z, i * d, d) - z) / (1 - i / k)
        # The last step, at τ = 1 - d, lands exactly on ẑ1: none at τ = 1 is needed.
        z = z + velocity / k
    return z


class Dynamics(nn.Module):
    """Denoises the latents of every frame of a video, given actions and the frames before."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        D, k_max = config.width, config.k_max
        packed_channels = config.latent_channels * config.pack
        self.packed = config.latents // config.pack
        # One lookup table for all action components: each begins at its offset.
        offsets = torch.tensor((0,) + config.action_spec[:-1]).cumsum(0)
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("sizes", torch.tensor(config.action_spec), persistent=False)
        self.action_table = nn.Embedding(sum(config.action_spec), D)
        # All that a frame without a known action gets.
        self.action_base = learned_embedding(D)
        # Entries for τ = 0, d_min, ..., 1 - d_min and for d = 1, 1/2, ..., d_min = 1 / k_max.
        self.signal = nn.Embedding(k_max, D // 2)
        self.step = nn.Embedding(k_max.bit_length(), D - D // 2)
        self.latent_in = linear(packed_channels, D)
        self.latent_pos = learned_embedding(self.packed, D)
        self.registers = learned_embedding(config.registers, D)
        self.transformer = Transformer(
            D, config.depth, config.heads, config.kv_heads, config.context, config.time_every)
        self.out_norm, self.latent_out = RMSNorm(D), linear(D, packed_channels)
        for table in (self.action_table, self.signal, self.step):
            nn.init.normal_(table.weight, std=0.5)
        self.loss_norm = LossNorm("dynamics")

    def embed_actions(self, actions):
        """actions (B, T, A) int, -1 = unknown -> (B, T, D): sum of lookups + learned embedding."""
        # Beyond its component, an index would read the next one's rows. Async: no wait for a GPU.
        torch._assert_async((actions < self.sizes).all(), "an action is beyond the action_spec")
        rows = actions.clamp(min=0).long() + self.offsets
        lookups = self.action_table(rows) * (actions >= 0)[..., None]  # (B, T, A, D)
        return lookups.sum(-2) + self.action_base

    def denoise(self, z, tau, d, actions, task_embedding=None, cache=None, separate=None):
        """One pass over noisy latents. Returns ẑ1 (B, T, N, Z) float32, and h (B, T, D) or None.
        z (B, T, N, Z); τ, d (B, T) on the grids of eq. 4; actions (B, T, A): block t carries
        a_{t-1}; task_embedding (D,) or (B, D): puts the agent token into every block, h is its
        output; cache, separate: as in Transformer.forward."""
        B, T, N, Z = z.shape
        signal = self.signal((tau * self.config.k_max).round().long())
        step = self.step((-torch.log2(d)).round().long())
        z = z.to(self.latent_in.weight.dtype)
        latents = self.latent_in(z.reshape(B, T, self.packed, -1))
        # bfloat16 under autocast: the residual stream stays in it.
        dtype = latents.dtype
        # The parts of the block, (B, T, tokens, D) each.
        unread = 2 + len(self.registers)
        groups = [("world", unread + self.packed)]
        parts = [
            self.embed_actions(actions)[:, :, None],
            torch.cat((signal, step), -1)[:, :, None],
            self.registers.expand(B, T, -1, -1),
            latents + self.latent_pos.to(dtype)]
        if task_embedding is not None:
            groups.append(("agent", 1))
            parts.append(task_embedding.expand(B, -1)[:, None, None].expand(B, T, 1, -1))
        x = torch.cat([part.to(dtype) for part in parts], 2)  # (B, T, S, D)
        x = self.transformer(x, groups, unread, cache, separate)
        h = None if task_embedding is None else x[:, :, -1]
        z1 = self.latent_out(self.out_norm(x[:, :, :self.packed])).float()
        return z1.reshape(B, T, N, Z), h

    def draw(self, B, T, device=None):
        """Everything random in one training step, for a batch of B sequences, as a dict of tensors.
        tau, d (B, T); noise (B, T, N, Z); separate (B,) bool."""
        c = self.config
        # Every shortcut_every-th sequence follows eq. 4; the others have d = d_min, τ on its grid.
        tau, d = sample_signal_and_step((B, T), c.k_max, device)
        fine = torch.randint(0, c.k_max, (B, T), device=device) / c.k_max
        shortcut = (torch.arange(B, device=device) % c.shortcut_every == 0)[:, None]
        tau = torch.where(shortcut, tau, fine)
        # In sequences with a past, a share of the frames is at the context level, as in use.
        separate = torch.rand(B, device=device) < c.separate_images
        as_context = (torch.rand(B, T, device=device) < c.context_share) & ~separate[:, None]
        return {
            "tau": torch.where(as_context, c.context_level, tau),
            "d": torch.where(shortcut & ~as_context, d, 1 / c.k_max),
            "noise": torch.randn(B, T, c.latents, c.latent_channels, device=device),
            "separate": separate}

    def loss(self, z1, actions, draws, task_embedding=None, valid=None):
        """Eq. 7, shortcut forcing with x-prediction, on z1 (B, T, N, Z), actions (B, T, A); draws
        from draw(); valid (B, T) bool: False for padding, which costs nothing, at the end of
        sequences. Returns (loss, metrics), h (B, T, D) or None."""
        tau, d, separate = draws["tau"], draws["d"], draws["separate"]
        d_min, n = 1 / self.config.k_max, self.config.shortcut_every
        # An image has no action that led to it.
        actions = torch.where(separate[:, None, None], -1, actions)
        # 1. Noise every frame (eq. 6).
        z = corrupt(z1, draws["noise"], tau)

        # 2. The targets are the data, but where d > d_min the end of two half steps. Only every
        # n-th sequence has such frames; the agent token is left out, as nothing sees it.
        def half_step(z, tau, d):
            return self.denoise(z, tau, d, actions[::n], separate=separate[::n])[0]

        with torch.no_grad():
            two_steps = bootstrap_target(half_step, z[::n], tau[::n], d[::n], d_min)
            large = (d[::n] > d_min)[..., None, None]
            target = z1.clone()
            target[::n] = torch.where(large, two_steps, z1[::n])
        # 3. Predict.
        prediction, h = self.denoise(z, tau, d, actions, task_embedding, separate=separate)
        error = (prediction - target).square().mean((-2, -1))  # (B, T)
        # 4. Weigh, the same for both terms.
        valid = torch.ones_like(error) if valid is None else valid.float()
        loss = (ramp_weight(tau) * error * valid).mean()
        with torch.no_grad():
            fine = (d <= d_min).float()
            metrics = {"flow": weighted_mean(error, fine * valid),
                       "shortcut": weighted_mean(error, (1 - fine) * valid)}
        return (loss, metrics), h

    def forward(self, z1, actions, draws, valid=None):
        """Eq. 7, RMS-normalized: the training loss of phase 1. Returns (loss, metrics)."""
        (loss, metrics), _ = self.loss(z1, actions, draws, valid=valid)
        return self.loss_norm({"dynamics": loss}), {"dynamics": loss.detach(), **metrics}


class Dream:
    """The world model with the interface of an environment: the one way to generate frames, for
    imagination, evaluation in the real environment, GIFs and interactive play."""
    def __init__(self, dynamics, task_embedding=None, k=4, generator=None, temperature=1.0):
        """task_embedding (D,) or (B, D), or None: no h; k denoising steps, a power of two up to
        k_max (else ValueError); temperature: standard deviation of the noise of dreamed frames."""
        k_max = dynamics.config.k_max
        if k < 1 or k & (k - 1) or k > k_max:
            raise ValueError(f"k = {k} must be a power of two up to k_max = {k_max}")
        self.dynamics, self.task_embedding, self.k = dynamics, task_embedding, k
        self.generator, self.temperature, self.cache = generator, temperature, Cache()

    def reset(self, z, actions):
        """Start from a context z (B, T, N, Z), actions (B, T, A). Returns h_T (B, D) or None."""
        self.cache = Cache()
        h = self.observe(z, actions)
        return None if h is None else h[:, -1]

    @torch.no_grad()
    def observe(self, z, actions):
        """Append finished frames z (B, T, N, Z), actions (B, T, A). Returns h (B, T, D) or None."""
        c = self.dynamics.config
        tau = torch.full(z.shape[:2], c.context_level, device=z.device)
        d = torch.full_like(tau, 1 / c.k_max)
        noise = torch.randn(z.shape, device=z.device, generator=self.generator)
        # Finished frames, real or dreamed, enter the KV cache at the context level, by a pass of
        # their own that also yields h: a half-denoised frame would tell the policy less.
        z = corrupt(z, noise, tau)
        _, h = self.dynamics.denoise(z, tau, d, actions, self.task_embedding, self.cache)
        self.cache.frames += z.shape[1]
        return h

    def step(self, action):
        """Dream the frame that the action (B, A) leads to, after a reset or observed frames.
        Returns z (B, N, Z), h (B, D) or None."""
        c, action = self.dynamics.config, action[:, None]  # (B, 1, A)

        def denoise(z, tau, d):
            return self.dynamics.denoise(z, tau, d, action, cache=self.cache)[0]

        noise = torch.randn(len(action), 1, c.latents, c.latent_channels, device=action.device,
                            generator=self.generator)
        z = generate(denoise, self.temperature * noise, self.k)
        h = self.observe(z, action)
        return z[:, 0], (None if h is None else h[:, 0])


# ---- 3. Agent (section 3.3) ----------------------------------------------------------------------

def symexp(x):
    """The inverse of symlog(x) = sign(x) ln(1 + |x|), which compresses large values (Dreamer 3)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def two_hot(x, bins):
    """x (...) -> weights (..., len(bins)) on the two bins around x: weights @ bins = x (Dreamer 3).
    bins: ascending values. x beyond the outer bins counts as the outer bin."""
    x = x.clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, x.contiguous()).clamp(1, len(bins) - 1)
    weight = (x - bins[above - 1]) / (bins[above] - bins[above - 1])
    low, high = F.one_hot(torch.stack((above - 1, above)), len(bins)).to(x.dtype)
    return low * (1 - weight[..., None]) + high * weight[..., None]


def two_hot_mean(logits, bins):
    """Expected value (...) of logits (..., len(bins)), in float32."""
    weighted = logits.float().softmax(-1) * bins
    # Sums mirrored bins first: they cancel, so that equal logits give exactly 0.
    return (weighted + weighted.flip(-1)).sum(-1) / 2


def multi_token_targets(x, distances):
    """Targets 0 ... L-1 steps ahead (eq. 9). x (B, T, ...) -> (B, T, L, ...), valid (T, L) bool.
    Entry [:, t, n] is x[:, t + n]; where t + n runs past the end of x, valid is False."""
    T = x.shape[1]
    t, n = torch.arange(T, device=x.device), torch.arange(distances, device=x.device)
    index = t[:, None] + n  # (T, L)
    return x[:, index.clamp(max=T - 1)], index < T


def lambda_returns(rewards, values, continues, gamma, lam):
    """Eq. 10: R_t = r_{t+1} + γ c_{t+1} ((1 - λ) v_{t+1} + λ R_{t+1}), R_H = v_H.
    rewards, continues (B, H) of frames 1 ... H; values (B, H + 1) of frames 0 ... H. Returns
    R (B, H) of frames 0 ... H-1."""
    B, H = rewards.shape
    returns, last = [], values[:, -1]
    for t in reversed(range(H)):
        # Index t of rewards and continues belongs to frame t + 1.
        future = (1 - lam) * values[:, t + 1] + lam * last
        last = rewards[:, t] + gamma * continues[:, t] * future
        returns.append(last)
    return torch.stack(returns[::-1], 1)


def pmpo_loss(log_prob, advantage, kl, weight, alpha, beta):
    """Eq. 11: (1 - α) mean over D- of ln π - α mean over D+ of ln π + β mean KL[π || prior].
    D+ = {advantage >= 0}, D- the rest: only the sign counts. All inputs (B, H); weight in [0, 1]:
    the probability that the dream still goes on. Returns a scalar."""
    # Each set has a mean of its own, so that a rare outcome is not drowned by the other.
    good = weighted_mean(log_prob, weight * (advantage >= 0))
    bad = weighted_mean(log_prob, weight * (advantage < 0))
    return (1 - alpha) * bad - alpha * good + beta * weighted_mean(kl, weight)


class Head(nn.Module):
    """MLP on h_t, one output per prediction distance: (..., D) -> (..., L, outputs), float32."""
    def __init__(self, width, hidden, distances, outputs):
        super().__init__()
        self.distances, self.outputs = distances, outputs
        # The last layer starts at zero: uniform policy, rewards and values of 0, c of 1/2.
        self.layers = nn.Sequential(
            RMSNorm(width), linear(width, hidden), RMSNorm(hidden), nn.SiLU(),
            linear(hidden, distances * outputs, zero=True))

    def forward(self, h):
        h = h.to(self.layers[1].weight.dtype)
        return self.layers(h).float().unflatten(-1, (self.distances, self.outputs))


class Agent(nn.Module):
    """The world model with an agent token and its heads; the policy: a product of categoricals."""
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
        self.loss_norm = LossNorm("dynamics", "policy", "reward", "continue_")

    @property
    def bin_values(self):
        """Values (bins,) of the two-hot bins; as a buffer, a cast to half would bend them."""
        return symexp(torch.linspace(-10, 10, self.config.bins, device=self.task.weight.device))

    def dream(self, k=4, task=0, generator=None, temperature=1.0):
        """A fresh Dream with this agent's token in it. Raises ValueError as Dream does."""
        return Dream(self.dynamics, self.task.weight[task], k, generator, temperature)

    def log_policy(self, logits):
        """logits (..., sum of categories) -> one tensor of log-probabilities per component."""
        u = self.config.unimix
        probs = [part.float().softmax(-1) for part in logits.split(self.config.action_spec, -1)]
        # The uniform share keeps every action possible, and ln π finite.
        return [torch.log((1 - u) * p + u / p.shape[-1]) for p in probs]

    def policy(self, h):
        """h (..., D) -> logits (..., sum of categories) of the action to take now, a_t."""
        return self.policy_head(h)[..., 0, :]

    def sample(self, logits, generator=None):
        """logits (B, sum of categories) -> actions (B, A) int64. The policy always samples."""
        actions = [torch.multinomial(part.exp(), 1, generator=generator)
                   for part in self.log_policy(logits)]
        return torch.cat(actions, -1)

    def log_prob(self, logits, actions):
        """ln π(a) (...) of actions (..., A); components that are -1 (unlabeled) count as 0."""
        total = 0
        for part, action in zip(self.log_policy(logits), actions.long().unbind(-1)):
            taken = part.gather(-1, action[..., None].clamp(min=0))[..., 0]
            total = total + taken * (action >= 0)
        return total

    def kl(self, logits, prior_logits):
        """KL[π || prior] (...), the reverse KL that eq. 11 penalizes."""
        pairs = zip(self.log_policy(logits), self.log_policy(prior_logits))
        return sum((p.exp() * (p - q)).sum(-1) for p, q in pairs)

    def reward(self, h):
        """Expected reward (...) received on arriving at the frame of h (..., D)."""
        return two_hot_mean(self.reward_head(h)[..., 0, :], self.bin_values)

    def continuation(self, h):
        """Probability (...) that the frame of h (..., D) is not terminal."""
        return self.continue_head(h)[..., 0, 0].sigmoid()

    def value(self, h):
        """Expected λ-return (...) from the frame of h (..., D) on."""
        return two_hot_mean(self.value_head(h)[..., 0, :], self.bin_values)

    def forward(self, z1, actions, rewards, continues, draws, task=0, valid=None):
        """Phase 2: eq. 9 beside eq. 7, every term RMS-normalized. Returns (loss, metrics).
        z1 (B, T, N, Z); actions (B, T, A): the action that LED to frame t; rewards, continues
        (B, T) of frame t; draws from dynamics.draw(); task: an index, or (B,) of them; valid
        (B, T) bool: False for padding, which costs nothing, at the end of sequences."""
        L, task_embedding = self.config.distances, self.task.weight[task]
        if valid is not None:
            actions = torch.where(valid[..., None], actions, -1)
        (dynamics, metrics), h = self.dynamics.loss(z1, actions, draws, task_embedding, valid)
        # h_t learns a_{t+n}, r_{t+n} and c_{t+n} for n = 0 ... L-1. The action that leaves the last
        # frame is unknown.
        unknown = torch.full_like(actions[:, :1], -1)
        chosen, is_known = multi_token_targets(torch.cat((actions[:, 1:], unknown), 1), L)
        if valid is not None:
            # What lies ahead must be valid, too: padding is at the end.
            is_known = is_known & multi_token_targets(valid, L)[0]
        rewards, _ = multi_token_targets(rewards, L)
        continues, _ = multi_token_targets(continues, L)
        # Cross-entropies (B, T, L) of what the heads predict.
        policy = -self.log_prob(self.policy_head(h), chosen)
        log_p = self.reward_head(h).log_softmax(-1)
        reward = -(two_hot(rewards, self.bin_values) * log_p).sum(-1)
        logits = self.continue_head(h)[..., 0]
        continue_ = F.binary_cross_entropy_with_logits(logits, continues, reduction="none")
        # Means over all B T L, not over the known ones: then processes may average gradients.
        losses = {"dynamics": dynamics}
        for name, loss in (("policy", policy), ("reward", reward), ("continue_", continue_)):
            losses[name] = (loss * is_known).mean()
        metrics = metrics | {name: loss.detach() for name, loss in losses.items()}
        return self.loss_norm(losses), metrics

    def imagination_loss(self, rollout, prior, policy_weight=1.0):
        """Phase 3: PMPO (eq. 11) for the policy, two-hot cross-entropy to the returns (eq. 10) for
        the value. Returns (loss, metrics). rollout: from imagine(); prior: frozen copy of the
        policy head before phase 3; policy_weight 0: only the value, which advantages need first."""
        # The transformer is frozen: the heads train on the stored h, without the rollout's graph.
        c, h = self.config, rollout["h"]
        rewards, continues = rollout["rewards"], rollout["continues"]
        # The policy acts in frames 0 ... H-1.
        h_acting = h[:, :-1]
        with torch.no_grad():
            values = self.value(h)  # (B, H + 1)
            returns = lambda_returns(rewards, values, continues, c.gamma, c.lam)
            advantage = returns - values[:, :-1]
            # A frame counts as much as the dream is likely to have got there.
            continues = torch.cat((self.continuation(h[:, :1]), continues), 1)
            weight = continues.cumprod(1)[:, :-1]  # (B, H)
            prior_logits = prior(h_acting)[..., 0, :]
        logits = self.policy(h_acting)
        kl = self.kl(logits, prior_logits)
        log_prob = self.log_prob(logits, rollout["actions"])
        policy = pmpo_loss(log_prob, advantage, kl, weight, c.alpha, c.beta)
        log_p = self.value_head(h_acting)[..., 0, :].log_softmax(-1)
        value = -((two_hot(returns, self.bin_values) * log_p).sum(-1) * weight).mean()
        entropy = -sum((p.exp() * p).sum(-1) for p in self.log_policy(logits)).mean()
        metrics = {
            "policy": policy, "value": value, "kl": kl.mean(), "entropy": entropy,
            "good": (advantage >= 0).float().mean(), "advantage_std": advantage.std(correction=0),
            "reward": rewards.mean(), "return": returns[:, 0].mean()}
        metrics = {name: number.detach() for name, number in metrics.items()}
        return policy_weight * policy + value, metrics


@torch.no_grad()
def imagine(agent, z, actions, horizon, k=4, task=0, generator=None, temperature=1.0):
    """Roll world model and policy forward together from a context (Algorithm 1, phase 3).
    z (B, T, N, Z), actions (B, T, A): dataset context; task: index of its embedding; the rest as
    in Dream. Returns a dict: h (B, H + 1, D) of frames 0 ... H (0 is the context's last), actions
    (B, H, A) taken at frames 0 ... H-1; rewards, continues (B, H), z (B, H, N, Z) of 1 ... H."""
    dream = agent.dream(k, task, generator, temperature)
    h, taken, dreamed = [dream.reset(z, actions)], [], []
    for _ in range(horizon):
        action = agent.sample(agent.policy(h[-1]), generator)
        frame, state = dream.step(action)
        taken.append(action)
        dreamed.append(frame)
        h.append(state)
    h = torch.stack(h, 1).float()
    return {
        "h": h, "actions": torch.stack(taken, 1), "z": torch.stack(dreamed, 1),
        "rewards": agent.reward(h[:, 1:]), "continues": agent.continuation(h[:, 1:])}


def frozen(module):
    """A copy for use, not for training: evaluation mode, no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)
