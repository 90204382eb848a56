"""A job says what its candidates say, or, when they are ranked, only the best and only at the end."""

import tiny_tokenizers

from lmi_dist.answers import Job
from lmi_dist.request import ModelInput, Output, Request, SamplingParams
from lmi_dist.sampler import Choice
from lmi_dist.sequence import Finished
from lmi_dist.text import TextDecoder

TEXT = TextDecoder(tiny_tokenizers.byte_level())
A, B = TEXT.tokenizer.convert_tokens_to_ids(["a", "b"])
EOS = 2


def job_of(**params) -> Job:
    request = Request(id="r", prompt=(5, 6), params=SamplingParams(**params))
    return Job(request, ModelInput((5, 6)), seed=0, eos_ids=frozenset({EOS}), text=TEXT, first_sequence=10)


def say(job: Job, index: int, *choices: Choice, reason="length") -> list[Output]:
    """Give a candidate these tokens; the last one ends it."""
    candidate, sent = job.candidates[index], []
    for place, choice in enumerate(choices, start=1):
        ended = Finished(candidate.sequence_id, reason, 1) if place == len(choices) else None
        sent += job.release(candidate.take(choice, ended))
    return sent


def test_candidates_have_sequences_and_seeds_of_their_own():
    candidates = job_of(n=3).candidates

    assert [candidate.sequence_id for candidate in candidates] == [10, 11, 12]
    assert len({candidate.seed for candidate in candidates}) == 3


def test_streaming_job_says_all_at_once():
    outputs = say(job_of(), 0, Choice(A), Choice(B), Choice(EOS), reason="eos_token")

    assert [(output.text, output.finish_reason) for output in outputs] == [("a", None), ("b", None), ("", "eos_token")]
    assert outputs[-1].tokens[0].is_special


def test_ranked_job_waits_for_all():
    job = job_of(n=1, best_of=2)

    first = say(job, 0, Choice(A, -2.0), Choice(A, -1.0))
    second = say(job, 1, Choice(B, -0.5), Choice(A, -0.5))

    assert first == []
    assert [(output.index, output.text, output.cumulative_logprob) for output in second] == [(0, "ba", -1.0)]
    assert [token.logprob for token in second[0].tokens] == [None, None]


def test_equally_good_candidates_keep_their_order():
    job = job_of(n=2, best_of=3)

    outputs = [say(job, index, Choice(id, -1.0)) for index, id in enumerate((A, B, B))][-1]

    assert [output.text for output in outputs] == ["a", "b"]


def test_failed_candidates_come_last():
    job = job_of(n=2, best_of=3)
    for index in (0, 2):
        job.release(job.candidates[index].end("abort"))

    outputs = say(job, 1, Choice(B, -9.0))

    assert [(output.text, output.finish_reason) for output in outputs] == [("b", "length"), ("", "abort")]


def test_stop_string_counts_more_than_length():
    (output,) = say(job_of(stop=("a",)), 0, Choice(A))

    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop_sequence", "a")


def test_stop_string_may_come_out_with_the_end():
    (*_, output) = say(job_of(stop=("\ufffd",)), 0, Choice(A), Choice(TEXT.tokenizer.convert_tokens_to_ids("ð")))

    assert (output.text, output.finish_reason) == ("", "stop_sequence")
    assert output.num_generated_tokens == 2


def test_held_back_text_is_given_at_an_abort():
    job = job_of(stop=("ab",))
    (held,) = job.release(job.candidates[0].take(Choice(A), None))

    assert held.text == ""
    assert job.candidates[0].end("abort").text == "a"


def test_ignored_eos_ends_nothing():
    assert job_of(ignore_eos=True).stop_ids == frozenset()
    assert job_of(ignore_eos=True, stop_token_ids=(7,)).stop_ids == {7}
    assert job_of(stop_token_ids=(7,)).stop_ids == {7, EOS}


def test_prompt_tokens_are_said_once():
    job = job_of(prompt_logprobs=1)
    job.prompt_choices.append(Choice(6, -0.5, ((A, -0.1),)))

    outputs = say(job, 0, Choice(A), Choice(B))

    assert [[token.id for token in output.prompt_tokens] for output in outputs] == [[5, 6], []]
    assert outputs[0].prompt_tokens[1].top[0].text == "a"
