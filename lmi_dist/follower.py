"""The engine's other ranks: each holds its part of the model and runs every plan that rank 0 publishes. Decides nothing."""

import logging
from pathlib import Path

from lmi_dist.config import EngineConfig
from lmi_dist.errors import DeviceError
from lmi_dist.fitting import before_fitting, fit_pool, is_measured
from lmi_dist.local_link import FollowerLink
from lmi_dist.runner import Runner
from lmi_dist.setup import explain

logger = logging.getLogger(__name__)


class Follower:
    """One rank above 0. It loads what rank 0's engine tells it to, with that engine's choices, so that the two agree.

    Raises on construction what made its own loading fail, or rank 0's.
    """

    def __init__(self, link: FollowerLink) -> None:
        self._link = link
        with link.together():
            setup = link.await_setup()
            told = explain(EngineConfig.of(setup["config"]), available_bytes=setup["available_bytes"], rank=link.ranks.rank)
            if told.device.type == "cuda":
                link.join_gpus(Path(setup["store"]), told.device.place)
            with told.device.judging():
                self._runner = Runner(told.config, told.model, before_fitting(told), link, told.device)
        if is_measured(told):
            with link.together(), told.device.judging():
                plan = link.next_plan()
                assert plan is not None, "rank 0 has told the same configuration, and closes nothing before it serves"
                fit_pool(told, self._runner, plan, link)

    def run(self) -> None:
        """Follow until rank 0 closes its engine. A step that fails here fails on rank 0 too, and the next one comes.
        Raises RankError when rank 0 has ended without a word, DeviceError when the GPU is lost: this process must end."""
        while (plan := self._link.next_plan()) is not None:
            try:
                with self._runner.device.judging():
                    self._runner.forward(plan)
            except DeviceError:
                raise
            except Exception as error:  # the other ranks know: forward has dropped the step
                logger.error("step %d failed on rank %d", plan.step, self._link.ranks.rank, exc_info=error)
