"""Tests of play.py: its server, talked to as a browser does and as one should not."""
import base64
import http.client
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from assets.play import Player
from dreamer4 import Agent, Config, Tokenizer
from test_dreamer4 import finished, start

TRAIN = Path(__file__).parent.parent / "train.py"
STILL = {"k": 4, "policy": False, "x": 0, "y": 0}
SMALL = Config(image_size=(16, 24), action_spec=(3, 2), patch=8, latents=4, latent_channels=4,
               tokenizer_width=32, tokenizer_heads=2, width=32, depth=4, heads=2, kv_heads=1,
               head_width=32, bins=41)


# --------------------------------------------------------------------------------------------------
# The player, with models that are random

@pytest.fixture
def player():
    """player(T) starts its dreams from an episode of T frames."""
    torch.manual_seed(0)
    tokenizer, agent = Tokenizer(SMALL), Agent(SMALL)
    # new models say nothing: their outputs start at zero
    for weight in (*tokenizer.parameters(), *agent.parameters()):
        weight.data += 0.1 * torch.randn_like(weight)

    def player(T):
        rng = np.random.default_rng(0)
        episode = {"frames": rng.integers(0, 256, (T, 16, 24, 3)).astype(np.uint8),
                   "latents": rng.uniform(-1, 1, (T, 4, 4)).astype(np.float16),
                   "actions": rng.integers(0, 2, (T, 2)).astype(np.int16),
                   "rewards": np.zeros(T, np.float32)}
        return Player(tokenizer, agent, [episode], SMALL)

    return player


def test_the_keys_pressed_change_the_dream(player):
    """From the same context, with the same noise, other keys dream another frame."""
    player, frames = player(20), []
    for keys in ({"x": -1}, {"x": 1}, {"x": -1}, {"y": 1}, {"digit": 1}):
        player.rng = np.random.default_rng(0)
        torch.manual_seed(0)
        session = player.start()["session"]
        keys = STILL | {"x": -1, "y": -1} | keys
        frames.append([player.step(session, **keys)["pixels"] for _ in range(4)])
    assert frames[0] == frames[2]
    assert all(frames[0] != other for other in (frames[1], frames[3], frames[4]))


@pytest.mark.parametrize("T, context", [(1, 1), (5, 5), (8, 8), (20, 8)])
def test_a_dream_starts_from_a_window_of_at_most_8_frames(player, T, context):
    player = player(T)
    session = player.start()["session"]
    tab = player.tabs[session]
    assert tab["dream"].cache.frames == tab["cache"].frames == context


def test_at_most_8_tabs_dream_and_a_silent_one_makes_room(player):
    player = player(8)
    sessions = [player.start()["session"] for _ in range(8)]
    with pytest.raises(ValueError, match="8 tabs"):
        player.start()
    player.tabs[sessions[0]]["seen"] -= 100
    assert player.start()["session"] in player.tabs and sessions[0] not in player.tabs


# --------------------------------------------------------------------------------------------------
# The server of the real script

