"""lmi-dist as a library: `Engine(EngineConfig(model=...))`, then add, step, abort, reset. These names are the public ones.

The engine, and torch with it, is loaded when its names are first used: a process that only configures stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmi_dist.config import BLOCK_SIZE, EngineConfig
from lmi_dist.errors import (
    CheckpointError,
    ConfigError,
    KernelError,
    LmiError,
    MemoryPlanError,
    OverloadedError,
    RequestError,
    StepError,
)
from lmi_dist.request import ImagePart, Output, Request, SamplingParams, Token, TokenLogprob

if TYPE_CHECKING:
    from lmi_dist.engine import Engine, EngineStats
    from lmi_dist.setup import Explanation, explain

HEAVY = {"Engine": "engine", "EngineStats": "engine", "Explanation": "setup", "explain": "setup"}

__all__ = [
    "BLOCK_SIZE",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Explanation",
    "ImagePart",
    "KernelError",
    "LmiError",
    "MemoryPlanError",
    "Output",
    "OverloadedError",
    "Request",
    "RequestError",
    "SamplingParams",
    "StepError",
    "Token",
    "TokenLogprob",
    "explain",
]


def __getattr__(name: str) -> Any:
    if name not in HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lmi_dist.{HEAVY[name]}"), name)
