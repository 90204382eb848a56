"""SantaCoder's and StarCoder's fill-in-the-middle tokens reach the model as they are, and come back if asked for."""

from pathlib import Path

import tiny_models
import tiny_tokenizers

from lmi_dist import Engine, EngineConfig, Request, SamplingParams

FIM = ("<fim-prefix>", "<fim-suffix>", "<fim-middle>")


def test_fill_in_the_middle_tokens_are_untouched(tmp_path: Path) -> None:
    tiny_models.save(tiny_models.build("starcoder"), tmp_path)
    tokenizer = tiny_tokenizers.byte_level.__wrapped__()  # a copy of our own
    tokenizer.add_special_tokens({"additional_special_tokens": list(FIM)})
    tokenizer.save_pretrained(tmp_path)
    prefix, suffix, middle = (tokenizer.convert_tokens_to_ids(name) for name in FIM)
    params = SamplingParams(max_tokens=3, prompt_logprobs=0, skip_special_tokens=False, logit_bias={suffix: 100.0}, temperature=0.0)
    engine = Engine(EngineConfig.of({"model": str(tmp_path), "dtype": "fp32", "cpu_threads": 1, "max_batch_size": 1}))

    engine.add(Request(id="r", prompt="<fim-prefix>def f(x):<fim-suffix>    return y<fim-middle>", params=params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()

    ids = [token.id for token in outputs[0].prompt_tokens]
    assert [id for id in ids if id in (prefix, suffix, middle)] == [prefix, suffix, middle]
    assert ids == tokenizer("<fim-prefix>def f(x):<fim-suffix>    return y<fim-middle>").input_ids
    assert "".join(output.text for output in outputs) == "<fim-suffix>" * 3
