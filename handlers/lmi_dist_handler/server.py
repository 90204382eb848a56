"""`lmi-dist serve`: one port, one host per model, until a signal or until a model cannot be loaded."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from lmi_dist import ConfigError
from lmi_dist_handler.front import Front
from lmi_dist_handler.host import Host, Limits
from lmi_dist_handler.http import Api, Served
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.properties import ModelSettings, ServerSettings, Settings

logger = logging.getLogger(__name__)

DRAIN_S = 5.0  # what requests in flight get after a signal
FAILED_GRACE_S = 1.0  # how long /ping still tells that a model failed, before the server ends
BACKLOG = 2048


def serve(settings: Settings) -> str | None:
    """Serve until SIGTERM or SIGINT. Returns None, or the sentence for which a model could not be loaded.
    Raises ConfigError when the port cannot be had."""
    listener = bind(settings.server)
    return asyncio.run(_Server(settings, listener).run())


def bind(server: ServerSettings) -> socket.socket:
    """A listening socket on the server's address. Raises ConfigError that names it and the way out."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
        raise ConfigError(f"port={server.port} on host={server.host} {what}; choose another with SERVING_PORT or --port") from None
    return listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: ours end the models too, and a clean end is exit status 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server:
    """One life of the process."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._listener = listener
        served = [_served(model, settings.server) for model in settings.models]
        self._hosts = [model.host for model in served]
        self._uvicorn = _Uvicorn(_uvicorn_config(Api(served, settings.server, Metrics()).app()))
        self._ending: asyncio.Task[None] | None = None
        self._failure: str | None = None

    async def run(self) -> str | None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._on_signal, name)
        host, port = self._listener.getsockname()[:2]
        names = ", ".join(host.name for host in self._hosts)
        logger.info("listening on http://%s:%d, loading %s", f"[{host}]" if ":" in host else host, port, names)
        minders = [asyncio.create_task(self._mind(host)) for host in self._hosts]
        await self._uvicorn.serve(sockets=[self._listener])
        await asyncio.gather(*minders, *([self._ending] if self._ending else []))
        return self._failure

    async def _mind(self, host: Host) -> None:
        """Keep a host going. One that has failed for good ends the server, after a moment in which it can be asked why."""
        with contextlib.suppress(asyncio.CancelledError):  # it was stopped
            await host.start()
        if host.state == "failed":
            logger.error("model %s cannot be loaded: %s", host.name, host.reason)
            self._failure = self._failure or host.reason
            await asyncio.sleep(FAILED_GRACE_S)
            self._end()

    def _on_signal(self, name: signal.Signals) -> None:
        if self._ending is not None:
            logger.warning("%s again: not waiting any longer", name.name)
            self._uvicorn.force_exit = True
            return
        logger.info("%s: no new requests; those in flight have %g s", name.name, DRAIN_S)
        self._end()

    def _end(self) -> None:
        self._uvicorn.should_exit = True
        self._ending = self._ending or asyncio.create_task(self._stop_hosts())

    async def _stop_hosts(self) -> None:
        await asyncio.gather(*(host.stop(DRAIN_S) for host in self._hosts))


def _served(model: ModelSettings, server: ServerSettings) -> Served:
    config = model.engine_config()
    limits = Limits(
        loading_timeout_s=server.model_loading_timeout,
        step_timeout_s=server.predict_timeout,
        max_in_flight=server.job_queue_size + config.max_batch_size,
    )
    return Served(
        Host(model.name, model.folder, model.init_properties(), limits=limits), model.version, config.model, tuple(model.table())
    )


def _uvicorn_config(app: Front) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,  # Front writes it
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(DRAIN_S) + 5,  # hosts end their requests by themselves within DRAIN_S
    )
