"""Arrays go to a device, and tensors come back from it, in one copy each that nobody waits for."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lmi_dist.staging import Parcel, to_device

ARRAYS = {
    "table": np.arange(6, dtype=np.int32).reshape(2, 3),
    "none": np.empty(0, np.int32),
    "shares": np.array([0.5, -1e30], np.float32),
    "seeds": np.array([2**64 - 1, 7, 0], np.uint64),
}


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cpu":
        yield torch.device("cpu")
        return
    import fake_gpu  # registers a device for the rest of the process

    fake_gpu.waits.clear()
    yield fake_gpu.FAKE_GPU
    assert fake_gpu.waits == []


def test_arrays_keep_their_shapes_and_dtypes(device: torch.device) -> None:
    there = to_device(ARRAYS, device)

    assert {each.device.type for each in there.values()} == {device.type}
    assert {each.data_ptr() % 16 for each in there.values() if each.numel()} == {0}
    for name, array in ARRAYS.items():
        held = getattr(there[name], "held", there[name])
        assert (held.shape, held.dtype) == (array.shape, torch.from_numpy(array).dtype)
        assert held.numpy().tolist() == array.tolist()


def test_parcel_holds_what_was_there_when_it_left(device: torch.device) -> None:
    names = ("table", "none", "shares")
    tensors = [to_device({"x": ARRAYS[name].copy()}, device)["x"] for name in names]

    parcel = Parcel(tensors)
    for tensor in tensors:
        tensor.zero_()

    assert [each.tolist() for each in parcel.open()] == [ARRAYS[name].tolist() for name in names]
