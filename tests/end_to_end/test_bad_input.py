"""Bad input over real HTTP, with a well-behaved request beside each: it must not be touched, to the last bit."""

import asyncio
import contextlib
import json
import math
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tiny_models
from lmi_dist_handler import openapi
from lmi_dist_handler.openai_requests import CHAT, COMPLETION
from lmi_dist_handler.sampling import LMI
from lmi_dist_handler.tgi_requests import TGI
from running_server import Server, until

MAX_BODY = 67_108_864
JSON = {"content-type": "application/json"}
GOOD = {"inputs": "hello world", "stream": True, "parameters": {"max_new_tokens": 40, "ignore_eos_token": True, "logprobs": 2}}
SHORT = {"inputs": "hello world", "parameters": {"max_new_tokens": 10, "ignore_eos_token": True}}
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
LMI_FIELDS = {**openapi.LMI_ONLY, **openapi.sampling_fields(LMI)}
WRONG: dict[str, list[Any]] = {
    "integer": [1.5, "7", True, [], math.nan, -math.inf],
    "number": ["7", True, {}, math.nan, math.inf],
    "boolean": [7, "true", [], math.nan],
    "array": [7, True, {}, math.nan],
    "object": [7, True, [], "x", math.nan],
}
EXTREMES = [-1, 0, 10**30, -(10**30), 2**31, 1e308, 5e-324]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bad") / "tiny"
    tiny_models.save(tiny_models.build("llama2-gqa", max_position_embeddings=256), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    server = Server(OPTION_MODEL_ID=str(folder), SERVING_READ_TIMEOUT="1", SERVING_WRITE_TIMEOUT="1")
    try:
        server.wait_until_ready()
        yield server
        assert not [line for line in server.lines if "Traceback" in line or "Exception in" in line]
        assert server.metric("lmi_worker_restarts_total") == 0
    finally:
        server.end()


@pytest.fixture(scope="module")
def expected(server: Server) -> str:
    return server.post("/invocations", json=GOOD).text


@pytest.fixture(scope="module")
def num_idle_files(server: Server, expected: str) -> int:
    return num_open_files(server)


@pytest.fixture(scope="module")
def client(server: Server, num_idle_files: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(autouse=True)
def neighbour(server: Server, client: httpx.Client, expected: str, num_idle_files: int) -> Iterator[None]:
    """A request that runs beside the test. Afterwards it is whole, and everything that the test has touched is given back."""
    with client.stream("POST", "/invocations", json=GOOD) as answer:
        yield
        text = b"".join(answer.iter_raw()).decode()
    assert text == expected
    until(lambda: figures(client, "lmi_requests_in_flight", "lmi_sequences_running", "lmi_kv_blocks_used") == [0.0] * 3)
    until(lambda: num_open_files(server) <= num_idle_files + 2)  # the client's: the neighbour's and the test's


def figures(client: httpx.Client, *names: str) -> list[float]:
    lines = client.get("/metrics").text.splitlines()
    return [float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2]) for name in names]


