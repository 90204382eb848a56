"""DJL's entry point (`option.entryPoint=lmi_dist_handler`): `handle`, and what our own host asks for beside it.

A host calls these functions by name in every request, so what they share lies in this module. `djl_python` is imported here only,
and only when its Input comes in.
"""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmi_dist import LmiError
from lmi_dist_handler.background import Background
from lmi_dist_handler.dialects import OURS, LmiDialect, dialect_of
from lmi_dist_handler.formatter import UnavailableError
from lmi_dist_handler.logs import defuse
from lmi_dist_handler.wire import Codec, Input, Output

if TYPE_CHECKING:
    from lmi_dist_handler.served import Served

logger = logging.getLogger(__name__)

Answer = Output | AsyncIterator[Output] | None

_served: "Served | None" = None  # once the model is loaded
_failure = "the model is not loaded yet"  # why there is none
_background: Background | None = None  # for hosts that call without a loop


class Output26(Output):
    """Our Output with the map of 0.26, for a host of that version whose request another worker has handed on."""

    binary_encode = staticmethod(Codec(26).encode_map)


def handle(inputs: Input) -> Answer | Coroutine[Any, Any, Answer]:
    """Without content: load the model that the properties describe; None, or a reply with code and the full sentence.
    With content: the reply, or the frames that answer one request. To be awaited where a loop runs, as it does in async mode."""
    global _background
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        _background = _background or Background()
        return _background.run(_handle(inputs, _background))
    return _handle(inputs, None)


async def abort(inputs: Input) -> Output:
    """End the request whose tracking id is the property `abort_tracking_id`; what it holds is freed before the next step."""
    tracking_id = inputs.get_property("abort_tracking_id")
    return Output().add({"aborted": _served is not None and _served.streams.abort(tracking_id)})


async def stats(inputs: Input) -> Output:
    """Counters of the engine as JSON."""
    return Output().add({} if _served is None else _served.streams.stats())


async def drain(inputs: Input) -> Output:
    """Refuse new requests; replies once the running ones have ended."""
    if _served is not None:
        await _served.streams.drain()
    return Output()


async def _handle(inputs: Input, background: Background | None) -> Answer:
    if inputs.is_empty():
        return None if _served else await _load(inputs, is_async=background is None)
    if _served is None:
        raise UnavailableError(_failure)
    return await _served.answer(inputs, background.iterate if background else None)


async def _load(inputs: Input, *, is_async: bool) -> Output | None:
    global _served, _failure
    # the host's process imports this package too, and must not load the engine
    from lmi_dist import Engine
    from lmi_dist_handler import model_py, properties, served, streaming

    reply, dialect = _host(inputs, is_async=is_async)
    given = inputs.get_properties()
    try:
        config = await asyncio.to_thread(lambda: properties.from_init(given, dialect=dialect))
        folder = Path(inputs.get_property("model_dir") or ".")
        own = model_py.load(folder, config.allow_model_py) if isinstance(inputs, Input) else model_py.given(given)
        thread = streaming.EngineThread(lambda: Engine(config.engine))
        streams = streaming.Streams(thread, await thread.start(), config, own)
        _served = served.Served(streams, config, reply, merges=int(given.get("batch_size", 1)) > 1)
    except Exception as error:  # the host shows the sentence; of what we did not raise on purpose the traceback stays here
        logger.error("the model could not be loaded: %s", error, exc_info=not isinstance(error, LmiError))
        _failure = f"the model could not be loaded: {error}"
        return _load_failure(error, reply)
    return None


def _load_failure(error: Exception, reply: type[Output]) -> Output:
    """507 for want of memory, so that DJL says so; `error_type` tells our host whether another try makes sense."""
    code = error.code if isinstance(error, LmiError) else 507 if isinstance(error, MemoryError) else 424
    output = reply().error(str(error), code=code, message=str(error))
    output.add_property("error_type", type(error).__name__)
    return output


def _host(inputs: Input, *, is_async: bool) -> tuple[type[Output], LmiDialect]:
    """The Output class that belongs to the host's Input class, and the host's dialect (dialects.py says how it is found out)."""
    if isinstance(inputs, Input):
        version = inputs.get_property("djl_version")
        dialect = dialect_of(version, is_async=False) if version else OURS
        return (Output26 if dialect.wire == 26 else Output), dialect
    defuse(logging.getLogger().handlers)
    djl: Any = importlib.import_module("djl_python")
    djl_outputs: Any = importlib.import_module("djl_python.outputs")
    return djl_outputs.Output, dialect_of(djl.__version__, is_async=is_async)
