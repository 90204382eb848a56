"""The whole thing as its users have it: `lmi-dist serve` as a process, a tiny Llama behind it, clients over HTTP."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny_models
from running_server import Server, until

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
GREEDY = {"max_new_tokens": 12, "ignore_eos_token": True}
ENDLESS = {"inputs": "hello", "stream": True, "parameters": {"max_new_tokens": 8000, "ignore_eos_token": True}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny-llama"
    tiny_models.save(tiny_models.build("llama2-gqa", max_position_embeddings=8192), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[dict[str, Server]]:
    """Three servers that load at the same time: the issue's two configurations, and one whose KV pool cannot hold a block."""
    folder = checkpoint.parent / "model"
    folder.mkdir()
    (folder / "serving.properties").write_text(
        "engine=MPI\n"
        "option.tensor_parallel_degree=max\n"
        "option.rolling_batch=lmi-dist\n"
        f"option.model_id={checkpoint}\n"
        "option.max_rolling_batch_prefill_tokens=4096\n"
    )
    servers = {
        "file": Server("--model-dir", str(folder)),
        "environment": Server(
            SERVING_LOAD_MODELS="test::MPI=/opt/ml/model",
            OPTION_TENSOR_PARALLEL_DEGREE="max",
            OPTION_ROLLING_BATCH="lmi-dist",
            OPTION_MODEL_ID=str(checkpoint),
            OPTION_MAX_ROLLING_BATCH_PREFILL_TOKENS="4096",
        ),
        "no room": Server(OPTION_MODEL_ID=str(checkpoint), OPTION_KV_CACHE_MEMORY_BYTES="100"),
    }
    try:
        yield servers
    finally:
        for server in servers.values():
            server.end()


