"""A device that is none: torch's PrivateUse1 under the name "fakegpu", whose tensors lie in the CPU's memory.

Torch treats them as a GPU's: an operation that mixes them with the CPU's tensors fails, and so does reading their memory. So what
runs on this device brings every tensor to it, and back, by itself. Not faked: that a GPU still works when a call returns; but
`waits` tells what would have waited for that.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CPU = torch.device("cpu")
MAY_MIX = ("copy_", "_copy_from", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")  # as with CUDA


READ = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "repeat_interleave", "unique")  # the host needs their result
waits: list[str] = []  # each call for which the host would have waited for a GPU


class FakeTensor(torch.Tensor):
    """`held` is the tensor on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "FakeTensor":
        assert not isinstance(held, FakeTensor)
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=FAKE_GPU
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"FakeTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = tree_leaves((args, kwargs))
    fakes = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
    others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) and leaf.dim() > 0]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if fakes and others and func.overloadpacket.__name__ not in MAY_MIX:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {FAKE_GPU} and cpu")
    if (
        fakes
        and (func.overloadpacket.__name__ in READ or others or (devices and devices[-1] == CPU))
        and not _is_free(args, kwargs)
    ):
        waits.append(str(func))
    args, kwargs = tree_map_only(FakeTensor, lambda fake: fake.held, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: CPU, (args, kwargs))
    out = func(*args, **kwargs)
    if devices and devices[-1] == CPU:
        return out
    known = {id(fake.held): fake for fake in fakes}
    return tree_map_only(torch.Tensor, lambda each: known[id(each)] if id(each) in known else FakeTensor(each), out)


def _is_free(args: Any, kwargs: Any) -> bool:
    """Whether a copy was told not to wait."""
    return bool(kwargs.get("non_blocking")) or args[-1] is True


def _empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, **_: Any) -> FakeTensor:
    return FakeTensor(torch.empty(size, dtype=dtype, device=CPU))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> FakeTensor:
    return FakeTensor(torch.empty_strided(size, stride, dtype=dtype, device=CPU))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not non_blocking:
        waits.append("copy_")
    source, held = (each.held if isinstance(each, FakeTensor) else each for each in (source, target))
    held.copy_(source)
    return target


_setup_privateuseone_for_python_backend("fakegpu")
FAKE_GPU = torch.device("fakegpu", 0)
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
