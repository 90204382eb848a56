"""Use without rolling batch: a call has one request or several merged ones, and is answered whole or as one stream (contract 3.6).

Merged requests need not have equal parameters, as they must in DJL's own handler; one that breaks a rule is told so in its place.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator

from lmi_dist_handler import requests
from lmi_dist_handler.formatter import error_body
from lmi_dist_handler.streaming import Frame, Streams
from lmi_dist_handler.wire import Input, Output


async def answer(inputs: Input, streams: Streams, failure: str) -> Output:
    """The reply to one call. Merged requests are items `batch_<i>.data` of it. `failure`: message of a reply that is an error."""
    if not inputs.is_batch():
        frame = await _whole(inputs, streams)
        if frame.code is not None:
            return Output().error(frame.error, frame.code, failure)
        return Output().add_property("Content-Type", frame.content_type).add(frame.text)
    output = Output().add_property("Content-Type", "application/json")
    frames = await asyncio.gather(*(_whole(one, streams) for one in inputs.get_batches()))
    for place, frame in enumerate(frames):
        text = frame.text if frame.code is None else error_body("lmi", frame.code, frame.error)
        output.add(text, key="data", batch_index=place)
    return output


async def _whole(inputs: Input, streams: Streams) -> Frame:
    """All frames in one."""
    text = ""
    async for frame in lines(inputs, streams):
        text += frame.text
    return Frame(text, frame.content_type, is_last=True, code=frame.code, error=frame.error)


def lines(inputs: Input, streams: Streams) -> AsyncIterator[Frame]:
    """The frames of one request's answer; with `enable_streaming` they are lines as they come."""
    return streams.frames(inputs, uuid.uuid4().hex, requests.parse_whole)
