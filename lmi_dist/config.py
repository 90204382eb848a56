"""Every setting and every fact of a checkpoint's config.json that the engine knows, typed, frozen, complete after construction.

`EngineConfig` owns each default and each rule; `ModelConfig` reads a checkpoint folder. Plain Python: no torch.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lmi_dist.errors import CheckpointError, ConfigError

BLOCK_SIZE = 16  # tokens a block
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of CUDA graphs, each of which takes time to capture and memory

DTYPES = {"fp32": "fp32", "float32": "fp32", "fp16": "fp16", "float16": "fp16", "half": "fp16",
          "bf16": "bf16", "bfloat16": "bf16", "auto": "auto"}  # fmt: skip
CACHE_DTYPES = {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8"}
CHECKPOINT_DTYPES: dict[str, Literal["fp32", "fp16", "bf16"]] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class EngineConfig(BaseModel):
    """How to run one model. `EngineConfig.of` takes strings too and gives our kind of error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1, description="folder, hub id or s3:// url of the checkpoint")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    tokenizer: str | None = Field(default=None, description="folder or hub id of the tokenizer, if not the model's")
    trust_remote_code: bool = Field(default=False, description="run Python code that lies in the checkpoint")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(default="auto", description="of weights, activations and cache")
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        default="auto",
        description="of the KV pool; auto: as dtype; fp8: E4M3, a byte a number, so that twice as many tokens fit as in bf16",
    )
    quantize: str | None = Field(default=None, description="weight format, if the checkpoint does not say it")
    tensor_parallel_degree: int = Field(default=1, ge=1, le=64, description="ranks that share the model, one process each")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where the model runs; auto: on GPUs if they can be used"
    )
    kernels: Literal["auto", "cpu", "cuda", "torch", "sim"] = Field(
        default="auto", description="which column of operations is used; auto: the device's"
    )
    batch_invariant: bool = Field(
        default=False,
        description="a row's bits never depend on its batch: own matrix kernels instead of cuBLAS; on a CPU they never do",
    )
    prefill_attention: Literal["own", "flash-attn"] = Field(
        default="own", description="what does prompts' attention on GPUs; flash-attn: that package, if it can what the model needs"
    )
    enforce_eager: bool = Field(
        default=False, description="run every step from Python; else decode steps are recorded and replayed"
    )
    cpu_threads: int | None = Field(default=None, ge=1, le=256, description="threads of the CPU kernels a rank; unset: all CPUs")
    max_model_len: int | None = Field(default=None, ge=1, description="prompt and answer together, in tokens")
    max_batch_size: int = Field(default=256, ge=1, le=65536, description="sequences that run at the same time")
    max_prefill_tokens: int = Field(default=4096, ge=1, description="prompt tokens in one step")
    prefill_chunk_tokens: int | None = Field(
        default=None, ge=1, description="prompt tokens in a step in which others decode; unset: 512 on CPU, 2048 on CUDA"
    )
    max_decode_slowdown: float | None = Field(
        default=None,
        description="times as long as alone that a step of decoding sequences may take beside prompts; 0: any; "
        "unset: 3 on CPU, 0 on CUDA",
    )
    enable_chunked_prefill: bool = Field(default=True, description="cut long prompts over several steps")
    enable_prefix_caching: bool = Field(default=True, description="reuse blocks of prompts that begin alike")
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1, description="size of the KV pool on each rank; unset: computed")
    reserved_memory_mb: int = Field(default=0, ge=0, description="MiB of memory to leave to other programs")
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0, description="share of a GPU's memory to use")
    max_logprobs: int = Field(default=20, ge=0, le=1000, description="alternatives a token that a request may ask for")
    max_images: int = Field(default=16, ge=0, description="images in a prompt")
    max_image_bytes: int = Field(default=20 << 20, ge=1, description="size of an encoded image")
    max_image_pixels: int = Field(default=1 << 25, ge=1, le=1 << 27, description="width times height of an image")
    max_queue_size: int = Field(default=1000, ge=1, description="requests that may wait")

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: object) -> object:
        if isinstance(value, str) and value.lower() in DTYPES:
            return DTYPES[value.lower()]
        raise ValueError(f"must be one of {', '.join(DTYPES)}")

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _kv_cache_dtype(cls, value: object) -> object:
        word = value.lower() if isinstance(value, str) else value
        if word == "fp8_e5m2":
            raise ValueError("known but not built; use fp8, which is E4M3 and more exact")
        if word in CACHE_DTYPES:
            return CACHE_DTYPES[word]
        raise ValueError(f"must be one of {', '.join(CACHE_DTYPES)}")

    @field_validator("max_images", mode="before")
    @classmethod
    def _images(cls, value: object) -> object:
        """A number, or as limit_mm_per_prompt has it: image=4. Of other media there can only be none."""
        if not isinstance(value, str) or "=" not in value:
            return value
        pairs = [pair.partition("=") for pair in value.replace(" ", "").split(",")]
        if any(kind != "image" and number != "0" for kind, _, number in pairs):
            raise ValueError("only images can be limited, as image=4; a model reads no other media")
        return next((number for kind, _, number in pairs if kind == "image"), 0)

    @field_validator("max_decode_slowdown")
    @classmethod
    def _slowdown(cls, value: float | None) -> float | None:
        if value is None or value == 0.0 or 1.0 < value < math.inf:
            return value
        raise ValueError("must be above 1, or 0 for no limit")

    @model_validator(mode="after")
    def _built(self) -> "EngineConfig":
        if self.quantize is not None:
            raise ValueError(f"quantize={self.quantize} is known but not built yet; leave it out and give an unquantized model")
        return self

    @model_validator(mode="after")
    def _agreed(self) -> "EngineConfig":
        if self.prefill_chunk_tokens is not None and not self.enable_chunked_prefill:
            raise ValueError(
                f"prefill_chunk_tokens={self.prefill_chunk_tokens} contradicts enable_chunked_prefill=false; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _invariant(self) -> "EngineConfig":
        if self.wants_flash_attn and self.batch_invariant:
            raise ValueError(
                "prefill_attention=flash-attn contradicts batch_invariant=true, for its sums are cut otherwise; leave one out"
            )
        return self

    @property
    def wants_flash_attn(self) -> bool:
        return self.prefill_attention == "flash-attn"

    @model_validator(mode="after")
    def _on_one_device(self) -> "EngineConfig":
        if self.device != "auto" and self.kernels != "auto" and (self.device == "cuda") != (self.kernels == "cuda"):
            raise ValueError(f"kernels={self.kernels} does not run on device={self.device}; leave one of them out")
        return self

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Numbers of sequences whose decode steps a GPU runs as CUDA graphs, ascending."""
        largest = min(self.max_batch_size, GRAPH_SIZES[-1])
        return () if self.enforce_eager else (*(size for size in GRAPH_SIZES if size < largest), largest)

    @classmethod
    def of(cls, values: Mapping[str, object], names: Mapping[str, str] | None = None) -> "EngineConfig":
        """EngineConfig from values or their strings. `names` maps field names to what the operator wrote, for the message.
        Raises ConfigError that names the first setting at fault, its value and the rule."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            message = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:
                raise ConfigError(message) from None
            name = str(first["loc"][0])
            raise ConfigError(f"{(names or {}).get(name, name)}={values.get(name)!r} is refused: {message}") from None


REQUIRED = object()


class ConfigKeys:
    """Typed reading of one JSON object of a checkpoint: each accessor gives the value or raises ConfigError by name.

    `names` maps our names of keys to those of an architecture whose config.json has words of its own; its word goes first.
    """

    def __init__(self, values: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None) -> None:
        self.values = values
        self.where = where
        self.names = names or {}

    def __contains__(self, name: str) -> bool:
        return self._value(name) is not None

    def but(self, values: Mapping[str, object]) -> "ConfigKeys":
        """These keys with other values for some, under our names."""
        names = {name: word for name, word in self.names.items() if name not in values}
        return ConfigKeys({**self.values, **values}, self.where, names)

    def integer(self, name: str, default: Any = REQUIRED, minimum: int = 1) -> int:
        value = self._get(name, default)
        if value is default and default is not REQUIRED:
            return value  # type: ignore[no-any-return]  # the caller's own default, as typed by the caller
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(name, f"must be an integer of at least {minimum}")
        return value

    def number(self, name: str, default: Any = REQUIRED, above: float = -math.inf) -> float:
        value = self._get(name, default)
        if value is default and default is not REQUIRED:
            return value  # type: ignore[no-any-return]
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
            raise self.refuse(name, f"must be a number above {above:g}" if above > -math.inf else "must be a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "must be true or false")
        return value

    def choice(self, name: str, supported: Collection[str], default: Any = REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in supported:
            raise self.refuse(name, f"is not supported; supported are {', '.join(sorted(supported))}")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._get(name, REQUIRED)
        if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
            raise self.refuse(name, "must be a list of numbers")
        return tuple(float(x) for x in value)

    def integers(self, name: str) -> tuple[int, ...]:
        """One integer or a list of them; empty when absent."""
        value = self._value(name)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in items):
            raise self.refuse(name, "must be an integer or a list of integers")
        return tuple(items)

    def section(self, name: str) -> "ConfigKeys":
        """A nested object; empty when absent."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise self.refuse(name, "must be an object")
        return ConfigKeys(value, f"{self.where}: {name}")

    def refuse(self, name: str, rule: str) -> ConfigError:
        return ConfigError(f"{self.where}: {self._word(name)}={self._value(name)!r} {rule}")

    def _get(self, name: str, default: Any) -> Any:
        value = self._value(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ConfigError(f"{self.where}: {self.names.get(name, name)} is missing")
        return default

    def _value(self, name: str) -> Any:
        return self.values.get(self._word(name))

    def _word(self, name: str) -> str:
        """What this object calls it."""
        word = self.names.get(name, name)
        return name if self.values.get(word) is None else word


RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding as config.json asks for it, in either spelling (rope_parameters, or rope_theta with rope_scaling)."""

    type: RopeType = "default"
    theta: float = 10000.0
    partial: float = 1.0  # share of head_dim that is rotated
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def read(cls, keys: ConfigKeys, max_position: int) -> "RopeConfig":
        """Raises ConfigError on a type that is not implemented or a missing parameter of it."""
        rope = keys.section("rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters")
        kind = rope.choice("rope_type" if "rope_type" in rope else "type", (*ROPE_TYPES, "su"), default="default")
        kind = "longrope" if kind == "su" else kind
        original = max_position
        if kind in ("llama3", "yarn", "longrope"):  # the model's own key goes before the section's, as in transformers
            original = rope.integer("original_max_position_embeddings", default=max_position)
            original = keys.integer("original_max_position_embeddings", default=original)
        needs_factor = kind in ("linear", "dynamic", "llama3", "yarn")
        longrope = kind == "longrope"
        low = rope.number("low_freq_factor", above=0.0) if kind == "llama3" else 1.0
        return cls(
            type=next(known for known in ROPE_TYPES if known == kind),
            theta=rope.number("rope_theta", default=keys.number("rope_theta", default=10000.0, above=1.0), above=1.0),
            partial=rope.number("partial_rotary_factor", default=keys.number("partial_rotary_factor", default=1.0)),
            factor=rope.number("factor", above=0.0)
            if needs_factor
            else rope.number("factor", default=max_position / original, above=0.0),
            original_max_position=original,
            attention_factor=rope.number("attention_factor", default=None),
            beta_fast=rope.number("beta_fast", default=32.0, above=0.0),
            beta_slow=rope.number("beta_slow", default=1.0, above=0.0),
            mscale=rope.number("mscale", default=None),
            mscale_all_dim=rope.number("mscale_all_dim", default=None),
            truncate=rope.boolean("truncate", default=True),
            low_freq_factor=low,
            high_freq_factor=rope.number("high_freq_factor", above=low) if kind == "llama3" else 4.0,
            short_factor=rope.numbers("short_factor") if longrope else (),
            long_factor=rope.numbers("long_factor") if longrope else (),
        )

    def reach(self, max_position: int) -> int:
        """Positions that the scaling promises, in tokens."""
        if self.type in ("linear", "dynamic"):
            return int(max_position * self.factor)
        if self.type == "yarn":
            return max(max_position, int(self.original_max_position * self.factor))
        return max_position


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the engine needs to know of any decoder. What only one architecture knows stays in `keys`, for its model file."""

    folder: Path
    architecture: str
    keys: ConfigKeys
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope: RopeConfig
    windows: tuple[int, ...]  # of each layer: keys that a token sees, itself included; 0: all
    tied_embeddings: bool
    dtype: Literal["fp32", "fp16", "bf16"]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    decoder_start_token_id: int | None = None  # what the decoder of an encoder-decoder begins with; None: there is no encoder
    generation: Mapping[str, float] = field(default_factory=dict)  # sampling defaults of generation_config.json

    @classmethod
    def load(cls, folder: Path, supported: Mapping[str, Callable[[ConfigKeys], ConfigKeys]]) -> "ModelConfig":
        """Read config.json and generation_config.json. `supported`: architecture to the function that gives its config.json our
        names of keys. Raises CheckpointError for files, ConfigError for their contents."""
        keys = ConfigKeys(_read_json(folder / "config.json"), str(folder / "config.json"))
        wishes_path = folder / "generation_config.json"
        wishes = ConfigKeys(_read_json(wishes_path) if wishes_path.exists() else {}, str(wishes_path))
        architecture = _architecture(keys, supported)
        keys = supported[architecture](keys)
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        if "head_dim" not in keys and hidden % heads:
            raise keys.refuse("hidden_size", f"must be a multiple of num_attention_heads={heads} where head_dim is left out")
        head_dim = keys.integer("head_dim", default=hidden // heads)
        if head_dim % 8 or head_dim > 256:
            raise ConfigError(f"{keys.where}: head_dim={head_dim} must be a multiple of 8 of at most 256")
        kv_heads = keys.integer("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise keys.refuse("num_key_value_heads", f"must divide num_attention_heads={heads}")
        trained_positions = keys.integer("max_position_embeddings", default=2048)
        rope = RopeConfig.read(keys, trained_positions)
        num_layers = keys.integer("num_hidden_layers")
        return cls(
            folder=folder,
            architecture=architecture,
            keys=keys,
            hidden_size=hidden,
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=keys.integer("vocab_size"),
            max_position=rope.reach(trained_positions),
            rope=rope,
            windows=_windows(keys, num_layers),
            tied_embeddings=keys.boolean("tie_word_embeddings", default=False),
            dtype=CHECKPOINT_DTYPES[keys.choice("dtype" if "dtype" in keys else "torch_dtype", CHECKPOINT_DTYPES, "float32")],
            bos_token_id=next(iter(keys.integers("bos_token_id")), None),
            eos_token_ids=wishes.integers("eos_token_id") or keys.integers("eos_token_id"),
            decoder_start_token_id=_decoder_start(keys, wishes) if keys.boolean("is_encoder_decoder", default=False) else None,
            generation=_sampling_wishes(wishes),
        )

    @property
    def window(self) -> int:
        """Keys that any layer looks back to, the token's own included; 0: some layer sees all."""
        return 0 if 0 in self.windows else max(self.windows)

    @property
    def is_encoder_decoder(self) -> bool:
        return self.decoder_start_token_id is not None

    def model_len(self, wanted: int | None) -> int:
        """Tokens that a sequence may have. Raises ConfigError when more is wanted than the model can do."""
        is_bounded = not self.is_encoder_decoder  # whose positions are relative: the config tells what it was trained on
        if is_bounded and wanted is not None and wanted > self.max_position:
            raise ConfigError(f"max_model_len={wanted} must be at most {self.max_position}, the positions of this model")
        return wanted or self.max_position


def _architecture(keys: ConfigKeys, supported: Collection[str]) -> str:
    names = keys.values.get("architectures") or []
    if not isinstance(names, list):
        raise keys.refuse("architectures", "must be a list of names")
    for name in names:
        if isinstance(name, str) and name in supported:
            return name
    raise keys.refuse("architectures", f"has none that is supported; supported are {', '.join(sorted(supported))}")


LAYER_TYPES = ("full_attention", "sliding_attention")


def _windows(keys: ConfigKeys, num_layers: int) -> tuple[int, ...]:
    """Each layer's window: all have one, or those that layer_types or max_window_layers (Qwen: those from there on) tell."""
    window = keys.integer("sliding_window", default=0, minimum=0) if keys.boolean("use_sliding_window", default=True) else 0
    if "layer_types" not in keys:
        first = keys.integer("max_window_layers", default=0, minimum=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    kinds = keys.values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in LAYER_TYPES for kind in kinds):
        raise keys.refuse("layer_types", f"must be a list of {num_layers}, each {' or '.join(LAYER_TYPES)}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _decoder_start(keys: ConfigKeys, wishes: ConfigKeys) -> int:
    """As transformers has it, but for models without any, where it is the padding's."""
    places = ((wishes, "decoder_start_token_id"), (keys, "decoder_start_token_id"), (keys, "pad_token_id"))
    return next((source.integer(name, minimum=0) for source, name in places if name in source), 0)


def _sampling_wishes(wishes: ConfigKeys) -> dict[str, float]:
    names = ("temperature", "top_p", "top_k", "typical_p", "min_p", "repetition_penalty")
    return {name: wishes.number(name) for name in names if name in wishes}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder must hold a checkpoint in Hugging Face format") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values
