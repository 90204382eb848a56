"""The reference of MPT says what transformers says, where transformers says anything."""

import mpt
import pytest
import torch
from transformers import MptConfig, MptForCausalLM


@pytest.mark.parametrize("heads", [4, 6])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_reference_equals_transformers(heads: int, clip: float | None) -> None:
    torch.manual_seed(heads)
    config = MptConfig(
        d_model=48, n_heads=heads, n_layers=2, vocab_size=96, max_seq_len=64, no_bias=True, attn_config={"clip_qkv": clip}
    )
    model = MptForCausalLM(config).double().eval()
    ids = (5, 17, 80, 3, 42, 42, 1, 63, 9)

    theirs = model(torch.tensor([ids])).logits[0]

    published = {"d_model": 48, "n_heads": heads, "n_layers": 2, "attn_config": {"alibi": True, "clip_qkv": clip}}
    assert torch.allclose(mpt.logits(published, model.state_dict(), ids), theirs, atol=1e-6)
