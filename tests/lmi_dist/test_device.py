"""Which device is chosen and why, and what is said of one that cannot be used, has no memory left or is lost. No GPU is here: what
torch reports of it is set by the tests."""

from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import tiny_models
import torch
from fake_cuda import FakeCuda

from lmi_dist import Engine, EngineConfig, Request, SamplingParams, explain, ops
from lmi_dist.device import CPU, Device, choose_device
from lmi_dist.errors import ConfigError, DeviceError, KernelError, MemoryPlanError

NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading"
GPU = Device("cuda", torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda.install(monkeypatch)


def choose(rank: int = 0, **values: Any) -> Device:
    return choose_device(EngineConfig.of({"model": "m", **values}), rank)


# ---- the choice ----


def test_auto_takes_a_gpu_that_can_be_used(gpu: FakeCuda) -> None:
    chosen = choose()

    assert (chosen.type, chosen.place, chosen.column) == ("cuda", torch.device("cuda", 0), "cuda")
    assert chosen.reason == "NVIDIA H200, device=auto"


def test_each_rank_takes_a_gpu_of_its_own(gpu: FakeCuda) -> None:
    gpu.num_gpus = 4

    assert [choose(rank, tensor_parallel_degree=4).place.index for rank in range(4)] == [0, 1, 2, 3]


def test_auto_without_a_gpu_is_the_cpu_and_says_why(gpu: FakeCuda) -> None:
    gpu.init_error = NO_DRIVER

    chosen = choose()

    assert chosen.type == "cpu"
    assert chosen.reason.startswith("no GPU to use: there is no NVIDIA driver; install one")


def test_cpu_is_taken_where_it_is_asked_for(gpu: FakeCuda) -> None:
    assert choose(device="cpu") == CPU
    assert choose(kernels="cpu").reason == "kernels=cpu runs on it"
    assert choose(kernels="torch").type == "cpu"


def test_kernels_ask_for_a_gpu_too(gpu: FakeCuda) -> None:
    assert choose(kernels="cuda").type == "cuda"

    gpu.num_gpus = 0
    with pytest.raises(
        ConfigError, match=r"^kernels=cuda cannot be: no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or"
    ):
        choose(kernels="cuda")


@pytest.mark.parametrize(("device", "kernels"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "sim"), ("cuda", "torch")])
def test_kernels_must_run_on_the_device(device: str, kernels: str) -> None:
    with pytest.raises(ConfigError, match=f"kernels={kernels} does not run on device={device}; leave one of them out"):
        EngineConfig.of({"model": "m", "device": device, "kernels": kernels})


def test_this_machine_has_no_gpu_that_torch_could_use() -> None:
    """Nothing faked: whatever torch is installed and whatever is missing, there is a sentence."""
    if torch.cuda.is_available():
        assert choose().type == "cuda"
    else:
        with pytest.raises(ConfigError, match=r"device=cuda cannot be: .*, or use device=cpu$"):
            choose(device="cuda")


# ---- what stands against a GPU ----


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"is_built": False}, "this torch (2.13.0+cpu) is built without CUDA; install one that is built with it"),
        (
            {"init_error": NO_DRIVER},
            "there is no NVIDIA driver; install one, and in a container start it with the GPUs (docker run --gpus all)",
        ),
        (
            {"init_error": OLD_DRIVER},
            "the NVIDIA driver is too old: it knows CUDA 11.4, and this torch needs 13.0; install a newer driver, or a torch that "
            "is built for the older CUDA",
        ),
        ({"init_error": "No CUDA GPUs are available"}, "no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"num_gpus": 0}, "no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (
            {"init_error": "Unexpected error from cudaGetDeviceCount().\nError 802: system not yet initialized"},
            "CUDA does not start: Unexpected error from cudaGetDeviceCount().; look at nvidia-smi",
        ),
        (
            {"name": "Tesla T4", "capability": (7, 5)},
            "Tesla T4 has compute capability 7.5, and our kernels need 8.0; take a newer GPU",
        ),
        (
            {"library": "liblmi_cuda.so is not built; install the package where there is nvcc, with LMI_CUDA=ON"},
            "liblmi_cuda.so is not built; install the package where there is nvcc, with LMI_CUDA=ON",
        ),
        (
            {"library": ("80-real", "90a-real"), "name": "NVIDIA B200", "capability": (10, 0)},
            "liblmi_cuda.so is built for 80-real 90a-real, and NVIDIA B200 has compute capability 10.0; build it with "
            "LMI_CUDA_ARCHITECTURES=100-real or release",
        ),
    ],
)
def test_obstacle_is_one_sentence_with_the_way_out(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for name, value in facts.items():
        setattr(gpu, name, value)

    with pytest.raises(ConfigError) as caught:
        choose(device="cuda")

    assert str(caught.value) == f"device=cuda cannot be: {sentence}, or use device=cpu"
    assert choose().reason == f"no GPU to use: {sentence}"


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (9, 0), False),
        ("89-real", (8, 6), False),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("100-real", (10, 3), True),
        ("120", (12, 1), True),
        ("80", (9, 0), True),
        ("120", (10, 0), False),
    ],
)
def test_library_runs_where_its_code_does(gpu: FakeCuda, built_for: str, capability: tuple[int, int], runs: bool) -> None:
    gpu.library, gpu.capability = (built_for,), capability

    assert choose().type == ("cuda" if runs else "cpu")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus_are_refused(gpu: FakeCuda, device: str) -> None:
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_degree=2 takes as many GPUs, and 1 is visible; lower it, make more visible"
    ):
        choose(1, device=device, tensor_parallel_degree=2)


