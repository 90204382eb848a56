"""SantaCoder (Ben Allal et al. 2023) and StarCoder (Li et al. 2023): GPT-2 with one key head for all. GPTBigCodeForCausalLM has
plain linears, and q, k, v in one; santacoder's own GPT2LMHeadCustomModel has linears that lie transposed, and k, v apart from q."""

from lmi_dist.config import ConfigKeys, ModelConfig
from lmi_dist.layers.qkv import Layout, Rows, grouped, joined
from lmi_dist.models.gpt2 import GPT2LMHeadModel, Layer
from lmi_dist.parallel import Heads
from lmi_dist.weights import Weights


def standard_keys(keys: ConfigKeys) -> dict[str, object]:
    """One key head, unless multi_query (or santacoder's attention_head_type) says that each query has its own."""
    kind = keys.choice("attention_head_type", ("multihead", "multiquery"), default="multiquery")
    is_shared = keys.boolean("multi_query", default=kind == "multiquery")
    return {"num_key_value_heads": 1 if is_shared else keys.integer("num_attention_heads")}


class GPTBigCodeForCausalLM(GPT2LMHeadModel):
    """Token ids to logits."""

    def load_layer(self, config: ModelConfig, weights: Weights, layer: int) -> Layer:
        # with a key head a query: q k v of each head; with one for all that is all queries, k, v
        return Layer(config, weights, layer, grouped(f"transformer.h.{layer}.attn.c_attn"), transposed=False)


class GPT2LMHeadCustomModel(GPT2LMHeadModel):
    """Token ids to logits."""

    def load_layer(self, config: ModelConfig, weights: Weights, layer: int) -> Layer:
        prefix = f"transformer.h.{layer}.attn"
        is_shared = config.num_kv_heads == 1
        layout = keys_apart(f"{prefix}.q_attn", f"{prefix}.kv_attn") if is_shared else joined(f"{prefix}.c_attn")
        return Layer(config, weights, layer, layout, transposed=True)


def keys_apart(query: str, key_value: str) -> Layout:
    """Two linears: all queries, and keys and values."""

    def rows(heads: Heads) -> list[Rows]:
        num_keys = heads.num_key * heads.size
        keys = heads.key_features
        values = slice(keys.start + num_keys, keys.stop + num_keys)
        return [
            Rows(query, heads.num_query * heads.size, heads.query_features),
            *(Rows(key_value, 2 * num_keys, part) for part in (keys, values)),
        ]

    return rows
