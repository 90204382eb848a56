"""Where a rank's tensors lie: on the CPU, or on a GPU of its own. The one place that asks torch about GPUs, and that says in a
sentence why there is none to use, what ran out of memory, and whether the GPU is lost to this process."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from lmi_dist import ops
from lmi_dist.config import EngineConfig
from lmi_dist.errors import ConfigError, DeviceError, KernelError, LmiError, MemoryPlanError

GPU = "cuda"  # as torch calls it
LEAST_CAPABILITY = (8, 0)  # mma.sync on bf16, cp.async
ON_CPU = ("cpu", "torch", "sim")  # columns whose tensors lie on the CPU
LOWER = (
    "lower gpu_memory_utilization, max_model_len, max_rolling_batch_size or max_rolling_batch_prefill_tokens, "
    "raise tensor_parallel_degree, or take a quantized checkpoint (quantize)"
)


@dataclass(frozen=True, slots=True)
class Device:
    """type: as the option says it. place: where tensors are made. reason: why this one, for people."""

    type: Literal["cpu", "cuda"] = "cpu"
    place: torch.device = torch.device("cpu")  # noqa: RUF009 immutable
    reason: str = "device=cpu"

    @property
    def column(self) -> Literal["auto", "cuda"]:
        """The column of operations that kernels=auto means here."""
        return "cuda" if self.type == "cuda" else "auto"

    def use(self) -> None:
        """Make it the calling thread's, for whatever names no device: streams, and our library's calls."""
        if self.type == "cuda":
            torch.cuda.set_device(self.place)

    def free_bytes(self) -> int:
        """Of a GPU's memory, what nobody holds for tensors that are alive."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.place)[0])

    def total_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.place)[1])

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """What tensors on a GPU took at most at one time while this ran, beside those that were there before."""
        torch.cuda.reset_peak_memory_stats(self.place)
        before = torch.cuda.memory_allocated(self.place)
        run()
        torch.cuda.synchronize(self.place)
        return int(torch.cuda.max_memory_allocated(self.place)) - before

    def judge(self, error: Exception) -> Exception:
        """What went wrong, told better where this device knows more: DeviceError if nothing will work any more,
        MemoryPlanError with the figures if its memory ran out, else the error itself."""
        if self.type == "cpu" or (isinstance(error, LmiError) and not isinstance(error, KernelError)):
            return error
        try:
            torch.cuda.synchronize(self.place)  # an error that stays comes again
        except RuntimeError as lasting:
            return DeviceError(
                f"the GPU is lost to this process, which ends and is started again: {_first_line(lasting)} "
                f"(after: {_first_line(error)})"
            )
        return self._out_of_memory(error) if is_out_of_memory(error) else error

    @contextmanager
    def judging(self) -> Iterator[None]:
        """What goes wrong in here is raised as `judge` tells it."""
        try:
            yield
        except Exception as error:
            told = self.judge(error)
            if told is error:
                raise
            raise told from error

    def _out_of_memory(self, error: Exception) -> MemoryPlanError:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)|(\d+ bytes) for scratch", str(error))
        held = torch.cuda.memory_reserved(self.place)
        return MemoryPlanError(
            f"the GPU is out of memory: {(asked and (asked[1] or asked[2])) or 'more'} was asked for, {_gb(self.free_bytes())} of "
            f"{_gb(self.total_bytes())} was free, and this process holds {_gb(held)} for tensors; {LOWER}"
        )


CPU = Device()


def is_out_of_memory(error: Exception) -> bool:
    """torch's error, or our library's where it asks the driver itself."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, KernelError) and "out of memory" in str(error))


def choose_device(config: EngineConfig, rank: int = 0) -> Device:
    """The device that `device` and `kernels` ask for, on this rank: its own GPU is the rank-th of those that are visible. All
    ranks are taken to be on one machine. Raises ConfigError with what stands against it and the way out."""
    if config.device == "cpu":
        return CPU
    if config.kernels in ON_CPU:
        return Device(reason=f"kernels={config.kernels} runs on it")
    obstacle = find_obstacle(rank)
    if obstacle is None:
        return _gpu(config, rank)
    if config.device == "cuda" or config.kernels == "cuda":
        word = "device" if config.device == "cuda" else "kernels"
        raise ConfigError(f"{word}=cuda cannot be: {obstacle}, or use device=cpu")
    return Device(reason=f"no GPU to use: {obstacle}")


def _gpu(config: EngineConfig, rank: int) -> Device:
    count, degree = torch.cuda.device_count(), config.tensor_parallel_degree
    if degree > count:
        raise ConfigError(
            f"tensor_parallel_degree={degree} takes as many GPUs, and {count} {'is' if count == 1 else 'are'} visible; lower it, "
            f"make more visible (CUDA_VISIBLE_DEVICES), or use device=cpu"
        )
    return Device("cuda", torch.device(GPU, rank), f"{torch.cuda.get_device_name(rank)}, device={config.device}")


def find_obstacle(rank: int = 0) -> str | None:
    """Why this rank's GPU cannot be used, with the way out; None if it can, or if there are fewer GPUs than ranks."""
    return _torch_obstacle() or _gpu_obstacle(min(rank, torch.cuda.device_count() - 1))


def _torch_obstacle() -> str | None:
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) is built without CUDA; install one that is built with it"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return _driver_obstacle(str(error))
    return None if torch.cuda.device_count() else "no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def _driver_obstacle(message: str) -> str:
    """What torch says when CUDA cannot be started, made short."""
    if "no NVIDIA driver" in message:
        return "there is no NVIDIA driver; install one, and in a container start it with the GPUs (docker run --gpus all)"
    too_old = re.search(r"too old \(found version (\d+)\)", message)
    if too_old:
        version = int(too_old[1])
        return (
            f"the NVIDIA driver is too old: it knows CUDA {version // 1000}.{version % 1000 // 10}, and this torch needs "
            f"{torch.version.cuda}; install a newer driver, or a torch that is built for the older CUDA"
        )
    if "No CUDA GPUs" in message:
        return "no GPU is visible; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    return f"CUDA does not start: {message.splitlines()[0]}; look at nvidia-smi"


def _gpu_obstacle(index: int) -> str | None:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return (
            f"{name} has compute capability {_dotted(capability)}, and our kernels need {_dotted(LEAST_CAPABILITY)}; "
            "take a newer GPU"
        )
    try:
        architectures = ops.cuda_architectures()
    except KernelError as error:
        return str(error)
    if not any(_runs(architecture, capability) for architecture in architectures):
        wanted = f"{capability[0]}{capability[1]}{'a' if capability == (9, 0) else ''}-real"
        return (
            f"liblmi_cuda.so is built for {' '.join(architectures)}, and {name} has compute capability {_dotted(capability)}; "
            f"build it with LMI_CUDA_ARCHITECTURES={wanted} or release"
        )
    return None


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for this architecture, as CMake names it, runs on such a GPU: machine code (-real) on later GPUs of one
    generation, with an `a` on that one alone, and what is handed over as PTX too on all later ones."""
    number, _, kind = architecture.partition("-")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built == capability
    same_generation = built[0] == capability[0] and built[1] <= capability[1]
    return same_generation if kind == "real" else built <= capability


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB"
