import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from lmi_dist_handler import demo
from lmi_dist_handler.demo import DemoError
from lmi_dist_handler.settings import ServerSettings

RECIPE = json.dumps(
    {"vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "context": 64, "num_steps": 3, "num_bytes": 20_000}
)


class Server(ThreadingHTTPServer):
    """Stands in for ours: not ready at first, then one canned answer. `requests` is what it was asked."""

    def __init__(self, status, lines):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.lines, self.requests, self.num_pings = status, lines, [], 0

    @property
    def settings(self):
        return ServerSettings(port=self.server_port)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.num_pings += 1
        self.send_response(200 if self.server.num_pings > 2 else 503)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, self.headers.get("authorization"), body))
        self.send_response(self.server.status)
        self.end_headers()
        for line in self.server.lines:
            self.wfile.write(line.encode() + b"\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def serving():
    """A function that starts a Server in a thread."""
    servers = []

    def start(status, lines):
        servers.append(Server(status, lines))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_demo_waits_until_the_server_is_ready(serving):
    server = serving(200, [])

    demo.wait_until_ready(server.settings)

    assert server.num_pings == 3


def test_demo_says_when_the_server_never_gets_ready():
    with pytest.raises(DemoError, match=r"not ready within 0\.5 s"):
        demo.wait_until_ready(ServerSettings(port=9), timeout_s=0.5)  # nobody listens at the discard port


def test_demo_streams_the_answer(serving):
    server = serving(
        200, ['{"token": {"id": 5, "text": " value"}}', '{"token": {"id": 6, "text": "."}, "generated_text": " value."}']
    )

    texts = list(demo.answer(server.settings, "Return the"))

    assert texts == [" value", "."]
    path, _, body = server.requests[0]
    assert path == "/invocations"
    assert body == {"inputs": "Return the", "stream": True, "parameters": demo.PARAMETERS}


def test_demo_shows_the_api_key(serving):
    server = serving(200, [])

    list(demo.answer(server.settings.model_copy(update={"api_key": "k"}), "x"))

    assert server.requests[0][1] == "Bearer k"


def test_demo_tells_what_the_server_refused(serving):
    server = serving(424, ['{"error": "inputs must not be empty"}'])

    with pytest.raises(DemoError, match=r"424.*inputs must not be empty"):
        list(demo.answer(server.settings, ""))


def test_failed_step_is_not_shown_as_an_answer(serving):
    server = serving(200, ['{"token": {"id": -1, "text": ""}, "details": {"finish_reason": "error"}}'])

    with pytest.raises(DemoError, match="error"):
        list(demo.answer(server.settings, "x"))


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "http://127.0.0.1:80/"), ("::1", "http://[::1]:80/")])
def test_ways_on_are_three_lines_that_reach_the_server(host, shown):
    lines = demo.ways_on(ServerSettings(host=host, port=80))

    assert len(lines) == 3
    assert shown in lines[0]


def test_trained_model_is_trained_once(tmp_path, monkeypatch):
    trainings = []
    monkeypatch.setattr(demo, "_train", lambda folder, recipe: (trainings.append(recipe), folder.mkdir(parents=True)))

    first, second, other = (demo.trained_model(tmp_path, recipe) for recipe in ("{}", "{}", '{"seed": 1}'))

    assert first == second != other
    assert trainings == ["{}", '{"seed": 1}']


def test_failed_training_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")

    with pytest.raises(DemoError, match="exit status 1"):
        demo.trained_model(tmp_path, "{}")


def test_ended_training_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "lmi_dist_handler.cli", "demo", "--cache", tmp_path, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        read_until(process, "reading the docstrings")
        (begun,) = tmp_path.glob("*/.unfinished-*")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM

    assert not begun.exists()


def test_training_that_does_not_hear_its_end_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CLEAN_UP_S", 0.2)
    folder = tmp_path / "demo-1" / "demo"
    deaf = """
import pathlib, signal, sys, time
from lmi_dist_handler.cache import complete_folder
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with complete_folder(pathlib.Path(sys.argv[1])):
    print("begun", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", deaf, folder], stdout=subprocess.PIPE, text=True) as training:
        read_until(training, "begun")
        demo._end(training, folder)

    assert list(folder.parent.iterdir()) == []


def test_demo_trains_serves_and_answers(tmp_path):
    """The whole command, with a model of 3 steps."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lmi_dist_handler.cli", "demo", "--cache", tmp_path, "--recipe", RECIPE, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        output = read_until(process, "make run")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0

    assert re.search(r"held-out loss is \d+\.\d+ nats a token, that of a bigram model of the same text \d", output)
    assert f"http://127.0.0.1:{port}/invocations" in output
    assert "error" not in output.replace("Raise an error", "").lower()


def read_until(process, words):
    """What a process prints up to a line with these words."""
    lines = []
    until = time.monotonic() + 120
    while time.monotonic() < until:
        lines.append(process.stdout.readline())
        if words in lines[-1] or not lines[-1]:
            break
    assert words in lines[-1], "".join(lines)
    return "".join(lines)
