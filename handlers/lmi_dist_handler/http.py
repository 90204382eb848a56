"""The HTTP routes of DJL Serving, SageMaker and OpenAI over a server's models (djl-contract 6). Knows no socket, no process.

The body decides what is asked for; the path decides the dialect of errors. Bodies go to the worker as they came.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from lmi_dist import LmiError, RequestError
from lmi_dist_handler import bodies, openapi, page
from lmi_dist_handler.formatter import TGI_ROUTES, dialect_of_route
from lmi_dist_handler.front import ClientGoneError, Front, HttpError, json_response, refusal
from lmi_dist_handler.group import Stream
from lmi_dist_handler.host import Health
from lmi_dist_handler.management import Management
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.registry import Registry, Served
from lmi_dist_handler.requests import MAX_INPUTS
from lmi_dist_handler.sagemaker import Runtime
from lmi_dist_handler.settings import ServerSettings
from lmi_dist_handler.streamed import Streamed
from lmi_dist_handler.wire import PairList

INLINE_BYTES = 256 * 1024  # of a body that is parsed in the loop's thread
BODY_BYTES_PER_S = 16 * 1024  # a body that comes slower than this ends with read_timeout
CUSTOM_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
FETCHED_LATER = "an answer that is fetched later (x-synchronous, x-starting-token)"
PING_STATUS: dict[Health, str] = {
    "loading": "PENDING", "serving": "Healthy", "degraded": "Unhealthy", "restarting": "Unhealthy", "draining": "Unhealthy",
    "dead": "FAILED",
}  # fmt: skip


PLACEHOLDERS = ("dummy", "tgi")  # what Hugging Face's clients write where a URL stands for the model
PRIVATE = ("request_tracking_id", "abort_tracking_id", "lmi_route", "requestid")  # properties that no client may set


class Api:
    """The routes. Each method is an endpoint or serves one."""

    def __init__(self, models: Registry, server: ServerSettings, metrics: Metrics) -> None:
        self._models = models
        self._server = server
        self._metrics = metrics
        self._started = int(time.time())

    def app(self) -> Front:
        handlers = {LmiError: self._on_error, HTTPException: self._on_http_exception, Exception: self._on_bug}
        app = Starlette(routes=self.routes(), exception_handlers=handlers)
        return Front(Runtime(app), self._metrics, self._server.api_key)

    def routes(self) -> list[Route]:
        """All of them; openapi.py says what they take."""
        post, get = ["POST"], ["GET"]
        return [
            Route("/", self.root, methods=get),
            Route("/status.json", self.status, methods=get),
            Route("/ping", self.ping, methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"]),
            Route("/invocations", self.invoke, methods=["POST", "OPTIONS"]),
            Route("/predictions/{model}", self.invoke, methods=post),
            Route("/predictions/{model}/{version}", self.invoke, methods=post),
            Route("/models/{model}/invoke", self.invoke, methods=post),
            *Management(self._models, self._server.drain_timeout).routes(),
            Route("/metrics", self.show_metrics, methods=get),
            Route("/openapi.json", self.openapi, methods=get),
            *(Route(path, self.invoke, methods=post) for path in TGI_ROUTES),
            Route("/health", self.ping, methods=get),
            Route("/info", self.tgi_info, methods=get),
            Route("/v1/models", self.openai_models, methods=get),
            Route("/v1/models/{model:path}", self.openai_model, methods=get),
            Route("/v1/completions", self.openai, methods=post),
            Route("/v1/chat/completions", self.openai, methods=post),
        ]

    async def root(self, request: Request) -> Response:
        """The page for a browser; else a few words of JSON."""
        if page.wants_page(request.headers.get("accept", "")):
            return page.page()
        models = {model.host.name: model.host.state for model in self._models.all()}
        return json_response(
            {"server": "lmi-dist", "models": models, "routes": ["/ping", "/invocations", "/v1/chat/completions", "/metrics"]}
        )

    async def status(self, request: Request) -> Response:
        """What the page shows, and why."""
        served = self._models.all()
        stats = await asyncio.gather(*(model.host.stats() for model in served))
        models = [
            page.model_status(model.name, model.host, model.model_id, model.options, values)
            for model, values in zip(served, stats, strict=True)
        ]
        uptime_s = round(time.time() - self._started)
        return json_response(
            {"server": "lmi-dist", "uptime_s": uptime_s, "models": models, "options": page.rows(self._server.table())}
        )

    async def ping(self, request: Request) -> Response:
        """Per model how it stands; 200 only if all of them take requests, 500 if one never will."""
        found = {model.host.name: model.host.health for model in self._models.all()}
        states = {found[model.host.name][0] for model in self._models.all() if model.counts}
        code = 500 if "dead" in states else 200 if states <= {"serving", "degraded"} else 503
        body = {
            name: {"status": PING_STATUS[health], **({"reason": reason} if reason else {})}
            for name, (health, reason) in found.items()
        }
        return json_response(body, code)

    async def show_metrics(self, request: Request) -> Response:
        hosts = [model.host for model in self._models.all()]
        stats = await asyncio.gather(*(host.stats() for host in hosts))
        known = {host.name: values for host, values in zip(hosts, stats, strict=True) if values}
        return PlainTextResponse(self._metrics.text(hosts, known), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """What the routes are and take, for tools."""
        return json_response(openapi.document())

    async def openai_models(self, request: Request) -> Response:
        names = dict.fromkeys(model.name for model in self._models.all())
        return json_response({"object": "list", "data": [self._openai_model(name) for name in names]})

    async def openai_model(self, request: Request) -> Response:
        return json_response(self._openai_model(self._models.find_openai(request.path_params["model"]).name))

    def _openai_model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "lmi-dist"}

    async def tgi_info(self, request: Request) -> Response:
        """Of what text-generation-inference tells about its model, that which is known without asking it."""
        model = self._models.find(request.query_params.get("model_name"))
        limits = {"max_concurrent_requests": model.queue_size, "max_client_batch_size": MAX_INPUTS}
        return json_response({"model_id": model.model_id, **limits, "router": "lmi-dist"})

    async def invoke(self, request: Request) -> Response:
        """DJL's and SageMaker's routes to a model."""
        if request.method == "OPTIONS":
            return json_response({})
        properties = _properties(request)
        name = request.path_params.get("model") or request.query_params.get("model_name") or properties.get("model_name")
        version = request.path_params.get("version") or request.query_params.get("model_version") or properties.get("model_version")
        kind = properties.get("content-type", "")
        body = await self._body(request) if name is None and bodies.is_form(kind) else None  # it may name the model
        if body is not None:
            name = await _parsed(_form_model_name, body, kind)
        model = self._models.find(name, version)
        return await self._answer(request, model, properties, await self._body(request) if body is None else body)

    async def openai(self, request: Request) -> Response:
        """OpenAI's routes: the body names the model."""
        properties = _properties(request)
        body = await self._body(request)
        return await self._answer(request, self._find_openai(await _parsed(_model_name, body)), properties, body)

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
        """The whole body. Raises HttpError 413 above the limit, 408 when it comes too slowly, ClientGoneError."""
        limit, size, pieces = self._server.max_request_size, 0, []
        declared = request.headers.get("content-length", "")
        chunks = request.stream()
        if not (declared.isdecimal() and int(declared) > limit):
            async for chunk in _in_time(chunks, self._server.read_timeout):
                size += len(chunk)
                if size > limit:
                    break
                pieces.append(chunk)
            else:
                return b"".join(pieces)
        raise HttpError(413, f"the body has more than max_request_size={limit} bytes; set SERVING_MAX_REQUEST_SIZE to allow more")

    def _find_openai(self, name: str | None) -> Served:
        """The model of this name or model id. A body that names none, or cannot be read, goes to the only model, which says so."""
        is_unnamed = name is None or name in PLACEHOLDERS
        return self._models.find(None) if is_unnamed and len(self._models.all()) == 1 else self._models.find_openai(name)

    async def _on_error(self, request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            self._metrics.client_gone()
        return refusal(request.scope, error)

    async def _on_bug(self, request: Request, error: Exception) -> Response:
        """What nobody raised on purpose; its traceback goes to the log, not to the client."""
        return refusal(request.scope, HttpError(500, f"internal error: {type(error).__name__}; see the server's log"))

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
    """What a request's headers become (djl-contract 6.3). Raises HttpError for a header that would change what is done with
    the body."""
    properties = dict(request.headers)
    for pair in properties.pop(CUSTOM_ATTRIBUTES, "").split(";"):
        key, separator, value = pair.partition("=")
        if separator:
            properties[key.strip()] = value.strip()
    given = {key.lower(): value for key, value in properties.items()}
    if "handler" in given:
        raise HttpError(400, "The handler can't be overridden in a request")
    if given.get("x-synchronous", "true").lower() != "true" or "x-starting-token" in given:
        raise HttpError(400, f"{FETCHED_LATER} is known but not built yet; leave the header out")
    if given.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, f"content-encoding={given['content-encoding']!r} is not taken; send the body as it is")
    for key in [key for key in properties if key.lower() in PRIVATE]:
        del properties[key]
    path = request.scope["path"]
    route = "" if dialect_of_route(path) == "lmi" else path
    return {**properties, "requestId": request.scope["state"]["request_id"], "lmi_route": route}


