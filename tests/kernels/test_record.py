"""A recorded run of operations, made again by one call: the same bits on new inputs, places used again, obstacles by name."""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import rand

from lmi_dist import ops
from lmi_dist.errors import KernelError
from lmi_dist.ops.linear import PackedWeight

ROWS, WIDTH = 3, 32


@pytest.fixture(params=["cpu", "sim"])
def column(request: pytest.FixtureRequest) -> Iterator[None]:
    """A column whose tensors lie on the CPU; a GPU has graphs for this."""
    with ops.using(request.param, 2):
        yield


def packed() -> PackedWeight:
    weight = ops.pack_linear(WIDTH, WIDTH, torch.float32)
    weight.put(rand(WIDTH, WIDTH, seed=1))
    return weight


def forward(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Long enough that places are used again."""
    for _ in range(4):
        x = ops.linear(ops.rms_norm(x, None, 1e-5), weight, residual=x)
    return x


def record(x: torch.Tensor, weight: PackedWeight, arena: ops.Arena) -> tuple[torch.Tensor, ops.Recording | None, str]:
    recorder = ops.Recorder(arena, len(x))
    return *recorder.run(lambda: forward(x, weight)), recorder.obstacle


def test_replay_gives_the_plain_bits_on_new_inputs(column: None) -> None:
    weight, x = packed(), rand(ROWS, WIDTH, seed=2)
    first, recording, obstacle = record(x, weight, ops.Arena(ROWS))
    assert torch.equal(first, forward(x, weight))
    assert recording is not None, obstacle

    x.copy_(rand(ROWS, WIDTH, seed=3))
    again = recording.replay()

    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, forward(x, weight))


def test_tensors_that_are_gone_leave_their_places(column: None) -> None:
    """Of the forward's eight at most three are needed at once."""
    arena = ops.Arena(ROWS)

    record(rand(ROWS, WIDTH), packed(), arena)

    assert arena.num_bytes == 3 * ROWS * WIDTH * 4


def test_smaller_forwards_take_no_memory_of_their_own(column: None) -> None:
    arena, weight = ops.Arena(ROWS), packed()
    recordings = [record(rand(rows, WIDTH, seed=rows), weight, arena)[1] for rows in (1, 2, ROWS)]
    assert all(recordings)

    assert arena.num_bytes == 3 * ROWS * WIDTH * 4


def test_failing_call_of_a_replay_is_the_plain_error(column: None) -> None:
    x = rand(ROWS, WIDTH)
    _, recording, _ = record(x, packed(), ops.Arena(ROWS))
    assert recording is not None
    recording.calls[-1].args.out.size[0] = ROWS + 1

    with pytest.raises(KernelError, match=r"linear: x has shape|linear: out has shape"):
        recording.replay()


@pytest.mark.parametrize(
    ("obstacle", "what"),
    [
        ("aten.add.Tensor", lambda x: x + 1),
        ("aten.clone", lambda x: x.T.contiguous()),
        ("aten.lift_fresh", lambda x: x[0].new_tensor([1.0])),
        ("aten.zero_", lambda x: x.zero_()),
        ("aten._local_scalar_dense", lambda x: x[0, 0].item()),
    ],
)
def test_what_torch_does_itself_is_an_obstacle(column: None, obstacle: str, what: object) -> None:
    recorder = ops.Recorder(ops.Arena(ROWS), ROWS)
    x = rand(ROWS, WIDTH)

    def run() -> torch.Tensor:
        y = ops.rms_norm(x, None, 1e-5)
        what(y)  # type: ignore[operator]
        return y

    result, recording = recorder.run(run)

    assert result.shape == (ROWS, WIDTH)
    assert recording is None
    assert obstacle in recorder.obstacle


def test_views_are_none(column: None) -> None:
    recorder = ops.Recorder(ops.Arena(ROWS), ROWS)
    x = rand(ROWS, WIDTH)

    def run() -> torch.Tensor:
        y = ops.rms_norm(x, None, 1e-5).view(ROWS, 4, -1)[:, 1:3]
        return ops.rms_norm(y.flatten(1), None, 1e-5)

    _, recording = recorder.run(run)

    assert recorder.obstacle == ""
    assert recording is not None


def test_torch_column_has_nothing_to_record() -> None:
    x = rand(ROWS, WIDTH)

    with ops.using("torch"):
        recorder = ops.Recorder(ops.Arena(ROWS), ROWS)
        _, recording = recorder.run(lambda: ops.rms_norm(x, None, 1e-5))

    assert recording is None
    assert recorder.obstacle == "the torch column has no calls"
