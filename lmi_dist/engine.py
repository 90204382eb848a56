"""The engine: requests in, outputs out, one forward a step. Joins scheduler, runner, sampler and text; decides nothing itself.

Not thread-safe: one thread calls everything, and it is the caller's business which.
"""

import logging
import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lmi_dist.admission import Admission
from lmi_dist.answers import Candidate, Job
from lmi_dist.batch import Chosen
from lmi_dist.config import BLOCK_SIZE, EngineConfig
from lmi_dist.errors import DeviceError, LostRankError, OverloadedError, RankError, RequestError, StepError
from lmi_dist.fitting import before_fitting, fit_pool, is_measured, largest_plan
from lmi_dist.flight import Flight
from lmi_dist.images import ImageReader, VisionConfig
from lmi_dist.link import Link
from lmi_dist.meeting import connect
from lmi_dist.pace import Pace
from lmi_dist.parallel import Ranks
from lmi_dist.plan import Plan
from lmi_dist.request import FinishReason, Output, Request
from lmi_dist.runner import Runner
from lmi_dist.sampler import Sampler
from lmi_dist.scheduler import Scheduler
from lmi_dist.sequence import Sequence
from lmi_dist.setup import Explanation, explain, load_tokenizer
from lmi_dist.text import TextDecoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges of now, and counters since the start (num_x of things, seconds of time)."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int  # that a new sequence may take, cached ones among them
    num_steps: int
    num_failed_steps: int
    num_failed_in_a_row: int  # up to the last step; 0 when that one worked
    step_seconds: float
    num_prompt_tokens: int  # of admitted requests
    num_generated_tokens: int
    num_aborted: int  # requests that were ended by `abort` or `reset`
    num_begun: int  # requests that have had their first step, and
    waiting_seconds: float  # the time that they waited for it
    num_preemptions: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    lazy_bytes: int  # of the KV pool and working memory, on all ranks: the system hands them out as they are used; 0 on GPUs
    device: str  # that the ranks run on: cpu or cuda


