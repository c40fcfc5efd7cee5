"""The page to play on: a browser tab drives in a dream of the world model.

    python train.py --phase play --checkpoint assets/carracing.pt

The server listens on 127.0.0.1 only, and only its own page may talk to it.
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
# Frames of an episode that a dream starts from, at most
CONTEXT = 8
# Denoising steps to choose from, as far as the model's k_max allows
STEPS = (1, 2, 4, 8)
MAX_TABS = 8
# A tab that falls silent for so many seconds is forgotten
SILENCE = 60


class Player:
    """The dreams of the browser tabs: start, step and stop one."""

    def __init__(self, tokenizer, agent, episodes, config):
        """episodes: as in the episode files, with latents (T, N, Z)."""
        self.tokenizer, self.agent, self.episodes, self.config = tokenizer, agent, episodes, config
        self.device = next(agent.parameters()).device
        self.tabs, self.rng = {}, np.random.default_rng()

    @torch.inference_mode()
    def start(self, session=None):
        """A new dream from a random context, in the place of the session's old one."""
        now = time.time()
        self.tabs = {name: tab for name, tab in self.tabs.items()
                     if name != session and now - tab["seen"] < SILENCE}
        if len(self.tabs) >= MAX_TABS:
            raise ValueError(f"{MAX_TABS} tabs are dreaming already; close one")
        episode = self.episodes[self.rng.integers(len(self.episodes))]
        batch = random_windows([episode], self.rng, 1, CONTEXT)
        z, actions = (torch.as_tensor(batch[name], device=self.device)
                      for name in ("latents", "actions"))
        z = z.float()
        name, dream = secrets.token_urlsafe(16), self.agent.dream(1)
        tab = {"dream": dream, "h": dream.reset(z, actions), "cache": Cache(), "frame": 0}
        self.tabs[name] = tab
        steps = [k for k in STEPS if k <= self.config.k_max]
        return self.show(tab, z) | {"session": name, "steps": steps}

    @torch.inference_mode()
    def step(self, session, k, policy, x, y, digit=None):
        """The next frame, in k denoising steps. A KeyError says that the session is unknown.

        policy: whether it acts; otherwise x and y in {-1, 0, 1} are the keys for the first two
        action components, and digit is a category of the first one.
        """
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

    def show(self, tab, z):
        """Decodes the frames z (1, T, N, Z), with which the tab's video goes on.

        Returns the last of them, and what the heads say of it.
        """
        tab["seen"] = time.time()
        pixels = to_frames(self.tokenizer.decode(z, tab["cache"]))[0, -1]
        heads = {name: float(getattr(self.agent, name)(tab["h"]))
                 for name in ("reward", "continuation", "value")}
        return heads | {"pixels": base64.b64encode(pixels.tobytes()).decode(),
                        "size": pixels.shape[:2], "frame": tab["frame"]}


class Handler(BaseHTTPRequestHandler):
    """GET / is the page. POST /start, /step and /stop call the player with the body's JSON."""
    protocol_version, timeout = "HTTP/1.1", 60
    # else the body waits 40 ms for the headers' acknowledgement
    disable_nagle_algorithm = True

    def handle(self):
        # a tab may be closed while it waits
        with contextlib.suppress(ConnectionError):
            super().handle()

    def answer(self):
        """Status, body and its type."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        # the host may carry another port: the server works through an SSH forward
        own_host = re.sub(r":\d+$", "", host) in ("127.0.0.1", "localhost", "[::1]")
        if not own_host or origin not in (None, f"http://{host}"):
            return 403, b"foreign host or origin", "text/plain"
        if self.command == "GET" and self.path == "/":
            return 200, self.server.page, "text/html; charset=utf-8"
        if self.command == "GET" or self.path not in ("/start", "/step", "/stop"):
            return 404, b"not found", "text/plain"
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 4 or int(length) > 1000:
            return 400, b"the body must be a small JSON object", "text/plain"
        body, self.close_connection = self.rfile.read(int(length)), self.should_close
        try:
            with self.server.one_at_a_time:
                state = getattr(self.server.player, self.path[1:])(**json.loads(body))
            return 200, json.dumps(state).encode(), "application/json"
        except KeyError:
            return 410, b"this dream was forgotten; it starts again", "text/plain"
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            text = f"bad request: {error}".encode(errors="backslashreplace")
            return 400, text, "text/plain; charset=utf-8"

    def do_GET(self):
        status, body, kind = self.answer()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        # as the client asked if the body is read, else at once
        self.should_close, self.close_connection = self.close_connection, True
        self.do_GET()

    def log_message(self, *_):
        pass


def make_server(player, port):
    """The server of the page, on 127.0.0.1; port 0: any free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.player, server.page = player, PAGE.read_bytes()
    # threads answer the tabs, but the models dream for one of them at a time
    server.one_at_a_time = threading.Lock()
    return server


def serve(player, port, should_stop):
    """Serves the page until should_stop() is true."""
    try:
        server = make_server(player, port)
    except (OSError, OverflowError) as error:
        fail(f"--port {port}: {error}; choose another one")
    with server:
        # should_stop is asked so often, in seconds
        server.timeout = 0.2
        print(f"[play] open http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        while not should_stop():
            server.handle_request()
