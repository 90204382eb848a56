"""The architectures: one table from the name in config.json to the class that implements it, imported when asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import torch

from lmi_dist.batch import ForwardBatch
from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.plan import Image
from lmi_dist.weights import Weights


class Model(Protocol):
    """A model on this rank. `ignored` are patterns of tensor names that a checkpoint may hold for nothing."""

    ignored: tuple[str, ...]

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int) -> None: ...

    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """fp32 logits [R,V] of the batch's output rows."""

    def cache_regime(self, prompt_length: int) -> str:
        """Keys may be shared between prompts of one regime only; part of the prefix cache's salt."""


class EncoderDecoder(Model, Protocol):
    """A model whose tokens attend to what an encoder has read."""

    def encode(self, batch: ForwardBatch) -> None:
        """Read each sequence of the batch as a whole and write its cross keys to the batch's slots."""


class VisionModel(Model, Protocol):
    """A model that takes images in its text."""

    def see(self, image: Image) -> torch.Tensor:
        """Features [tokens,E] of an image, for ForwardBatch.images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Where a class is, and how its config.json is to be read: its `names` of our keys, the values (`defaults`) that hold where it
    leaves a key out, those that hold whatever it says (`facts`), and if that is not enough the function of the module that works
    out the rest (`derive`). Keys of a sliding window count only for what is `windowed`."""

    module: str
    model: str = ""  # the class, if it is not called as in config.json
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    derive: str = ""
    windowed: bool = False

    def standard(self, keys: ConfigKeys) -> ConfigKeys:
        """config.json under our names. Raises ConfigError."""
        no_window = {} if self.windowed else {"sliding_window": None, "layer_types": None}
        keys = ConfigKeys({**self.defaults, **keys.values, **self.facts, **no_window}, keys.where, self.names)
        return keys.but(getattr(self.load(), self.derive)(keys)) if self.derive else keys

    def load(self) -> ModuleType:
        return import_module(f"lmi_dist.models.{self.module}")


TIED: Mapping[str, object] = {"tie_word_embeddings": True}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}
FALCON = Architecture(
    module="falcon",
    model="FalconForCausalLM",
    names={
        "hidden_size": "n_embed",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "hidden_act": "activation",
    },
    defaults=TIED,
    derive="standard_keys",
)
MPT = Architecture(
    module="mpt",
    model="MptForCausalLM",
    names={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
    defaults=TIED,
    derive="standard_keys",
)

ARCHITECTURES = {
    "BloomForCausalLM": Architecture(
        module="bloom",
        names={
            "hidden_size": "n_embed",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
        },
        defaults=TIED,
    ),
    "FalconForCausalLM": FALCON,
    "GPT2LMHeadCustomModel": Architecture(
        module="santacoder", names=GPT2_NAMES, defaults={**TIED, "max_position_embeddings": 1024}, derive="standard_keys"
    ),
    "GPT2LMHeadModel": Architecture(module="gpt2", names=GPT2_NAMES, defaults={**TIED, "max_position_embeddings": 1024}),
    "GPTBigCodeForCausalLM": Architecture(
        module="santacoder", names=GPT2_NAMES, defaults={**TIED, "max_position_embeddings": 1024}, derive="standard_keys"
    ),
    "GPTJForCausalLM": Architecture(module="gptj", names=GPT2_NAMES, derive="standard_keys"),
    "GPTNeoXForCausalLM": Architecture(
        module="gpt_neox",
        names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        defaults={"partial_rotary_factor": 0.25, "hidden_act": "gelu"},
    ),
    "Gemma2ForCausalLM": Architecture(
        module="gemma",
        defaults={
            **TIED,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
        },
        derive="gemma2_keys",
        windowed=True,
    ),
    "GemmaForCausalLM": Architecture(
        module="gemma", defaults={**TIED, "head_dim": 256, "max_position_embeddings": 8192}, derive="gemma_keys"
    ),
    "LlavaForConditionalGeneration": Architecture(module="llava", facts={"image_grid_pinpoints": None}, derive="standard_keys"),
    "LlavaNextForConditionalGeneration": Architecture(
        module="llava",
        defaults={"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]},
        derive="standard_keys",
    ),
    "LlamaForCausalLM": Architecture(module="llama"),
    "MPTForCausalLM": MPT,
    "MistralForCausalLM": Architecture(
        module="llama",
        model="LlamaForCausalLM",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
        windowed=True,
    ),
    "MixtralForCausalLM": Architecture(
        module="mixtral",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
        windowed=True,
    ),
    "MptForCausalLM": replace(MPT, defaults={**TIED, "no_bias": True, "attn_config": {"alibi": True}}),
    "OPTForCausalLM": Architecture(
        module="opt", names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}, defaults=TIED
    ),
    "Phi3ForCausalLM": Architecture(
        module="llama",
        model="LlamaForCausalLM",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        facts={"fused_projections": True, "partial_rotary": True},
        windowed=True,
    ),
    "Qwen2ForCausalLM": Architecture(
        module="llama",
        model="LlamaForCausalLM",
        defaults={"max_position_embeddings": 32768, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        facts={"qkv_bias": True},
        windowed=True,
    ),
    "Qwen3ForCausalLM": Architecture(
        module="llama",
        model="LlamaForCausalLM",
        defaults={
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "max_window_layers": 28,
        },
        facts={"qk_norm": True},
        windowed=True,
    ),
    "RWForCausalLM": FALCON,  # falcon's first name
    "T5ForConditionalGeneration": Architecture(
        module="t5",
        names={
            "hidden_size": "d_model",
            "num_hidden_layers": "num_decoder_layers",
            "num_attention_heads": "num_heads",
            "head_dim": "d_kv",
            "intermediate_size": "d_ff",
            "max_position_embeddings": "n_positions",
        },
        defaults={**TIED, "is_encoder_decoder": True, "n_positions": 512},
        derive="standard_keys",
    ),
}


def read_config(folder: Path) -> ModelConfig:
    """A checkpoint folder's ModelConfig. Raises CheckpointError for files, ConfigError for their contents."""
    return ModelConfig.load(folder, {name: row.standard for name, row in ARCHITECTURES.items()})


def model_class(architecture: str) -> type[Model]:
    """The class of a row of ARCHITECTURES."""
    row = ARCHITECTURES[architecture]
    return cast(type[Model], getattr(row.load(), row.model or architecture))
