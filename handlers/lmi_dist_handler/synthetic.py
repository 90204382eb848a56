"""Checkpoints with the shape of real models and seeded random weights, for benchmarks: speed does not depend on their values."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lmi_dist_handler.cache import complete_folder
from lmi_dist_handler.demo_text import BOS, CHAT_TEMPLATE, EOS, documents, train_tokenizer

MAX_POSITIONS = 2048
STD = 0.02


@dataclass(frozen=True, slots=True)
class Preset:
    """Sizes of a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


PRESETS = {
    "llama-1.1b": Preset(hidden=2048, inner=5632, layers=22, heads=32, kv_heads=4, vocab=32000),  # TinyLlama's shape
    "llama-160m": Preset(hidden=768, inner=3072, layers=12, heads=12, kv_heads=12, vocab=32000),
    "tiny": Preset(hidden=64, inner=128, layers=2, heads=4, kv_heads=2, vocab=512),
}


def write(folder: Path, preset: Preset, seed: int = 0, num_bytes: int | None = None) -> None:
    """A Llama in Hugging Face format at `folder`, weights in bf16 drawn from N(0, STD); its tokenizer learns from up to `num_bytes`
    of text. The same arguments give the same weights."""
    with complete_folder(folder) as unfinished:
        save_file(dict(_tensors(preset, seed)), unfinished / "model.safetensors", metadata={"format": "pt"})
        texts = (document.text for document in documents(num_bytes))
        train_tokenizer(texts, preset.vocab).save(str(unfinished / "tokenizer.json"))
        for name, values in _json_files(preset).items():
            (unfinished / name).write_text(json.dumps(values, indent=2) + "\n")


def _tensors(preset: Preset, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, bf16 tensor) in the order of a Llama checkpoint, which is the order of the draws."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=chance) * STD).to(torch.bfloat16)

    hidden, inner, key = preset.hidden, preset.inner, preset.hidden // preset.heads * preset.kv_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    yield "model.embed_tokens.weight", normal(preset.vocab, hidden)
    for layer in range(preset.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", torch.ones(hidden, dtype=torch.bfloat16)
        for name, size in matrices.items():
            yield f"{prefix}.{name}.weight", normal(*size)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "lm_head.weight", normal(preset.vocab, hidden)


def _json_files(preset: Preset) -> dict[str, dict[str, object]]:
    ends: dict[str, object] = {"bos_token_id": 0, "eos_token_id": 1}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": preset.hidden,
        "intermediate_size": preset.inner,
        "num_hidden_layers": preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.hidden // preset.heads,
        "vocab_size": preset.vocab,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **ends,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"config.json": config, "generation_config.json": ends, "tokenizer_config.json": tokenizer}
