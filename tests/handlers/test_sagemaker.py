"""SageMaker's runtime over a container that the test plays, read by botocore's own parser of event streams."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from botocore.eventstream import EventStreamBuffer
from lmi_dist_handler.sagemaker import MAX_PAYLOAD, Runtime
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


async def whole(request: Request) -> Response:
    return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()})


async def lines(request: Request) -> Response:
    async def pieces() -> Any:
        for piece in ("a\n", "", "é\n"):
            yield piece.encode()

    return StreamingResponse(pieces(), media_type="application/jsonlines")


def container(answer: Callable[[Request], Awaitable[Response]]) -> Runtime:
    return Runtime(
        Starlette(routes=[Route(path, answer, methods=["POST"]) for path in ("/invocations", "/models/{m}/invoke", "/x")])
    )


def post(path: str, answer: Callable[[Request], Awaitable[Response]] = whole, **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(container(answer)), base_url="http://host") as client:
            return await client.post(path, **request)

    return asyncio.run(main())


def events(body: bytes) -> list[tuple[dict[str, str], bytes]]:
    buffer = EventStreamBuffer()
    buffer.add_data(body)
    return [(event.headers, event.payload) for event in buffer]


@pytest.mark.parametrize(("path", "seen"), [("/endpoints/e1/invocations-response-stream", {}), ("/x", {"a": 1})])
def test_container_has_no_way_around_the_events(path: str, seen: dict[str, int]) -> None:
    """What it wrote by an extension would not be framed."""
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)

    asyncio.run(Runtime(app)({"type": "http", "path": path, "headers": [], "extensions": {"a": 1}}, None, None))  # type: ignore[arg-type]

    assert scopes[0]["extensions"] == seen


@pytest.mark.parametrize(
    ("path", "headers", "seen"),
    [
        ("/endpoints/my-endpoint/invocations", {}, "/invocations"),
        ("/endpoints/e1/invocations", {"X-Amzn-SageMaker-Target-Model": "m"}, "/models/m/invoke"),
        ("/x", {}, "/x"),
    ],
)
def test_container_sees_its_own_routes(path: str, headers: dict[str, str], seen: str) -> None:
    answer = post(path, content=b"hi", headers=headers)

    assert (answer.status_code, answer.json()) == (200, {"path": seen, "body": "hi"})
    assert answer.headers.get("x-amzn-invoked-production-variant") == (None if path == "/x" else "AllTraffic")


@pytest.mark.parametrize(
    "path", ["/endpoints/a/b", "/endpoints//invocations", "/endpoints/a_b/invocations", "/endpoints/a/invocations/"]
)
def test_other_paths_are_the_containers(path: str) -> None:
    assert post(path).status_code == 404


def test_stream_is_one_event_a_piece() -> None:
    answer = post("/endpoints/e/invocations-response-stream", lines)

    assert answer.headers["content-type"] == "application/vnd.amazon.eventstream"
    assert answer.headers["x-amzn-sagemaker-content-type"] == "application/jsonlines"
    found = events(answer.content)
    assert [payload.decode() for _, payload in found] == ["a\n", "é\n"]
    assert found[0][0] == {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}


def test_whole_answer_streams_too() -> None:
    answer = post("/endpoints/e/invocations-response-stream", content=b"x" * (MAX_PAYLOAD + 1))

    sizes = [len(payload) for _, payload in events(answer.content)]
    assert sizes[0] == MAX_PAYLOAD
    assert "content-length" not in answer.headers


@pytest.mark.parametrize("stream", ["", "-response-stream"])
def test_error_of_the_container_is_a_model_error(stream: str) -> None:
    async def refuse(request: Request) -> Response:
        return PlainTextResponse("büsy", 503, headers={"retry-after": "2"})

    answer = post(f"/endpoints/e/invocations{stream}", refuse)

    assert (answer.status_code, answer.headers["x-amzn-errortype"], answer.headers["retry-after"]) == (424, "ModelError", "2")
    assert answer.json()["Message"] == 'Received server error (503) from primary with message "büsy"'
    assert (answer.json()["OriginalStatusCode"], answer.json()["OriginalMessage"]) == (503, "büsy")
    assert answer.headers["content-length"] == str(len(answer.content))
