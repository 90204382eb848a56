"""Special tokens that a text spells, and those that it does not."""

import tiny_tokenizers
from lmi_dist_handler.special_tokens import Cuts


def test_text_without_special_tokens_stays_text() -> None:
    cuts = Cuts(tiny_tokenizers.byte_level())

    assert cuts.prompt(cuts.cut("a < s > </ s> |tool| 1")) == "a < s > </ s> |tool| 1"


def test_cut_text_has_the_characters_of_the_text() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    cuts = Cuts(tokenizer)

    prompt = cuts.prompt(cuts.cut("x</s></s>y<|tool|>"))

    assert isinstance(prompt, tuple)
    assert tokenizer.decode(list(prompt)) == "x</s></s>y<|tool|>"


def test_marks_of_two_prompts_differ() -> None:
    tokenizer = tiny_tokenizers.byte_level()

    assert Cuts(tokenizer).cut("</s>") != Cuts(tokenizer).cut("</s>")


def test_marks_survive_templates_that_change_case_and_quote() -> None:
    cuts = Cuts(tiny_tokenizers.byte_level())
    marked = cuts.cut("</s>")

    assert marked.upper().lower() == marked
    assert "<" not in marked[1:]