async def _parsed(find: Callable[..., str | None], body: bytes, *more: str) -> str | None:
    """What `find` finds in a body, away from the loop's thread if the body is large."""
    return await asyncio.to_thread(find, body, *more) if len(body) > INLINE_BYTES else find(body, *more)


def _form_model_name(body: bytes, content_type: str) -> str | None:
    """The field `model_name` of a form; None when it has none or cannot be read, which is the worker's to say."""
    try:
        return bodies.form_fields(body, content_type).get("model_name")
    except RequestError:
        return None


def _model_name(body: bytes) -> str | None:
    """`model` of a body; None when it has none or is no JSON object, which is the worker's to say."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = values.get("model") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None


async def _watch(receive: Receive, stream: Stream) -> None:
    """Interrupt the stream once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.interrupt(ClientGoneError("the client has closed its connection"))


async def _in_time(chunks: AsyncIterator[bytes], timeout_s: float) -> AsyncIterator[bytes]:
    """The chunks. Raises HttpError when they are late: after timeout_s, and a second more for each BODY_BYTES_PER_S that came."""
    started, size = time.monotonic(), 0
    while True:
        rest_s = started + timeout_s + size / BODY_BYTES_PER_S - time.monotonic()
        try:
            chunk = await asyncio.wait_for(anext(chunks), max(0.0, rest_s))
        except StopAsyncIteration:
            return
        except ClientDisconnect:
            raise ClientGoneError("the client has closed its connection before its body's end") from None
        except (TimeoutError, asyncio.TimeoutError):
            raise HttpError(
                408,
                f"{size} bytes of the body have come within read_timeout={timeout_s:g} s; send it faster than "
                f"{BODY_BYTES_PER_S} bytes a second",
            ) from None
        size += len(chunk)
        yield chunk