# ---- what goes wrong later ----


def test_memory_that_ran_out_is_told_with_the_figures(gpu: FakeCuda) -> None:
    gpu.free_bytes = 512_000_000
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which"
    )

    told = GPU.judge(error)

    assert isinstance(told, MemoryPlanError)
    assert str(told) == (
        "the GPU is out of memory: 2.00 GiB was asked for, 0.512 GB of 80.000 GB was free, and this process holds 3.000 GB for "
        "tensors; lower gpu_memory_utilization, max_model_len, max_rolling_batch_size or max_rolling_batch_prefill_tokens, raise "
        "tensor_parallel_degree, or take a quantized checkpoint (quantize)"
    )


def test_memory_that_a_kernel_asked_for_is_told_too(gpu: FakeCuda) -> None:
    told = GPU.judge(KernelError("attention: 9600 bytes for scratch: out of memory"))

    assert isinstance(told, MemoryPlanError)
    assert "9600 bytes was asked for" in str(told)


def test_error_that_stays_is_a_lost_gpu(gpu: FakeCuda) -> None:
    gpu.lasting_error = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"

    told = GPU.judge(KernelError("attention: an illegal memory access was encountered"))

    assert isinstance(told, DeviceError)
    assert "the GPU is lost to this process, which ends and is started again: CUDA error: an illegal memory access" in str(told)


def test_other_errors_stay_what_they_are(gpu: FakeCuda) -> None:
    error = KernelError("attention: D must be a multiple of 8")

    assert GPU.judge(error) is error
    assert CPU.judge(torch.OutOfMemoryError("CUDA out of memory")).__class__ is torch.OutOfMemoryError


# ---- in the engine ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.build("llama2-gqa"), tmp_path)


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with ops.using("cpu", 1):
        fake = fake_cuda.install_with_tensors(monkeypatch)
        made = Engine(EngineConfig(model=str(folder), device="cuda", dtype="fp32", cpu_threads=1))
        made.add(Request(id="a", prompt="x", params=SamplingParams(max_tokens=1)))
        yield made, fake, monkeypatch


def test_explain_shows_the_device_and_why(folder: Path, gpu: FakeCuda) -> None:
    gpu.capability = (7, 5)

    with ops.using("cpu", 1):
        lines = explain(EngineConfig(model=str(folder))).lines

    assert "device cpu (no GPU to use: NVIDIA H200 has compute capability 7.5, and our kernels need 8.0; take a newer GPU)" in lines


def test_step_that_runs_out_of_memory_ends_its_requests_alone(engine: Any) -> None:
    made, _, patch = engine
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with patch.context() as failing:
        failing.setattr(made._runner, "forward", lambda *_: (_ for _ in ()).throw(error))
        (output,) = made.step()

    made.add(Request(id="b", prompt="x", params=SamplingParams(max_tokens=1)))

    assert "the GPU is out of memory: 2.00 GiB was asked for" in str(output.error)
    assert made.step()[0].error is None


def test_step_on_a_lost_gpu_ends_the_engine(engine: Any) -> None:
    made, fake, patch = engine
    fake.lasting_error = "CUDA error: unspecified launch failure"
    patch.setattr(made._sampler, "draw", lambda *_: (_ for _ in ()).throw(KernelError("sample: unspecified launch failure")))

    with pytest.raises(DeviceError, match="the GPU is lost to this process"):
        made.step()


def test_model_too_large_for_the_gpu_is_told_at_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install_with_tensors(monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 30.00 GiB.")

    monkeypatch.setattr("lmi_dist.weights.Weights.tensor", fail)

    with ops.using("cpu", 1), pytest.raises(MemoryPlanError, match=r"30\.00 GiB was asked for, 79\.000 GB of 80\.000 GB was free"):
        Engine(EngineConfig(model=str(folder), device="cuda"))
