"""Prompts become token ids as the model expects them, or are refused by field, value and rule."""

import pytest
import tiny_models
import tiny_tokenizers

from lmi_dist.admission import Admission
from lmi_dist.config import EngineConfig
from lmi_dist.errors import RequestError
from lmi_dist.models import read_config
from lmi_dist.request import ImagePart, ModelInput, Request, SamplingParams
from lmi_dist.text import TextDecoder

LENGTH = 128
FOX = tuple(tiny_tokenizers.byte_level()("fox", add_special_tokens=False).input_ids)
BOS = 1


@pytest.fixture(scope="module")
def admission(tmp_path_factory) -> Admission:
    folder = tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path_factory.mktemp("llama"))
    config = EngineConfig(model=str(folder))
    return Admission(config, read_config(folder), LENGTH, TextDecoder(tiny_tokenizers.byte_level()))


def ask(prompt="fox", *, truncate=None, add_special_tokens=True, adapter="", **params) -> Request:
    wishes = SamplingParams(**params)
    return Request(id="a", prompt=prompt, params=wishes, truncate=truncate, add_special_tokens=add_special_tokens, adapter=adapter)


@pytest.mark.parametrize(
    ("request_", "ids"),
    [
        (ask("fox"), (BOS, *FOX)),
        (ask("<s>fox"), (BOS, *FOX)),
        (ask("fox", add_special_tokens=False), FOX),
        (ask("<s>fox", add_special_tokens=False), (BOS, *FOX)),
        (ask("<s><s>fox", add_special_tokens=False), (BOS, BOS, *FOX)),
        (ask(("f", "ox")), (BOS, *FOX)),
        (ask((7, 8, 9)), (7, 8, 9)),
        (ask((1, 1, 7)), (1, 1, 7)),
    ],
)
def test_prompt_becomes_ids(admission, request_, ids):
    assert admission.admit(request_) == ModelInput(ids)


@pytest.mark.parametrize("truncate", [1, 30, 1000])
def test_truncate_keeps_the_last_tokens(admission, truncate):
    prompt = tiny_models.prompt_of(100)

    assert admission.admit(ask(prompt, truncate=truncate)) == ModelInput(prompt[-truncate:])


def test_longest_prompt_leaves_room_for_one_token(admission):
    prompt = tiny_models.prompt_of(LENGTH - 1)

    assert admission.admit(ask(prompt)) == ModelInput(prompt)


@pytest.mark.parametrize(
    ("request_", "field", "told"),
    [
        (ask(""), "prompt", "prompt is empty"),
        (ask(()), "prompt", "prompt is empty"),
        (ask(("", "")), "prompt", "prompt is empty"),
        (ask(tiny_models.prompt_of(LENGTH)), "prompt", r"has 128 tokens, but at most 127 fit \(max_model_len=128.*set truncate"),
        (ask("fox " * 500_000), "prompt", "has 2000000 characters, but at most 1048576 can fit"),
        (ask("fox \ud83d fox"), "prompt", "has half of a surrogate pair"),
        (ask((5, 512)), "prompt", "has token id 512; ids of this model are 0 to 511"),
        (ask((5, -1)), "prompt", "has token id -1"),
        (ask(("look: ", ImagePart(b"png"))), "prompt", "has an image, but this model reads only text"),
        (ask(truncate=0), "truncate", "truncate=0 must be at least 1"),
        (ask(truncate=-5), "truncate", "truncate=-5 must be at least 1"),
        (ask(logprobs=21), "logprobs", "logprobs=21 must be at most 20"),
        (ask(prompt_logprobs=21), "prompt_logprobs", "prompt_logprobs=21 must be at most 20"),
        (ask(logit_bias={512: 1.0}), "logit_bias", "has token id 512"),
        (ask(stop_token_ids=(-3,)), "stop_token_ids", "has token id -3"),
        (ask(adapter="poet"), "adapter", "adapter='poet' is not loaded"),
    ],
)
def test_bad_request_is_refused_by_name(admission, request_, field, told):
    with pytest.raises(RequestError, match=told) as caught:
        admission.admit(request_)

    assert caught.value.field == field
    assert str(caught.value).startswith(field)