def num_open_files(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def talk(server: Server, data: bytes) -> tuple[int, dict[str, Any]]:
    """Send bytes, read to the end of the connection: status and JSON of the answer."""
    with connect(server) as connection:
        connection.sendall(data)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def sentence(answer: httpx.Response) -> str:
    """What an error says, in any dialect."""
    told = answer.json()
    error = told.get("error", told.get("message"))
    return str(error["message"] if isinstance(error, dict) else error)


# ---- bodies ----

ROUTES = [("/invocations", 424), ("/v1/completions", 400), ("/v1/chat/completions", 400), ("/generate", 422)]
BODIES = [
    (b"", "the body is empty"),
    (b'{"inputs":', "the body is not JSON"),
    (b"{'inputs': 'a'}", "the body is not JSON"),
    (b"[]", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'"inputs"', "must be a JSON object"),
    (b'{"inputs": "\xff"}', "not UTF-8: byte 12 is 0xff"),
    ('{"inputs": "a"}'.encode("utf-16"), "not UTF-8"),
    (rb'{"inputs": "\ud800", "prompt": "\ud800"}', "half of a surrogate pair"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"inputs":' * 100_000, "nested too deeply"),
    (b'{"inputs": ' + b"9" * 5000 + b"}", "the body is not JSON"),
]


@pytest.mark.parametrize(("route", "code"), ROUTES)
def test_broken_body_is_told(client: httpx.Client, route: str, code: int) -> None:
    for body, told in BODIES:
        answer = client.post(route, content=body, headers=JSON)

        assert (answer.status_code, told in sentence(answer)) == (code, True), (body[:40], answer.text)


@pytest.mark.parametrize("kind", ["image/png", "application/xml", "multipart/mixed; boundary=x", "text/html"])
def test_foreign_content_type_is_told(client: httpx.Client, kind: str) -> None:
    answer = client.post("/invocations", content=b"x", headers={"content-type": kind})

    assert answer.status_code == 424
    assert f"content-type='{kind.partition(';')[0]}' is not for text generation; send application/json" in sentence(answer)


# ---- fields ----


def kind_of(schema: dict[str, Any]) -> str:
    kinds = [each.get("type", "") for each in schema.get("anyOf", [schema])]
    return next((kind for kind in kinds if kind in WRONG), "array" if schema is openapi.STOP else "")


def dumps(value: object) -> bytes:
    return json.dumps(value, allow_nan=True).encode()


@pytest.mark.parametrize(
    ("route", "code", "fields", "base"),
    [
        ("/invocations", 424, LMI_FIELDS, {"inputs": "a"}),
        ("/generate", 422, {**openapi.TGI_ONLY, **openapi.sampling_fields(TGI)}, {"inputs": "a"}),
        ("/v1/completions", 400, openapi.sampling_fields(COMPLETION), {"prompt": "a"}),
        ("/v1/chat/completions", 400, openapi.sampling_fields(CHAT), {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_wrong_type_of_each_field_is_told(
    client: httpx.Client, route: str, code: int, fields: dict[str, Any], base: dict[str, Any]
) -> None:
    nested = "inputs" in base
    for name, schema in fields.items():
        for value in WRONG.get(kind_of(schema), [7, True, {}]):
            body = {**base, "parameters": {name: value}} if nested else {**base, name: value}
            answer = client.post(route, content=dumps(body), headers=JSON)

            assert answer.status_code == code, (name, value, answer.text)
            assert name in sentence(answer), (name, value, answer.text)


@pytest.mark.parametrize("kind", sorted({kind_of(schema) for schema in LMI_FIELDS.values()}))
def test_extreme_values_are_taken_or_told(client: httpx.Client, kind: str) -> None:
    for name in [name for name, schema in LMI_FIELDS.items() if kind_of(schema) == kind]:
        values: list[Any] = [*EXTREMES, *([[value] for value in EXTREMES] if name == "stop_token_ids" else [])]
        values += [{"1": value} for value in EXTREMES] + [{str(10**9): 1}, {"-1": 1}] if name == "logit_bias" else []
        for value in values:
            parameters = {"max_new_tokens": 2, "do_sample": True, name: value}
            answer = client.post("/invocations", content=dumps({"inputs": "a", "parameters": parameters}), headers=JSON)

            assert answer.status_code in (200, 424), (name, value, answer.text)
            assert answer.status_code == 200 or name in sentence(answer), (name, value, answer.text)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"stop_sequences": ["x"] * 10_000}, "stop_sequences="),
        ({"stop_sequences": ["x" * 10_000]}, "stop_sequences="),
        ({"stop_token_ids": list(range(10_000))}, "stop_token_ids="),
        ({"n": 1_000_000}, "parameters.n=1000000 is refused"),
        ({"best_of": 2, "n": 3}, "parameters.best_of=2 must be at least parameters.n=3"),
        ({"logprobs": 1000, "details": True}, "logprobs=1000 must be at most 20; raise max_logprobs"),
        ({"output_formatter": "xml"}, "must be one of json"),
    ],
)
def test_value_over_a_cap_is_told(client: httpx.Client, parameters: dict[str, Any], told: str) -> None:
    answer = client.post("/invocations", json={"inputs": "a", "parameters": parameters})

    assert answer.status_code == 424
    assert told in sentence(answer)
    assert len(answer.text) < 1000


@pytest.mark.parametrize("size", [257, 250_000])
def test_long_prompt_is_told_with_the_limit(client: httpx.Client, size: int) -> None:
    lmi = client.post("/invocations", json={"inputs": "word " * size})
    openai = client.post("/v1/completions", json={"prompt": [7] * size})

    assert (lmi.status_code, openai.status_code) == (424, 400)
    assert all("max_model_len=256" in sentence(answer) for answer in (lmi, openai))
    assert openai.json()["error"]["param"] == "prompt"


def test_template_sees_no_code_in_messages(client: httpx.Client) -> None:
    words = "{{ ''.__class__.__mro__ }}{% for x in range(10**9) %}a{% endfor %}"
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": words}], "max_tokens": 1})

    assert answer.status_code == 200


# ---- sizes and times ----


def test_declared_size_over_the_limit_is_refused_unread(server: Server) -> None:
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"

    code, told = talk(server, head.encode())

    assert code == 413
    assert told["message"].startswith(f"the body has more than max_request_size={MAX_BODY} bytes")


def test_undeclared_size_over_the_limit_is_refused(client: httpx.Client) -> None:
    piece = b" " * (1 << 20)

    def pieces() -> Iterator[bytes]:
        yield from (piece for _ in range(64))
        yield b"x"

    answer = client.post("/v1/completions", content=pieces())

    assert answer.status_code == 413
    assert "max_request_size" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
            "1 bytes of the body have come within read_timeout=1 s",
        ),
        (b"POST /invocations HTTP/1.1\r\nHost:", "headers must come within read_timeout=1 s"),
        (b"", "headers must come within read_timeout=1 s"),
    ],
    ids=["body", "headers", "nothing"],
)
def test_slow_sender_gets_a_408(server: Server, data: bytes, told: str) -> None:
    code, body = talk(server, data)

    assert code == 408
    assert told in body["message"]


