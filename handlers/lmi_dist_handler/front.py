"""What every answer has in common, whatever its route: headers, key, access log, counts, and errors in the route's dialect."""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmi_dist import LmiError
from lmi_dist_handler.formatter import dialect_of_route, explained
from lmi_dist_handler.metrics import Metrics

logger = logging.getLogger("lmi_dist_handler.access")

RETRY_AFTER_S = 2
NO_CACHE = {
    "pragma": "no-cache",
    "cache-control": "no-cache; no-store, must-revalidate, private",
    "expires": "Thu, 01 Jan 1970 00:00:00 UTC",
}
ROUTES = (
    "/ping", "/invocations", "/predictions", "/models", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions",
    "/generate", "/generate_stream", "/endpoints", "/status.json", "/openapi.json", "/health", "/info",
)  # fmt: skip
LINGER_S = 2.0  # a client that is refused is heard out this long: one that is cut off while it sends never sees the answer
UNHEARD = (408, 499)  # it is slow, or gone
QUIET = ("/ping", "/health", "/status.json")  # asked every few seconds, for ever
MAX_HEADER_BYTES = 64 * 1024  # of the path, the query and all headers
LONG_HEADERS = f"the request line and headers must be at most {MAX_HEADER_BYTES} bytes; shorten them"
SAFE_ID = re.compile(r"[\w.:/+=@-]{1,128}")


# ASGI extension: a function that sends a piece of a body that has begun and has no length, or returns False. So does `send`, by way
# of all that is around an application, which for a token costs as much as writing it.
WRITE = "lmi_dist.write"


class HttpError(LmiError):
    """The request cannot be handed to a model, or a worker said no without a text for this dialect."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ClientGoneError(LmiError):
    """The client has closed its connection."""

    code = 499


def refusal(scope: Scope, error: Exception) -> Response:
    """The answer to a request that no model has answered."""
    told = explained(dialect_of_route(scope["path"]), error)
    return Response(told.text, told.code, media_type="application/json")


def json_response(value: Any, code: int = 200) -> Response:
    """JSON as DJL's host writes it."""
    return Response(json.dumps(value, indent=2, ensure_ascii=False) + "\n", code, media_type="application/json")


def refuse(piece: bytes) -> bool:
    """What a server without the extension writes."""
    return False


class Front:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None) -> None:
        self._app = app
        self._metrics = metrics
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(scope, send, self._metrics).run(self._guarded(scope), receive)
        else:
            await self._app(scope, receive, send)

    def _guarded(self, scope: Scope) -> ASGIApp:
        """The routes, or the answer to a request without the key, or with more headers than uvicorn would have waited for."""
        if _header_bytes(scope) > MAX_HEADER_BYTES:
            return refusal(scope, HttpError(431, LONG_HEADERS))
        if self._api_key is None or _is_open(scope):
            return self._app
        given = Headers(scope=scope).get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {self._api_key}".encode()):
            return self._app
        return refusal(scope, HttpError(401, "the Authorization header must be `Bearer <key>` with the key of this server"))


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, send: Send, metrics: Metrics) -> None:
        self._scope = scope
        self._send = send
        self._metrics = metrics
        self._code = 500
        self._num_bytes = 0
        self._has_body = True  # some of it may still come
        headers = Headers(scope=scope)
        given = headers.get("x-request-id") or headers.get("x-amzn-sagemaker-inference-id", "")
        self._id = given if SAFE_ID.fullmatch(given) else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = self._id

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        started = time.perf_counter()
        try:
            self._receive = receive
            self._write = self._scope.setdefault("extensions", {}).get(WRITE, refuse)
            self._scope["extensions"][WRITE] = self.write
            await app(self._scope, self.receive, self.send)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.answered(_label(self._scope["path"]), self._code, seconds)
            self._log(seconds)

    def _log(self, seconds: float) -> None:
        path, (client, _) = self._scope["path"], self._scope.get("client") or ("-", 0)
        level = logging.DEBUG if path in QUIET else logging.INFO
        fields = {
            "client": client, "method": self._scope["method"], "path": path, "code": self._code, "num_bytes": self._num_bytes,
            "seconds": round(seconds, 3), "request_id": self._id,
        }  # fmt: skip
        logger.log(level, '%s "%s %s" %d %d bytes %.3f s %s', *fields.values(), extra={"fields": fields})

    async def receive(self) -> Message:
        message = await self._receive()
        self._has_body = bool(message.get("more_body", False))
        return message

    def write(self, piece: bytes) -> bool:
        is_taken: bool = self._write(piece)
        self._num_bytes += len(piece) if is_taken else 0
        return is_taken

    async def _hear_out(self) -> None:
        """Read and forget what the client is still sending, for a while."""

        async def forget() -> None:
            while self._has_body:
                await self.receive()

        if Headers(scope=self._scope).get("expect", "").lower() != "100-continue":  # else it has not begun to send
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(forget(), LINGER_S)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._code = message["status"]
            if self._code >= 400 and self._code not in UNHEARD:
                await self._hear_out()
            headers = MutableHeaders(scope=message)
            headers.update({**NO_CACHE, "x-request-id": self._id, "connection": "close" if self._code >= 400 else "keep-alive"})
            if self._code in (429, 503):
                headers["retry-after"] = str(RETRY_AFTER_S)
        else:
            self._num_bytes += len(message.get("body", b""))
        await self._send(message)


def _is_open(scope: Scope) -> bool:
    """Whether no key is asked for: neither route tells more than whether the models are well. POST / generates text."""
    return bool(scope["path"] == "/ping" or (scope["path"] == "/" and scope["method"] in ("GET", "HEAD")))


def _header_bytes(scope: Scope) -> int:
    sizes = [len(name) + len(value) + 4 for name, value in scope["headers"]]
    return len(scope["path"]) + len(scope["query_string"]) + sum(sizes)


def _label(path: str) -> str:
    """The route without names in it: a label with endless values would fill the memory."""
    if path.startswith("/models/") and path.endswith("/invoke"):
        return "/models/invoke"
    return next((route for route in ROUTES if path == route or path.startswith(f"{route}/")), "other")
