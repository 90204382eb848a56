"""text-generation-inference's bodies to engine requests: /generate, /generate_stream and /, which is either, as `stream` says.

Where it differs from the LMI schema: sampling begins with the first word that asks for it, and takes nothing from the checkpoint's
wishes.
"""

import secrets
import uuid

from lmi_dist import Request, SamplingParams
from lmi_dist_handler.fields import Fields
from lmi_dist_handler.images import split_markdown
from lmi_dist_handler.sampling import LMI, Sampling
from lmi_dist_handler.tgi_responses import Tgi, TgiEvents, TgiFormatter, TgiWishes

DEFAULT_NEW_TOKENS = 100
SAMPLING_WORDS = ("temperature", "top_k", "top_p", "typical_p")
SEED_BITS = 53  # of a seed that we choose: clients in JavaScript can send it back
TGI = {name: target for name, target in LMI.items() if name != "n"}


def generate(fields: Fields, route: str, image_token: str | None = None) -> tuple[tuple[Request, ...], TgiFormatter]:
    """The request of a body and the form of its answer. `route` is one of TGI_ROUTES."""
    prompt = fields.text("inputs")
    parameters = fields.section("parameters")
    stream = fields.boolean("stream") or route == "/generate_stream"
    fields.ignore("model")
    _refuse_unbuilt(parameters)
    if stream:
        _refuse_unstreamed(parameters)
    wishes = _wishes(parameters, prompt, is_listed=route == "/" and not stream)
    params = _params(parameters, wishes, stream)
    read = split_markdown(prompt, "inputs", image_token)
    request = Request(id=uuid.uuid4().hex, prompt=read, params=params, truncate=parameters.integer("truncate", 1))
    parameters.warn_of_unknown()
    return (request,), (TgiEvents if stream else Tgi)(wishes)


def _refuse_unbuilt(parameters: Fields) -> None:
    parameters.only("adapter_id", "", way_out="leave it out for the base model")
    parameters.only("grammar")
    parameters.only("watermark", False)


def _refuse_unstreamed(parameters: Fields) -> None:
    if (parameters.integer("best_of", 1) or 1) > 1:
        raise parameters.refuse("best_of", "is for whole answers; leave out best_of or stream")
    if parameters.boolean("decoder_input_details"):
        raise parameters.refuse("decoder_input_details", "is for whole answers; leave out decoder_input_details or stream")


def _wishes(parameters: Fields, prompt: str, *, is_listed: bool) -> TgiWishes:
    return TgiWishes(
        prompt=prompt,
        num_candidates=parameters.integer("best_of", 1) or 1,
        seed=_seed(parameters) if _is_sampled(parameters) else None,
        details=parameters.boolean("details") or parameters.boolean("decoder_input_details"),
        return_full_text=parameters.boolean("return_full_text"),
        top_tokens=bool(parameters.integer("top_n_tokens", 0)),
        is_listed=is_listed,
    )


def _is_sampled(parameters: Fields) -> bool:
    return parameters.boolean("do_sample") or any(name in parameters for name in SAMPLING_WORDS)


def _seed(parameters: Fields) -> int:
    """The client's seed, or one of ours, so that the answer can tell how to get it again."""
    seed = parameters.integer("seed", -(2**63), 2**64 - 1)
    return secrets.randbits(SEED_BITS) if seed is None else seed


def _params(parameters: Fields, wishes: TgiWishes, stream: bool) -> SamplingParams:
    sampling = Sampling(parameters, TGI)
    sampling.values.setdefault("max_tokens", DEFAULT_NEW_TOKENS)
    if wishes.num_candidates > 1:
        sampling.put("n", wishes.num_candidates, parameters.name("best_of"))
    if stream or wishes.details or wishes.num_candidates > 1:
        sampling.values["logprobs"] = parameters.integer("top_n_tokens", 0) or 0
    if parameters.boolean("decoder_input_details"):
        sampling.values["prompt_logprobs"] = 0
    if wishes.seed is None:
        sampling.values["temperature"] = 0.0
    else:
        sampling.values["seed"] = wishes.seed
    return sampling.params()
