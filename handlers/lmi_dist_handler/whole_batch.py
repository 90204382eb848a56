"""Use without rolling batch: a call has one request or several merged ones, and is answered whole or as one stream (contract 3.6).

Merged requests need not have equal parameters, as they must in DJL's own handler; one that breaks a rule is told so in its place.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from lmi_dist_handler import requests
from lmi_dist_handler.formatter import error_body
from lmi_dist_handler.streaming import Frame, ReplyType, Streams
from lmi_dist_handler.wire import Input, Output


async def answer(inputs: Input, streams: Streams, reply: ReplyType) -> Output:
    """The reply to one call. Merged requests are items `batch_<i>.data` of it."""
    if not inputs.is_batch():
        return await _single(inputs, streams, reply)
    output = reply().add_property("Content-Type", "application/json")
    frames = await asyncio.gather(*(_whole(one, streams) for one in inputs.get_batches()))
    for place, frame in enumerate(frames):
        output.add(frame.text, key="data", batch_index=place)
    return output


async def _single(inputs: Input, streams: Streams, reply: ReplyType) -> Output:
    frame = await _whole(inputs, streams)
    if frame.code is not None:
        return reply().error(frame.error, code=frame.code)
    return reply().add_property("Content-Type", frame.content_type).add(frame.text)


async def _whole(inputs: Input, streams: Streams) -> Frame:
    """The last frame with all the text, or with the error's body as text."""
    text = ""
    async for frame in streams.frames(inputs, uuid.uuid4().hex, requests.parse_whole):
        text = text + frame.text if frame.code is None else error_body("lmi", frame.code, frame.error)
    return Frame(text, frame.content_type, is_last=True, code=frame.code, error=frame.error)


async def stream(inputs: Input, streams: Streams, reply: ReplyType, blocking: Callable[[AsyncIterator[Frame]], Any]) -> Output:
    """One request's answer as a stream of lines, for `enable_streaming`. What is wrong before the first has a code."""
    frames = streams.frames(inputs, uuid.uuid4().hex, requests.parse_whole)
    first = await frames.__anext__()
    if first.code is not None:
        return reply().error(first.error, code=first.code)
    output = reply().add_property("Content-Type", first.content_type)
    return output.add_stream_content((frame.text for frame in blocking(frames)), None)
