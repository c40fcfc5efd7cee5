"""The page to play on: dreams that people drive.

    python train.py --phase play --checkpoint assets/carracing.pt

It is served on 127.0.0.1 only, and only pages of this server may talk to it: foreign hosts and
origins are refused. The port may change on the way, as through an SSH forward.
"""
import base64
import contextlib
import json
import re
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from assets.files import fail
from assets.videos import random_windows, to_frames
from dreamer4 import Cache

PAGE = Path(__file__).parent / "play.html"
STEPS = (1, 2, 4, 8)
MAX_TABS = 8
# A tab that falls silent for so many seconds is forgotten
PATIENCE = 60


class Player:
    """The dreams of the browser tabs: start, step and stop one."""

    def __init__(self, tokenizer, agent, episodes, config):
        """episodes: dicts of arrays with latents, to start from."""
        self.tokenizer, self.agent, self.episodes, self.config = tokenizer, agent, episodes, config
        self.device = next(agent.parameters()).device
        self.tabs, self.rng = {}, np.random.default_rng()

    def start(self, session=None):
        """A new dream from a random context, in the place of the session's old one."""
        now = time.time()
        self.tabs = {name: tab for name, tab in self.tabs.items()
                     if name != session and now - tab["seen"] < PATIENCE}
        if len(self.tabs) >= MAX_TABS:
            raise ValueError(f"{MAX_TABS} tabs are dreaming already; close one")
        episode = self.episodes[self.rng.integers(len(self.episodes))]
        batch = random_windows([episode], self.rng, 1, 8)
        z, actions = (torch.as_tensor(batch[name], device=self.device)
                      for name in ("latents", "actions"))
        tab = {"dream": self.agent.dream(1), "cache": Cache(), "frame": 0}
        tab["h"] = tab["dream"].reset(z.float(), actions)
        name = secrets.token_urlsafe(16)
        self.tabs[name] = tab
        steps = [k for k in STEPS if k <= self.config.k_max]
        return self.show(tab, z.float()) | {"session": name, "steps": steps}

    def step(self, session, k, policy, x, y, digit=None):
        """The next frame. x, y in {-1, 0, 1}: keys for the first two action components; digit: a
        category of the first; policy: it acts instead. Raises KeyError for an unknown session."""
        tab, spec = self.tabs[session], self.config.action_spec
        if k not in STEPS or k > self.config.k_max or x not in (-1, 0, 1) or y not in (-1, 0, 1):
            raise ValueError("k, x or y is out of range")
        action = self.agent.sample(self.agent.policy(tab["h"]))
        if not policy:
            action[0] = 0
            for i, (key, count) in enumerate(zip((x, y), spec)):
                action[0, i] = round((key + 1) / 2 * (count - 1))
            if digit is not None:
                action[0, 0] = min(max(int(digit), 0), spec[0] - 1)
        tab["dream"].k, tab["frame"] = k, tab["frame"] + 1
        z, tab["h"] = tab["dream"].step(action)
        return self.show(tab, z[:, None])

    def stop(self, session):
        """Forgets the session's dream, if there is one."""
        if session in self.tabs:
            del self.tabs[session]
        return {}

    @torch.no_grad()
    def show(self, tab, z):
        """Decodes the frames z (1, T, N, Z), with which the tab's video goes on.

        Returns the last of them, and what the heads say of it.
        """
        tab["seen"] = time.time()
        pixels = to_frames(self.tokenizer.decode(z, tab["cache"]))[0, -1]
        state = {"pixels": base64.b64encode(pixels.tobytes()).decode(), "size": pixels.shape[:2],
                 "frame": tab["frame"]}
        for name in ("reward", "continuation", "value"):
            state[name] = float(getattr(self.agent, name)(tab["h"]))
        return state


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /start, /step and /stop call the player with the body's JSON."""
    protocol_version, timeout = "HTTP/1.1", 60
    # else the body waits 40 ms for the headers' acknowledgement
    disable_nagle_algorithm = True

    def handle(self):
        # a tab that is closed while it waits
        with contextlib.suppress(ConnectionError):
            super().handle()

    def answer(self):
        """Status, body and its type."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost", "[::1]") or (
                origin not in (None, f"http://{host}")):
            return 403, b"foreign host or origin", "text/plain"
        if self.command == "GET" and self.path == "/":
            return 200, PAGE.read_bytes(), "text/html; charset=utf-8"
        if self.command == "GET" or self.path not in ("/start", "/step", "/stop"):
            return 404, b"not found", "text/plain"
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > 1000:
            return 400, b"the body must be a small JSON object", "text/plain"
        body, self.close_connection = self.rfile.read(int(length)), False
        try:
            with self.server.one_at_a_time:
                state = getattr(self.server.player, self.path[1:])(**json.loads(body))
            return 200, json.dumps(state).encode(), "application/json"
        except KeyError:
            return 410, b"this dream was forgotten; it starts again", "text/plain"
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            return 400, f"bad request: {error}".encode(), "text/plain; charset=utf-8"

    def do_GET(self):
        status, body, kind = self.answer()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        # unless the body is read
        self.close_connection = True
        self.do_GET()

    def log_message(self, *_):
        pass


def serve(player, port, stop):
    """Serves the page until the list `stop` holds something."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        fail(f"--port {port}: {error}; choose another one")
    server.player, server.one_at_a_time, server.timeout = player, threading.Lock(), 0.2
    address = f"http://127.0.0.1:{server.server_address[1]}"
    print(f"[play] open {address} (Ctrl-C ends it)", flush=True)
    while not stop:
        server.handle_request()
