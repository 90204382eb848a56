"""Keeps one model's worker alive: loads it, watches it, replaces it (djl-contract 1.14), and says truthfully how things stand.

A request never hangs on a worker that is gone or stuck: it ends with an error while the next worker is already on its way.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmi_dist import ConfigError, LmiError, OverloadedError
from lmi_dist_handler.group import Group, Stream, WorkerLostError
from lmi_dist_handler.launcher import Launch
from lmi_dist_handler.wire import PairList

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopped"]
Health = Literal["loading", "serving", "degraded", "restarting", "draining", "dead"]

FINAL_ERRORS = ("ConfigError", "CheckpointError", "MemoryPlanError")  # the model's fault: another try would say the same
MAX_START_FAILURES = 3
BACKOFF_S, MAX_BACKOFF_S = 0.25, 30.0
STABLE_S = 10.0  # a worker that was ready for this long starts the count of failures anew
WATCH_INTERVAL_S = 2.0
SILENT_S = 5.0  # a worker answers in milliseconds; one that takes this long is in trouble, one that takes predict_timeout is lost


class NotReadyError(LmiError):
    """The model cannot answer now."""

    code = 503


class LoadError(LmiError):
    """Loading the model failed, and would fail again."""

    def __init__(self, message: str, code: int = 424) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long a worker may take, and how much may be in flight."""

    loading_timeout_s: float = 240.0
    step_timeout_s: float = 120.0
    max_in_flight: int = 1256


class Turns:
    """Has models loaded one after the other, so that each plans with what those before it leave.

    The system hands a KV pool out page by page, so what of a plan is not in use yet still looks free; `turn` tells how much."""

    def __init__(self) -> None:
        self.hosts: set[Host] = set()
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self, host: "Host", *, is_first: bool) -> AsyncIterator[int]:
        """Wait for one's turn; gives the MiB that the other models' plans hold. A model that comes back is not made to wait."""
        async with self._lock if is_first else contextlib.nullcontext():
            yield sum(other.unused_bytes for other in self.hosts if other is not host) >> 20


