"""The HTTP routes of DJL Serving, SageMaker and OpenAI over a server's models (djl-contract 6). Knows no socket, no process.

The body decides what is asked for; the path decides the dialect of errors. Bodies go to the worker as they came.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lmi_dist import LmiError
from lmi_dist_handler import page
from lmi_dist_handler.formatter import TGI_ROUTES, dialect_of_route
from lmi_dist_handler.front import ClientGoneError, Front, HttpError, json_response, refusal
from lmi_dist_handler.group import Piece, Stream, WorkerLostError
from lmi_dist_handler.host import Host
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.properties import ServerSettings
from lmi_dist_handler.sagemaker import Runtime
from lmi_dist_handler.wire import PairList

INLINE_BYTES = 256 * 1024  # of a body that is parsed in the loop's thread
LINGER_S = 2.0  # a client that sends too much is heard out this long, so that it reads the answer
CUSTOM_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
PING_STATUS = {"loading": "PENDING", "ready": "Healthy", "failed": "FAILED", "stopped": "Unhealthy"}
MODEL_STATUS = {"loading": "PENDING", "ready": "READY", "failed": "FAILED", "stopped": "PENDING"}


PLACEHOLDERS = ("dummy", "tgi")  # what Hugging Face's clients write where a URL stands for the model
PRIVATE = ("request_tracking_id", "abort_tracking_id", "lmi_route", "requestid")  # properties that no client may set


@dataclass(frozen=True, slots=True)
class Served:
    """A model as clients see it."""

    host: Host
    version: str
    model_id: str
    options: tuple[tuple[str, str, str], ...] = ()  # option, value in use, origin

    @property
    def name(self) -> str:
        return self.host.name


class Streamed(Response):
    """An answer in pieces, whose status and headers are those of the first. A client that leaves ends it."""

    def __init__(self, first: Piece, stream: Stream, watcher: "asyncio.Task[None]", metrics: Metrics, *, timeout_s: float) -> None:
        super().__init__(None, first.code or 200, dict(first.headers))
        del self.headers["content-length"]  # so that the server sends chunks
        self._piece = first
        self._stream = stream
        self._watcher = watcher
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while not self._piece.is_last:
                await self._send(send, self._piece.text)
                self._piece = await self._next()
            await self._send(send, self._piece.text or self._failure(self._piece), is_last=True)
        except ClientGoneError:
            self._metrics.client_gone()
        finally:
            self._watcher.cancel()
            self._stream.close()

    async def _send(self, send: Send, text: str, is_last: bool = False) -> None:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": not is_last})

    async def _next(self) -> Piece:
        """The next piece. A worker that is lost or silent gives an error: the status has been sent already."""
        silent = WorkerLostError(f"no more text came within chunked_read_timeout={self._timeout_s:g} s")
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self._stream.interrupt, silent)
        try:
            return await self._stream.piece()
        except WorkerLostError as error:
            return Piece("", True, error.code, str(error))
        finally:
            timer.cancel()

    def _failure(self, piece: Piece) -> str:
        """An error that nobody has put into the stream's form yet."""
        if piece.code is None:
            return ""
        line = json.dumps({"error": piece.error, "code": piece.code}, ensure_ascii=False)
        return f"data: {line}\n\n" if "event-stream" in self.headers.get("content-type", "") else f"{line}\n"


