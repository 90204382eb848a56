import torch
from lmi_dist_handler import synthetic
from lmi_dist_handler.synthetic import PRESETS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_synthetic_checkpoint_loads_whole(tmp_path):
    synthetic.write(tmp_path / "tiny", PRESETS["tiny"], num_bytes=20_000)

    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", output_loading_info=True)

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tiny")) == model.config.vocab_size == PRESETS["tiny"].vocab


def test_same_seed_gives_same_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write(tmp_path / name, PRESETS["tiny"], seed=seed, num_bytes=20_000)

    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_presets_have_the_size_of_their_names():
    def num_weights(preset):
        key = preset.hidden // preset.heads * preset.kv_heads
        layer = 2 * preset.hidden * (preset.hidden + key) + 3 * preset.hidden * preset.inner
        return preset.layers * layer + 2 * preset.hidden * preset.vocab

    assert round(num_weights(PRESETS["llama-1.1b"]) / 1e8) == 11
    assert round(num_weights(PRESETS["llama-160m"]) / 1e6) == 162
