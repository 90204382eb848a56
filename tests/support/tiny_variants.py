"""The tiny models of the model tests as data: for each architecture a base, and variants that between them have all it can be."""

from typing import Any

VOCABULARY = 512  # at least the tokenizer's
POSITIONS = 256
ORIGINAL = 40  # positions that dynamic and longrope scalings take as trained: below one prompt's length, above the other's

# kind: transformers' classes of configuration and model
KINDS = {
    "bloom": ("BloomConfig", "BloomForCausalLM"),
    "falcon": ("FalconConfig", "FalconForCausalLM"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM"),
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "mpt": ("MptConfig", "MptForCausalLM"),
    "opt": ("OPTConfig", "OPTForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}

# initializer_range: large enough that attention looks somewhere and logits lie apart
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_BASE = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
# a norm that takes the mean away, and tied ends: with small weights they would repeat the last token
ROUGH = {**COMMON, "initializer_range": 0.35}
GPT2_BASE = {**ROUGH, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
BASES: dict[str, dict[str, Any]] = {  # of what is worded otherwise than Llama
    "bloom": {**ROUGH, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": {**ROUGH, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS},
    "gemma": {**LLAMA_BASE, "head_dim": 16},
    "gemma2": {**LLAMA_BASE, **ROUGH, "head_dim": 16, "sliding_window": 19, "tie_word_embeddings": False},
    "gpt2": GPT2_BASE,
    "gpt_bigcode": GPT2_BASE,
    "gpt_neox": {
        **{name: value for name, value in {**LLAMA_BASE, **ROUGH}.items() if name != "num_key_value_heads"},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    },
    "gptj": {**GPT2_BASE, "rotary_dim": 8},
    "mpt": {**ROUGH, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS},
    "opt": {
        **COMMON, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS, "init_std": 0.35,
    },
    "phi3": {**LLAMA_BASE, "pad_token_id": 0},
    "qwen3": {**LLAMA_BASE, "head_dim": 16},
}  # fmt: skip


def _rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


def _longrope(half: int, **values: object) -> dict[str, object]:
    short, long = [1.0 + 0.1 * i for i in range(half)], [1.0 + 1.5 * i for i in range(half)]
    return _rope("longrope", short_factor=short, long_factor=long, original_max_position_embeddings=ORIGINAL, **values)


DYNAMIC = {**_rope("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL}
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)


def _partial(share: float, kind: str = "default", **values: object) -> dict[str, object]:
    return _rope(kind, partial_rotary_factor=share, **values)


SIX = {"hidden_size": 96, "num_attention_heads": 6}  # no power of two
SIX_GPT2 = {"n_embd": 96, "n_head": 6}

# name: kind, and what differs from its base
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
    "falcon-7b": ("falcon", {}),
    "falcon-7b-bias": ("falcon", {**SIX, "bias": True, "ffn_hidden_size": 112, "tie_word_embeddings": False}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-180b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "num_attention_heads": 8,
                               **_rope("linear", factor=2.0)}),
    "falcon-11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
                              "tie_word_embeddings": False, "activation": "gelu_pytorch_tanh", **_rope("default", rope_theta=5e5)}),
    "falcon-rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-rw-six-heads": ("falcon", {**SIX, "alibi": True, "multi_query": False, "parallel_attn": False, "num_hidden_layers": 3}),
    "falcon-rotary-heads": ("falcon", {"multi_query": False, "parallel_attn": True, **DYNAMIC}),
    "falcon-shared-key-in-a-row": ("falcon", {"parallel_attn": False, "alibi": True, "layer_norm_epsilon": 1e-3}),
    "pythia": ("gpt_neox", {}),
    "dolly": ("gpt_neox", {**SIX, "tie_word_embeddings": True}),
    "stablelm-alpha": ("gpt_neox", {"use_parallel_residual": False, "layer_norm_eps": 1e-4, "num_hidden_layers": 3}),
    "neox-all-rotary": ("gpt_neox", {**_partial(1.0), "hidden_act": "gelu_fast", "num_attention_heads": 8}),
    "neox-no-attention-bias": ("gpt_neox", {**_partial(0.5, "linear", factor=2.0), "attention_bias": False, "hidden_act": "relu"}),
    "neox-in-a-row-theta": ("gpt_neox", {**SIX, **_partial(0.5, rope_theta=500.0), "use_parallel_residual": False}),
    "mistral-gqa": ("mistral", {"sliding_window": 33, "num_attention_heads": 8}),
    "mistral-no-window": ("mistral", {"sliding_window": None, **_rope("default", rope_theta=1e6)}),
    "mistral-short-window": ("mistral", {"sliding_window": 4, "num_hidden_layers": 3, "tie_word_embeddings": True}),
    "mistral-mqa": ("mistral", {**SIX, "sliding_window": 16, "num_key_value_heads": 1}),
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "mixtral-few": ("mixtral", {"num_local_experts": 2, "num_key_value_heads": 4, "hidden_act": "gelu"}),
    "mixtral-best-one": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 1}),
    "mixtral-best-three": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 56}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "sliding_window": 21, "tie_word_embeddings": True}),
    "mixtral-deep": ("mixtral", {**SIX, "num_local_experts": 3, "num_hidden_layers": 3, "num_key_value_heads": 2}),
    "mpt": ("mpt", {}),
    "mpt-six-heads": ("mpt", {"d_model": 96, "n_heads": 6}),
    "mpt-clipped": ("mpt", {"attn_config": {"clip_qkv": 0.8}}),
    "mpt-scale": ("mpt", {"attn_config": {"softmax_scale": 0.1}, "n_layers": 3}),
    "mpt-eps": ("mpt", {"layer_norm_epsilon": 1e-2, "n_heads": 8}),
    "mpt-clipped-wide": ("mpt", {"d_model": 96, "n_heads": 2, "attn_config": {"clip_qkv": 2.0, "softmax_scale": 0.3}}),
    "starcoder": ("gpt_bigcode", {}),
    "starcoder-own-keys": ("gpt_bigcode", {"multi_query": False}),
    "starcoder-inner": ("gpt_bigcode", {**SIX_GPT2, "n_inner": 100, "activation_function": "gelu"}),
    "starcoder-untied": ("gpt_bigcode", {"tie_word_embeddings": False, "n_layer": 3}),
    "starcoder-unscaled": ("gpt_bigcode", {"scale_attn_weights": False, "multi_query": False, "n_head": 8,
                                           "initializer_range": 0.2}),
    "starcoder-eps": ("gpt_bigcode", {"layer_norm_epsilon": 1e-2, "n_head": 2, "activation_function": "relu"}),
    "gpt2": ("gpt2", {}),
    "gpt2-inner": ("gpt2", {**SIX_GPT2, "n_inner": 100, "activation_function": "gelu", "tie_word_embeddings": False}),
    "gpt2-by-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    "gptj": ("gptj", {}),
    "gptj-inner": ("gptj", {**SIX_GPT2, "rotary_dim": 16, "n_inner": 100, "activation_function": "relu"}),
    "opt": ("opt", {}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 40}),
    "opt-no-bias": ("opt", {**SIX, "word_embed_proj_dim": 96, "enable_bias": False, "activation_function": "gelu",
                            "tie_word_embeddings": False}),
    "bloom": ("bloom", {}),
    "bloom-normed-residual": ("bloom", {"hidden_size": 96, "n_head": 6, "apply_residual_connection_post_layernorm": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1,
                               "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-wide": ("qwen3", {"head_dim": 24, "attention_bias": True, "num_key_value_heads": 1}),
    "phi3": ("phi3", {}),
    # the prompts stay below 128 all the time: transformers' Phi-3 computes all keys anew where a text crosses it, and no other does
    "phi3-longrope": ("phi3", {**_longrope(8), "original_max_position_embeddings": 128, "sliding_window": 29}),
    "phi4-mini": ("phi3", {**_partial(0.75), "hidden_size": 128, "tie_word_embeddings": True}),
    "gemma": ("gemma", {}),
    "gemma-mqa": ("gemma", {"head_dim": 32, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", {}),
    "gemma2-tied": ("gemma2", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 24}),
    "gemma2-all-windows": ("gemma2", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 23}),
}  # fmt: skip
