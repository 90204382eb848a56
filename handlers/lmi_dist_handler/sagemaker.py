"""SageMaker's runtime in front of the container's routes: boto3's `sagemaker-runtime` client is answered as by the service.

/endpoints/NAME/invocations goes to /invocations (with X-Amzn-SageMaker-Target-Model to /models/MODEL/invoke); a container's error
becomes a ModelError. /endpoints/NAME/invocations-response-stream answers with AWS's event stream. Signatures are not checked.
"""

import json
import re
import struct
import zlib
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENDPOINT = re.compile(r"/endpoints/([A-Za-z0-9](?:-*[A-Za-z0-9]){0,62})/(invocations|invocations-response-stream)")
VARIANT = "AllTraffic"  # SageMaker's name where an endpoint has one variant
EVENT_STREAM = "application/vnd.amazon.eventstream"
MODEL_ERROR = 424  # what SageMaker answers for every error of a container
STRING = 7  # type of an event's header
MAX_PAYLOAD = 1 << 20  # bytes of one event; clients read at most 16 MiB


class Runtime:
    """ASGI middleware: hands the endpoints' requests to the container's routes, everything else through."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = ENDPOINT.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        model = Headers(scope=scope).get("x-amzn-sagemaker-target-model")
        path = f"/models/{model}/invoke" if model else "/invocations"
        reply = _Reply(send, is_stream=found[2] != "invocations")
        inner = {**scope, "path": path, "raw_path": path.encode(), "extensions": {}}  # all has to come by `reply`
        await self._app(inner, receive, reply.send)


class _Reply:
    """The container's answer on its way to the client."""

    def __init__(self, send: Send, *, is_stream: bool) -> None:
        self._send = send
        self._is_stream = is_stream
        self._start: Message = {}
        self._failure: list[bytes] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            await self._begin(message)
        elif self._start["status"] >= 400:
            await self._fail(message)
        else:
            await self._send({**message, "body": _events(message["body"])} if self._is_stream and message.get("body") else message)

    async def _begin(self, message: Message) -> None:
        """Send status and headers; those of an error wait for its body."""
        headers = MutableHeaders(scope=message)
        headers["x-amzn-invoked-production-variant"] = VARIANT
        if message["status"] >= 400:
            return
        if self._is_stream:
            headers["x-amzn-sagemaker-content-type"] = headers.get("content-type", "")
            headers["content-type"] = EVENT_STREAM
            del headers["content-length"]
        await self._send(message)

    async def _fail(self, message: Message) -> None:
        """A ModelError that tells the container's status and body."""
        self._failure.append(message.get("body", b""))
        if message.get("more_body"):
            return
        code, text = self._start["status"], b"".join(self._failure).decode()
        told = {
            "Message": f'Received {"client" if code < 500 else "server"} error ({code}) from primary with message "{text}"',
            "OriginalMessage": text,
            "OriginalStatusCode": code,
        }
        body = json.dumps(told, ensure_ascii=False).encode()
        headers = MutableHeaders(scope=self._start)
        headers.update({"content-type": "application/json", "content-length": str(len(body)), "x-amzn-errortype": "ModelError"})
        await self._send({**self._start, "status": MODEL_ERROR})
        await self._send({"type": "http.response.body", "body": body})


def _events(payload: bytes) -> bytes:
    return b"".join(_event(payload[start : start + MAX_PAYLOAD]) for start in range(0, len(payload), MAX_PAYLOAD))


def _event(payload: bytes) -> bytes:
    """A PayloadPart in AWS's event stream encoding: lengths, their checksum, headers, payload, checksum of all; big-endian."""
    names = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}
    headers = _headers(names)
    lengths = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    prelude = lengths + struct.pack(">I", zlib.crc32(lengths))
    message = prelude + headers + payload
    return message + struct.pack(">I", zlib.crc32(message))


def _headers(values: Mapping[str, str]) -> bytes:
    parts = []
    for name, value in values.items():
        parts.append(struct.pack(f">B{len(name)}sBH{len(value)}s", len(name), name.encode(), STRING, len(value), value.encode()))
    return b"".join(parts)
