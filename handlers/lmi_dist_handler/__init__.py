"""DJL's entry point (`option.entryPoint=lmi_dist_handler`), async mode: `handle`, and what our own host asks for beside it.

A host calls these functions by name in every request, so what they share lies in this module. `djl_python` is imported here only,
and only when its Input comes in.
"""

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmi_dist import LmiError
from lmi_dist_handler.formatter import UnavailableError
from lmi_dist_handler.wire import Input, Output

if TYPE_CHECKING:
    from lmi_dist_handler.streaming import Streams

logger = logging.getLogger(__name__)

_streams: "Streams | None" = None  # once the model is loaded


async def handle(inputs: Input) -> Output | AsyncIterator[Output] | None:
    """Without content: load the model that the properties describe; None, or a reply with code and the full sentence.
    With content: the frames that answer one request."""
    reply = _reply_type(inputs)
    if inputs.is_empty():
        return await _load(inputs, reply)
    if _streams is None:
        raise UnavailableError("the model is not loaded yet")
    return _streams.answer(inputs, reply)


async def abort(inputs: Input) -> Output:
    """End the request whose tracking id is the property `abort_tracking_id`; what it holds is freed before the next step."""
    tracking_id = inputs.get_property("abort_tracking_id")
    return Output().add({"aborted": _streams is not None and _streams.abort(tracking_id)})


async def stats(inputs: Input) -> Output:
    """Counters of the engine as JSON."""
    return Output().add({} if _streams is None else _streams.stats())


async def drain(inputs: Input) -> Output:
    """Refuse new requests; replies once the running ones have ended."""
    if _streams is not None:
        await _streams.drain()
    return Output()


async def _load(inputs: Input, reply: type[Output]) -> Output | None:
    global _streams
    # the host's process imports this package too, and must not load the engine
    from lmi_dist import Engine
    from lmi_dist_handler import model_py, properties, streaming

    try:
        config = await asyncio.to_thread(properties.from_init, inputs.get_properties())
        is_djl = reply is not Output
        folder = Path(inputs.get_property("model_dir") or ".")
        own = model_py.given(inputs.get_properties()) if is_djl else model_py.load(folder, config.allow_model_py)
        thread = streaming.EngineThread(lambda: Engine(config.engine))
        _streams = streaming.Streams(thread, await thread.start(), config, own)
    except Exception as error:  # the host shows the sentence; of what we did not raise on purpose the traceback stays here
        logger.error("the model could not be loaded: %s", error, exc_info=not isinstance(error, LmiError))
        return _load_failure(error, reply)
    return None


def _load_failure(error: Exception, reply: type[Output]) -> Output:
    """507 for want of memory, so that DJL says so; `error_type` tells our host whether another try makes sense."""
    code = error.code if isinstance(error, LmiError) else 507 if isinstance(error, MemoryError) else 424
    output = reply().error(str(error), code=code, message=str(error))
    output.add_property("error_type", type(error).__name__)
    return output


def _reply_type(inputs: Input) -> type[Output]:
    """The Output class that belongs to the host's Input class."""
    if isinstance(inputs, Input):
        return Output
    djl_outputs: Any = importlib.import_module("djl_python.outputs")
    output_type: type[Output] = djl_outputs.Output
    return output_type
