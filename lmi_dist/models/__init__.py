"""The architectures: one table from the name in config.json to the class that implements it, imported when asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ModelConfig
from lmi_dist.weights import Weights


class Model(Protocol):
    """A model on this rank. `ignored` are patterns of tensor names that a checkpoint may hold for nothing."""

    ignored: tuple[str, ...]

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None: ...

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """fp32 logits [R,V] of the batch's output rows."""

    def cache_regime(self, prompt_length: int) -> str:
        """Keys may be shared between prompts of one regime only; part of the prefix cache's salt."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where the class is, and what its config.json may leave out, with the values that then hold."""

    module: str
    defaults: Mapping[str, object] = field(default_factory=dict)


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture(
        "llama", {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    ),
}


def read_config(folder: Path) -> ModelConfig:
    """A checkpoint folder's ModelConfig. Raises CheckpointError for files, ConfigError for their contents."""
    return ModelConfig.load(folder, {name: row.defaults for name, row in ARCHITECTURES.items()})


def model_class(architecture: str) -> type[Model]:
    """The class of a row of ARCHITECTURES."""
    module = import_module(f"lmi_dist.models.{ARCHITECTURES[architecture].module}")
    return cast(type[Model], getattr(module, architecture))
