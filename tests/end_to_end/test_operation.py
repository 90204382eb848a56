"""What an operator sees of a running server: logs as JSON, the key, and an end that lets requests finish, or not."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tiny_models
from running_server import Server, until

KEY = {"authorization": "Bearer secret"}
ENDLESS = {"inputs": "hello", "stream": True, "parameters": {"max_new_tokens": 8000, "ignore_eos_token": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("operation") / "tiny"
    tiny_models.save(tiny_models.build("llama2-gqa", max_position_embeddings=8192), folder)
    variables = {"OPTION_MODEL_ID": str(folder), "SERVING_LOG_FORMAT": "json", "SERVING_API_KEY": "secret"}
    server = Server(**variables)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait(10)


def records(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in list(server.lines)]


def test_each_request_has_one_record_with_its_id(server: Server) -> None:
    server.post("/invocations", json={"inputs": 7}, headers={**KEY, "x-request-id": "mine-1"})

    def found() -> list[dict[str, Any]]:
        return [record for record in records(server) if record.get("request_id") == "mine-1"]

    until(lambda: len(found()) > 0)
    (record,) = found()
    assert (record["method"], record["path"], record["code"]) == ("POST", "/invocations", 424)
    assert record["level"] == "INFO"


def test_key_is_asked_for_everywhere_but_at_ping(server: Server) -> None:
    without = [httpx.get(f"{server.url}{path}").status_code for path in ("/ping", "/metrics", "/openapi.json", "/models")]

    assert without == [200, 401, 401, 401]
    assert server.post("/v1/completions", json={"prompt": "a"}).json()["error"]["code"] == "invalid_api_key"


def test_draining_server_says_so_until_a_second_signal(server: Server) -> None:
    pieces: list[bytes] = []

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/invocations", json=ENDLESS, headers=KEY, timeout=30) as answer:
            pieces.extend(answer.iter_raw())

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: len(pieces) > 0)

    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.ping().status_code == 503)
    (ping,) = server.ping().json().values()
    refused = server.post("/invocations", json={"inputs": "a"}, headers=KEY)
    num_pieces = len(pieces)
    until(lambda: len(pieces) > num_pieces)  # the running one goes on
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status = server.process.wait(10)
    reader.join(5)

    assert ping == {"status": "Unhealthy", "reason": "the server is being stopped"}
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert (status, time.monotonic() - started < 5) == (0, True)
    assert json.loads(b"".join(pieces).splitlines()[-1])["code"] == 503
