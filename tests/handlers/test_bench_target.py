import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from lmi_dist_handler.bench_target import BenchError, HttpTarget
from lmi_dist_handler.bench_work import MAX_RUNNING, Job


class Server(ThreadingHTTPServer):
    """Stands in for ours: as many events as tokens asked for, less `num_missing`."""

    request_queue_size = 64

    def __init__(self, num_missing=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.num_missing, self.num_running, self.most_running, self.bodies = num_missing, 0, 0, []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "served"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.num_running += 1
            self.server.most_running = max(self.server.most_running, self.server.num_running)
        num_tokens = body["max_tokens"] - self.server.num_missing
        events = [{"choices": [{"text": "x"}]}] * num_tokens + [{"choices": [], "usage": {"completion_tokens": num_tokens}}]
        with self.server.lock:
            self.server.num_running -= 1
        self.answer("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def serving():
    """A function that starts a Server in a thread and gives a target for it too."""
    servers = []

    def start(**options):
        servers.append(Server(**options))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}).start()
        return servers[-1], HttpTarget(f"http://127.0.0.1:{servers[-1].server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_http_target_asks_for_exact_work(serving):
    server, target = serving()

    target.run([Job((5, 6, 7), 4)])

    body = server.bodies[0]
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("served", [5, 6, 7], 4)
    assert (body["ignore_eos"], body["temperature"]) == (True, 0.0)


def test_http_target_keeps_to_the_concurrency(serving):
    server, target = serving()

    timing = target.run([Job((1,), 2)] * 40)

    assert len(server.bodies) == 40
    assert server.most_running <= MAX_RUNNING
    assert 0 < timing.first_s <= timing.seconds


def test_short_answer_is_no_measurement(serving):
    _, target = serving(num_missing=1)

    with pytest.raises(BenchError, match="4 tokens were asked for and 3 came"):
        target.run([Job((1,), 4)])


def test_missing_server_is_told():
    with pytest.raises(BenchError, match=r"no server answers at http://127\.0\.0\.1:9"):
        HttpTarget("http://127.0.0.1:9")


@pytest.mark.parametrize("url", ["localhost:8080", "https://host", "8080"])
def test_url_without_scheme_is_refused(url):
    with pytest.raises(BenchError, match="must look like"):
        HttpTarget(url)