class Engine:
    """Answers many requests at once. `add` them, then `step` while `has_work`; each step's outputs say what is new.

    Where ranks share the model this is rank 0; `link` leads to the others, which have a Follower each. Raises on construction what
    `explain` raises, CheckpointError if tokenizer or weights cannot be read, and what a Follower raises.
    """

    def __init__(self, config: EngineConfig, link: Link | None = None, *, overlap: bool | None = None) -> None:
        """overlap: whether a step is given to the device before the last one's tokens are known; None: on a GPU, if it is one alone
        (other ranks learn of tokens from the plan)."""
        self._link = link or connect(config.tensor_parallel_degree, Ranks())
        with self._link.together():
            setup = self._load(config)
        if is_measured(setup):
            with self._link.together(), setup.device.judging():
                self._fit(setup)
        self._overlaps = setup.device.type == "cuda" and self._link.ranks.size == 1 if overlap is None else overlap
        self._flight: Flight | None = None  # the step that the device runs between two calls
        self._waited_at = 0.0  # when the last step's tokens were there
        self._sampler = Sampler()
        self._scheduler = _scheduler(self.config, self.memory.num_blocks, self._runner.window)
        self._pace = _pace(self.config, self._scheduler)
        self._jobs: dict[str, Job] = {}
        self._candidates: dict[int, Candidate] = {}  # by sequence
        self._num_sequences = self._num_prompt_tokens = self._num_generated_tokens = 0
        self._num_failed_steps = self._num_failed_in_a_row = self._num_aborted = self._num_begun = 0
        self._step_seconds = self._waiting_seconds = 0.0

    def _load(self, config: EngineConfig) -> Explanation:
        """Everything that may fail, but for a GPU's KV pool."""
        setup = explain(config)
        for line in setup.lines:
            logger.info("%s", line)
        self.config, self.model, self.memory = setup.config, setup.model, setup.memory
        self.max_model_len = setup.memory.max_model_len
        vision = VisionConfig.read(self.model.keys)
        images = None if vision is None else ImageReader(self.config, vision, self.model.folder)
        self._share(setup)
        with ThreadPoolExecutor(max_workers=1) as pool:  # the tokenizer takes a second of Python, weights wait for memory
            tokenizer = pool.submit(load_tokenizer, config, setup.model.folder)
            with setup.device.judging():
                self._runner = Runner(
                    self.config,
                    self.model,
                    before_fitting(setup),
                    self._link,
                    setup.device,
                    meanwhile=lambda: tokenizer.done() and tokenizer.result(),  # a broken one is told now, and not behind 100 GB
                )
        self.tokenizer = tokenizer.result()
        self._text = TextDecoder(self.tokenizer)
        self._admission = Admission(self.config, self.model, self.max_model_len, self._text, images)
        eos = self.tokenizer.eos_token_id
        self._eos_ids = frozenset(self.model.eos_token_ids) | (set() if eos is None else {eos})
        return setup

    def _share(self, setup: Explanation) -> None:
        """Tell the other ranks what to load, and meet their GPUs."""
        with tempfile.TemporaryDirectory(prefix="lmi-dist-") as folder:
            store = Path(folder) / "store"  # where GPUs find each other
            told = {"config": self.config.model_dump(mode="json"), "available_bytes": setup.available_bytes, "store": str(store)}
            self._link.share_setup(told)
            if setup.device.type == "cuda":
                self._link.join_gpus(store, setup.device.place)

    def _fit(self, setup: Explanation) -> None:
        """Take the KV pool that the GPUs have room for now."""
        plan = largest_plan(setup)
        self._link.publish(plan)
        self.memory = fit_pool(setup, self._runner, plan, self._link)
        self.config = self.config.model_copy(update={"kv_cache_memory_bytes": self.memory.pool_bytes})

    # ---- the four verbs ----

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it breaks a rule, OverloadedError if too many wait; then nothing has changed."""
        if request.id in self._jobs:
            raise RequestError(f"id={request.id!r} is the id of a request that is still being answered; choose another", "id")
        input = self._admission.admit(request)
        if self._scheduler.num_waiting >= self.config.max_queue_size:
            raise OverloadedError(
                f"{self._scheduler.num_waiting} requests wait and max_queue_size={self.config.max_queue_size}; try later"
            )
        seed = secrets.randbits(64) if request.params.seed is None else request.params.seed
        job = Job(request, input, seed, self._eos_ids, self._text, self._num_sequences)
        self._num_sequences += len(job.candidates)
        self._num_prompt_tokens += input.num_tokens
        self._jobs[request.id] = job
        for candidate in job.candidates:
            self._start(candidate)

    def step(self) -> list[Output]:
        """What one forward comes to. Where steps overlap, the next one is planned and given to the device before this one's tokens
        are waited for; a sequence that they end runs in it for nothing, and nobody sees what comes out.
        A failed one ends the requests that were in it with StepError (LostRankError: all that come are going to fail); the others
        go on. Raises DeviceError when the GPU is lost: this process must end, and another can begin."""
        started = time.perf_counter()
        flight, self._flight = self._flight, None
        if flight is None or not self._is_wanted(flight):
            flight = self._begin(flight, started)
            if flight is None:
                return []
        ahead = self._go_ahead(flight, started)
        try:
            choices, broken = flight.wait()
        except Exception as error:
            return self._fail(flight, ahead, error)
        self._note_pace(flight)
        outputs = [output for job in broken for output in self._end(job, "error", _broken(flight.plan))]
        self._num_failed_in_a_row = self._num_failed_in_a_row + 1 if outputs and not choices else 0
        finished = self._scheduler.commit(flight.plan, {candidate.sequence_id: (choice.id,) for candidate, choice in choices})
        ended = {end.sequence_id: end for end in finished}
        for candidate, choice in choices:
            candidate.draws.record(choice.id)
        if ahead is not None:
            ahead.draw(self._sampler, self._candidates, ended)
            self._flight = ahead
        for candidate, choice in choices:
            outputs += self._send(candidate, candidate.take(choice, ended.get(candidate.sequence_id)))
        self._num_generated_tokens += len(choices)
        self._step_seconds += time.perf_counter() - started
        return outputs

    def abort(self, request_id: str) -> list[Output]:
        """End a request now and give its blocks back. Returns its last outputs, or nothing if it is not (or no more) known."""
        job = self._jobs.get(request_id)
        return [] if job is None else self._abort(job)

    def reset(self) -> list[Output]:
        """Abort everything and forget all cached prefixes. Returns the last outputs of what was aborted."""
        outputs = [output for job in list(self._jobs.values()) for output in self._abort(job)]
        self._scheduler.reset()
        self._flight = None
        return outputs

    # ---- around them ----

    def prepare(self, request: Request) -> Request:
        """The request with its images read, for `add`, which else does it itself; for any thread. Raises RequestError."""
        return self._admission.prepare(request)

    @property
    def image_token(self) -> str | None:
        """How a text spells the place of an image; None: this model sees none."""
        return self._admission.image_token

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_available,
            num_steps=scheduler.num_steps,
            num_failed_steps=self._num_failed_steps,
            num_failed_in_a_row=self._num_failed_in_a_row,
            step_seconds=self._step_seconds,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_aborted=self._num_aborted,
            num_begun=self._num_begun,
            waiting_seconds=self._waiting_seconds,
            num_preemptions=scheduler.preemptions,
            num_prefix_query_tokens=scheduler.prefix_query_tokens,
            num_prefix_hit_tokens=scheduler.prefix_hit_tokens,
            lazy_bytes=0 if self.config.device == "cuda" else self._planned_bytes * self._link.ranks.size,
            device=self.config.device,
        )

    @property
    def _planned_bytes(self) -> int:
        """Beside the weights, on one rank."""
        return self.memory.pool_bytes + self.memory.working_bytes

    def close(self) -> None:
        """Drop all requests, the weights and the KV pool, and let the followers end. Nothing may be called after it."""
        self.reset()
        self._link.close()
        del self._runner

    # ---- their parts ----

    def _start(self, candidate: Candidate) -> None:
        """Queue a candidate; those behind the first share its prompt's blocks. The memory plan has room for a sequence of
        max_model_len, so that each fits the pool alone."""
        job = candidate.job
        room = self.max_model_len - len(job.prompt_ids)
        self._candidates[candidate.sequence_id] = candidate
        self._scheduler.add(
            Sequence(
                id=candidate.sequence_id,
                token_ids=list(job.prompt_ids),
                prompt_length=len(job.prompt_ids),
                max_tokens=min(job.params.max_tokens or room, room),
                stop_ids=job.stop_ids,
                min_tokens=job.params.min_tokens,
                salt=self._salt(job),
                wants_prompt_logits=candidate.index == 0 and job.params.prompt_logprobs is not None,
                leader=job.candidates[0].sequence_id if candidate.index else None,
                encoder_ids=job.input.encoder_ids,
                images=job.input.images,
            )
        )

    def _salt(self, job: Job) -> str:
        """Prompts share cached keys only if client, adapter and the rotary scaling's regime are the same."""
        return "\0".join((job.request.cache_salt, job.request.adapter, self._runner.cache_regime(len(job.prompt_ids))))

    def _note_begun(self, plan: Plan, now: float) -> None:
        """Count the requests whose first step this is, and how long they have waited for it."""
        for chunk in plan.chunks:
            job = self._candidates[chunk.sequence].job
            if not job.has_begun:
                job.has_begun = True
                self._num_begun += 1
                self._waiting_seconds += now - job.added_at

    def _note_pace(self, flight: Flight) -> None:
        """The device begins a step when it is launched, or when it is done with the one before."""
        begun_at, self._waited_at = max(flight.launched_at, self._waited_at), time.perf_counter()
        plan = flight.plan
        if not plan.encodes:  # whose tokens are of another kind
            num_decoding = len(plan.decodes)
            self._pace.record(num_decoding, plan.num_tokens - num_decoding, self._waited_at - begun_at)

    def _set_pace(self) -> None:
        self._scheduler.prefill_chunk_tokens = self._pace.budget(self._scheduler.num_decoding)

    def _abort(self, job: Job) -> list[Output]:
        self._num_aborted += 1
        return self._end(job, "abort")

    def _begin(self, unwanted: Flight | None, now: float) -> Flight | None:
        """A step with nothing in flight before it, but for one that nobody wants any more; None without work."""
        if unwanted is not None:
            self._scheduler.drop(unwanted.plan)
        self._set_pace()
        plan = self._scheduler.plan()
        if plan.is_empty:
            return None
        flight = self._launch(plan, None, now)
        flight.draw(self._sampler, self._candidates)
        return flight

    def _go_ahead(self, flight: Flight, now: float) -> Flight | None:
        """The forward behind the one in flight, without its draws: those look at what the tokens before them have been."""
        if not self._overlaps or flight.error is not None:
            return None
        self._set_pace()
        plan = self._scheduler.plan_ahead()
        return None if plan.is_empty else self._launch(plan, flight.chosen, now)

    def _launch(self, plan: Plan, chosen: Chosen | None, now: float) -> Flight:
        self._note_begun(plan, now)
        flight = Flight(plan, now)
        flight.launch(lambda: self._forward(plan, chosen))
        return flight

    def _forward(self, plan: Plan, chosen: Chosen | None) -> Tensor:
        self._link.publish(plan)
        return self._runner.forward(plan, chosen)

    def _is_wanted(self, flight: Flight) -> bool:
        return any(chunk.sequence in self._candidates for chunk in flight.plan.rows)

    def _send(self, candidate: Candidate, output: Output) -> list[Output]:
        """What of an output may be sent now. If it is the candidate's last, its blocks are given back and it is forgotten."""
        job = candidate.job
        if output.finish_reason is not None:
            self._scheduler.finish(candidate.sequence_id)
            del self._candidates[candidate.sequence_id]
            if job.is_finished:
                del self._jobs[job.request.id]
        return job.release(output)

    def _end(self, job: Job, reason: FinishReason, error: Exception | None = None) -> list[Output]:
        running = [candidate for candidate in job.candidates if not candidate.is_finished]
        return [output for candidate in running for output in self._send(candidate, candidate.end(reason, error))]

    def _fail(self, flight: Flight, ahead: Flight | None, cause: Exception) -> list[Output]:
        """Undo the flight's plan and end every request that had a part in it; what was planned behind it is planned again. Raises
        DeviceError if no step can work any more."""
        plan, cause = flight.plan, self._runner.device.judge(cause)
        if isinstance(cause, DeviceError):
            raise cause
        logger.error("step %d failed; its requests end, the others go on", plan.step, exc_info=cause)
        if ahead is not None:
            self._scheduler.drop(ahead.plan)
        self._scheduler.drop(plan)
        self._num_failed_steps += 1
        self._num_failed_in_a_row += 1
        kind = LostRankError if isinstance(cause, RankError) and self._link.has_lost_a_rank else StepError
        error = kind(f"step {plan.step} failed: {type(cause).__name__}: {cause}")
        error.__cause__ = cause
        jobs = dict.fromkeys(self._candidates[chunk.sequence].job for chunk in plan.rows if chunk.sequence in self._candidates)
        return [output for job in jobs for output in self._end(job, "error", error)]


def _broken(plan: Plan) -> StepError:
    return StepError(f"step {plan.step} failed for this request: the model's logits are not numbers")


def _pace(config: EngineConfig, scheduler: Scheduler) -> Pace:
    assert config.max_decode_slowdown is not None, "explain has chosen it"
    return Pace(config.max_decode_slowdown, scheduler.prefill_chunk_tokens)


def _scheduler(config: EngineConfig, num_blocks: int, window: int) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_batch_size=config.max_batch_size,
        max_prefill_tokens=config.max_prefill_tokens,
        prefill_chunk_tokens=config.prefill_chunk_tokens or config.max_prefill_tokens,  # without chunks there is no size of them
        prefix_caching=config.enable_prefix_caching,
        chunked_prefill=config.enable_chunked_prefill,
        window=window,
    )
