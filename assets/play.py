"""The page to play on: a browser tab drives in a dream of the world model.

    python assets/play.py                          # the shipped model; open the address it prints
    python assets/play.py runs/default/agent.pt    # another one; --port 8000 --device cpu

A dream starts from a few frames of a held-out episode beside the checkpoint, or else of an episode
that the policy plays first. Only the server's own page may talk to it, and only from this machine.
"""
import argparse
import base64
import contextlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)
import train
from dreamer4 import Cache

ASSETS = Path(__file__).resolve().parent
# frames of an episode that a dream starts from, at most
CONTEXT = 8
# denoising steps to choose from, as far as the model's k_max allows
STEPS = (1, 2, 4, 8)


def find_episodes(run, checkpoint, tokenizer, agent):
    """Some of the newest held-out episodes of the checkpoint's run, or two that are played now."""
    paths = sorted((checkpoint.parent / "data").glob("*.npz"))[::10][-4:]
    episodes = [train.load_episode(path, run.cfg) for path in paths]
    if not episodes:
        print("[play] the policy plays two short episodes to dream on from", flush=True)
        run.cfg.episode_frames = min(run.cfg.episode_frames, 40)
        policy = train.AgentPolicy(tokenizer, agent, run.cfg, run.cfg.seed)
        seeds = [train.EVALUATION_SEEDS - 1, train.EVALUATION_SEEDS - 2]
        episodes = [episode for _, episode in train.play(run.cfg, policy, seeds)]
    for episode in episodes:
        episode["latents"] = train.encode(tokenizer, episode["frames"])
    return episodes


class Player:
    """One dream: start() begins a new one, step() goes on."""
    def __init__(self, tokenizer, agent, episodes):
        self.tokenizer, self.agent, self.episodes = tokenizer, agent, episodes
        self.config, self.rng = agent.config, np.random.default_rng()
        self.start()

    @torch.inference_mode()
    def start(self):
        """A new dream, from a random context."""
        episode = self.episodes[self.rng.integers(len(self.episodes))]
        start = self.rng.integers(max(1, len(episode["latents"]) - CONTEXT + 1))
        device = next(self.agent.parameters()).device
        z, actions = (torch.as_tensor(episode[name][None, start:start + CONTEXT], device=device)
                      for name in ("latents", "actions"))
        self.dream, self.cache, self.frame = self.agent.dream(k=1), Cache(), 0
        self.h = self.dream.reset(z.float(), actions)
        return self.show(z.float()) | {"steps": [k for k in STEPS if k <= self.config.k_max]}

    @torch.inference_mode()
    def step(self, k, policy, x, y, digit=None):
        """The next frame, in k denoising steps. policy: whether it acts; else x and y in {-1, 0, 1}
        are the keys for the first two action components, digit is a category of the first one."""
        if k not in STEPS or k > self.config.k_max or x not in (-1, 0, 1) or y not in (-1, 0, 1):
            raise ValueError("k, x or y is out of range")
        action, sizes = self.agent.sample(self.agent.policy(self.h)), self.config.action_spec
        if not policy:
            action[0] = 0
            for i, (key, size) in enumerate(zip((x, y), sizes)):
                action[0, i] = round((key + 1) / 2 * (size - 1))
            if digit is not None:
                action[0, 0] = min(max(digit, 0), sizes[0] - 1)
        self.dream.k, self.frame = k, self.frame + 1
        z, self.h = self.dream.step(action)
        return self.show(z[:, None])

    def show(self, z):
        """The last of the frames z (1, T, N, Z), with which the video goes on, and what the heads
        say of it."""
        image = self.tokenizer.decode(z, self.cache)[0, -1]
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        # the model counts rewards in units of this
        scale = self.config.reward_scale or 1
        return {"pixels": base64.b64encode(pixels.tobytes()).decode(), "size": pixels.shape[:2],
                "frame": self.frame, "reward": float(self.agent.reward(self.h)) * scale,
                "value": float(self.agent.value(self.h)) * scale,
                "continuation": float(self.agent.continuation(self.h))}


class Handler(BaseHTTPRequestHandler):
    """GET / is the page. POST /start and /step call the player with the body's JSON."""

    def answer(self):
        """Status, body and its type."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        # another port is fine: the server works through an SSH forward
        is_own = host.split(":")[0] in ("127.0.0.1", "localhost")
        if not is_own or origin not in (None, f"http://{host}"):
            return 403, b"foreign host or origin", "text/plain"
        if (self.command, self.path) == ("GET", "/"):
            return 200, (ASSETS / "play.html").read_bytes(), "text/html; charset=utf-8"
        if self.command == "GET" or self.path not in ("/start", "/step"):
            return 404, b"not found", "text/plain"
        try:
            body = self.rfile.read(min(int(self.headers["Content-Length"]), 1000))
            # threads answer, but one at a time dreams
            with self.server.lock:
                state = getattr(self.server.player, self.path[1:])(**json.loads(body))
            return 200, json.dumps(state).encode(), "application/json"
        except (ValueError, TypeError) as error:
            return 400, f"bad request: {error}".encode(), "text/plain; charset=utf-8"

    def do_GET(self):
        status, body, kind = self.answer()
        # a tab that was closed no longer waits for its picture
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def make_server(player, port):
    """The server of the page, on 127.0.0.1; port 0: any free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.player, server.lock = player, threading.Lock()
    return server


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=ASSETS / "carracing.pt")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    # every request has a thread of its own, with which others would start, for work so small
    torch.set_num_threads(1)
    run = train.Run(*train.parse([
        "--checkpoint", str(args.checkpoint), "--run", str(args.checkpoint.parent),
        "--device", args.device]))
    tokenizer, agent, _ = run.load_agent()
    player = Player(tokenizer, agent, find_episodes(run, args.checkpoint, tokenizer, agent))
    with make_server(player, args.port) as server:
        print(f"[play] open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