class Host:
    """One model. `state` and `reason` may be read at any time."""

    def __init__(
        self,
        name: str,
        launch: Launch,
        properties: Mapping[str, str],
        *,
        limits: Limits | None = None,
        prepare: Callable[[], Awaitable[None]] | None = None,
        turns: Turns | None = None,
    ) -> None:
        """`prepare` runs once, before the first worker starts."""
        self.name = name
        self.state: State = "loading"
        self.reason = ""
        self.num_restarts = 0
        self._properties = dict(properties)
        self._limits = limits or Limits()
        self._launch = launch
        self._prepare = prepare
        self._turns = turns or Turns()
        self._turns.hosts.add(self)
        self._settled = asyncio.Event()
        self._grows_to_bytes = 0
        self.device = "cpu"  # that the worker's ranks run on, or cuda
        self.failure: LmiError | None = None  # why the model has failed for good
        self.started_at = 0.0  # of the worker, seconds since 1970
        self._was_ready = False
        self._asked_at: float | None = None  # since when the worker owes the answer to a look at it
        self._failing = ""
        self._group: Group | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def num_in_flight(self) -> int:
        return self._group.num_streams if self._group else 0

    @property
    def health(self) -> tuple[Health, str]:
        """How things stand, and why if they are not well. Degraded: requests are taken, but may well fail."""
        if self.state == "ready":
            trouble = self._trouble()
            return ("degraded" if trouble else "serving"), trouble
        health: dict[State, Health] = {"loading": "restarting" if self._was_ready else "loading", "failed": "dead"}
        return health.get(self.state, "draining"), self.reason

    def _trouble(self) -> str:
        silent_s = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        return f"the worker has not answered for {silent_s:.0f} s" if silent_s > SILENT_S else self._failing

    @property
    def was_ready(self) -> bool:
        """Requests have been answered, or could have been."""
        return self._was_ready

    @property
    def unused_bytes(self) -> int:
        """Memory that the plan gives to this model and that its worker has not taken yet."""
        return max(0, self._grows_to_bytes - self._group.resident_bytes) if self._group and self.state == "ready" else 0

    async def settled(self) -> None:
        """Wait until the model is ready, has failed for good or was stopped."""
        await self._settled.wait()

    @property
    def worker_pid(self) -> int | None:
        """That of rank 0."""
        return self._group.pids[0] if self._group and self._group.pids else None

    def start(self) -> "asyncio.Task[None]":
        """Begin to keep a worker alive. The task ends when the model has failed for good (`state`, `reason`) or was stopped."""
        self._task = asyncio.create_task(self._supervise())
        self._task.add_done_callback(lambda _: self._settled.set())
        return self._task

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give those in flight `drain_s` to end, then end the worker. One that has failed keeps its reason."""
        group, was_ready = self._group, self.state == "ready"
        if self.state != "failed":
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
        self._turns.hosts.discard(self)
        self._settled.set()
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
            self._group = group = Group(self.name, self._launch)
            ready_at = math.inf
            try:
                async with self._turns.turn(self, is_first=not self._was_ready) as promised_mb:
                    await self._load(group, promised_mb)
                self._enter("ready", "")
                self._was_ready, ready_at = True, time.monotonic()
                reason = await self._watch(group)
            except (LoadError, ConfigError) as error:
                self._fail(error)
                return
            except WorkerLostError as error:
                reason = str(error)
                if not self._was_ready and failures >= MAX_START_FAILURES - 1:
                    self._fail(LoadError(f"{reason}; given up after {MAX_START_FAILURES} tries", 500))
                    return
            finally:
                await group.kill()
            failures = 1 if time.monotonic() - ready_at > STABLE_S else failures + 1
            await self._back_off(reason, failures)

    async def _back_off(self, reason: str, failures: int) -> None:
        self.num_restarts += self.state == "ready"
        delay_s = min(BACKOFF_S * 2 ** (failures - 2), MAX_BACKOFF_S) if failures > 1 else 0.0  # the first may be bad luck
        logger.error("%s; next try in %g s", reason, delay_s)
        self._enter("loading", f"{reason}; it is being restarted")
        await asyncio.sleep(delay_s)

    async def _load(self, group: Group, promised_mb: int) -> None:
        """Start the worker and have it load the model beside `promised_mb` MiB of other models' plans. Raises LoadError for good,
        WorkerLostError for now."""
        if self._prepare is not None:
            prepare, self._prepare = self._prepare, None
            await prepare()
        started, self.started_at = time.monotonic(), time.time()
        await group.start()
        timeout_s = self._limits.loading_timeout_s
        try:
            reply = await group.load(self._beside(promised_mb), timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise LoadError(
                f"model {self.name} was not loaded within model_loading_timeout={timeout_s:g} s; set a larger one", 500
            ) from None
        if reply.code >= 300:
            is_final = reply.get_property("error_type") in FINAL_ERRORS
            raise LoadError(reply.message, reply.code) if is_final else WorkerLostError(reply.message)
        stats = await _first_stats(group)
        self._grows_to_bytes = group.resident_bytes + int(stats.get("lazy_bytes", 0))
        self.device = str(stats.get("device", "cpu"))
        logger.info("model %s is ready after %.1f s", self.name, time.monotonic() - started)

    def _beside(self, promised_mb: int) -> dict[str, str]:
        """The model's properties, with the memory that other models were promised added to what it must leave."""
        if not promised_mb:
            return self._properties
        own = int(self._properties.get("reserved_memory_mb", 0))
        return {**self._properties, "reserved_memory_mb": str(own + promised_mb)}

    async def _watch(self, group: Group) -> str:
        """Wait until the worker is of no use any more; returns the reason. A step past its deadline is one."""
        limit_s = self._limits.step_timeout_s
        self._failing, was_idle, num_seen, rest_s = "", True, group.num_opened, limit_s
        while not group.died.done():
            unseen_s = min(WATCH_INTERVAL_S, limit_s / 5, rest_s + 0.01)
            await asyncio.wait({group.died}, timeout=unseen_s)
            is_idle = group.num_streams == 0 and group.num_opened == num_seen
            if group.died.done() or (is_idle and was_idle):  # once more when it has become idle: how did its last steps end?
                continue
            was_idle, num_seen = is_idle, group.num_opened
            try:
                rest_s = await self._look_at(group, limit_s, unseen_s)
            except (TimeoutError, asyncio.TimeoutError):
                group.die(f"the worker of model {self.name} did not answer within predict_timeout={limit_s:g} s")
            except WorkerLostError as error:
                group.die(str(error))
        return group.died.result()

    async def _look_at(self, group: Group, limit_s: float, unseen_s: float) -> float:
        """Ask for the counters: is it stuck in a step, do its steps fail? Returns how long its step may still take.
        It was last seen `unseen_s` ago. Raises TimeoutError, WorkerLostError."""
        self._asked_at = time.monotonic()
        try:
            stats = await group.stats(limit_s - unseen_s)
        finally:
            self._asked_at = None
        rest_s = limit_s - float(stats["busy_s"])
        if rest_s < 0:
            group.die(f"the worker of model {self.name} was in one step for more than predict_timeout={limit_s:g} s")
        failed = stats.get("num_failed_in_a_row", 0)
        self._failing = f"the last {failed} steps failed, and with them the requests in them" if failed else ""
        return max(0.0, rest_s)

    def _fail(self, error: LmiError) -> None:
        self.failure = error
        self._enter("failed", str(error))

    def _enter(self, state: State, reason: str) -> None:
        if self.state != "stopped":
            self.state, self.reason = state, reason
        if state != "loading":
            self._settled.set()


async def _first_stats(group: Group) -> dict[str, Any]:
    """What a worker says once it has loaded: what its memory plan has beyond what it holds, for one; {} from a silent one."""
    try:
        return await group.stats(SILENT_S)
    except (TimeoutError, asyncio.TimeoutError):
        return {}
