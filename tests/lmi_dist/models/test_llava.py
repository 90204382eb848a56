"""LLaVA 1.5 and 1.6 against transformers' own processor and model on tiny random checkpoints, and equal bits in any company."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import driving
import pytest
import ranks
import tiny_llava
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import CASES, VARIANTS
from tiny_models import Reference
from transformers import AutoModelForImageTextToText, PreTrainedModel

from lmi_dist import CheckpointError, ConfigError, Engine, EngineConfig, ImagePart, Output, Request, RequestError, SamplingParams
from lmi_dist.admission import Admission
from lmi_dist.images import ImageReader, VisionConfig
from lmi_dist.models import read_config
from lmi_dist.plan import Chunk, Encode, Plan, Span
from lmi_dist.request import ModelInput, Prompt
from lmi_dist.runner import Runner
from lmi_dist.scheduler import wants_token
from lmi_dist.sequence import Sequence
from lmi_dist.text import TextDecoder

LENGTH = 500


class Settled(NamedTuple):
    """A variant's checkpoint folder, transformers' model, and of each case what its processor gives and how it goes on."""

    folder: Path
    model: PreTrainedModel
    references: list[tuple[Any, Reference]]


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Settled]:
    @lru_cache
    def make(variant: str) -> Settled:
        model, references = tiny_llava.settled(variant)
        return Settled(tiny_llava.save(model, tmp_path_factory.mktemp(variant), variant), model, references)

    return make


def prompt_of(parts: tuple[str | bytes, ...]) -> Prompt:
    return tuple(part if isinstance(part, str) else ImagePart(part) for part in parts)


def admit(folder: Path, *prompts: Prompt, **values: Any) -> list[ModelInput]:
    config, model = EngineConfig(model=str(folder), **values), read_config(folder)
    vision = VisionConfig.read(model.keys)
    assert vision is not None
    reader = ImageReader(config, vision, folder)
    admission = Admission(config, model, LENGTH, TextDecoder(tiny_llava.tokenizer()), reader)
    return [admission.admit(Request(id="a", prompt=prompt)) for prompt in prompts]


def run(runner: Runner, inputs: dict[int, ModelInput], num_steps: int = 64, **settings: Any) -> dict[int, driving.Course]:
    """Continue each by the most probable tokens through the real scheduler."""
    scheduler = driving.make_scheduler(runner, **settings)
    return run_on(runner, scheduler, inputs, num_steps)


def run_on(runner: Runner, scheduler: Any, inputs: dict[int, ModelInput], num_steps: int = 64) -> dict[int, driving.Course]:
    courses = {number: driving.Course() for number in inputs}
    for number, each in inputs.items():
        scheduler.add(
            Sequence(
                id=number,
                token_ids=list(each.token_ids),
                prompt_length=len(each.token_ids),
                max_tokens=num_steps,
                images=each.images,
            )
        )
    while scheduler.has_work:
        plan = scheduler.plan()
        logits = iter(runner.forward(plan))
        tokens = {}
        for chunk in plan.rows:
            if wants_token(chunk):
                course = courses[chunk.sequence]
                course.logits.append(next(logits).clone())  # the next step may overwrite it
                course.ids.append(int(course.logits[-1].argmax()))
                tokens[chunk.sequence] = course.ids[-1:]
        scheduler.commit(plan, tokens)
    return courses


# ---- against transformers ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_and_pixels_are_the_processors(settled: Callable[[str], Settled], variant: str) -> None:
    folder, _, references = settled(variant)

    inputs = admit(folder, *map(prompt_of, CASES))

    for ours, (theirs, reference) in zip(inputs, references, strict=True):
        assert ours.token_ids == reference.prompt
        pixels = theirs["pixel_values"]
        for placed, expected in zip(ours.images, pixels, strict=True):
            got = torch.frombuffer(bytearray(placed.image.pixels), dtype=torch.float32).view(placed.image.shape)
            expected = expected if expected.dim() == 4 else expected[None]
            assert torch.equal(got, expected[: len(got)])
            assert not expected[len(got) :].any()


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuation_equals_transformers(settled: Callable[[str], Settled], variant: str, kernels: str) -> None:
    folder, _, references = settled(variant)
    runner = driving.make_runner(folder, kernels)

    courses = run(runner, dict(enumerate(admit(folder, *map(prompt_of, CASES)))))

    for number, (_, reference) in enumerate(references):
        assert tuple(courses[number].ids) == reference.ids
        assert tiny_models.relative_error(courses[number].rows, reference.logits) < tiny_models.TOLERANCE


def teacher_forced(model: PreTrainedModel, inputs: Any, ids: tuple[int, ...]) -> torch.Tensor:
    whole = torch.cat((inputs["input_ids"], torch.tensor([ids])), 1)
    images = {
        name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items() if "image" in name or "pix" in name
    }
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=whole, attention_mask=torch.ones_like(whole), **images).logits[0].float()
    return logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_is_as_exact_as_transformers(settled: Callable[[str], Settled], variant: str) -> None:
    folder, model, references = settled(variant)
    theirs, reference = references[0]
    exact = teacher_forced(model, theirs, reference.ids)
    rounded = teacher_forced(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16), theirs, reference.ids)
    (ours,) = admit(folder, prompt_of(CASES[0]))
    (placed,) = ours.images
    ids = ours.token_ids + reference.ids
    table = tuple(range(-(-len(ids) // 16)))
    span = Span(placed.start, placed.image.digest, 0, placed.image.num_tokens)
    chunk = Chunk(0, ids, 0, table, len(ids), len(ids), spans=(span,))

    runner = driving.make_runner(folder, dtype="bf16")
    logits = runner.forward(Plan(step=0, chunks=(chunk,), encodes=(Encode(0, image=placed.image),)))

    allowed = 2 * float((rounded - exact).abs().max())
    assert float((logits - exact).abs().max()) <= allowed
    differs = logits.argmax(1) != exact.argmax(1)
    assert (tiny_models.gap(exact)[differs] < allowed).all()


# ---- equal bits ----


@pytest.fixture(scope="module")
def alone(settled: Callable[[str], Settled]) -> Callable[[str, str], tuple[Runner, dict[int, ModelInput], list[driving.Course]]]:
    """A runner, and the courses of both cases when each runs alone, its prompt in one piece."""

    @lru_cache
    def make(variant: str, dtype: str) -> tuple[Runner, dict[int, ModelInput], list[driving.Course]]:
        folder = settled(variant).folder
        runner = driving.make_runner(folder, dtype=dtype, cpu_threads=2)
        inputs = dict(enumerate(admit(folder, *map(prompt_of, CASES))))
        return runner, inputs, [run(runner, {0: each})[0] for each in inputs.values()]

    return make


BITS = pytest.mark.parametrize(("variant", "dtype"), [(name, ("fp32", "bf16")[i % 2]) for i, name in enumerate(VARIANTS)])
COMPANIES: dict[str, dict[str, Any]] = {
    "mixed batch": {"prefill_chunk_tokens": 100},
    "chunked": {"max_prefill_tokens": 7, "prefill_chunk_tokens": 7},
    "uncut": {"max_prefill_tokens": 7, "prefill_chunk_tokens": 7, "chunked_prefill": False},
}


def assert_same_bits(courses: dict[int, driving.Course], expected: list[driving.Course]) -> None:
    for number, course in enumerate(expected):
        assert torch.equal(courses[number].rows, course.rows)


@BITS
@pytest.mark.parametrize("company", COMPANIES)
def test_bits_do_not_depend_on_company(alone: Any, variant: str, dtype: str, company: str) -> None:
    runner, inputs, expected = alone(variant, dtype)
    others = {2 + i: ModelInput(tiny_models.prompt_of(3 + 5 * i % 70, seed=i)) for i in range(8 if company == "mixed batch" else 0)}
    again = {100 + number: each for number, each in inputs.items()}  # the same images in other sequences

    courses = run(runner, {**inputs, **others, **again}, **COMPANIES[company])

    assert_same_bits(courses, expected)


@BITS
def test_preempted_sequence_has_equal_bits(alone: Any, variant: str, dtype: str) -> None:
    runner, inputs, expected = alone(variant, dtype)
    num_blocks = sum(-(-len(each.token_ids) // 16) for each in inputs.values()) + 3  # enough for both prompts
    scheduler = driving.make_scheduler(runner, num_blocks=num_blocks, window=0)

    courses = run_on(runner, scheduler, inputs)

    assert scheduler.preemptions > 0
    assert_same_bits(courses, expected)


@BITS
def test_prefix_cached_prompt_has_equal_bits(alone: Any, variant: str, dtype: str) -> None:
    runner, inputs, expected = alone(variant, dtype)
    scheduler = driving.make_scheduler(runner, prefix_caching=True)
    run_on(runner, scheduler, inputs)

    courses = run_on(runner, scheduler, inputs)

    assert scheduler.prefix_hit_tokens >= 48
    assert_same_bits(courses, expected)


def test_other_image_finds_no_prefix(alone: Any, settled: Any) -> None:
    runner, inputs, _ = alone("1.5", "fp32")
    scheduler = driving.make_scheduler(runner, prefix_caching=True)
    run_on(runner, scheduler, {0: inputs[0]}, 1)
    text, _, rest = CASES[0]
    (other,) = admit(settled("1.5").folder, prompt_of((text, tiny_llava.png(40, 37, seed=9), rest)))

    courses = run_on(runner, scheduler, {0: other}, 1)

    assert scheduler.prefix_hit_tokens == 0
    assert torch.equal(courses[0].rows, run(runner, {0: other}, 1)[0].rows)


# ---- two ranks ----


def test_two_ranks_say_what_transformers_says(settled: Callable[[str], Settled]) -> None:
    cases = [settled(name) for name in ("1.5", "1.6-mistral")]
    rounds = [(each.folder, admit(each.folder, *map(prompt_of, CASES))) for each in (*cases, cases[0])]

    first, second = ranks.run(2, lambda link, number: ranks.continue_prompts(link, *rounds[number], drive=run_on), len(rounds))

    assert [digest for digest, _ in first] == [digest for digest, _ in second], "equal bits between ranks"
    assert first[0][0] == first[-1][0], "equal bits between runs"
    for each, (_, courses) in zip(cases, first, strict=False):
        for course, (_, reference) in zip(courses, each.references, strict=True):
            assert tuple(course.ids) == reference.ids
            assert tiny_models.relative_error(course.rows, reference.logits) < tiny_models.TOLERANCE


# ---- in the engine ----


@pytest.fixture(scope="module")
def engine(settled: Callable[[str], Settled]) -> Engine:
    folder = settled("1.6").folder
    return Engine(EngineConfig(model=str(folder), dtype="fp32", max_model_len=LENGTH, max_batch_size=4, cpu_threads=1))


def answer(engine: Engine, prompt: Prompt, **values: Any) -> list[Output]:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine.add(engine.prepare(Request(id="a", prompt=prompt, params=params, **values)))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def ids_of(outputs: list[Output]) -> tuple[int, ...]:
    return tuple(token.id for output in outputs for token in output.tokens)


@pytest.mark.parametrize("case", [0, 1])
def test_engine_answers_what_it_sees(settled: Any, engine: Engine, case: int) -> None:
    _, reference = settled("1.6").references[case]

    outputs = answer(engine, prompt_of(CASES[case]))

    assert ids_of(outputs) == reference.ids[:8]
    assert outputs[-1].num_prompt_tokens == len(reference.prompt)


def test_ids_may_hold_images_too(settled: Any, engine: Engine) -> None:
    _, reference = settled("1.6").references[0]
    text, picture, rest = CASES[0]
    encode = tiny_llava.tokenizer()
    prompt = (
        1,
        *encode(text, add_special_tokens=False).input_ids,
        ImagePart(picture),
        *encode(rest, add_special_tokens=False).input_ids,
    )

    assert ids_of(answer(engine, prompt)) == reference.ids[:8]


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        (("look: <image>", ImagePart(tiny_llava.png(9, 9))), {}, r"2 places for images \(<image>\) but 1 images"),
        ("look: <image>", {}, r"1 places for images \(<image>\) but 0 images"),
        ((5, ImagePart(b"no image")), {}, "an image is of no type that is read, which are PNG, JPEG, WEBP, GIF, BMP"),
        (("a", ImagePart(tiny_llava.png(9, 9)[:60])), {}, "an image cannot be decoded"),
        (("a", ImagePart(tiny_llava.png(9, 9, kind="TIFF"))), {}, "an image is of no type that is read"),
        (("a", ImagePart(tiny_llava.png(2000, 10))), {}, "2000 x 10 pixels; one side may be at most 100 times the other"),
        (("a", *[ImagePart(tiny_llava.png(9, 9))] * 17), {}, "prompt has 17 images, but at most 16 are taken"),
        (("a", *[ImagePart(tiny_llava.png(90, 90))] * 9), {}, "but at most 499 fit"),
        (("abcdef", ImagePart(tiny_llava.png(9, 9))), {"truncate": 5}, "truncate=5 would cut a prompt that has images"),
    ],
)
def test_bad_image_is_refused(engine: Engine, prompt: Prompt, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        answer(engine, prompt, **values)

    assert not engine.has_work


# ---- kinds of checkpoints ----


@pytest.mark.parametrize("layout", ["published", "inside"])
@pytest.mark.parametrize("variant", ["1.5", "1.6-mistral"])
def test_each_layout_of_names_loads(settled: Any, tmp_path: Path, variant: str, layout: str) -> None:
    folder, model, references = settled(variant)
    tiny_llava.save(model, tmp_path, variant)
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, x in tensors.items():
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if layout == "inside":
            name = name.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
            name = name if name.startswith("lm_head") else f"model.{name}"
        renamed[name] = x
    positions = {
        f"{'model.' if layout == 'inside' else ''}vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]
    }
    save_file({**renamed, **positions}, tmp_path / "model.safetensors")

    courses = run(driving.make_runner(tmp_path), {0: admit(folder, prompt_of(CASES[0]))[0]}, 4)

    assert tiny_models.relative_error(courses[0].rows, references[0][1].logits[:4]) < tiny_models.TOLERANCE


@pytest.mark.parametrize(
    ("variant", "values", "error", "message"),
    [
        ("1.5", {"vision_feature_layer": -5}, ConfigError, "vision_feature_layer=-5 must be -4 to 3"),
        ("1.5", {"vision_feature_select_strategy": "cls"}, ConfigError, "vision_feature_select_strategy='cls' is not supported"),
        ("1.6", {"vision_feature_select_strategy": "full"}, ConfigError, "must be default where an image is cut into tiles"),
        ("1.6", {"image_grid_pinpoints": [[28, 50]]}, ConfigError, "must be a list of .height, width., multiples of image_size=28"),
        ("1.5", {"projector_hidden_act": "tanh"}, ConfigError, "projector_hidden_act='tanh' is not supported"),
        ("1.5", {"text_config": {"model_type": "qwen2"}}, ConfigError, "model_type='qwen2' is not supported"),
        ("1.5", {"vision_config": {"model_type": "siglip_vision_model"}}, ConfigError, "image_size is missing"),
        ("1.5", {"multimodal_projector_bias": False}, CheckpointError, r"2 not part of this architecture \(multi_modal_projector"),
        ("1.5", {"vision_feature_layer": -1}, None, ""),
    ],
)  # fmt: skip
def test_unlike_config_is_refused_by_name(
    settled: Any, tmp_path: Path, variant: str, values: Any, error: Any, message: str
) -> None:
    tiny_llava.save(settled(variant).model, tmp_path, variant)
    tiny_models.rewrite_config(tmp_path, **values)

    if error is None:
        driving.make_runner(tmp_path)
    else:
        with pytest.raises(error, match=message):
            driving.make_runner(tmp_path)


def test_processor_unlike_the_model_is_refused(settled: Any, tmp_path: Path) -> None:
    tiny_llava.save(settled("1.5").model, tmp_path, "1.5")
    tiny_llava.processor("1.5").__class__(size={"shortest_edge": 14}, crop_size={"height": 14, "width": 14}).save_pretrained(
        tmp_path
    )

    with pytest.raises(CheckpointError, match=r"gives images of \(3, 14, 14\), the model takes \(3, 28, 28\)"):
        admit(tmp_path, "a")


def test_missing_processor_is_told(settled: Any, tmp_path: Path) -> None:
    tiny_llava.save(settled("1.5").model, tmp_path, "1.5")
    (tmp_path / "preprocessor_config.json").unlink()

    with pytest.raises(CheckpointError, match=r"has no image processor.*add preprocessor_config\.json"):
        admit(tmp_path, "a")


def test_caps_are_the_operators(settled: Any) -> None:
    picture = tiny_llava.png(40, 37)

    for values, message in (
        ({"max_image_bytes": 99}, f"an image has {len(picture)} bytes, but at most 99 are taken"),
        ({"max_image_pixels": 1000}, "an image has 40 x 37 pixels, but at most 1000 are taken"),
        ({"max_images": 0}, "prompt has 1 images, but at most 0 are taken"),
    ):
        with pytest.raises(RequestError, match=message):
            admit(settled("1.5").folder, prompt_of(("a", picture)), **values)


def test_turned_and_odd_images_are_read(settled: Any) -> None:
    """EXIF orientation, palettes, transparency and grey: what the client sees is what the model does."""
    import io

    import PIL.Image

    plain = PIL.Image.open(io.BytesIO(tiny_llava.png(40, 20)))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned, grey = io.BytesIO(), io.BytesIO()
    plain.rotate(90, expand=True).save(turned, "PNG", exif=exif)
    plain.convert("LA").save(grey, "PNG")

    ours = admit(
        settled("1.6").folder, *[prompt_of(("a", data)) for data in (tiny_llava.png(40, 20), turned.getvalue(), grey.getvalue())]
    )

    assert ours[0].images[0].image == ours[1].images[0].image
    assert ours[2].images[0].image.size == (20, 40)
