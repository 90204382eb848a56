"""Where nvcc is: only who wants CUDA kernels needs it (README)."""

import shutil

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