def test_body_that_trickles_gets_a_408(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(TimeoutError, ConnectionError):
            connection.settimeout(0.1)
            for _ in range(40):
                connection.sendall(b" ")
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
                    return
    raise AssertionError("no answer came")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n", 400),
        (b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n", 400),
        (b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    ],
    ids=["tls", "length", "two lengths", "chunk", "header", "line"],
)
def test_what_is_no_http_is_told_in_json(server: Server, data: bytes, code: int) -> None:
    status, told = talk(server, data)

    assert status == told["code"] == code
    assert ("at most 65536 bytes" if code == 431 else "the request is not valid HTTP/1.1") in told["message"]


# ---- routes ----


@pytest.mark.parametrize(
    ("method", "path", "code", "told"),
    [
        ("POST", "/predictions/other", 404, "Model or workflow not found: other"),
        ("POST", "/models/other/invoke", 404, "Model or workflow not found: other"),
        ("GET", "/../../etc/passwd", 404, "there is no such route"),
        ("POST", "/v1/embeddings", 404, "there is no such route"),
        ("DELETE", "/invocations", 405, "this route takes"),
        ("BREW", "/v1/completions", 405, "this route takes"),
    ],
)
def test_unknown_place_is_told(client: httpx.Client, method: str, path: str, code: int, told: str) -> None:
    answer = client.request(method, path)

    assert answer.status_code == code
    assert told in sentence(answer)


def test_unknown_model_of_openai_is_a_404(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions", json={"model": "gpt-9", "messages": [{"role": "user", "content": "a"}]})

    assert answer.status_code == 404
    assert "model='gpt-9' does not exist; there is" in sentence(answer)


# ---- clients that go ----

ENDLESS = json.dumps({"inputs": "a b c", "stream": True, "parameters": {"max_new_tokens": 1000, "ignore_eos_token": True}}).encode()
ENDLESS_HEAD = (
    f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(ENDLESS)}\r\n\r\n".encode()
)


@pytest.mark.parametrize("is_rude", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize(
    ("sent", "heard"),
    [
        (ENDLESS_HEAD[:50], 0),
        (ENDLESS_HEAD, 0),
        (ENDLESS_HEAD + ENDLESS[:20], 0),
        (ENDLESS_HEAD + ENDLESS, 0),
        (ENDLESS_HEAD + ENDLESS, 600),
    ],
    ids=["in headers", "before body", "in body", "before first token", "in mid-stream"],
)
def test_client_that_goes_leaves_nothing(server: Server, sent: bytes, heard: int, is_rude: bool) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        while heard > 0:
            heard -= len(connection.recv(heard))
        if is_rude:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_two_hundred_at_once_are_all_answered(server: Server) -> None:
    bad = [{"inputs": 7}, {"inputs": "a", "parameters": {"n": -1}}, {"inputs": "a", "parameters": {"stop": [""]}}, {}]

    async def main() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            bodies = [bad[i // 4 % 4] if i % 4 == 0 else SHORT for i in range(200)]
            return await asyncio.gather(*(client.post("/invocations", json=body) for body in bodies))

    answers = asyncio.run(main())

    assert [answer.status_code for answer in answers] == [424, 200, 200, 200] * 50
    assert len({answer.text for answer in answers if answer.status_code == 200}) == 1
