"""The classes that a model's own formatters see."""

from lmi_dist_handler.request_io import Sequence, TextGenerationOutput, TextInput, Token

A, B = Token(1, "a", -0.5), Token(2, "b", -1.0, special_token=True)


def test_tokens_are_handed_out_one_after_the_other() -> None:
    sequence = Sequence(tokens=[A])
    first = sequence.get_next_token()
    sequence.tokens.append(B)
    sequence.finish_reason = "length"

    assert (first, sequence.get_next_token(), sequence.get_next_token()) == (
        (A, True, False),
        (B, False, True),
        (None, False, False),
    )


def test_alternatives_are_handed_out_one_after_the_other() -> None:
    sequence = Sequence(top_tokens=[[A, B]])

    assert (sequence.has_next_top_tokens(), sequence.get_next_top_tokens(), sequence.get_next_top_tokens()) == (True, [A, B], None)


def test_output_shows_tokens_in_the_requests_words() -> None:
    output = TextGenerationOutput(1, TextInput(), prompt_tokens_details=[A])
    output.sequences[0].tokens += [A, B]
    output.sequences[0].top_tokens.append([B])

    assert output.get_tokens_as_dict() == [
        {"id": 1, "text": "a", "log_prob": -0.5}, {"id": 2, "text": "b", "log_prob": -1.0, "special_token": True},
    ]  # fmt: skip
    output.input.tgi_compat = True
    assert output.get_prompt_tokens_as_dict() == [{"id": 1, "text": "a", "logprob": -0.5}]
    assert output.get_top_tokens_as_dict() == [[{"id": 2, "text": "b", "logprob": -1.0, "special": True}]]


def test_token_tells_its_error() -> None:
    assert Token(-1, "", error_msg="bad").as_dict() == {"id": -1, "text": "", "log_prob": None, "error_msg": "bad"}


def test_prompt_has_a_length() -> None:
    assert TextInput(input_ids=[1, 2]).prompt_tokens_length() == 2
