"""Checkpoints of every kind are read by name, checked before they are read, and never held twice in memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

from lmi_dist.errors import CheckpointError
from lmi_dist.link import Link
from lmi_dist.weights import Checkpoint, Inventory, Weights

TENSORS = {"a.weight": torch.arange(12.0).view(4, 3), "b.weight": torch.ones(5, dtype=torch.float16), "c.bias": torch.zeros(2)}
Write = Callable[[Path], None]


def write_one(folder: Path) -> None:
    save_file(TENSORS, folder / "model.safetensors")


def write_shards(folder: Path) -> None:
    names = {"model-00001-of-00002.safetensors": ["a.weight", "b.weight"], "model-00002-of-00002.safetensors": ["c.bias"]}
    for file, part in names.items():
        save_file({name: TENSORS[name] for name in part}, folder / file)
    places = {name: file for file, part in names.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def write_bin(folder: Path) -> None:
    torch.save(TENSORS, folder / "pytorch_model.bin")


def write_pt(folder: Path) -> None:
    torch.save({name: TENSORS[name] for name in ("a.weight", "b.weight")}, folder / "model-1-of-2.pt")
    torch.save({"c.bias": TENSORS["c.bias"]}, folder / "model-2-of-2.pt")


KINDS = pytest.mark.parametrize("write", [write_one, write_shards, write_bin, write_pt])


def weights(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return Weights(Checkpoint(folder), dtype, Link())


# ---- files ----


@KINDS
def test_contents_are_known_without_reading(tmp_path: Path, write: Write) -> None:
    write(tmp_path)

    checkpoint = Checkpoint(tmp_path)

    assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
        name: (tuple(x.shape), x.dtype) for name, x in TENSORS.items()
    }
    assert checkpoint.size_bytes == 12 * 4 + 5 * 2 + 2 * 4


@KINDS
def test_tensors_and_their_parts_are_read_by_name(tmp_path: Path, write: Write) -> None:
    write(tmp_path)

    checkpoint = Checkpoint(tmp_path)

    assert all(torch.equal(checkpoint.read(name), x) for name, x in TENSORS.items())
    assert torch.equal(checkpoint.read("a.weight", slice(1, 3), slice(0, 2)), TENSORS["a.weight"][1:3, :2])


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    write_one(tmp_path)

    assert set(Checkpoint(tmp_path).tensors) == set(TENSORS)


def test_files_that_are_no_weights_are_left_alone(tmp_path: Path) -> None:
    write_bin(tmp_path)
    for name in ("training_args.bin", "optimizer.pt", "consolidated.00.safetensors"):
        (tmp_path / name).write_bytes(b"not looked at")

    assert set(Checkpoint(tmp_path).tensors) == set(TENSORS)


class Boom:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no weights"),
        ({"model.safetensors": b""}, "corrupt, truncated or not readable"),
        ({"model.safetensors": b"\xff" * 64}, "corrupt, truncated or not readable"),
        ({"model.bin": b"not a zip"}, "corrupt, truncated or not readable"),
        ({"model-00001-of-00003.safetensors": b"", "model-00003-of-00003.safetensors": b""}, "is one of 3, found 2"),
        ({"model.safetensors.index.json": b"{"}, "is no index of a checkpoint"),
        ({"model.safetensors.index.json": b'{"weight_map": []}'}, "is no index of a checkpoint"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors", "b": "../y.safetensors"}}'},
            "lacks 2 of 2 files of model.safetensors.index.json: y.safetensors, x.safetensors",
        ),
    ],
)
def test_missing_or_corrupt_files_are_told(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)

    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "none")


@KINDS
def test_every_truncation_is_told(tmp_path: Path, write: Write) -> None:
    write(tmp_path)
    file = sorted(path for path in tmp_path.iterdir() if path.suffix != ".json")[0]
    whole = file.read_bytes()

    for size in range(0, len(whole), max(1, len(whole) // 40)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=file.name):
            Checkpoint(tmp_path)


def test_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Boom()}, tmp_path / "model.bin")

    with pytest.raises(CheckpointError, match=r"model\.bin"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("value", [[1], {"model": {"a": torch.ones(1)}}])
def test_pickle_without_tensors_by_name_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "model.bin")

    with pytest.raises(CheckpointError, match="must hold a dict of tensors"):
        Checkpoint(tmp_path)


# ---- Weights ----


def test_tensor_comes_in_the_models_dtype(tmp_path: Path) -> None:
    write_one(tmp_path)

    tensor = weights(tmp_path, torch.bfloat16).tensor("a.weight", (4, 3), slice(1, 4))

    assert torch.equal(tensor, TENSORS["a.weight"][1:].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_join_to_the_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("lmi_dist.weights.PIECE_BYTES", 100)
    whole = torch.randn(37, 8)
    save_file({"w": whole}, tmp_path / "model.safetensors")

    pieces = [(row, piece.clone()) for row, piece in weights(tmp_path, dtype).pieces("w", (37, 8), slice(5, 30), slice(2, 6))]

    assert len(pieces) > 5
    assert [row for row, _ in pieces] == [sum(len(piece) for _, piece in pieces[:i]) for i in range(len(pieces))]
    assert torch.equal(torch.cat([piece for _, piece in pieces]), whole[5:30, 2:6].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_pieces_join_to_the_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("lmi_dist.weights.PIECE_BYTES", 100)
    whole = torch.randn(37, 8)
    save_file({"w": whole.T.contiguous()}, tmp_path / "model.safetensors")

    found = weights(tmp_path, dtype).pieces("w", (37, 8), slice(5, 30), slice(2, 6), transposed=True)
    pieces = [(piece.stride(-1), piece.clone()) for _, piece in found]

    assert len(pieces) > 5
    assert {stride for stride, _ in pieces} == {1}
    assert torch.equal(torch.cat([piece for _, piece in pieces]), whole[5:30, 2:6].to(dtype))


def test_inventory_knows_what_will_be_read(tmp_path: Path) -> None:
    write_one(tmp_path)
    done: list[int] = []
    made = Weights(Checkpoint(tmp_path), torch.float32, Link(), advance=done.append)
    inventory = Inventory(made.checkpoint, torch.float32, Link())

    for weights_of in (inventory, made):
        for name, x in TENSORS.items():
            weights_of.tensor(name, tuple(x.shape))
        weights_of.tensor("a.weight", tuple(TENSORS["a.weight"].shape))  # tied: read twice

    assert sum(done) == inventory.num_bytes > made.checkpoint.size_bytes


@pytest.mark.parametrize(("name", "shape"), [("a.weight", (3, 4)), ("nobody", (1,))])
def test_unexpected_tensor_stops_loading(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    write_one(tmp_path)

    with pytest.raises(CheckpointError, match=name):
        weights(tmp_path).tensor(name, shape)


# ---- Inventory ----


def test_inventory_tells_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    write_one(tmp_path)
    inventory = Inventory(Checkpoint(tmp_path), torch.float32, Link())
    inventory.tensor("a.weight", (3, 4))
    for number in (0, 1, 2, 3, 4, 5, 6, 6, 0):  # asked for in parts: told once
        inventory.tensor(f"layers.{number}", (2,))

    with pytest.raises(CheckpointError) as caught:
        inventory.verify(["bias"])

    message = str(caught.value)
    assert "7 missing (layers.0, layers.1, layers.2, layers.3, layers.4, ...)" in message
    assert "1 of a wrong shape (a.weight has shape [4, 3], expected [3, 4])" in message
    assert "1 not part of this architecture (b.weight)" in message


def test_inventory_of_a_right_checkpoint_is_content(tmp_path: Path) -> None:
    write_one(tmp_path)
    inventory = Inventory(Checkpoint(tmp_path), torch.float32, Link())

    for name, x in TENSORS.items():
        inventory.tensor(name, tuple(x.shape))

    inventory.verify()


# ---- memory ----


@pytest.mark.parametrize(
    ("dtype", "file"),
    [(torch.bfloat16, "model.safetensors"), (torch.float32, "model.safetensors"), (torch.float16, "pytorch_model.bin")],
    ids=["as-it-is", "converted", "bin"],
)
def test_loading_peaks_below_its_promise(tmp_path: Path, dtype: torch.dtype, file: str) -> None:
    tiny_models.write_big(tmp_path, 14, dtype, file)
    script = Path(tiny_models.__file__).with_name("load_and_measure.py")

    told = json.loads(subprocess.check_output([sys.executable, script, tmp_path, "bf16"], text=True))

    assert told["packed"] > 150e6
    assert told["peak"] <= 1.15 * (told["packed"] + told["pool"])


def test_piece_goes_to_a_gpu_from_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here: what torch is asked for is noted, and done on the CPU."""
    save_file({"a": torch.arange(6.0).view(3, 2)}, tmp_path / "model.safetensors")
    made = Weights(Checkpoint(tmp_path), torch.bfloat16, Link(), device=torch.device("cuda", 1))
    asked: list[dict[str, Any]] = []
    empty = torch.empty

    def noted_empty(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append({"pin_memory": pin_memory})
        return empty(*sizes, **{**options, "device": "cpu"})

    def noted_to(x: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        asked.append({"device": device, "non_blocking": non_blocking})
        return x

    monkeypatch.setattr(torch, "empty", noted_empty)
    monkeypatch.setattr(torch.Tensor, "to", noted_to)
    pieces = list(made.pieces("a", (3, 2)))

    assert asked == [{"pin_memory": True}, {"device": torch.device("cuda", 1), "non_blocking": True}]
    assert [(row, piece.dtype, piece.tolist()) for row, piece in pieces] == [(0, torch.bfloat16, [[0, 1], [2, 3], [4, 5]])]
