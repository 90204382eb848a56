"""Keeps one model's worker alive: loads it, watches it, replaces it (djl-contract 1.14), and says truthfully how things stand.

A request never hangs on a worker that is gone or stuck: it ends with an error while the next worker is already on its way.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmi_dist import ConfigError, LmiError, OverloadedError
from lmi_dist_handler.group import Group, Stream, WorkerLostError
from lmi_dist_handler.wire import PairList

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopped"]

FINAL_ERRORS = ("ConfigError", "CheckpointError", "MemoryPlanError")  # the model's fault: another try would say the same
MAX_START_FAILURES = 3
BACKOFF_S, MAX_BACKOFF_S = 0.25, 30.0
STABLE_S = 60.0  # a worker that lived this long starts the count of failures anew
WATCH_INTERVAL_S = 2.0


class NotReadyError(LmiError):
    """The model cannot answer now."""

    code = 503


class LoadError(LmiError):
    """Loading the model failed, and would fail again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a worker may take, and how much may be in flight."""

    loading_timeout_s: float = 240.0
    step_timeout_s: float = 120.0
    max_in_flight: int = 1256


class Host:
    """One model. `state` and `reason` may be read at any time."""

    def __init__(
        self,
        name: str,
        model_dir: Path | None,
        properties: Mapping[str, str],
        *,
        limits: Limits | None = None,
        entry_point: str = "lmi_dist_handler",
    ) -> None:
        self.name = name
        self.model_dir = model_dir
        self.state: State = "loading"
        self.reason = ""
        self.num_restarts = 0
        self._properties = dict(properties)
        self._limits = limits or Limits()
        self._entry_point = entry_point
        self._was_ready = False
        self._group: Group | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def num_in_flight(self) -> int:
        return self._group.num_streams if self._group else 0

    @property
    def worker_pid(self) -> int | None:
        return self._group.pid if self._group else None

    def start(self) -> "asyncio.Task[None]":
        """Begin to keep a worker alive. The task ends when the model has failed for good (`state`, `reason`) or was stopped."""
        self._task = asyncio.create_task(self._supervise())
        return self._task

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give those in flight `drain_s` to end, then end the worker."""
        group, was_ready = self._group, self.state == "ready"
        self.state, self.reason = "stopped", "the server is being stopped"
        try:
            if group is not None and was_ready and drain_s > 0:
                await group.call("drain", {}, drain_s)
        except (TimeoutError, asyncio.TimeoutError):
            logger.warning("model %s: %d requests did not end within %g s", self.name, group.num_streams if group else 0, drain_s)
        except WorkerLostError as error:
            logger.warning("%s", error)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._group is not None:
            await self._group.kill()  # in case the task was just doing that

    def open(self, properties: Mapping[str, str], content: PairList) -> Stream:
        """Send a request to the worker. Raises NotReadyError, OverloadedError."""
        if self.state != "ready" or self._group is None:
            raise NotReadyError(f"model {self.name} is not ready: {self.reason or 'it is still loading'}")
        if self._group.num_streams >= self._limits.max_in_flight:
            raise OverloadedError(f"Worker queue capacity exceeded for model: {self.name}")
        return self._group.open(properties, content)

    async def stats(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Counters of the engine; empty while there is no worker that answers."""
        if self.state != "ready" or self._group is None:
            return {}
        try:
            return await self._group.stats(timeout_s)
        except (TimeoutError, asyncio.TimeoutError, WorkerLostError) as error:
            logger.warning("model %s: no counters: %s", self.name, error or "the worker took too long")
            return {}

    async def _supervise(self) -> None:
        failures = 0
        while True:
            self._group = group = Group(self.name, self.model_dir, self._entry_point)
            started = time.monotonic()
            try:
                await self._load(group)
                self._enter("ready", "")
                self._was_ready = True
                reason = await self._watch(group)
            except (LoadError, ConfigError) as error:
                self._enter("failed", str(error))
                return
            except WorkerLostError as error:
                reason = str(error)
                if not self._was_ready and failures >= MAX_START_FAILURES - 1:
                    self._enter("failed", f"{reason}; given up after {MAX_START_FAILURES} tries")
                    return
            finally:
                await group.kill()
            failures = 1 if time.monotonic() - started > STABLE_S else failures + 1
            await self._back_off(reason, failures)

    async def _back_off(self, reason: str, failures: int) -> None:
        self.num_restarts += self.state == "ready"
        delay_s = min(BACKOFF_S * 2 ** (failures - 1), MAX_BACKOFF_S)
        logger.error("%s; next try in %g s", reason, delay_s)
        self._enter("loading", f"{reason}; it is being restarted")
        await asyncio.sleep(delay_s)

    async def _load(self, group: Group) -> None:
        """Start the worker and have it load the model. Raises LoadError for good, WorkerLostError for now."""
        started = time.monotonic()
        await group.start()
        timeout_s = self._limits.loading_timeout_s
        try:
            reply = await group.call("handle", self._properties, timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise LoadError(
                f"model {self.name} was not loaded within model_loading_timeout={timeout_s:g} s; set a larger one"
            ) from None
        if reply.code >= 300:
            is_final = reply.get_property("error_type") in FINAL_ERRORS
            raise LoadError(reply.message) if is_final else WorkerLostError(reply.message)
        logger.info("model %s is ready after %.1f s", self.name, time.monotonic() - started)

    async def _watch(self, group: Group) -> str:
        """Wait until the worker is of no use any more; returns the reason. A step past its deadline is one."""
        limit_s = self._limits.step_timeout_s
        while not group.died.done():
            await asyncio.wait({group.died}, timeout=min(WATCH_INTERVAL_S, limit_s / 2))
            if group.died.done() or group.num_streams == 0:
                continue
            try:
                if (await group.stats(limit_s))["busy_s"] > limit_s:
                    group.die(f"the worker of model {self.name} was in one step for more than predict_timeout={limit_s:g} s")
            except (TimeoutError, asyncio.TimeoutError):
                group.die(f"the worker of model {self.name} did not answer within predict_timeout={limit_s:g} s")
            except WorkerLostError as error:
                group.die(str(error))
        return group.died.result()

    def _enter(self, state: State, reason: str) -> None:
        if self.state != "stopped":
            self.state, self.reason = state, reason
