"""The worker's arguments (contract 1.6): each version knows its own only."""

import argparse

from djl_python.codec import IS_TODAYS, MINOR


def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-dir", required=True)
    parser.add_argument("--entry-point")
    parser.add_argument("--sock-type", required=True, choices=["unix", "tcp"])
    parser.add_argument("--sock-name")
    parser.add_argument("--port")
    parser.add_argument("--device-id", default="-1")
    parser.add_argument("--tensor-parallel-degree", type=int)
    if MINOR >= 29:
        parser.add_argument("--pipeline-parallel-degree", type=int)
        parser.add_argument("--cluster-size", type=int)
        parser.add_argument("--recommended-entry-point")
    if IS_TODAYS:
        parser.add_argument("--log-level", default="info")
        parser.add_argument("--async-mode", action=argparse.BooleanOptionalAction, default=False)
    arguments = parser.parse_args(argv)
    if arguments.sock_type == "unix" and not arguments.sock_name:
        raise ValueError("Missing sock-name argument.")
    if arguments.sock_type == "tcp" and not arguments.port:
        raise ValueError("Missing port argument.")
    return arguments
