"""The table of architectures: README lists it, each row leads to a class, and the words of config.json are found."""

import re
from pathlib import Path

import pytest

from lmi_dist.config import ConfigKeys
from lmi_dist.models import ARCHITECTURES, Architecture, model_class

README = Path(__file__).parents[3] / "README.md"


def test_readme_lists_the_table() -> None:
    section = README.read_text(encoding="utf-8").split("## Models")[1].split("\n## ")[0]

    assert set(re.findall(r"`(\w+For\w+|\w+Model)`", section)) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_leads_to_a_model(name: str) -> None:
    assert callable(model_class(name))


def test_rows_words_defaults_and_facts_meet_the_file() -> None:
    row = Architecture(
        module="llama",
        names={"hidden_size": "n_embd"},
        defaults={"rope_theta": 5.0, "vocab_size": 7},
        facts={"qkv_bias": True},
    )

    keys = row.standard(ConfigKeys({"n_embd": 3, "vocab_size": 9, "qkv_bias": False, "sliding_window": 4}, "config.json"))

    assert (keys.integer("hidden_size"), keys.integer("vocab_size"), keys.number("rope_theta")) == (3, 9, 5.0)
    assert keys.boolean("qkv_bias", default=False)
    assert "sliding_window" not in keys  # not windowed
