"""The models of one server, by name and version: those of the start, and those that come and go by the management routes.

Each has its own worker group and options. They load one after the other (`Turns`): each plans with what those before it leave.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from lmi_dist import LmiError
from lmi_dist_handler import packages
from lmi_dist_handler.front import HttpError
from lmi_dist_handler.host import Host, Limits, Turns
from lmi_dist_handler.launcher import Launch
from lmi_dist_handler.properties import Settings
from lmi_dist_handler.settings import ModelSettings, ServerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A model as clients see it. `host.name` also has the version, to tell versions apart in metrics and logs."""

    host: Host
    version: str
    model_id: str
    options: tuple[tuple[str, str, str], ...] = ()  # option, value in use, origin
    at_startup: bool = True
    queue_size: int = 1000

    @property
    def name(self) -> str:
        return self.host.name.removesuffix(f":{self.version}")

    @property
    def counts(self) -> bool:
        """Whether the server as a whole answers for it: one that was registered and has never been ready harms nobody else."""
        return self.at_startup or self.host.was_ready


Build = Callable[[Mapping[str, str]], Served]  # a model, not yet started, from the parameters of POST /models


class Registry:
    """All methods belong to the event loop's thread."""

    def __init__(self, served: Iterable[Served], build: Build) -> None:
        self._served = {(model.name, model.version): model for model in served}
        self._build = build
        self._leaving: set[Host] = set()
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    def all(self) -> list[Served]:
        """In the order in which they came."""
        return list(self._served.values())

    def find(self, name: str | None, version: str | None = None) -> Served:
        """The model of this name, or the only one (djl-contract 6.2); without a version one that is ready goes first.
        Raises HttpError."""
        if name is None:
            started = [model for model in self.all() if model.at_startup]
            names = {model.name for model in started or self.all() if model.counts}
            if len(names) != 1:
                raise HttpError(400, "Parameter model_name is required.")
            name = names.pop()
        found = self.versions(name, version)
        return next((model for model in found if model.host.state == "ready"), found[0])

    def find_openai(self, name: str | None) -> Served:
        """The model of this name or model id, as OpenAI's bodies give it. Raises HttpError."""
        found = [model for model in self.all() if name in (model.name, model.model_id)]
        if not found:
            there = ", ".join(dict.fromkeys(model.name for model in self.all()))
            raise HttpError(404, f"model={name!r} does not exist; there is {there or 'none'}")
        return next((model for model in found if model.host.state == "ready"), found[0])

    def versions(self, name: str, version: str | None = None) -> list[Served]:
        """All versions of a model, or the one. Raises HttpError when there is none."""
        found = [model for model in self.all() if model.name == name and version in (None, model.version)]
        if not found:
            raise HttpError(404, f"Model or workflow not found: {name}")
        return found

    async def register(self, parameters: Mapping[str, str], *, wait: bool) -> Served:
        """Begin to load a model; with `wait` until it is ready. One that fails then is gone again, and nothing else has changed.
        Raises ConfigError, HttpError 409 for a name that is taken, LoadError."""
        if self._is_stopping:
            raise HttpError(503, "the server is being stopped")
        model = self._build(parameters)
        key = (model.name, model.version)
        if key in self._served and self._served[key].host.state != "failed":
            raise HttpError(409, f"Model {model.host.name} is already registered.")
        self._served[key] = model
        logger.info("model %s was registered: %s", model.host.name, model.model_id)
        task = asyncio.create_task(self._mind(model))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if wait:
            await self._until_ready(model)
        return model

    async def unregister(self, name: str, version: str | None, drain_s: float) -> None:
        """Take a model's requests no more, give those that run `drain_s` to end, then end its workers. Raises HttpError."""
        found = self.versions(name, version)
        for model in found:
            del self._served[model.name, model.version]
        hosts = {model.host for model in found}
        self._leaving |= hosts
        try:
            await asyncio.gather(*(host.stop(drain_s) for host in hosts))
        finally:
            self._leaving -= hosts
        logger.info("model %s was unregistered", name)

    async def stop(self, drain_s: float) -> None:
        """End all models, also those that are just leaving. No new one is taken."""
        self._is_stopping = True
        hosts = {model.host for model in self.all()} | self._leaving
        await asyncio.gather(*(host.stop(drain_s) for host in hosts))

    async def _mind(self, model: Served) -> None:
        """Keep a registered model going. Its failure is its own: the server goes on."""
        await asyncio.wait({model.host.start()})
        if model.host.state == "failed":
            logger.error("model %s cannot be loaded: %s", model.host.name, model.host.reason)

    async def _until_ready(self, model: Served) -> None:
        await model.host.settled()
        if model.host.state == "ready":
            return
        if self._served.get((model.name, model.version)) is model:
            del self._served[model.name, model.version]
        await model.host.stop()
        failure: LmiError | None = model.host.failure
        raise failure or HttpError(503, f"model {model.host.name} was unregistered or stopped while it was loading")


def of_settings(settings: Settings) -> Registry:
    """The registry of a server, its start-up models in it and not yet started."""
    turns = Turns()
    started = [serve_model(model, settings.server, turns) for model in settings.models]
    return Registry(started, lambda given: serve_model(settings.register(given), settings.server, turns, at_startup=False))


def serve_model(model: ModelSettings, server: ServerSettings, turns: Turns, *, at_startup: bool = True) -> Served:
    """One model with its host, not yet started."""
    config = model.engine_config()
    limits = Limits(
        loading_timeout_s=model.worker.model_loading_timeout,
        step_timeout_s=model.worker.predict_timeout,
        max_in_flight=model.worker.job_queue_size + config.max_batch_size,
    )
    launch = Launch(
        model_dir=model.folder,
        num_ranks=config.tensor_parallel_degree,
        is_mpi=model.engine == "MPI" or config.tensor_parallel_degree > 1,
        environment=model.environment,
    )
    host = Host(
        f"{model.name}:{model.version}" if model.version else model.name,
        launch,
        model.init_properties(),
        limits=limits,
        prepare=_preparation(model, server),
        turns=turns,
    )
    return Served(host, model.version, config.model, tuple(model.table()), at_startup, model.worker.job_queue_size)


def _preparation(model: ModelSettings, server: ServerSettings) -> Callable[[], Awaitable[None]] | None:
    """What must be done before the model's first worker starts."""
    requirements = packages.requirements_of(model.folder)
    if requirements is None:
        return None
    if not server.install_requirements:
        logger.warning("%s is not installed; SERVING_INSTALL_REQUIREMENTS=true has pip do so before the model loads", requirements)
        return None
    timeout_s = float(model.worker.model_loading_timeout)
    return functools.partial(packages.install, requirements, offline=server.offline, timeout_s=timeout_s)
