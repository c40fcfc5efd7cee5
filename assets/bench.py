"""Speed of everything on this machine, in one run, and the costs of larger models on paper.

    python assets/bench.py                                  # the cpu preset
    python assets/bench.py cpu minerl --compile false       # --device cuda
    python assets/bench.py gpu paper                        # on paper: nothing is computed

Compiled as train.py does, but for play. `paper` is on paper always, `gpu` where there is no GPU.
Training counts neither the loading of data nor the optimizer. The last line of every preset is its
result as JSON.
"""
import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import train
from dreamer4 import Agent, Cache, Tokenizer, frozen, imagine

# the 2 B model of the paper: to show that the code reaches it
PAPER = dict(
    image_size=(360, 640), patch=16, latents=512, tokenizer_width=1024, tokenizer_depth=16,
    tokenizer_heads=16, width=2048, depth=36, heads=32, kv_heads=8, registers=8, context=192,
    k_max=64, head_width=2048, short_length=64, long_length=256, action_spec=(2,) * 23 + (121,))


def jobs(run):
    """(name, frames, work, the model to compile or None): work() finishes so many frames."""
    cfg, device, count = run.cfg, run.device, 16
    with torch.device(device):
        tokenizer, agent = Tokenizer(cfg), Agent(cfg)
        B, T = cfg.tokenizer_batch, cfg.tokenizer_length
        images = torch.rand(B, T, 3, *cfg.image_size)
        B2, T2 = cfg.batch_size, cfg.short_length
        z = torch.rand(max(B2, count), max(T2, 8), cfg.latents, cfg.latent_channels) * 2 - 1
        actions = torch.zeros(*z.shape[:2], len(cfg.action_spec), dtype=torch.int64)
    frozen_tokenizer, frozen_agent = run.for_inference(tokenizer), run.for_inference(agent)
    k = min(4, cfg.k_max)
    # a copy that stays uncompiled
    stream, cache = frozen(frozen_agent).dream(k), Cache()
    stream.reset(z[:1, :8], actions[:1, :8])

    def train_step(module, *inputs):
        with run.autocast():
            loss, _ = module(*inputs)
        loss.backward()
        module.zero_grad(set_to_none=True)

    def tokenizer_training():
        train_step(tokenizer, images, tokenizer.draw(B, T, device=device))

    def dynamics_training():
        draws = agent.dynamics.draw(B2, T2, device=device)
        train_step(agent.dynamics, z[:B2, :T2], actions[:B2, :T2], draws)

    def imagination():
        imagine(frozen_agent, z[:count, :8], actions[:count, :8], cfg.horizon, k)

    def play():
        frame, _ = stream.step(actions[:1, 0])
        frozen_tokenizer.decode(frame[:, None], cache)

    return [("tokenizer_training", B * T, tokenizer_training, tokenizer),
            ("dynamics_training", B2 * T2, dynamics_training, agent.dynamics),
            ("imagination", count * cfg.horizon, imagination, frozen_agent),
            ("play", 1, play, None)]


def costs(run):
    """Builds the models on the meta device, which computes nothing -> their parameters; for one
    frame of each job the GFLOP, and in training the MB that wait for the backward pass (in float32;
    bfloat16 needs about half)."""
    run.device, run.dtype, run.autocast = "meta", torch.float32, contextlib.nullcontext
    results = {}
    for name, frames, work, model in jobs(run):
        # imagination costs what play does without decoding
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
            results[f"{name.split('_')[0]}_parameters"] = sum(p.numel() for p in model.parameters())
    return results


def seconds(work, threads):
    """Median time of one call, after two to warm up (and compile)."""
    work()
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=3).median


def bench(run):
    """Measures all jobs and the collection -> frames per second and shares of the matmul rate."""
    cfg, device = run.cfg, run.device
    results = {"machine": platform.processor() or platform.machine(),
               "threads": torch.get_num_threads()}
    # the run's own precision last: shares are of this rate
    for dtype in dict.fromkeys((torch.float32, run.dtype)):
        a = torch.randn(2048, 2048, device=device, dtype=dtype)
        matmul_rate = 2 * 2048 ** 3 / seconds(lambda: a @ a, torch.get_num_threads())
        results[f"matmul_{str(dtype)[6:]}_gflops"] = matmul_rate / 1e9
        print(f"[bench] matmul in {str(dtype)[6:]}: {matmul_rate / 1e9:.0f} GFLOP/s", flush=True)
    for name, frames, work, model in jobs(run):
        with FlopCounterMode(display=False) as counter:
            work()
        # only after the count, from which compiled code would hide
        if model:
            run.compile(name.split("_")[0], model)
        # the page has one thread
        spent = seconds(work, 1 if name == "play" else torch.get_num_threads())
        # of this process, which counts it in KB on Linux, or of the GPU
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if device == "cuda":
            memory = torch.cuda.max_memory_allocated() / 1e9
        share = counter.get_total_flops() / spent / matmul_rate
        results |= {name: frames / spent, f"{name}_share": share, "peak_memory_gb": memory}
        print(f"[bench] {name}: {frames / spent:.0f} frames/s, {share:.0%} of the matmul rate, "
              f"peak memory so far {memory:.2f} GB", flush=True)
    cfg.episode_frames = min(cfg.episode_frames, 100)
    start, policy = time.time(), train.RandomPolicy(cfg, cfg.seed)
    frames = sum(len(e["rewards"]) for _, e in train.play(cfg, policy, list(range(cfg.envs))))
    results["collect"] = frames / (time.time() - start)
    print(f"[bench] collect: {results['collect']:.0f} frames/s with {cfg.envs} environments, "
          "start included", flush=True)
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in results.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", default=["cpu"],
                        help=f"{', '.join(train.PRESETS)} or paper")
    parser.add_argument("--compile", default="auto", help="true, false or auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    for preset in args.presets:
        # not the settings of runs/default
        flags = ["--run", os.devnull, "--compile", args.compile, "--device", args.device]
        given, cfg = train.parse([*flags, "--preset", "cpu" if preset == "paper" else preset])
        if preset == "paper":
            cfg = train.TrainConfig(**PAPER)
        run = train.Run(given, cfg)
        is_on_paper = preset == "paper" or (preset == "gpu" and args.device == "cpu")
        print(f"[bench] {preset}", flush=True)
        print(json.dumps((costs if is_on_paper else bench)(run)), flush=True)


if __name__ == "__main__":
    main()