@pytest.fixture(scope="module")
def port(finished):
    """The port of a running server."""
    process = start("-u", TRAIN, "--phase", "play", "--checkpoint", finished / "agent.pt", "--run",
                    finished, "--port", 0)
    yield int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def ask(port):
    """ask(path, body, method, **headers) -> status, answer: a request to the server."""

    def ask(path, body=None, method="POST", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = body if isinstance(body, str) else json.dumps(body)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text, kind = answer.read(), answer.headers["Content-Type"]
        return answer.status, json.loads(text) if kind == "application/json" else text

    return ask


def test_the_page_is_served_and_frames_advance_with_numbers(ask):
    assert b"<canvas" in ask("/", method="GET")[1]
    status, state = ask("/start", {})
    assert status == 200 and state["frame"] == 0 and state["steps"] == [1, 2, 4]
    for frame, policy in ((1, False), (2, True)):
        status, after = ask("/step", STILL | {"session": state["session"], "policy": policy})
        assert (status, after["frame"], after["size"]) == (200, frame, [64, 64])
        assert len(base64.b64decode(after["pixels"])) == 64 * 64 * 3
        assert all(isinstance(after[name], float) for name in ("reward", "continuation", "value"))
    ask("/stop", {"session": state["session"]})


def test_tabs_dream_apart_restart_and_are_freed(ask):
    first, second = (ask("/start", {})[1]["session"] for _ in range(2))
    for frame in (1, 2, 3):
        assert ask("/step", STILL | {"session": first})[1]["frame"] == frame
    assert ask("/step", STILL | {"session": second})[1]["frame"] == 1
    again = ask("/start", {"session": first})[1]
    assert again["frame"] == 0
    # the old dream is gone
    assert ask("/step", STILL | {"session": first})[0] == 410
    for session in (second, again["session"]):
        assert ask("/stop", {"session": session})[0] == 200
        assert ask("/step", STILL | {"session": session})[0] == 410


@pytest.mark.parametrize("status, path, body, method, headers", [
    (403, "/", None, "GET", {"Host": "evil.example"}),
    (403, "/start", {}, "POST", {"Origin": "http://evil.example"}),
    (403, "/start", {}, "POST", {"Origin": "null"}),
    (404, "/etc/passwd", None, "GET", {}),
    (404, "/x", {}, "POST", {}),
    (501, "/start", {}, "PUT", {}),
    (400, "/step", "not json", "POST", {}),
    (400, "/step", [1], "POST", {}),
    (400, "/step", {"session": "x"}, "POST", {}),
    (410, "/step", STILL | {"session": "x"}, "POST", {}),
    (400, "/start", "x" * 2000, "POST", {}),
    (400, "/start", {"session": "x" * 2000}, "POST", {}),
    (400, "/start", '{"\\ud800": 1}', "POST", {}),
    (400, "/start", None, "POST", {"Content-Length": "9" * 5000}),
    (400, "/stop", {"session": [1]}, "POST", {})])
def test_strangers_and_nonsense_are_refused(ask, status, path, body, method, headers):
    assert ask(path, body, method, **headers)[0] == status


@pytest.mark.parametrize("wrong", [{"k": 3}, {"k": 8}, {"k": 64}, {"x": 2}, {"y": "up"},
                                   {"digit": "x"}, {"digit": float("inf")}])
def test_steps_that_make_no_sense_are_refused_and_the_dream_goes_on(ask, wrong):
    session = ask("/start", {})[1]["session"]
    assert ask("/step", STILL | {"session": session} | wrong)[0] == 400
    assert ask("/step", STILL | {"session": session})[1]["frame"] == 1
    ask("/stop", {"session": session})


@pytest.mark.parametrize("path, headers, stays", [
    ("/start", {}, True), ("/x", {}, False), ("/start", {"Connection": "close"}, False)])
def test_a_connection_ends_as_asked_or_with_a_body_that_was_not_read(port, path, headers, stays):
    """Else the body of a refused request would be taken for the next request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", headers)
    assert connection.getresponse().read()
    if stays:
        socket = connection.sock
        connection.request("GET", "/")
        assert b"<canvas" in connection.getresponse().read() and connection.sock is socket
    else:
        assert connection.sock.recv(1) == b""


def test_a_port_forward_may_change_the_port_but_not_the_host(ask):
    headers = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}
    assert ask("/start", {}, **headers)[0] == 200
    assert ask("/start", {}, **headers | {"Origin": "http://localhost:9001"})[0] == 403


# --------------------------------------------------------------------------------------------------
# The page, in headless Chromium

@pytest.fixture
def browser(port, tmp_path):
    """browser(path, body, method) -> value: a WebDriver session in which the page is open."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium here; apt-get install chromium chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if found := re.search(r"started successfully on port (\d+)", line):
            break
    else:
        pytest.skip("chromedriver does not start here")
    session = ""

    def call(path, body=None, method="POST"):
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        text = json.dumps(body or {}) if method == "POST" else None
        connection.request(method, session + path, text)
        value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    options = {"binary": binary, "args": ["--headless", "--no-sandbox", "--disable-gpu",
                                          "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}"]}
    wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
    try:
        session = "/session/" + call("/session", wanted)["sessionId"]
        call("/url", {"url": f"http://127.0.0.1:{port}/"})
        yield call
        call("", method="DELETE")
    finally:
        process.terminate()


def test_in_a_browser_frames_advance_keys_steer_restart_restarts_and_the_policy_drives(browser):
    def script(text):
        return browser("/execute/sync", {"script": text, "args": []})

    def shown(name):
        return script(f"return document.getElementById('{name}').textContent")

    def frame():
        return int(shown("frame") or -1)

    def last():
        """The last request of the page."""
        return script("return asked.at(-1) || {}")

    def press(kind, key):
        keys = {"type": "key", "id": "keys", "actions": [{"type": kind, "value": key}]}
        browser("/actions", {"actions": [keys]})

    def pixels():
        return script("const c = document.getElementById('screen');"
                      "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")

    def until(condition):
        end = time.time() + 30
        while not condition():
            assert time.time() < end
            time.sleep(0.05)

    until(lambda: frame() > 3)
    for name in ("reward", "continuation", "value", "total", "rate"):
        float(shown(name))
    script("const ask = window.fetch; window.asked = [];"
           "window.fetch = (path, options) => {"
           "  asked.push(JSON.parse(options.body)); return ask(path, options); }")
    up, down, left = "\ue013", "\ue015", "\ue012"
    for key, name, value in ((up, "y", 1), (down, "y", -1), (left, "x", -1), ("d", "x", 1),
                             ("2", "digit", 2)):
        press("keyDown", key)
        until(lambda: last().get(name) == value)
        press("keyUp", key)
        until(lambda: not last().get(name))
    script("document.getElementById('policy').click()")
    until(lambda: last().get("policy") is True)
    script("[...document.querySelectorAll('#steps button')]"
           ".filter(button => button.textContent === '2')[0].click()")
    until(lambda: last().get("k") == 2)
    before = frame()
    script("document.getElementById('restart').click()")
    until(lambda: frame() < before)
    first = pixels()
    # the picture moves
    until(lambda: pixels() != first)
    assert len(first) == 64 * 64 * 4
    assert len(base64.b64decode(browser("/screenshot", method="GET"))) > 1000
    assert shown("message") == ""
