"""Stands in for DJL's djl_python_engine.py: arguments, files, marker, one connection, its sync loop and today's async one."""

import asyncio
import contextlib
import inspect
import logging
import os
import queue
import signal
import socket
import sys
import threading

SOCKET_ACCEPT_TIMEOUT = 30.0

for target, source in (("WORLD_SIZE", "SIZE"), ("LOCAL_RANK", "LOCAL_RANK"), ("RANK", "RANK")):  # before anything else
    if f"OMPI_COMM_WORLD_{source}" in os.environ:
        os.environ[target] = os.environ[f"OMPI_COMM_WORLD_{source}"]

from djl_python.arg_parser import parse  # noqa: E402
from djl_python.codec import IS_TODAYS, MINOR  # noqa: E402
from djl_python.inputs import Input  # noqa: E402
from djl_python.service import ModelService, failure, reply_of  # noqa: E402


class Engine:
    def __init__(self, arguments, service):
        self.service = service
        self.is_async = IS_TODAYS and arguments.async_mode
        rank = os.environ.get("OMPI_COMM_WORLD_RANK")
        self.path = None
        if arguments.sock_type == "unix":
            self.path = arguments.sock_name + ("" if rank is None else f".{rank}")
            self.clean()
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(self.path)
        else:
            self.socket = socket.socket(socket.AF_INET)
            address = "127.0.0.1" if MINOR < 29 else arguments.sock_name or "0.0.0.0"
            self.socket.bind((address, int(arguments.port) + (int(rank or 0) if MINOR >= 29 else 0)))

    @property
    def pid_path(self):
        return f"{self.path}.pid"

    def clean(self):
        if os.path.exists(self.pid_path):
            with open(self.pid_path) as file, contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.readline()), signal.SIGKILL)
        with open(self.pid_path, "w") as file:
            file.write(str(os.getpid()))
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.path)

    def run(self):
        self.socket.settimeout(SOCKET_ACCEPT_TIMEOUT)
        self.socket.listen(128)
        logging.info("Python engine started.")
        connection, _ = self.socket.accept()
        connection.setblocking(True)
        if self.is_async:
            asyncio.run(self.serve(connection))
        while True:
            inputs = Input()
            inputs.read(connection)
            self.reply(inputs).send(connection)

    def reply(self, inputs):
        try:
            return reply_of(self.service.prepare(inputs)(inputs))
        except Exception as error:
            return failure(error)

    async def serve(self, connection):
        """One thread receives, one sends, the loop calls: as today's async engine does."""
        loop = asyncio.get_running_loop()
        replies, over = queue.Queue(), loop.create_future()

        def receive():
            try:
                while True:
                    inputs = Input()
                    inputs.read(connection)
                    asyncio.run_coroutine_threadsafe(self.answer(inputs, replies), loop)
            except (ValueError, OSError) as error:
                loop.call_soon_threadsafe(over.set_exception, error)

        def send():
            while True:
                replies.get().send(connection)

        threading.Thread(target=receive, daemon=True).start()
        threading.Thread(target=send, daemon=True).start()
        await over

    async def answer(self, inputs, replies):
        tracking_id = inputs.get_property("request_tracking_id")

        def put(output):
            if tracking_id:
                output.add_property("request_tracking_id", tracking_id)
            replies.put(output)

        try:
            result = await self.service.prepare(inputs)(inputs)
        except Exception as error:
            put(failure(error, message="service.invoke_handler_async() failure"))
            return
        if inspect.isasyncgen(result):
            async for output in result:
                put(output)
        else:
            put(reply_of(result))


def main():
    form = "%(levelname)s::%(message)s" if IS_TODAYS else "%(message)s"
    logging.basicConfig(stream=sys.stdout, format=form, level=logging.INFO)
    engine = None
    try:
        arguments = parse(sys.argv[1:])
        os.chdir(arguments.model_dir)
        engine = Engine(arguments, ModelService(arguments))
        engine.run()
    except Exception:
        logging.exception("Python engine process died")
    finally:
        logging.info("%s - Python process finished", os.getpid())
        sys.stdout.flush()
        if engine is not None and engine.path:
            for path in (engine.path, engine.pid_path):
                with contextlib.suppress(OSError):
                    os.remove(path)
    sys.exit(1)


if __name__ == "__main__":
    main()
