"""A model folder's requirements.txt, installed by pip before the model's first worker starts, when allowed (djl-contract 1.9)."""

import asyncio
import contextlib
import logging
import sys
from pathlib import Path

logger = logging.getLogger(__name__)


def requirements_of(folder: Path | None) -> Path | None:
    """The folder's requirements.txt, if it has one."""
    path = folder / "requirements.txt" if folder else None
    return path if path and path.is_file() else None


def pip_arguments(requirements: Path, *, offline: bool) -> list[str]:
    """What pip is asked for. A folder `requirements` beside the file is searched for packages; offline it is all there is."""
    wheels = requirements.with_name("requirements")
    found = ["-f", str(wheels)] if wheels.is_dir() else ["--no-deps"] if offline else []
    index = ["--no-index"] if offline and wheels.is_dir() else []
    return ["-m", "pip", "-q", "install", "-r", str(requirements), *index, *found]


async def install(requirements: Path, *, offline: bool, timeout_s: float) -> None:
    """Run pip. What it does not manage is told in a warning, and the model is tried all the same, as DJL does."""
    logger.info("installing %s", requirements)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *pip_arguments(requirements, offline=offline)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout_s)
    except (TimeoutError, asyncio.TimeoutError):
        logger.warning("%s: pip was not done within model_loading_timeout=%g s; going on without", requirements, timeout_s)
        return
    finally:
        if process.returncode is None:  # it took too long, or the server ends
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
    if process.returncode:
        last = output.decode(errors="replace").strip().rpartition("\n")[2]
        logger.warning("%s: pip failed: %s; going on without", requirements, last)
