"""What a group's processes print, line by line into the log, with the rank that mpirun's tag tells (djl-contract 1.11, 1.13)."""

import asyncio
import logging
import re
import time

worker_logger = logging.getLogger("lmi_dist_handler.worker")

START_MARKER = "Python engine started."
PROGRESS_INTERVAL_S = 1.0
LEVELS = {name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}
TAG = re.compile(rb"\[\d+,(\d+)\]<std(?:out|err)>: ?")


class WorkerLog:
    """Reads the streams of one group. `started` is set once every rank has said so."""

    def __init__(self, name: str, num_ranks: int) -> None:
        self._name = name
        self._num_missing = num_ranks
        self._last_lines = ("", "")  # of mpirun or of one worker alone, and of a rank
        self.started = asyncio.Event()

    @property
    def last_words(self) -> str:
        """The last line of a rank; what mpirun says after it helps nobody."""
        of_others, of_rank = self._last_lines
        return of_rank or of_others

    async def read(self, stream: asyncio.StreamReader, pid: int, which: str, level: int) -> None:
        """Log until the stream ends. A progress bar ends its states with a carriage return: of those, one a second."""
        rest, last_progress, rank = b"", 0.0, ""
        while data := await stream.read(65536):
            *lines, rest = re.split(rb"(?<=[\r\n])", rest + data)
            for line in lines:
                tag = TAG.match(line)
                rank = f"rank{int(tag[1])}-" if tag else rank
                is_progress = line.endswith(b"\r")
                if not (is_progress and time.monotonic() - last_progress < PROGRESS_INTERVAL_S):
                    last_progress = time.monotonic() if is_progress else last_progress
                    self._log(line[tag.end() if tag else 0 :], f"W-{pid}-{self._name[:15]}-{rank}{which}", level, bool(rank))
                rank = rank if is_progress else ""  # mpirun puts no tag between a bar's states
        self._log(rest, f"W-{pid}-{self._name[:15]}-{which}", level, False)

    def _log(self, data: bytes, who: str, level: int, is_rank: bool) -> None:
        line = data.decode(errors="replace").strip()
        if not line:
            return
        of_others, of_rank = self._last_lines
        self._last_lines = (of_others, line) if is_rank else (line, of_rank)
        if START_MARKER in line:
            self._num_missing -= 1
            if self._num_missing == 0:
                self.started.set()
        word, separator, message = line.partition("::")
        if separator and word in LEVELS:
            level, line = LEVELS[word], message
        worker_logger.log(level, "%s %s", who, line)
