"""DJL's entry point (`option.entryPoint=lmi_dist_handler`): `handle`, and what our own host asks for beside it.

A host calls these functions by name in every request, so what they share lies in this module. `djl_python` is imported here only,
and only when its Input comes in.
"""

import asyncio
import contextlib
import gc
import importlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmi_dist import LmiError
from lmi_dist_handler.background import Background, end_with_parent
from lmi_dist_handler.dialects import OURS, LmiDialect, dialect_of
from lmi_dist_handler.formatter import UnavailableError
from lmi_dist_handler.logs import defuse
from lmi_dist_handler.wire import Input, Output

if TYPE_CHECKING:
    from lmi_dist_handler.served import Answer, Served
    from lmi_dist_handler.settings import HandlerConfig

logger = logging.getLogger(__name__)


class Host(NamedTuple):
    """Who calls us: DJL, with its class for replies, or our own worker."""

    output_type: Any
    dialect: LmiDialect
    version: str = ""  # of DJL

    @property
    def is_djl(self) -> bool:
        return self.output_type is not Output


_host = Host(Output, OURS)  # until the first request tells
_served: "Served | None" = None  # once the model is loaded
_failure = "the model is not loaded yet"  # why there is none
_background: Background | None = None  # for hosts that call without a loop


def handle(inputs: Input) -> Any | Coroutine[Any, Any, Any]:
    """Without content: load the model that the properties describe; None, or a reply with code and the full sentence.
    With content: the reply, or the frames that answer one request. To be awaited where a loop runs, as it does in async mode."""
    global _background
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        _background = _background or Background()
        return _of_host(_background.run(_handle(inputs, is_async=False)), _background)
    return _handle_async(inputs)


async def abort(inputs: Input) -> Output:
    """End the request whose tracking id is the property `abort_tracking_id`; what it holds is freed before the next step."""
    tracking_id = inputs.get_property("abort_tracking_id")
    return Output().add({"aborted": _served is not None and _served.abort(tracking_id)})


async def stats(inputs: Input) -> Output:
    """Counters of the engine as JSON."""
    return Output().add({} if _served is None else _served.stats())


async def drain(inputs: Input) -> Output:
    """Refuse new requests; replies once the running ones have ended."""
    if _served is not None:
        await _served.drain()
    return Output()


async def _handle_async(inputs: Input) -> Any:
    return _of_host(await _handle(inputs, is_async=True), None)


async def _handle(inputs: Input, *, is_async: bool) -> "Answer | None":
    if inputs.is_empty():
        return None if _served else await _load(inputs, is_async=is_async)
    if _served is None:
        raise UnavailableError(_failure)
    return await _served.answer(inputs, is_async=is_async)


async def _load(inputs: Input, *, is_async: bool) -> Output | None:
    """None, or the reply with what went wrong; later requests are told the same."""
    global _host, _served, _failure
    from lmi_dist_handler import properties  # the host's process imports this package too, and must not load the engine

    given = inputs.get_properties()
    try:
        with _for_good():
            _host = _found_host(inputs, is_async=is_async)
            config = await asyncio.to_thread(lambda: properties.from_init(given, dialect=_host.dialect))
            _served = await _start(given, config)
    except Exception as error:  # the host shows the sentence; of what we did not raise on purpose the traceback stays here
        logger.error("the model could not be loaded: %s", error, exc_info=not isinstance(error, LmiError))
        _failure = f"the model could not be loaded: {error}"
        return _load_failure(error)
    return None


async def _start(given: Mapping[str, Any], config: "HandlerConfig") -> "Served":
    """This process's part in serving the model: alone, as one of the ranks that share it, or in front of them."""
    from lmi_dist import Engine, FollowerLink, Ranks, connect
    from lmi_dist_handler import forwarding, model_py, ranks, served, streaming

    degree = config.engine.tensor_parallel_degree
    is_alone = Ranks.of_environment().size == 1 and str(given.get("mpi_mode", "false")).lower() != "true"
    if _host.is_djl and is_alone and degree > 1:
        front = forwarding.Forwarding(config)
        await front.start(given, _host.version)
        return front
    link = await asyncio.to_thread(connect, degree)
    if isinstance(link, FollowerLink):
        follower = ranks.Following(link)
        await follower.start()
        return follower
    folder = Path(given.get("model_dir") or ".")
    own = model_py.given(given) if _host.is_djl else model_py.load(folder, config.allow_model_py)
    thread = streaming.EngineThread(lambda: Engine(config.engine, link))
    streams = streaming.Streams(thread, await thread.start(), config, own)
    leading = served.Leading(streams, config, merges=int(given.get("batch_size", 1)) > 1)
    asks_all = _host.dialect.asks_all_ranks or str(given.get("use_passive_workers", "true")).lower() == "false"
    if _host.is_djl and asks_all and link.ranks.size > 1:
        return ranks.Sharing(leading, link, config.dialect.failure)
    return leading


@contextlib.contextmanager
def _for_good() -> Iterator[None]:
    """What is loaded in here stays. So Python need not look through it for garbage, neither meanwhile (an eighth of the time that
    the imports take) nor ever after."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _load_failure(error: Exception) -> Output:
    """507 for want of memory, so that DJL says so; `error_type` tells our host whether another try makes sense."""
    code = error.code if isinstance(error, LmiError) else 507 if isinstance(error, MemoryError) else 424
    output = Output().error(str(error), code=code, message=str(error))
    return output.add_property("error_type", type(error).__name__)


def _found_host(inputs: Input, *, is_async: bool) -> Host:
    """Who it is that has sent this (dialects.py says how a version is found out)."""
    if isinstance(inputs, Input):
        version = inputs.get_property("djl_version") or ""
        return Host(Output, dialect_of(version, is_async=is_async) if version else OURS)
    defuse(logging.getLogger().handlers)
    end_with_parent()
    djl: Any = importlib.import_module("djl_python")
    djl_outputs: Any = importlib.import_module("djl_python.outputs")
    return Host(djl_outputs.Output, dialect_of(djl.__version__, is_async=is_async), djl.__version__)


def _of_host(answer: "Answer | None", background: Background | None) -> Any:
    """An answer in the host's own class."""
    if isinstance(answer, tuple):
        assert background is not None, "no stream of texts in async mode"
        output, texts = answer
        return _converted(output).add_stream_content(background.iterate(texts), None)
    if answer is None or isinstance(answer, Output):
        return None if answer is None else _converted(answer)
    return _converted_all(answer) if _host.is_djl else answer


async def _converted_all(frames: AsyncIterator[Output]) -> AsyncIterator[Any]:
    async for frame in frames:
        yield _converted(frame)


def _converted(output: Output) -> Any:
    if not _host.is_djl:
        return output
    theirs = _host.output_type(output.code, output.message)
    for name, value in output.properties.items():
        theirs.add_property(name, value)
    for key, data in output.content.pairs:
        theirs.add(data, key)
    return theirs
