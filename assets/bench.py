"""Speed of everything on this machine, in one run.

    python train.py --phase bench --preset cpu
    python train.py --phase bench --preset minerl --compile true
    python train.py --phase bench --preset paper      # costs on paper: what costs() says
    python assets/bench.py gpu                        # the same of another preset
"""
import json
import platform
import sys
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from assets.files import check_stop, in_one_line, new_parser
from assets.run import Run, compile_blocks
from dreamer4 import Agent, Cache, Tokenizer, imagine

SIZES = {
    # of an earlier MineRL implementation
    "minerl": dict(
        latent_channels=32, tokenizer_width=256, tokenizer_depth=6, tokenizer_heads=8, depth=6,
        heads=8, kv_heads=2, registers=4, pack=1, batch_size=8, short_length=16, long_length=32,
        tokenizer_batch=8, tokenizer_length=16),
    # the 2 B model: to show that the code reaches it
    "paper": dict(
        image_size=(360, 640), patch=16, latents=512, latent_channels=16, tokenizer_width=1024,
        tokenizer_depth=16, tokenizer_heads=16, pack=2, width=2048, depth=36, heads=32, kv_heads=8,
        registers=8, context=192, k_max=64, head_width=2048, short_length=64, long_length=256,
        action_spec=(2,) * 23 + (121,)),
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def costs(cfg):
    """Builds the models on the meta device, which computes nothing, and prints as JSON:

    their parameters; for one frame of each job the GFLOP, and in training the MB that wait for the
    backward pass (in float32; bfloat16 needs about half).
    """
    run = Run("", cfg, 0, None)
    run.device, run.dtype, results = "meta", torch.float32, {}
    for name, frames, work, model in jobs(run):
        # it costs what play does without decoding
        if name == "imagination":
            continue
        waiting = {}

        def keep(x):
            storage = x.untyped_storage()
            waiting[storage._cdata] = storage.nbytes()
            return x

        with (FlopCounterMode(display=False) as counter,
              torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)):
            work()
        results[f"{name}_gflop"] = round(counter.get_total_flops() / frames / 1e9, 3)
        if model:
            results[f"{name}_mb"] = round(sum(waiting.values()) / frames / 1e6, 1)
            results[f"{name.split('_')[0]}_parameters"] = parameters(model)
    print(json.dumps(results))


def seconds(work):
    """Median time of one call, after two to warm up (and compile)."""
    work()
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=3).median


def peak_memory(device):
    """The most memory held so far, in GB: of the GPU or of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def matmul_rate(device, dtype):
    """GFLOP/s of square matrix products."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    return round(2 * 2048 ** 3 / seconds(lambda: a @ a) / 1e9)


def jobs(run):
    """(name, frames, work, model to compile or None): work() finishes so many frames."""
    cfg, device = run.cfg, run.device
    with torch.device(device):
        tokenizer, agent = Tokenizer(cfg), Agent(cfg)
    frozen_tokenizer, frozen_agent = run.for_inference(tokenizer), run.for_inference(agent)
    B, T = cfg.tokenizer_batch, cfg.tokenizer_length
    images = torch.rand(B, T, 3, *cfg.image_size, device=device)
    B2, T2 = cfg.batch_size, cfg.short_length
    z = torch.rand(16, max(T2, 8), cfg.latents, cfg.latent_channels, device=device) * 2 - 1
    actions = torch.zeros(16, max(T2, 8), len(cfg.action_spec), dtype=torch.int64, device=device)
    batch = (z[:1, :T2].expand(B2, -1, -1, -1), actions[:1, :T2].expand(B2, -1, -1))
    k = min(4, cfg.k_max)
    stream, cache = frozen_agent.dream(k), Cache()
    stream.reset(z[:1, :8], actions[:1, :8])

    def train_step(module, *inputs):
        with run.autocast():
            loss, _ = module(*inputs)
        loss.backward()
        module.zero_grad(set_to_none=True)

    def tokenizer_training():
        train_step(tokenizer, images, tokenizer.draw(B, T, device=device))

    def dynamics_training():
        train_step(agent.dynamics, *batch, agent.dynamics.draw(B2, T2, device=device))

    def imagination():
        imagine(frozen_agent, z[:, :8], actions[:, :8], 16, k)

    def play():
        frame, _ = stream.step(actions[:1, 0])
        frozen_tokenizer.decode(frame[:, None], cache)

    return [("tokenizer_training", B * T, tokenizer_training, tokenizer),
            ("dynamics_training", B2 * T2, dynamics_training, agent.dynamics),
            ("imagination", 16 * 16, imagination, None), ("play", 1, play, None)]


def bench(run, play, policy):
    """Measures all jobs and the collection; the last line printed is the result as JSON.

    play: train.play; policy: one that acts randomly.
    """
    cfg, device = run.cfg, run.device
    machine = platform.processor() or platform.machine()
    results = {"machine": machine, "threads": torch.get_num_threads()}
    # without instructions for bfloat16 a product in it takes minutes
    rates = {dtype: matmul_rate(device, dtype) for dtype in {torch.float32, run.dtype}}
    for dtype, rate in rates.items():
        results[f"matmul_{str(dtype)[6:]}_gflops"] = rate
        print(f"[bench] matmul in {str(dtype)[6:]}: {rate} GFLOP/s", flush=True)
    for name, frames, work, model in jobs(run):
        check_stop()
        if model:
            results[f"{name.split('_')[0]}_parameters"] = parameters(model)
        with FlopCounterMode(display=False) as counter:
            work()
        # only after the count, from which compiled code would hide
        if model and cfg.compile:
            compile_blocks(model)
        if device != "cpu":
            # the count ran uncompiled
            torch.cuda.reset_peak_memory_stats()
        spent = seconds(work)
        rate = frames / spent
        share = counter.get_total_flops() / spent / (rates[run.dtype] * 1e9)
        memory = max(peak_memory(device), results.get("peak_memory_gb", 0))
        results |= {name: rate, f"{name}_share": share, "peak_memory_gb": memory}
        print(f"[bench] {name}: {rate:.0f} frames/s, {share:.0%} of the matmul rate, peak memory "
              f"so far {memory:.2f} GB", flush=True)
    if cfg.env:
        start, frames = time.time(), 0
        cfg.episode_frames = min(cfg.episode_frames, 100)
        for _, episode in play(cfg, policy, range(cfg.envs)):
            frames += len(episode["frames"])
        results["collect"] = frames / (time.time() - start)
        print(f"[bench] collect: {results['collect']:.0f} frames/s with {cfg.envs} environments, "
              "start included", flush=True)
    numbers = {name: round(x, 3) if isinstance(x, float) else x for name, x in results.items()}
    print(json.dumps(numbers), flush=True)


@in_one_line()
def main(arguments=None):
    import train
    parser = new_parser(__doc__)
    parser.add_argument("preset", nargs="+", choices=train.PRESETS)
    for preset in parser.parse_args(arguments).preset:
        costs(train.TrainConfig(**train.PRESETS[preset]))


if __name__ == "__main__":
    main()
