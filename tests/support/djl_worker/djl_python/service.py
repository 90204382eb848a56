"""Loads the entry point and calls its functions (contract 1.10, 3.4, 3.5); replies for what goes wrong (2.6)."""

import importlib
import importlib.util
import logging
import os

from djl_python.codec import IS_TODAYS, MINOR
from djl_python.outputs import Output


class ModelService:
    def __init__(self, arguments):
        self.arguments = arguments
        self.model_dir = arguments.model_dir
        self.module = _load(arguments.entry_point, self.model_dir)

    def prepare(self, inputs):
        """Properties that the worker puts into every request."""
        properties = inputs.get_properties()
        properties["model_dir"] = self.model_dir
        properties["device_id"] = self.arguments.device_id
        names = ["tensor_parallel_degree"] + (["pipeline_parallel_degree", "cluster_size"] if MINOR >= 29 else [])
        for name in names:
            if getattr(self.arguments, name):
                properties[name] = getattr(self.arguments, name)
        return getattr(self.module, inputs.get_function_name())


def _load(name, model_dir):
    if os.path.isabs(name):
        spec = importlib.util.spec_from_file_location("model", name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if name.endswith(".py") and not os.path.exists(os.path.join(model_dir, name)):
        raise ValueError(f"entry-point file not found {os.path.join(model_dir, name)}.")
    return importlib.import_module(name.removesuffix(".py"))


def reply_of(result):
    if result is None:
        return Output(code=204, message="No content")
    if not isinstance(result, Output):
        return Output().error(f"Invalid output type: {type(result)}")
    return result


def failure(error, **words):
    logging.exception("Failed invoke service.invoke_handler()")
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return Output(code=507, message=str(error))
    if IS_TODAYS and any(text in str(error) for text in ("No available memory for the cache blocks", "CUDA error: out of memory")):
        return Output(code=507, message=str(error))
    return Output().error(str(error), **words)
