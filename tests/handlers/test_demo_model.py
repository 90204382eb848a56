import json

import pytest
import torch
from lmi_dist_handler import demo_model
from lmi_dist_handler.demo_model import Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

MINIATURE = Recipe(
    vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, context=32, num_steps=60, num_bytes=30_000
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, report) of a miniature."""
    folder = tmp_path_factory.mktemp("cache") / "demo"
    return folder, demo_model.make(folder, MINIATURE)


def test_checkpoint_is_in_hugging_face_format(trained):
    folder, _ = trained
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_chat_template_is_what_was_learned(trained):
    folder, _ = trained
    messages = [{"role": "user", "content": "json.dumps"}]

    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == "<|begin|><|user|>json.dumps<|assistant|>"


def test_report_is_kept_beside_the_model(trained):
    folder, report = trained

    kept = json.loads((folder / "training.json").read_text())
    assert kept["held_out_loss"] == report["held_out_loss"]
    assert Recipe(**kept["recipe"]) == MINIATURE


def test_training_learns(trained):
    _, report = trained

    assert report["held_out_loss"] < torch.tensor(300.0).log().item() - 1.0  # a model that knows nothing has log(vocabulary)


def test_same_recipe_gives_same_model(trained, tmp_path):
    _, report = trained

    again = demo_model.make(tmp_path / "demo", MINIATURE)

    assert again["held_out_loss"] == pytest.approx(report["held_out_loss"], abs=1e-4)


def test_interrupted_training_leaves_no_model(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "train", interrupt)

    with pytest.raises(KeyboardInterrupt):
        demo_model.make(tmp_path / "cache" / "demo", MINIATURE)

    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (9, 4)])
def test_orthogonal_makes_singular_values_alike(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 100

    values = torch.linalg.svdvals(demo_model.orthogonal(matrix))

    assert values.min() > 0.3
    assert values.max() < 1.5


def test_windows_predict_each_token_once():
    windows = demo_model._windows(torch.arange(10), 3)

    assert windows[:, 1:].flatten().tolist() == list(range(1, 10))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_demo_model_beats_a_bigram_model(tmp_path):
    report = demo_model.make(tmp_path / "demo", Recipe())

    assert report["held_out_loss"] < report["bigram_loss"]
