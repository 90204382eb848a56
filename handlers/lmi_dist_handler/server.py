"""`lmi-dist serve`: one port, one host per model, until a signal or until a model cannot be loaded."""

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import signal
import socket
from collections.abc import Iterator
from typing import cast

import uvicorn

from lmi_dist import ConfigError
from lmi_dist_handler.connection import connections
from lmi_dist_handler.front import MAX_HEADER_BYTES
from lmi_dist_handler.host import Host
from lmi_dist_handler.http import Api
from lmi_dist_handler.metrics import Metrics
from lmi_dist_handler.properties import Settings
from lmi_dist_handler.registry import Registry, of_settings
from lmi_dist_handler.settings import ServerSettings

logger = logging.getLogger(__name__)

FLUSH_S = 5  # what answers get to leave once they are written
MAX_FILES = 65536  # open at most, where the system allows it: each client is one
FAILED_GRACE_S = 3.0  # how long /ping still tells that a model failed, before the server ends
BACKLOG = 2048


def serve(settings: Settings) -> str | None:
    """Serve until SIGTERM or SIGINT. Returns None, or the sentence for which a model could not be loaded.
    Raises ConfigError when the port cannot be had."""
    _allow_files()
    gc.freeze()  # what is imported stays: looking through it for garbage, again and again, took a tenth of a stream's time
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
        self._models = of_settings(settings)
        self._drain_s = settings.server.drain_timeout
        self._uvicorn = _Uvicorn(_uvicorn_config(self._models, settings.server))
        self._ending: asyncio.Task[None] | None = None
        self._failure: str | None = None

    async def run(self) -> str | None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._on_signal, name)
        host, port = self._listener.getsockname()[:2]
        hosts = [model.host for model in self._models.all()]
        names = ", ".join(host.name for host in hosts) or "no model: POST /models registers one"
        logger.info("listening on http://%s:%d, loading %s", f"[{host}]" if ":" in host else host, port, names)
        minders = [asyncio.create_task(self._mind(host)) for host in hosts]
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
            if not self._uvicorn.force_exit:
                self._ending.cancel()
            self._drain_s, self._uvicorn.force_exit = 0, True
            return
        logger.info("%s: no new requests; those in flight have drain_timeout=%d s", name.name, self._drain_s)
        self._end()

    def _end(self) -> None:
        self._ending = self._ending or asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        """First the models, while the port goes on telling that no more requests are taken; then the port."""
        try:
            await self._stop_hosts()
        except asyncio.CancelledError:  # a second signal
            await self._stop_hosts()
        self._uvicorn.should_exit = True

    async def _stop_hosts(self) -> None:
        await self._models.stop(self._drain_s)


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _uvicorn_config(models: Registry, server: ServerSettings) -> uvicorn.Config:
    metrics = Metrics()
    protocol = connections(metrics, read_timeout_s=server.read_timeout, write_timeout_s=server.write_timeout)
    return uvicorn.Config(
        Api(models, server, metrics).app(),
        http=cast("type[asyncio.Protocol]", protocol),  # uvicorn only calls it
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,  # Front writes it
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=FLUSH_S,  # the models have ended their requests by then
    )
