"""Tests of play.py: its server, talked to as a browser does and as one should not."""
import base64
import http.client
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
import torch

import train
from assets.play import Player
from test_dreamer4 import finished, start


@pytest.fixture(scope="module")
def port(finished):
    """The port of a running server."""
    process = start("-u", train.__file__, "--phase", "play", "--checkpoint", finished / "agent.pt", "--run", finished,
                    "--port", 0)
    yield int(re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())[1])
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def ask(port):
    """ask(path, body, method, **headers) -> status, answer: a request to the server."""

    def ask(path, body=None, method="POST", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request(method, path, body if isinstance(body, str) else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text

    return ask


STILL = dict(k=4, policy=False, x=0, y=0)


def test_the_page_is_served_and_frames_advance_with_numbers(ask):
    assert b"<canvas" in ask("/", method="GET")[1]
    status, state = ask("/start", {})
    assert status == 200 and state["frame"] == 0 and state["steps"] == [1, 2, 4]
    for frame, policy in ((1, False), (2, True)):
        status, after = ask("/step", STILL | {"session": state["session"], "policy": policy})
        assert (status, after["frame"], after["size"]) == (200, frame, [64, 64])
        assert len(base64.b64decode(after["pixels"])) == 64 * 64 * 3
        assert all(isinstance(after[name], float) for name in ("reward", "continuation", "value"))


def test_tabs_dream_apart_restart_and_are_freed(ask):
    first, second = (ask("/start", {})[1]["session"] for _ in range(2))
    for frame in (1, 2, 3):
        assert ask("/step", STILL | {"session": first})[1]["frame"] == frame
    assert ask("/step", STILL | {"session": second})[1]["frame"] == 1
    again = ask("/start", {"session": first})[1]
    assert again["frame"] == 0 and ask("/step", STILL | {"session": first})[0] == 410      # the old dream is gone
    assert ask("/stop", {"session": second})[0] == 200
    assert ask("/step", STILL | {"session": second})[0] == 410


@pytest.mark.parametrize("status, path, body, method, headers", [
    (403, "/", None, "GET", {"Host": "evil.example"}), (403, "/start", {}, "POST", {"Origin": "http://evil.example"}),
    (403, "/start", {}, "POST", {"Origin": "null"}), (404, "/etc/passwd", None, "GET", {}), (404, "/x", {}, "POST", {}),
    (501, "/start", {}, "PUT", {}), (400, "/step", "not json", "POST", {}), (400, "/step", [1], "POST", {}),
    (400, "/step", {"session": "x"}, "POST", {}), (410, "/step", STILL | {"session": "x"}, "POST", {}),
    (400, "/start", "x" * 2000, "POST", {}), (400, "/stop", {"session": [1]}, "POST", {})])
def test_strangers_and_nonsense_are_refused(ask, status, path, body, method, headers):
    assert ask(path, body, method, **headers)[0] == status


@pytest.mark.parametrize("wrong", [{"k": 3}, {"k": 64}, {"x": 2}, {"y": "up"}, {"digit": "x"}])
def test_steps_that_make_no_sense_are_refused_and_the_dream_goes_on(ask, wrong):
    session = ask("/start", {})[1]["session"]
    assert ask("/step", STILL | {"session": session} | wrong)[0] == 400
    assert ask("/step", STILL | {"session": session})[1]["frame"] == 1
    ask("/stop", {"session": session})


def test_a_port_forward_may_change_the_port_but_not_the_host(ask):
    headers = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}
    assert ask("/start", {}, **headers)[0] == 200


@pytest.fixture
def browser(port, tmp_path):
    """browser(path, body, method="POST") -> value: a WebDriver session with the page open in headless Chromium."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no Chromium here; apt-get install chromium chromium-driver")
    process = subprocess.Popen([driver, "--port=0"], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if found := re.search(r"started successfully on port (\d+)", line):
            break
    else:
        pytest.skip("chromedriver does not start here")
    session = ""

    def call(path, body=None, method="POST"):
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request(method, session + path, json.dumps(body or {}) if method == "POST" else None)
        value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    options = {"binary": binary, "args": ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                                          f"--user-data-dir={tmp_path}"]}
    try:
        session = "/session/" + call("/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})[
            "sessionId"]
        call("/url", {"url": f"http://127.0.0.1:{port}/"})
        yield call
        call("", method="DELETE")
    finally:
        process.terminate()


def test_in_a_browser_frames_advance_keys_steer_restart_restarts_and_the_policy_drives(browser):
    script = lambda text: browser("/execute/sync", {"script": text, "args": []})
    frame = lambda: int(script("return document.getElementById('frame').textContent") or -1)
    press = lambda kind, key: browser("/actions", {"actions": [
        {"type": "key", "id": "keys", "actions": [{"type": kind, "value": key}]}]})

    def until(condition):
        end = time.time() + 30
        while not condition():
            assert time.time() < end
            time.sleep(0.05)

    until(lambda: frame() > 3)
    assert [float(script(f"return document.getElementById('{name}').textContent"))
            for name in ("reward", "continuation", "value", "total", "rate")]
    script("const ask = window.fetch; window.asked = [];"
           "window.fetch = (path, options) => { asked.push(JSON.parse(options.body)); return ask(path, options); }")
    last = lambda: script("return asked.at(-1) || {}")
    for key, name, value in (("\ue013", "y", 1), ("\ue015", "y", -1), ("\ue012", "x", -1), ("d", "x", 1), ("2", "digit", 2)):
        press("keyDown", key)
        until(lambda: last().get(name) == value)
        press("keyUp", key)
        until(lambda: not last().get(name))
    script("document.getElementById('policy').click()")
    until(lambda: last().get("policy") is True)
    [button] = [b for b in range(3) if script(f"return document.querySelectorAll('#steps button')[{b}].textContent") == "2"]
    script(f"document.querySelectorAll('#steps button')[{button}].click()")
    until(lambda: last().get("k") == 2)
    before = frame()
    script("document.getElementById('restart').click()")
    until(lambda: frame() < before)
    pixels = lambda: script("const c = document.getElementById('screen');"
                            "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    first = pixels()
    until(lambda: pixels() != first)                                         # the picture moves
    assert len(first) == 64 * 64 * 4 and len(base64.b64decode(browser("/screenshot", method="GET"))) > 1000
    assert script("return document.getElementById('message').textContent") == ""


def test_the_keys_pressed_change_the_dream(finished):
    """From the same context, with the same noise, other keys dream another frame."""
    cfg = train.TrainConfig(**json.loads((finished / "config.json").read_text())["config"])
    run = train.Run(finished, cfg, 0, None)
    tokenizer, agent, _ = train.load_agent(run, finished / "agent.pt")
    episodes, frames = train.held_out_episodes(run, tokenizer, agent), []
    player = Player(tokenizer, agent, episodes, cfg)
    for x in (-1, 1, -1):
        player.rng = np.random.default_rng(0)
        torch.manual_seed(0)
        session = player.start()["session"]
        frames.append([player.step(session, 4, False, x, 0)["pixels"] for _ in range(4)])
    assert frames[0] == frames[2] != frames[1]