class Api:
    """The routes. Each method is an endpoint or serves one."""

    def __init__(self, served: Iterable[Served], server: ServerSettings, metrics: Metrics) -> None:
        self._served = {model.name: model for model in served}
        self._server = server
        self._metrics = metrics
        self._started = int(time.time())

    def app(self) -> Front:
        post, get = ["POST"], ["GET"]
        routes = [
            Route("/", self.root, methods=get),
            Route("/status.json", self.status, methods=get),
            Route("/ping", self.ping, methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"]),
            Route("/invocations", self.invoke, methods=["POST", "OPTIONS"]),
            Route("/predictions/{model}", self.invoke, methods=post),
            Route("/predictions/{model}/{version}", self.invoke, methods=post),
            Route("/models/{model}/invoke", self.invoke, methods=post),
            Route("/models", self.models, methods=get),
            Route("/models/{model}", self.describe, methods=get),
            Route("/metrics", self.show_metrics, methods=get),
            *(Route(path, self.invoke, methods=post) for path in TGI_ROUTES),
            Route("/v1/models", self.openai_models, methods=get),
            Route("/v1/completions", self.openai, methods=post),
            Route("/v1/chat/completions", self.openai, methods=post),
        ]
        app = Starlette(routes=routes, exception_handlers={LmiError: self._on_error, HTTPException: self._on_http_exception})
        return Front(Runtime(app), self._metrics, self._server.api_key)

    async def root(self, request: Request) -> Response:
        """The page for a browser; else a few words of JSON."""
        if page.wants_page(request.headers.get("accept", "")):
            return page.page()
        models = {name: model.host.state for name, model in self._served.items()}
        return json_response(
            {"server": "lmi-dist", "models": models, "routes": ["/ping", "/invocations", "/v1/chat/completions", "/metrics"]}
        )

    async def status(self, request: Request) -> Response:
        """What the page shows, and why."""
        served = list(self._served.values())
        stats = await asyncio.gather(*(model.host.stats() for model in served))
        models = [
            page.model_status(model.host, model.version, model.model_id, model.options, values)
            for model, values in zip(served, stats, strict=True)
        ]
        uptime_s = round(time.time() - self._started)
        return json_response(
            {"server": "lmi-dist", "uptime_s": uptime_s, "models": models, "options": page.rows(self._server.table())}
        )

    async def ping(self, request: Request) -> Response:
        """Per model how it stands; 200 only if all of them answer."""
        hosts = [model.host for model in self._served.values()]
        code = (
            500 if any(host.state == "failed" for host in hosts) else 200 if all(host.state == "ready" for host in hosts) else 503
        )
        body = {
            host.name: {"status": PING_STATUS[host.state], **({"reason": host.reason} if host.reason else {})} for host in hosts
        }
        return json_response(body, code)

    async def models(self, request: Request) -> Response:
        return json_response({"models": [self._summary(model) for model in self._served.values()]})

    async def describe(self, request: Request) -> Response:
        model = self._find(request.path_params["model"])
        host = model.host
        workers = [{"id": host.worker_pid, "status": MODEL_STATUS[host.state]}]
        group = {"device": {"deviceType": "cpu", "deviceId": -1}, "minWorkers": 1, "maxWorkers": 1, "workers": workers}
        queue = {"queueSize": self._server.job_queue_size, "requestInQueue": host.num_in_flight}
        details = {"batchSize": 1, **queue, "loadedAtStartup": True, "workerGroups": [group], "reason": host.reason}
        return json_response(
            [{"workflowName": model.name, "version": model.version, "models": [{**self._summary(model), **details}]}]
        )

    async def show_metrics(self, request: Request) -> Response:
        hosts = [model.host for model in self._served.values()]
        stats = await asyncio.gather(*(host.stats() for host in hosts))
        known = {host.name: values for host, values in zip(hosts, stats, strict=True) if values}
        return PlainTextResponse(self._metrics.text(hosts, known), media_type="text/plain; version=0.0.4")

    async def openai_models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model", "created": self._started, "owned_by": "lmi-dist"} for name in self._served]
        return json_response({"object": "list", "data": models})

    async def invoke(self, request: Request) -> Response:
        """DJL's and SageMaker's routes to a model."""
        if request.method == "OPTIONS":
            return json_response({})
        properties = _properties(request)
        name = request.path_params.get("model") or request.query_params.get("model_name") or properties.get("model_name")
        version = request.path_params.get("version") or request.query_params.get("model_version") or properties.get("model_version")
        model = self._find(name, version)
        return await self._answer(request, model, properties, await self._body(request))

    async def openai(self, request: Request) -> Response:
        """OpenAI's routes: the body names the model."""
        properties = _properties(request)
        body = await self._body(request)
        name = await asyncio.to_thread(_model_name, body) if len(body) > INLINE_BYTES else _model_name(body)
        return await self._answer(request, self._find_openai(name), properties, body)

    async def _answer(self, request: Request, model: Served, properties: dict[str, str], body: bytes) -> Response:
        content = PairList((key, value.encode()) for key, value in request.query_params.multi_items())
        content.add("data", body)
        stream = model.host.open(properties, content)
        watcher = asyncio.create_task(_watch(request.receive, stream))
        piece = None
        try:
            piece = await stream.piece()
        finally:
            if piece is None or piece.is_last:
                watcher.cancel()
                stream.close()
        if not piece.is_last:
            return Streamed(piece, stream, watcher, self._metrics, timeout_s=self._server.chunked_read_timeout)
        if piece.code is not None and not piece.text:
            return refusal(request.scope, HttpError(piece.code, piece.error))
        return Response(piece.text, piece.code or 200, dict(piece.headers))

    async def _body(self, request: Request) -> bytes:
        """The whole body. Raises HttpError 413 above the limit."""
        limit, size, pieces = self._server.max_request_size, 0, []
        declared = request.headers.get("content-length", "")
        chunks = request.stream()
        if not (declared.isdecimal() and int(declared) > limit):
            async for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    break
                pieces.append(chunk)
            else:
                return b"".join(pieces)
        if request.headers.get("expect", "").lower() != "100-continue":  # else the client has not begun to send
            await _linger(chunks)
        raise HttpError(413, f"the body has more than max_request_size={limit} bytes; set SERVING_MAX_REQUEST_SIZE to allow more")

    def _find(self, name: str | None, version: str | None = None) -> Served:
        """The model of this name, or the only one (djl-contract 6.2)."""
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        if name is None:
            raise HttpError(400, "Parameter model_name is required.")
        model = self._served.get(name)
        if model is None or (version is not None and version != model.version):
            raise HttpError(404, f"Model or workflow not found: {name}")
        return model

    def _find_openai(self, name: str | None) -> Served:
        """The model of this name or model id. A body that names none, or cannot be read, goes to the only model, which says so."""
        if (name is None or name in PLACEHOLDERS) and len(self._served) == 1:
            return self._find(None)
        found = next((model for model in self._served.values() if name in (model.name, model.model_id)), None)
        if found is None:
            raise HttpError(404, f"model={name!r} does not exist; there is {', '.join(self._served)}")
        return found

    def _summary(self, model: Served) -> dict[str, str]:
        version = {"version": model.version} if model.version else {}
        status = MODEL_STATUS[model.host.state]
        return {"modelName": model.name, **version, "modelUrl": model.model_id, "status": status}

    async def _on_error(self, request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            self._metrics.client_gone()
        return refusal(request.scope, error)

    async def _on_http_exception(self, request: Request, error: Exception) -> Response:
        """Unknown routes and wrong methods."""
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"
        sentences = {
            404: f"{what}: there is no such route",
            405: f"{what}: this route takes {(error.headers or {}).get('Allow', '')}",
        }
        response = refusal(request.scope, HttpError(error.status_code, sentences.get(error.status_code, error.detail)))
        response.headers.update(error.headers or {})
        return response


def _properties(request: Request) -> dict[str, str]:
    """What a request's headers become (djl-contract 6.3). Raises HttpError for a header that would choose the handler."""
    properties = dict(request.headers)
    for pair in properties.pop(CUSTOM_ATTRIBUTES, "").split(";"):
        key, separator, value = pair.partition("=")
        if separator:
            properties[key.strip()] = value.strip()
    if any(key.lower() == "handler" for key in properties):
        raise HttpError(400, "The handler can't be overridden in a request")
    for key in [key for key in properties if key.lower() in PRIVATE]:
        del properties[key]
    path = request.scope["path"]
    route = "" if dialect_of_route(path) == "lmi" else path
    return {**properties, "requestId": request.scope["state"]["request_id"], "lmi_route": route}


def _model_name(body: bytes) -> str | None:
    """`model` of a body; None when it has none or is no JSON object, which is the worker's to say."""
    try:
        values = json.loads(body)
    except ValueError:
        return None
    name = values.get("model") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


async def _watch(receive: Receive, stream: Stream) -> None:
    """Interrupt the stream once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.interrupt(ClientGoneError("the client has closed its connection"))


async def _linger(chunks: AsyncIterator[bytes]) -> None:
    """Read and forget what a client is still sending, for a while: one that is cut off never sees the answer."""

    async def forget() -> None:
        async for _ in chunks:
            pass

    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
        await asyncio.wait_for(forget(), LINGER_S)
