"""Compile to bytecode what a server and its workers import, which `pip install --no-compile` has left out: once here instead of at
each start, where Python may not write it (PYTHONDONTWRITEBYTECODE, a folder of somebody else's)."""

import compileall
import importlib
import sys

MODULES = (
    "lmi_dist.engine", "lmi_dist.follower", "lmi_dist.models.llama", "lmi_dist_handler.cli", "lmi_dist_handler.server",
    "lmi_dist_handler.served", "lmi_dist_handler.worker", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)  # fmt: skip

for name in MODULES:
    importlib.import_module(name)
files = [str(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
for file in files:
    if file.endswith(".py"):
        compileall.compile_file(file, quiet=2)