@pytest.fixture(scope="module")
def server(running: dict[str, Server]) -> Server:
    running["file"].wait_until_ready()
    return running["file"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_port_answers_503_before_the_model_is_ready(running: dict[str, Server]) -> None:
    ping = running["environment"].ping()
    invocation = running["environment"].post("/invocations", json={"inputs": "hello"})

    assert (ping.status_code, ping.json()) == (503, {"test": {"status": "PENDING"}})
    assert (invocation.status_code, invocation.headers["retry-after"]) == (503, "2")
    assert invocation.json()["message"] == "model test is not ready: it is still loading"


def test_forms_of_an_answer_have_the_same_text(server: Server) -> None:
    whole = server.post("/invocations", json={"inputs": "hello world", "parameters": {**GREEDY, "details": True}})
    lines = server.post("/predictions/model", json={"inputs": "hello world", "stream": True, "parameters": GREEDY})
    events = server.post(
        "/models/model/invoke", json={"inputs": "hello world", "parameters": {**GREEDY, "output_formatter": "sse"}}
    )

    text = whole.json()["generated_text"]
    tokens = [json.loads(line) for line in lines.text.splitlines()]
    assert [answer.headers["content-type"].partition(";")[0] for answer in (whole, lines, events)] == [
        "application/json",
        "application/jsonlines",
        "text/event-stream",
    ]
    assert whole.json()["details"]["generated_tokens"] == len(tokens) == 12
    assert "".join(line["token"]["text"] for line in tokens) == tokens[-1]["generated_text"] == text
    assert events.text == "".join(f"data: {line}\n\n" for line in lines.text.splitlines())


def test_openai_client_gets_completions(client: openai.OpenAI) -> None:
    words: dict[str, Any] = {"model": "model", "prompt": "hello world", "max_tokens": 12, "temperature": 0}

    whole = client.completions.create(**words, extra_body={"ignore_eos": True})
    chunks = list(client.completions.create(**words, extra_body={"ignore_eos": True}, stream=True))

    assert (whole.choices[0].finish_reason, whole.usage and whole.usage.completion_tokens) == ("length", 12)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert client.models.list().data[0].id == "model"


def test_openai_client_chats(client: openai.OpenAI) -> None:
    words: dict[str, Any] = {"model": "model", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "hi"}]}

    whole = client.chat.completions.create(**words)
    chunks = list(client.chat.completions.create(**words, stream=True))

    assert whole.choices[0].message.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"inputs":', "the body is not JSON"),
        (b'{"inputs": 7}', "inputs=7 must be a string"),
        (b'{"inputs": ""}', "empty"),
        (b'{"inputs": "a", "parameters": {"temperature": "hot"}}', "temperature='hot' is refused"),
        (json.dumps({"inputs": "word " * 9000}).encode(), "8192"),
    ],
)
def test_bad_request_is_told_with_its_rule(server: Server, body: bytes, sentence: str) -> None:
    answer = server.post("/invocations", content=body, headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (424, 424)
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize("prompt", ["", "word " * 9000])
def test_bad_openai_request_is_a_400(client: openai.OpenAI, prompt: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="model", prompt=prompt)

    assert caught.value.param == "prompt"


def test_unknown_openai_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model='other' does not exist; there is model"):
        client.completions.create(model="other", prompt="a")


def test_client_that_goes_away_frees_its_blocks(server: Server) -> None:
    assert server.metric("lmi_kv_blocks_free") == server.metric("lmi_kv_blocks{")
    gone = server.metric("lmi_http_clients_gone_total")

    with httpx.stream("POST", f"{server.url}/invocations", json=ENDLESS, timeout=30) as answer:
        pieces = answer.iter_raw()  # kept: httpx closes the connection with it
        next(pieces)
        assert server.metric("lmi_sequences_running") == 1
        assert server.metric("lmi_kv_blocks_free") < server.metric("lmi_kv_blocks{")

    until(lambda: server.metric("lmi_sequences_running") == 0)
    assert server.metric("lmi_kv_blocks_free") == server.metric("lmi_kv_blocks{")
    assert server.metric("lmi_generated_tokens_total") < 8000
    assert server.metric("lmi_http_clients_gone_total") == gone + 1


def test_client_that_goes_away_while_waiting_frees_its_blocks(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/invocations", json={**ENDLESS, "stream": False}, timeout=0.3)

    until(lambda: server.metric("lmi_sequences_running") == 0)
    assert server.metric("lmi_requests_in_flight") == 0


def test_port_in_use_is_told_with_the_way_out(server: Server, checkpoint: Path) -> None:
    port = server.url.rpartition(":")[2]
    second = Server("--port", port, OPTION_MODEL_ID=str(checkpoint))

    assert second.process.wait(20) == 2
    second._reader.join(5)
    sentence = f"port={port} on host=127.0.0.1 is in use; choose another with SERVING_PORT or --port"
    assert second.lines == [f"lmi-dist: error: {sentence}"]


def test_model_without_room_ends_the_server_with_the_arithmetic(running: dict[str, Server]) -> None:
    server = running["no room"]

    assert server.process.wait(60) == 2
    server._reader.join(5)
    assert server.lines[-1].startswith("lmi-dist: error: ")
    assert "kv_cache_memory_bytes=100" in server.lines[-1]
    assert "Traceback" not in server.lines[-1]


def test_killed_worker_is_told_and_replaced(running: dict[str, Server]) -> None:
    server = running["environment"]
    server.wait_until_ready()
    (described,) = httpx.get(f"{server.url}/models/test").json()
    worker = described["models"][0]["workerGroups"][0]["workers"][0]["id"]

    with httpx.stream("POST", f"{server.url}/invocations", json=ENDLESS, timeout=30) as answer:
        pieces = answer.iter_lines()
        next(pieces)
        os.kill(worker, signal.SIGKILL)
        *_, last = pieces

    assert json.loads(last)["code"] == 503
    assert "the worker of model test was killed by SIGKILL" in json.loads(last)["error"]
    assert server.ping().status_code == 503
    server.wait_until_ready()
    assert server.post("/invocations", json={"inputs": "hello"}).status_code == 200
    assert server.metric("lmi_worker_restarts_total") == 1


def test_sigterm_ends_requests_and_exits_with_0(running: dict[str, Server]) -> None:
    server = running["environment"]
    server.wait_until_ready()
    (described,) = httpx.get(f"{server.url}/models/test").json()
    worker = described["models"][0]["workerGroups"][0]["workers"][0]["id"]

    with httpx.stream(
        "POST", f"{server.url}/invocations", json={**ENDLESS, "parameters": {**GREEDY, "max_new_tokens": 200}}
    ) as answer:
        pieces = answer.iter_lines()
        next(pieces)
        server.process.send_signal(signal.SIGTERM)
        *_, last = pieces

    assert "generated_text" in json.loads(last)  # it was short enough to come to its end
    assert server.process.wait(20) == 0
    assert not Path(f"/proc/{worker}").exists()
    with pytest.raises(httpx.ConnectError):
        server.ping()
