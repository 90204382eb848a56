"""lmi-dist as a library: `Engine(EngineConfig(model=...))`, then add, step, abort, reset. These names are the public ones.

What stands behind a name is loaded when it is first used: a process that only configures loads no torch, and one that only uses the
kernels (`lmi_dist.ops`) needs nothing but torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmi_dist.collector import uncollected
from lmi_dist.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    KernelError,
    LmiError,
    LostRankError,
    MemoryPlanError,
    OverloadedError,
    RankError,
    RequestError,
    StepError,
)
from lmi_dist.parallel import Ranks

if TYPE_CHECKING:
    from lmi_dist.config import BLOCK_SIZE, EngineConfig
    from lmi_dist.engine import Engine, EngineStats
    from lmi_dist.follower import Follower
    from lmi_dist.link import Link
    from lmi_dist.local_link import FollowerLink
    from lmi_dist.meeting import connect
    from lmi_dist.request import ImagePart, Output, Prompt, Request, SamplingParams, Token, TokenLogprob
    from lmi_dist.setup import Explanation, explain

FILES = {
    "BLOCK_SIZE": "config",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineStats": "engine",
    "Explanation": "setup",
    "Follower": "follower",
    "FollowerLink": "local_link",
    "ImagePart": "request",
    "Link": "link",
    "Output": "request",
    "Prompt": "request",
    "Request": "request",
    "SamplingParams": "request",
    "Token": "request",
    "TokenLogprob": "request",
    "connect": "meeting",
    "explain": "setup",
}

__all__ = [
    "BLOCK_SIZE",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Explanation",
    "Follower",
    "FollowerLink",
    "ImagePart",
    "KernelError",
    "Link",
    "LmiError",
    "LostRankError",
    "MemoryPlanError",
    "Output",
    "OverloadedError",
    "Prompt",
    "RankError",
    "Ranks",
    "Request",
    "RequestError",
    "SamplingParams",
    "StepError",
    "Token",
    "TokenLogprob",
    "connect",
    "explain",
]


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with uncollected():
        return getattr(import_module(f"lmi_dist.{FILES[name]}"), name)
