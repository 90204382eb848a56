"""What an operator's words come to: typed, frozen, each default written once. properties.py fills them in.

Only EngineConfig's defaults and rules are not here: they are the engine's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lmi_dist import EngineConfig
from lmi_dist_handler.dialects import OURS, LmiDialect
from lmi_dist_handler.options import OPTIONS, SECRETS, SERVER_FIELDS, Formatter, Option
from lmi_dist_handler.words import parse_env

MASK = "***"


class ServerSettings(BaseModel):
    """What the host process needs. `origin` tells where each value that is not a default came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen at")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port; 0: any that is free")
    max_request_size: int = Field(default=67108864, ge=1, description="bytes of a body at most")
    job_queue_size: int = Field(default=1000, ge=1, description="requests that may wait")
    chunked_read_timeout: int = Field(default=120, ge=1, description="seconds between two pieces of an answer")
    api_key: str | None = Field(default=None, min_length=1, description="bearer key that every route but /ping asks for")
    read_timeout: int = Field(default=30, ge=1, description="seconds for headers, and for a body slower than 16 KiB/s; then 408")
    write_timeout: int = Field(default=60, ge=1, description="seconds without reading, after which a client is cut off")
    drain_timeout: int = Field(default=25, ge=0, description="seconds that running requests get after SIGTERM")
    log_format: Literal["text", "json"] = Field(default="text", description="one line a record, as text or as JSON")
    model_store: str | None = Field(default=None, description="folder of models: loaded at the start, open to POST /models")
    allow_any_model_url: bool = Field(default=False, description="let POST /models name what lies outside the model store")
    install_requirements: bool = Field(default=False, description="let pip install a model folder's requirements.txt")
    allow_env: bool = Field(default=False, description="take option.env of a model's own file")
    offline: bool = Field(default=False, description="pip fetches nothing: requirements come from the model's folder requirements/")
    origin: Mapping[str, str] = Field(default_factory=dict)

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (word, value in use, origin); a secret only as set or unset."""
        rows = [(name, _told(name, getattr(self, name)), self.origin.get(name, "default")) for name in SERVER_FIELDS]
        return [(f"SERVING_{name.upper()}", value, origin) for name, value, origin in rows]


class WorkerConfig(BaseModel):
    """What the host process needs to know of one model's worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_queue_size: int = Field(default=1000, ge=1, description="requests that may wait")
    predict_timeout: int = Field(default=240, ge=1, description="seconds that a step may take")
    model_loading_timeout: int = Field(default=1200, ge=1, description="seconds until a model must be ready")
    env: Annotated[Mapping[str, str] | None, BeforeValidator(parse_env)] = Field(
        default=None, description="variables for the model's worker, as K=V,K2=V2; needs SERVING_ALLOW_ENV=true"
    )


class HandlerConfig(BaseModel):
    """What a worker needs: how to run the model and how to answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    engine: EngineConfig
    model_name: str
    dialect: LmiDialect = Field(default=OURS, exclude=True)  # of the host: not an option, it is found out
    rolling_batch: Annotated[Literal["lmi-dist", "vllm", "auto", "disable"], BeforeValidator(str.lower)] = Field(
        default="lmi-dist",
        description="which engine batches requests; lmi-dist, vllm and auto all mean this one, disable takes a request a call",
    )
    enable_streaming: Annotated[Literal["true", "false", "huggingface"], BeforeValidator(str.lower)] = Field(
        default="false", description="answers come as streams where DJL has rolling_batch=disable"
    )
    output_formatter: Formatter | None = Field(default=None, description="form of answers; unset: the request's `stream` decides")
    tgi_compat: bool = Field(default=False, description="token fields and frames as in text-generation-inference")
    allow_model_py: bool | None = Field(
        default=None, description="run the formatters in the folder's model.py; unset: refused if there are some"
    )


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model. `values` is what its workers get as init properties: option name, without `option.`, to text."""

    name: str
    version: str
    folder: Path | None
    engine: str
    values: Mapping[str, str]
    origin: Mapping[str, str]
    handler: HandlerConfig
    worker: WorkerConfig
    environment: Mapping[str, str] | None = None  # of the worker; None: the server's own

    def engine_config(self) -> EngineConfig:
        return self.handler.engine

    def init_properties(self) -> dict[str, str]:
        """The properties of the init request (contract 3.5)."""
        values = {name: value for name, value in self.values.items() if name != "env"}
        return {**values, "model_name": self.name, "handler": "handle"}

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (option, value in use, origin) of every option that has an effect, then of those given that have none."""
        rows = [
            (key, _told(option.name, self._in_use(option)), self.origin.get(option.name, "default")) for key, option in _effective()
        ]
        idle = [OPTIONS[key] for name in self.values for key in (f"option.{name}", name) if key in OPTIONS]
        ignored = [row for row in idle if row.reader == "ignored"]
        return rows + [
            (row.key, _told(row.name, self.values[row.name]), f"{self.origin[row.name]}; no effect: {row.about}") for row in ignored
        ]

    def _in_use(self, option: Option) -> object:
        if option.reader == "engine":
            return getattr(self.handler.engine, option.field)
        if option.field == "engine":
            return self.engine
        if option.reader == "host":
            return getattr(self.worker, option.field)
        return getattr(self.handler, option.field)


def _effective() -> list[tuple[str, Option]]:
    return [(key, option) for key, option in OPTIONS.items() if option.reader in ("engine", "handler", "host")]


def _told(name: str, value: object) -> str:
    """The value of an option as anybody may see it."""
    return MASK if name in SECRETS and value is not None else _shown(value)


def _shown(value: object) -> str:
    """A value as an operator would write it, without the name and password that a url may hold."""
    if isinstance(value, str) and "://" in value:
        return re.sub(r"://[^/@\s]*@", f"://{MASK}@", value)
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
