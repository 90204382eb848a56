"""DJL's management routes over a registry: list, describe, register, scale and unregister models (djl-contract 6.8)."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lmi_dist import ConfigError, LmiError
from lmi_dist_handler.formatter import JAVA_TYPES
from lmi_dist_handler.front import HttpError, json_response
from lmi_dist_handler.registry import Registry, Served
from lmi_dist_handler.settle import unknown_parameter
from lmi_dist_handler.words import Word

MODEL_STATUS = {"loading": "PENDING", "ready": "READY", "failed": "FAILED", "stopped": "PENDING"}
MAX_LIMIT = 100  # models a page
TYPES = {**JAVA_TYPES, 409: "IllegalArgumentException", 507: "WlmOutOfMemoryException"}
CODES = {424: 400}  # what a checkpoint or an option has wrong is the caller's here
SWITCH = {"true": True, "false": False}

Endpoint = Callable[[Request], Awaitable[Response]]


class Management:
    """The routes. Those below are endpoints or serve one."""

    def __init__(self, registry: Registry, drain_s: float) -> None:
        self._registry = registry
        self._drain_s = drain_s

    def routes(self) -> list[Route]:
        one: dict[str, Endpoint] = {"GET": self.describe, "PUT": self.scale, "DELETE": self.unregister}
        return [
            Route("/models", _by_method({"GET": self.list_models, "POST": self.register}), methods=["GET", "POST"]),
            Route("/models/{model}", _by_method(one), methods=list(one)),
            Route("/models/{model}/{version}", _by_method(one), methods=list(one)),
        ]

    async def list_models(self, request: Request) -> Response:
        """A page of the models, and where the next one begins."""
        given = _parameters(request, ("limit", "next_page_token"))
        limit = _integer(given, "limit", MAX_LIMIT, 1, MAX_LIMIT)
        first = _integer(given, "next_page_token", 0, 0)
        models = self._registry.all()
        token = {"nextPageToken": str(first + limit)} if first + limit < len(models) else {}
        return json_response({"models": [summary(model) for model in models[first : first + limit]], **token})

    async def describe(self, request: Request) -> Response:
        found = self._registry.versions(request.path_params["model"], request.path_params.get("version"))
        return json_response([_description(model) for model in found])

    async def register(self, request: Request) -> Response:
        given = dict(request.query_params)
        wait = _switch(given, "synchronous", True)
        model = await self._registry.register(given, wait=wait)
        if wait:
            return json_response({"status": f'Model "{model.name}" registered.'})
        return json_response({"status": f'Model "{model.name}" registration scheduled.'}, 202)

    async def scale(self, request: Request) -> Response:
        """One worker is what a model has; to be told so again changes nothing."""
        name = self._registry.versions(request.path_params["model"], request.path_params.get("version"))[0].name
        given = _parameters(request, ("min_worker", "max_worker", "synchronous"))
        _switch(given, "synchronous", True)
        for parameter in ("min_worker", "max_worker"):
            if given.get(parameter, "1") != "1":
                raise ConfigError(f"{parameter}={given[parameter]!r} is known but not built yet; a model has one worker, write 1")
        told = f'Model "{name}" worker scaled. New Worker configuration min workers:1 max workers:1'
        return json_response({"status": told})

    async def unregister(self, request: Request) -> Response:
        name = request.path_params["model"]
        await self._registry.unregister(name, request.path_params.get("version"), self._drain_s)
        return json_response({"status": f'Model or workflow "{name}" unregistered'})


def summary(model: Served) -> dict[str, str]:
    """A model in a list."""
    version = {"version": model.version} if model.version else {}
    return {"modelName": model.name, **version, "modelUrl": model.model_id, "status": MODEL_STATUS[model.host.state]}


def _description(model: Served) -> dict[str, Any]:
    """All that DJL tells of a model; `reason` is ours."""
    host = model.host
    version = {"version": model.version} if model.version else {}
    started = datetime.fromtimestamp(host.started_at, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    workers = [{"id": host.worker_pid, "startTime": started, "status": MODEL_STATUS[host.state]}] if host.worker_pid else []
    device = {"deviceType": "gpu", "deviceId": 0} if host.device == "cuda" else {"deviceType": "cpu", "deviceId": -1}
    group = {"device": device, "minWorkers": 1, "maxWorkers": 1, "workers": workers}
    details = {
        "modelName": model.name,
        "modelUrl": model.model_id,
        "batchSize": 1,
        "maxBatchDelayMillis": 0,
        "maxIdleSeconds": 0,
        "queueSize": model.queue_size,
        "requestInQueue": host.num_in_flight,
        "status": MODEL_STATUS[host.state],
        "loadedAtStartup": model.at_startup,
        "workerGroups": [group],
        **({"reason": host.reason} if host.reason else {}),
    }
    return {"workflowName": model.name, **version, "models": [details]}


def _by_method(endpoints: Mapping[str, Endpoint]) -> Endpoint:
    """One endpoint for a path: so a wrong method is told all the right ones. Refusals are the host's, in its words."""

    async def endpoint(request: Request) -> Response:
        try:
            return await endpoints["GET" if request.method == "HEAD" else request.method](request)
        except LmiError as error:
            code = CODES.get(error.code, error.code)
            told = {"code": code, "type": TYPES.get(code, "InternalServerException"), "message": str(error)}
            return json_response(told, code)

    return endpoint


def _parameters(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    given = dict(request.query_params)
    for name, value in given.items():
        if name not in known:
            raise unknown_parameter(Word(value, request.method, name), known)
    return given


def _integer(given: Mapping[str, str], name: str, default: int, least: int, most: int | None = None) -> int:
    text = given.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or not least <= int(text) <= (most or int(text)):
        raise HttpError(400, f"{name}={text!r} must be an integer of at least {least}" + (f" and at most {most}" if most else ""))
    return int(text)


def _switch(given: Mapping[str, str], name: str, default: bool) -> bool:
    text = given.get(name, str(default)).lower()
    if text not in SWITCH:
        raise HttpError(400, f"{name}={given[name]!r} must be true or false")
    return SWITCH[text]
