"""handlers/lmi_dist_handler/{http,front,metrics}.py: the routes, over a host whose worker is played by the test."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import httpx
import pytest
from lmi_dist_handler.group import Piece, WorkerLostError
from lmi_dist_handler.host import NotReadyError
from lmi_dist_handler.http import Api
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.registry import Registry, Served
from lmi_dist_handler.settings import ServerSettings
from lmi_dist_handler.wire import PairList

from lmi_dist import LmiError, OverloadedError

JSON = {"Content-Type": "application/json"}
SSE = {"Content-Type": "text/event-stream"}
STATS = {
    "num_running": 1, "num_waiting": 2, "num_blocks": 10, "num_free_blocks": 4, "num_steps": 7, "num_failed_steps": 0,
    "step_seconds": 1.5, "num_prompt_tokens": 30, "num_generated_tokens": 20, "num_preemptions": 0, "num_prefix_query_tokens": 8,
    "num_prefix_hit_tokens": 5, "busy_s": 0.0, "num_streams": 1,
    "first_token_s": {"bounds": [0.1, 1.0], "counts": [3, 1, 1], "sum": 4.5},
    "token_gap_s": {"bounds": [0.1], "counts": [2, 0], "sum": 0.05}, "num_aborted": 3, "num_begun": 4, "waiting_seconds": 2.5,
}  # fmt: skip


class FakeStream:
    """Pieces and errors in order; then nothing, until interrupted."""

    def __init__(self, items: list[Piece | LmiError]) -> None:
        self.items: asyncio.Queue[Piece | LmiError] = asyncio.Queue()
        for item in items:
            self.items.put_nowait(item)
        self.is_closed = False

    async def piece(self) -> Piece:
        item = await self.items.get()
        if isinstance(item, LmiError):
            raise item
        return item

    def interrupt(self, error: LmiError) -> None:
        self.items.put_nowait(error)

    def close(self) -> None:
        self.is_closed = True


class FakeHost:
    """A model that answers every request with `script`, or raises it."""

    def __init__(self, name: str = "test", state: str = "ready", reason: str = "") -> None:
        self.name, self.state, self.reason = name, state, reason
        self.num_in_flight, self.num_restarts, self.worker_pid, self.started_at = 1, 2, 4711, 0.0
        self.device = "cpu"
        self.script: list[Piece | LmiError] | LmiError = [Piece('{"generated_text": "é"}', True, headers=JSON)]
        self.asked: tuple[Mapping[str, str], PairList] = ({}, PairList())
        self.stream = FakeStream([])

    @property
    def health(self) -> tuple[str, str]:
        return {"ready": "serving", "failed": "dead", "stopped": "draining"}.get(self.state, self.state), self.reason

    def open(self, properties: Mapping[str, str], content: PairList) -> FakeStream:
        self.asked = (properties, content)
        if isinstance(self.script, LmiError):
            raise self.script
        self.stream = FakeStream(self.script)
        return self.stream

    async def stats(self) -> dict[str, Any]:
        return STATS


def app(*hosts: FakeHost, **settings: Any) -> Any:
    served = [Served(host, "1", f"hub/{host.name}") for host in hosts]  # type: ignore[arg-type]  # fakes
    return Api(Registry(served, lambda given: served[0]), ServerSettings(**settings), Metrics()).app()


def call(host: FakeHost, method: str, path: str, settings: dict[str, Any] | None = None, **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app(host, **(settings or {})))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.request(method, path, **request)

    return asyncio.run(main())


def test_whole_answer_has_a_length() -> None:
    host = FakeHost()

    response = call(host, "POST", "/invocations", json={"inputs": "x"})

    assert (response.status_code, response.json()) == (200, {"generated_text": "é"})
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["content-type"] == "application/json"
    assert host.stream.is_closed


def test_every_answer_has_djls_headers() -> None:
    response = call(FakeHost(), "GET", "/ping", headers={"x-request-id": "abc-1"})

    assert response.headers["x-request-id"] == "abc-1"
    assert response.headers["pragma"] == "no-cache"
    assert response.headers["cache-control"] == "no-cache; no-store, must-revalidate, private"
    assert response.headers["expires"] == "Thu, 01 Jan 1970 00:00:00 UTC"
    assert response.headers["connection"] == "keep-alive"
    assert call(FakeHost(), "GET", "/nowhere", headers={"x-request-id": "a b\t"}).headers["x-request-id"] != "a b\t"


def test_stream_has_no_length() -> None:
    host = FakeHost()
    host.script = [Piece("data: a\n\n", False, headers=SSE), Piece("data: b\n\n", True)]

    response = call(host, "POST", "/invocations", json={})

    assert response.text == "data: a\n\ndata: b\n\n"
    assert response.headers["content-type"] == "text/event-stream"
    assert "content-length" not in response.headers
    assert host.stream.is_closed


def test_error_before_the_first_piece_sets_the_status() -> None:
    host = FakeHost()
    host.script = [Piece('{"error": "told"}', True, 424, "told", JSON)]

    response = call(host, "POST", "/invocations", json={})

    assert (response.status_code, response.json()) == (424, {"error": "told"})
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("headers", "tail"),
    [
        (SSE, 'data: {"error": "the worker is lost", "code": 503}\n\n'),
        ({"Content-Type": "application/jsonlines"}, '{"error": "the worker is lost", "code": 503}\n'),
    ],
)
def test_worker_lost_in_mid_stream_ends_it_with_an_error(headers: dict[str, str], tail: str) -> None:
    host = FakeHost()
    host.script = [Piece("a\n", False, headers=headers), WorkerLostError("the worker is lost")]

    response = call(host, "POST", "/invocations", json={})

    assert (response.status_code, response.text) == (200, f"a\n{tail}")


def test_silent_worker_ends_a_stream() -> None:
    host = FakeHost()
    host.script = [Piece("a\n", False, headers=SSE)]

    response = call(host, "POST", "/invocations", {"chunked_read_timeout": 1}, json={})

    assert "no more text came within chunked_read_timeout=1 s" in response.text


@pytest.mark.parametrize(
    ("path", "error", "code", "kind"),
    [
        ("/invocations", WorkerLostError("x is gone"), 503, None),
        ("/invocations", NotReadyError("x is gone"), 503, None),
        ("/invocations", OverloadedError("x is gone"), 503, None),
        ("/v1/completions", NotReadyError("x is gone"), 503, "server_error"),
        ("/v1/chat/completions", OverloadedError("x is gone"), 429, "rate_limit_error"),
    ],
)
def test_refusals_speak_the_routes_dialect(path: str, error: LmiError, code: int, kind: str | None) -> None:
    host = FakeHost()
    host.script = error

    response = call(host, "POST", path, json={})

    assert (response.status_code, response.headers["retry-after"]) == (code, "2")
    if kind is None:
        assert response.json() == {"code": code, "type": "ServiceUnavailableException", "message": "x is gone"}
        assert response.text.endswith("}\n")
    else:
        assert response.json()["error"]["message"] == "x is gone"
        assert response.json()["error"]["type"] == kind


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("ready", 200, "Healthy"),
        ("degraded", 200, "Unhealthy"),
        ("loading", 503, "PENDING"),
        ("restarting", 503, "Unhealthy"),
        ("failed", 500, "FAILED"),
        ("stopped", 503, "Unhealthy"),
    ],
)
def test_ping_tells_the_truth(state: str, code: int, status: str) -> None:
    response = call(FakeHost(state=state, reason="" if state == "ready" else "why"), "GET", "/ping")

    assert response.status_code == code
    assert response.json()["test"]["status"] == status
    assert response.json()["test"].get("reason") == (None if state == "ready" else "why")
    assert ("retry-after" in response.headers) == (code == 503)


def test_headers_and_query_become_properties_and_content() -> None:
    host = FakeHost()
    attributes = {"X-Amzn-SageMaker-Custom-Attributes": "adapter=a; top=b;c", "request_tracking_id": "mine", "Lmi_Route": "/v1/x"}

    call(host, "POST", "/invocations?limit=3", content=b"body", headers={"x-request-id": "abc", **attributes})

    properties, content = host.asked
    assert (properties["adapter"], properties["top"], properties["requestId"]) == ("a", "b", "abc")
    assert properties["lmi_route"] == ""
    assert "request_tracking_id" not in properties
    assert content.pairs == [("limit", b"3"), ("data", b"body")]


@pytest.mark.parametrize("headers", [{"Handler": "stats"}, {"X-Amzn-SageMaker-Custom-Attributes": "handler=stats"}])
def test_clients_cannot_choose_the_handler(headers: dict[str, str]) -> None:
    response = call(FakeHost(), "POST", "/invocations", headers=headers)

    assert (response.status_code, response.json()["message"]) == (400, "The handler can't be overridden in a request")


def test_compressed_body_is_refused() -> None:
    response = call(FakeHost(), "POST", "/invocations", headers={"content-encoding": "gzip"}, content=b"x")

    assert (response.status_code, response.json()["type"]) == (415, "BadRequestException")
    assert response.json()["message"] == "content-encoding='gzip' is not taken; send the body as it is"
    assert call(FakeHost(), "POST", "/v1/completions", headers={"content-encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("header", [{"x-synchronous": "False"}, {"x-starting-token": "abc"}])
def test_answer_to_be_fetched_later_is_refused(header: dict[str, str]) -> None:
    response = call(FakeHost(), "POST", "/invocations", headers=header)

    assert response.status_code == 400
    assert "(x-synchronous, x-starting-token) is known but not built yet" in response.json()["message"]
    assert call(FakeHost(), "POST", "/invocations", headers={"x-synchronous": "true"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "code", "message"),
    [
        ("POST", "/predictions/other", 404, "Model or workflow not found: other"),
        ("POST", "/predictions/test/7", 404, "Model or workflow not found: test"),
        ("POST", "/models/other/invoke", 404, "Model or workflow not found: other"),
        ("POST", "/invocations?model_name=other", 404, "Model or workflow not found: other"),
        ("GET", "/models/other", 404, "Model or workflow not found: other"),
        ("GET", "/nowhere", 404, "GET /nowhere: there is no such route"),
        ("GET", "/invocations", 405, "GET /invocations: this route takes"),
        ("PATCH", "/models/test", 405, "PATCH /models/test: this route takes"),
    ],
)
def test_wrong_paths_are_told(method: str, path: str, code: int, message: str) -> None:
    response = call(FakeHost(), method, path)

    assert response.status_code == response.json()["code"] == code
    assert message in response.json()["message"]


@pytest.mark.parametrize(
    "path", ["/predictions/test", "/predictions/test/1", "/models/test/invoke", "/invocations?model_name=test"]
)
def test_model_is_found_by_every_route(path: str) -> None:
    assert call(FakeHost(), "POST", path, json={}).status_code == 200


PART = b'--x\r\nContent-Disposition: form-data; name="model_name"\r\n\r\n%s\r\n--x--'


@pytest.mark.parametrize(
    ("kind", "body", "code"),
    [
        ("application/x-www-form-urlencoded", b"inputs=x&model_name=te%73t", 200),
        ("application/x-www-form-urlencoded", b"model_name=other&inputs=x", 404),
        ("application/x-www-form-urlencoded", b"inputs=x", 200),
        ("application/x-www-form-urlencoded", b"model_name=%ff", 200),
        ("multipart/form-data; boundary=x", PART % b"test", 200),
        ("multipart/form-data; boundary=x", PART % b"other", 404),
        ("multipart/form-data", PART % b"other", 200),
    ],
)
def test_form_may_name_its_model(kind: str, body: bytes, code: int) -> None:
    host = FakeHost()

    answer = call(host, "POST", "/invocations", content=body, headers={"content-type": kind})

    assert answer.status_code == code
    assert code != 200 or host.asked[1].pairs == [("data", body)]


def test_one_of_several_models_must_be_named() -> None:
    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app(FakeHost("a"), FakeHost("b")))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            bodies: list[Any] = [{"model": "a"}, {"model": "hub/b"}, {"model": "c"}, {}]
            openai = [await client.post("/v1/completions", json=body) for body in bodies]
            return [await client.post("/invocations"), await client.post("/invocations", headers={"model_name": "b"}), *openai]

    unnamed, named, first, by_id, unknown, missing = asyncio.run(main())

    assert (unnamed.status_code, unnamed.json()["message"]) == (400, "Parameter model_name is required.")
    assert [named.status_code, first.status_code, by_id.status_code] == [200, 200, 200]
    assert [unknown.status_code, missing.status_code] == [404, 404]
    assert unknown.json()["error"]["message"] == "model='c' does not exist; there is a, b"


@pytest.mark.parametrize("is_declared", [True, False])
def test_body_above_the_limit_is_refused(is_declared: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 30

    host = FakeHost()

    response = call(host, "POST", "/invocations", {"max_request_size": 100}, content=b"x" * 150 if is_declared else chunks())

    assert response.status_code == 413
    assert "max_request_size=100 bytes; set SERVING_MAX_REQUEST_SIZE" in response.json()["message"]
    assert host.asked[0] == {}
    assert call(host, "POST", "/invocations", {"max_request_size": 100}, content=b"x" * 100).status_code == 200


def test_key_guards_all_but_ping() -> None:
    settings = {"api_key": "secret"}

    assert call(FakeHost(), "GET", "/ping", settings).status_code == 200
    for path in ("/metrics", "/v1/models", "/nowhere"):
        assert call(FakeHost(), "GET", path, settings).status_code == 401
        assert call(FakeHost(), "GET", path, settings, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert call(FakeHost(), "GET", "/v1/models", settings, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_models_are_listed_and_described() -> None:
    listed = call(FakeHost(), "GET", "/models").json()
    (described,) = call(FakeHost(), "GET", "/models/test").json()
    (openai,) = call(FakeHost(), "GET", "/v1/models").json()["data"]

    assert listed == {"models": [{"modelName": "test", "version": "1", "modelUrl": "hub/test", "status": "READY"}]}
    assert described["models"][0]["workerGroups"][0]["workers"] == [
        {"id": 4711, "startTime": "1970-01-01T00:00:00.000Z", "status": "READY"}
    ]
    assert (openai["id"], openai["object"]) == ("test", "model")
    assert call(FakeHost(), "OPTIONS", "/invocations").json() == {}
    assert call(FakeHost(), "GET", "/").json()["models"] == {"test": "ready"}


def test_metrics_count_host_and_worker() -> None:
    async def main() -> str:
        transport = httpx.ASGITransport(app(FakeHost()))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            await client.post("/predictions/test", json={})
            await client.post("/models/secret-name/invoke", json={})
            return (await client.get("/metrics")).text

    lines = asyncio.run(main()).splitlines()

    for line in (
        'lmi_http_requests_total{code="200",route="/predictions"} 1.0',
        'lmi_http_requests_total{code="404",route="/models/invoke"} 1.0',
        'lmi_model_state{model="test",state="ready"} 1.0',
        'lmi_requests_in_flight{model="test"} 1.0',
        'lmi_worker_restarts_total{model="test"} 2.0',
        'lmi_sequences_waiting{model="test"} 2.0',
        'lmi_kv_cache_usage{model="test"} 0.6',
        'lmi_generated_tokens_total{model="test"} 20.0',
        'lmi_time_to_first_token_seconds_bucket{le="1.0",model="test"} 4.0',
        'lmi_time_to_first_token_seconds_bucket{le="+Inf",model="test"} 5.0',
        'lmi_time_to_first_token_seconds_sum{model="test"} 4.5',
        'lmi_time_between_tokens_seconds_bucket{le="0.1",model="test"} 2.0',
        'lmi_queue_seconds_count{model="test"} 4.0',
        'lmi_queue_seconds_sum{model="test"} 2.5',
        'lmi_kv_blocks_used{model="test"} 6.0',
        'lmi_requests_running{model="test"} 1.0',
        'lmi_aborted_requests_total{model="test"} 3.0',
    ):
        assert line in lines


def exchange(host: FakeHost, after: Callable[[asyncio.Event, list[Any]], Coroutine[Any, Any, None]]) -> list[Any]:
    """One POST /invocations by hand; `after` decides when its client goes. Returns what was sent to it."""

    async def main() -> list[Any]:
        gone, sent = asyncio.Event(), list[Any]()
        bodies = iter([{"type": "http.request", "body": b"{}", "more_body": False}])

        async def receive() -> Any:
            for message in bodies:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/invocations", "raw_path": b"/invocations",
            "query_string": b"", "headers": [], "scheme": "http", "server": ("host", 80), "client": ("client", 1), "root_path": "",
        }  # fmt: skip
        leaving = asyncio.create_task(after(gone, sent))
        await asyncio.wait_for(app(host)(scope, receive, send), 5)
        await leaving
        return sent

    return asyncio.run(main())


def test_client_that_goes_while_waiting_closes_its_stream() -> None:
    host = FakeHost()
    host.script = []

    async def go(gone: asyncio.Event, sent: list[Any]) -> None:
        await asyncio.sleep(0.01)
        assert not host.stream.is_closed
        gone.set()

    sent = exchange(host, go)

    assert sent[0]["status"] == 499
    assert host.stream.is_closed


def test_client_that_goes_in_mid_stream_closes_its_stream() -> None:
    host = FakeHost()
    host.script = [Piece("a", False, headers=SSE)]

    async def go(gone: asyncio.Event, sent: list[Any]) -> None:
        while len(sent) < 2:
            await asyncio.sleep(0.001)
        gone.set()

    sent = exchange(host, go)

    assert [message.get("body") for message in sent] == [None, b"a"]
    assert host.stream.is_closed
