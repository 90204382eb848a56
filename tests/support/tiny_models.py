"""Tiny random checkpoints, written by transformers, and what transformers says about them: the reference of the model tests."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_tokenizers
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

NUM_STEPS = 64
LEAST_GAP = 1e-4  # between the two best logits; below it fp32 may choose either
VOCABULARY = 512  # at least the tokenizer's
ORIGINAL = 40  # positions that dynamic and longrope scalings take as trained: below one prompt's length, above the other's
PROMPT_LENGTHS = (11, 53)

CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that attention looks somewhere and logits lie apart
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def _longrope(half: int, **values: object) -> dict[str, object]:
    short, long = [1.0 + 0.1 * i for i in range(half)], [1.0 + 1.5 * i for i in range(half)]
    return _rope("longrope", short_factor=short, long_factor=long, original_max_position_embeddings=ORIGINAL, **values)


DYNAMIC = {**_rope("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL}
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)

# Twenty configurations that between them have every variant; each is llama or mistral with what differs from BASE.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama1": ("llama", {"num_key_value_heads": 4}),
    "llama2-gqa": ("llama", {}),
    "mqa": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "attention-bias": ("llama", {"attention_bias": True}),
    "mlp-bias": ("llama", {"mlp_bias": True, "hidden_act": "gelu"}),
    "both-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "tied": ("llama", {"tie_word_embeddings": True, **LLAMA3}),
    "wide-heads": ("llama", {"head_dim": 40, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "narrow-heads": ("llama", {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "odd-sizes": ("llama", {"hidden_size": 72, "intermediate_size": 99, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "linear": ("llama", _rope("linear", factor=2.5)),
    "dynamic": ("llama", DYNAMIC),
    "dynamic-mqa": ("llama", {**DYNAMIC, "num_key_value_heads": 1, "head_dim": 24}),
    "llama3": ("llama", {**LLAMA3, "hidden_act": "gelu_pytorch_tanh"}),
    "yarn": ("llama", YARN),
    "yarn-mscale": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.8, mscale_all_dim=0.4,
                                   beta_fast=16.0, beta_slow=2.0, truncate=False)),
    "longrope": ("llama", _longrope(8)),
    "longrope-factor": ("mistral", {**_longrope(8, attention_factor=1.25), "sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 19}),
    "mistral-window-theta": ("mistral", {"sliding_window": 64, "head_dim": 32, **_rope("default", rope_theta=1e6)}),
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Transformers' greedy continuation of one prompt and the logits at each step: fp32 [NUM_STEPS,V]."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logits: torch.Tensor


def build(variant: str, seed: int = 0, **values: Any) -> PreTrainedModel:
    """A transformers model with random weights, norms and biases too, which transformers would begin at 1 and 0."""
    kind, differs = VARIANTS[variant]
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**BASE, **differs, **values})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    model.generation_config.eos_token_id = None
    return model


def save(model: PreTrainedModel, folder: Path, **values: Any) -> Path:
    """As a checkpoint with a byte-level BPE tokenizer; `values` go to save_pretrained."""
    model.save_pretrained(folder, **values)
    tiny_tokenizers.byte_level().save_pretrained(folder)
    return folder


def rewrite_config(folder: Path, **values: Any) -> None:
    """Set keys of config.json, or take them out where the value is None."""
    path = folder / "config.json"
    keys = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in keys.items() if value is not None}))


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids, no special ones."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist())


def refer(model: PreTrainedModel, prompt: tuple[int, ...], num_steps: int = NUM_STEPS) -> Reference:
    """What transformers' generate says, greedily. On a copy: a dynamic scaling remembers the longest sequence it has seen."""
    model = copy.deepcopy(model)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_steps,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return Reference(prompt, tuple(out.sequences[0, len(prompt) :].tolist()), torch.cat(out.logits).float())


def gap(logits: torch.Tensor) -> torch.Tensor:
    """Distance of the two best logits of each row."""
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def settled(variant: str, **values: Any) -> tuple[PreTrainedModel, list[Reference]]:
    """The model of the first seed whose greedy continuations have no near tie, with them."""
    for seed in range(50):
        model = build(variant, seed, **values)
        references = []
        for length in PROMPT_LENGTHS:
            references.append(refer(model, prompt_of(length)))
            if gap(references[-1].logits).min() < LEAST_GAP:
                break
        else:
            return model, references
    raise AssertionError(f"no seed of 50 leaves {LEAST_GAP} between the two best logits of {variant}")


def teacher_forced(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """fp32 [T,V] logits at every position of one forward. On a copy, as above."""
    model = copy.deepcopy(model)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def old_style(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 in place of rope_parameters and dtype."""
    rope = dict(config["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}
    return {"rope_parameters": None, "dtype": None, "torch_dtype": config["dtype"], "rope_theta": theta, "rope_scaling": scaling}


def write_big(folder: Path, num_layers: int, dtype: torch.dtype = torch.bfloat16, file: str = "model.safetensors") -> Path:
    """A Llama checkpoint of 66 + 6.4 * num_layers MB in bf16, made quickly: all numbers alike, a vocabulary of 32000."""
    hidden, feed_forward, vocabulary = 512, 1408, 32000
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in LlamaForCausalLM(config).state_dict().items()}
    tensors = {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return folder
