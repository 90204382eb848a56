"""`lmi-dist`: serve, explain, bench, demo. Errors are one line on stderr and exit status 2."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from lmi_dist import LmiError
from lmi_dist_handler import logs, properties

ELSEWHERE = {
    "bench": "measure the engine or a running server and print a table",
    "demo": "train a tiny model, serve it and talk to it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(words[0] if words else "").parse_args(words)
    try:
        status: int = arguments.run(arguments)
    except LmiError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    return status


def serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal. The exit status is 0 after one, 2 when a model could not be loaded or the port not be had."""
    with logs.early() as early:
        settings = _settings(arguments)
        early.use(settings.server.log_format)
    from lmi_dist_handler.server import serve as serve_until_end  # after the settings: an error in them is told at once

    failure = serve_until_end(settings)
    return 0 if failure is None else _fail(failure)


def explain(arguments: argparse.Namespace) -> int:
    """Print what `serve` would do: options with their origin, memory plan, kernels. Loads no weights."""
    from lmi_dist import explain as explain_engine

    settings = _settings(arguments)
    rest: int | None = None  # of the memory, for the next model: a server loads them one after the other
    for model in settings.models:
        explanation = explain_engine(model.engine_config(), available_bytes=rest)
        rest = explanation.memory.left_bytes + (explanation.config.reserved_memory_mb << 20)
        print(f"model {model.name}")
        _print_table(model.table())
        print("\n".join(explanation.lines))
    return 0


def _settings(arguments: argparse.Namespace) -> properties.Settings:
    given = {"host": arguments.host, "port": arguments.port}
    given |= dict(option.partition("=")[::2] for option in arguments.options)
    return properties.load(arguments.model_dir, arguments={key: value for key, value in given.items() if value is not None})


def _print_table(rows: Sequence[tuple[str, str, str]]) -> None:
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:2]]
    for option, value, origin in rows:
        print(f"  {option:{widths[0]}}  {value:{widths[1]}}  {origin}")


def _fail(sentence: str) -> int:
    print(f"lmi-dist: error: {sentence}", file=sys.stderr)
    return 2


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmi-dist", description="A model server for text generation, compatible with DJL Serving."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, about in (
        ("serve", serve, "serve the models that serving.properties or the environment name"),
        ("explain", explain, "print resolved options, memory plan and kernels; loads no weights"),
    ):
        added = commands.add_parser(name, help=about, description=about)
        _add_model_arguments(added)
        added.set_defaults(run=run)
    for name, about in ELSEWHERE.items():
        added = commands.add_parser(name, help=about, description=about)
        if name == command:  # their imports are heavy
            module = importlib.import_module(f"lmi_dist_handler.{name}")
            module.add_arguments(added)
            added.set_defaults(run=module.run)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-dir", type=Path, help="folder with serving.properties, or with a checkpoint")
    parser.add_argument("--host", help="address to listen at (SERVING_HOST)")
    parser.add_argument("--port", help="port to listen at (SERVING_PORT); 0: any that is free")
    parser.add_argument(
        "-o", dest="options", metavar="KEY=VALUE", action="append", default=[], help="as in serving.properties, option.X=Y"
    )


if __name__ == "__main__":
    sys.exit(main())
