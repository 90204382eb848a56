"""Who needs the key, and whose words an error has."""

import asyncio
from typing import Any

import httpx
import pytest
from lmi_dist_handler.front import WRITE, Front
from lmi_dist_handler.metrics import Metrics
from starlette.responses import PlainTextResponse

KEY = {"Authorization": "Bearer secret"}


def call(method: str, path: str, **headers: str) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(Front(PlainTextResponse("in"), Metrics(), "secret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(main())


@pytest.mark.parametrize(("method", "path"), [("GET", "/ping"), ("POST", "/ping"), ("GET", "/"), ("HEAD", "/")])
def test_health_and_page_are_open(method: str, path: str) -> None:
    assert call(method, path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/generate", "/generate_stream", "/invocations", "/endpoints/e/invocations", "/v1/completions"]
)
def test_whatever_generates_text_needs_the_key(path: str) -> None:
    assert (call("POST", path).status_code, call("POST", path, **KEY).status_code) == (401, 200)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/", {"error", "error_type"}),
        ("/generate", {"error", "error_type"}),
        ("/v1/models", {"error"}),
        ("/x", {"code", "type", "message"}),
    ],
)
def test_refusal_is_in_the_routes_words(path: str, names: set[str]) -> None:
    assert set(call("POST", path).json()) == names


@pytest.mark.parametrize(
    ("headers", "expected"),
    [({"x-request-id": "a", "x-amzn-sagemaker-inference-id": "b"}, "a"), ({"x-amzn-sagemaker-inference-id": "b"}, "b")],
)
def test_request_has_the_clients_id(headers: dict[str, str], expected: str) -> None:
    assert call("GET", "/ping", **headers).headers["x-request-id"] == expected


def test_log_counts_what_the_extension_wrote(caplog: pytest.LogCaptureFixture) -> None:
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for piece in (b"abc", b"de"):
            if not scope["extensions"][WRITE](piece):
                await send({"type": "http.response.body", "body": piece})

    async def send(message: Any) -> None:
        sent.append(message["body"])

    scope = {
        "type": "http",
        "path": "/ping",
        "method": "GET",
        "query_string": b"",
        "headers": [],
        "extensions": {WRITE: b"abc".__eq__},
    }
    with caplog.at_level("DEBUG"):
        asyncio.run(Front(app, Metrics(), None)(scope, None, send))  # type: ignore[arg-type]

    assert (sent, caplog.records[-1].fields["num_bytes"]) == ([b"de"], 5)  # type: ignore[attr-defined]
