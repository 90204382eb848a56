"""A Plan travels to the other ranks as bytes."""

from lmi_dist.plan import Chunk, Encode, Image, Plan, Span


def test_plan_comes_back_as_it_was() -> None:
    image = Image(digest=b"cat", num_tokens=4, shape=(1, 3, 2, 2), size=(2, 3), pixels=bytes(48))
    decode = Chunk(7, (5,), 20, (9, 3), 4, 1, cross_table=(1, 2), cross_length=18)
    chunk = Chunk(8, (1, 2, 3), 0, (4,), 6, 0, 2, spans=(Span(1, b"cat", 0, 2), Span(3, b"dog", 1, 1)))
    encodes = (Encode(7, (3, 4), (1, 2)), Encode(8, image=image))

    plan = Plan(3, (decode,), (chunk, decode), encodes, (b"dog",))

    assert Plan.of_bytes(plan.to_bytes()) == plan
