"""An entry point without an engine for real worker processes: it answers each request with its own name and what it was told.

`load` among its init properties decides how loading goes: `fault`, `room`, `slow`, else well.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from lmi_dist_handler.wire import Input, Output

properties: dict[str, Any] = {}
running = 0


async def handle(inputs: Input) -> Output | AsyncIterator[Output] | None:
    if not inputs.is_empty():
        return answer(inputs)
    properties.update(inputs.get_properties())
    how = properties.get("load", "")
    if how == "slow":
        await asyncio.sleep(0.5)
    if how in ("fault", "room"):
        code, kind = (424, "CheckpointError") if how == "fault" else (507, "MemoryPlanError")
        sentence = f"{kind} of {properties['model_name']}"
        return Output().error(sentence, code=code, message=sentence).add_property("error_type", kind)
    return None


def frame(text: str, *, is_last: bool) -> Output:
    output = Output().add_property("Content-Type", "application/json")
    return output.add(Output.binary_encode({"data": text, "last": is_last}))


async def answer(inputs: Input) -> AsyncIterator[Output]:
    global running
    running += 1
    body = inputs.get_as_string()
    if body.startswith("wait"):
        yield frame(" ", is_last=False)
        await asyncio.sleep(float(body.removeprefix("wait")))
    running -= 1
    yield frame(json.dumps({**properties, "env": os.environ.get("FROM_OPTION_ENV"), "pid": os.getpid()}), is_last=True)


def abort(inputs: Input) -> Output:
    return Output()


def stats(inputs: Input) -> Output:
    told = {"busy_s": 0.0, "lazy_bytes": int(properties.get("lazy", 0)), "device": properties.get("device", "cpu")}
    return Output().add(told)


async def drain(inputs: Input) -> Output:
    while running:
        await asyncio.sleep(0.01)
    return Output()
