"""Prompt tokens beside decoding sequences, on machines whose steps take what a formula says. Times are in units of their own."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from lmi_dist import Engine, EngineConfig, Request, SamplingParams
from lmi_dist.flight import Flight
from lmi_dist.pace import LEAST, Pace
from lmi_dist.plan import Plan

pytestmark = pytest.mark.usefixtures("column_as_before")

Machine = Callable[[int], float]  # the time of a step of so many tokens
MACHINES: dict[str, Machine] = {
    "weights and products one after the other": lambda num_tokens: 20 + 1.4 * num_tokens,
    "weights while products run": lambda num_tokens: max(25, 0.7 * num_tokens),
    "products alone": lambda num_tokens: 1.4 * num_tokens,
}


def run(pace: Pace, machine: Machine, num_decoding: int, num_steps: int) -> list[int]:
    """Steps of a prompt without end beside others; the prompt tokens of each."""
    budgets = []
    for _ in range(num_steps):
        budgets.append(pace.budget(num_decoding))
        pace.record(num_decoding, budgets[-1], machine(num_decoding + budgets[-1]))
    return budgets


def decoding(machine: Machine, num_decoding: int, *, max_tokens: int = 512) -> Pace:
    """One that has seen so many sequences decode alone."""
    pace = Pace(3.0, max_tokens)
    for _ in range(32):
        pace.record(num_decoding, 0, machine(num_decoding))
    return pace


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> Machine:
    return MACHINES[request.param]


@pytest.mark.parametrize("num_decoding", [8, 16, 60])
@pytest.mark.parametrize("num_before", [0, 64, 512, 4096])  # prompt tokens of a step in which nobody decoded
def test_no_step_takes_longer_than_it_may(machine: Machine, num_decoding: int, num_before: int) -> None:
    pace = decoding(machine, num_decoding)
    if num_before:
        pace.record(0, num_before, machine(num_before))

    budgets = run(pace, machine, num_decoding, 60)

    longest = 3 * machine(num_decoding)
    assert max(machine(num_decoding + budget) for budget in budgets) <= 1.001 * longest
    assert machine(num_decoding + budgets[-1] + 12) > 0.98 * longest


@pytest.mark.parametrize("num_decoding", [8, 16, 60])
def test_tiles_of_a_kernel_cost_at_most_one_of_them(num_decoding: int) -> None:
    def machine(num_tokens: int) -> float:
        return 20.0 + 16 * -(-num_tokens // 12)

    budgets = run(decoding(machine, num_decoding), machine, num_decoding, 60)

    assert max(machine(num_decoding + budget) for budget in budgets) < 3 * machine(num_decoding) + 16


@pytest.mark.parametrize("num_decoding", [1, 8, 100])
def test_first_guess_is_in_proportion_to_who_decodes(num_decoding: int) -> None:
    pace = decoding(lambda _: 30.0, num_decoding)

    assert pace.budget(num_decoding) == max(LEAST, 2 * num_decoding)


def test_prompt_alone_teaches_the_first_guess() -> None:
    machine = MACHINES["weights and products one after the other"]
    pace = decoding(machine, 8)
    pace.record(0, 512, machine(512))

    assert pace.budget(8) == 44  # 20 + 1.4 * 52 = 3 * (20 + 1.4 * 8)


def test_nothing_known_is_the_least() -> None:
    assert Pace(3.0, 512).budget(8) == LEAST


def test_sequences_that_were_never_alone_count_by_their_share() -> None:
    pace = Pace(3.0, 512)
    pace.record(0, 320, 320.0)

    assert pace.budget(20) == 40


def test_where_prompts_cost_more_than_they_may_is_the_least() -> None:
    pace = decoding(lambda _: 5.0, 8)

    budgets = run(pace, lambda num_tokens: 17.0 + num_tokens, 8, 20)

    assert budgets[-1] == LEAST


@pytest.mark.parametrize("most", [1, 8, 100])
def test_chunk_of_the_operator_is_the_most(most: int) -> None:
    pace = decoding(lambda _: 30.0, 8, max_tokens=most)

    budgets = run(pace, lambda _: 30.0, 8, 10)

    assert budgets[-1] == max(budgets) == most


def test_without_others_or_limit_nothing_is_cut() -> None:
    unlimited, pace = Pace(0.0, 512), decoding(lambda _: 30.0, 8)
    unlimited.record(8, 0, 30.0)

    assert (unlimited.budget(8), pace.budget(0)) == (512, 512)


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("num_prompt_tokens", [0, 44])
def test_single_step_out_of_line_changes_little(num_prompt_tokens: int, factor: float) -> None:
    machine = MACHINES["weights and products one after the other"]
    pace = decoding(machine, 8)
    before = run(pace, machine, 8, 40)[-1]

    pace.record(8, num_prompt_tokens, factor * machine(8 + num_prompt_tokens))

    assert pace.budget(8) == pytest.approx(before, abs=1)


def test_steps_shrink_as_the_prompt_gets_deep() -> None:
    """Its tokens look at more and more keys, and take half as long again at the end."""
    pace = decoding(lambda _: 30.0, 8)
    times, budgets = [], []

    for depth in range(60):
        budgets.append(pace.budget(8))
        times.append(30 + 1.5 * budgets[-1] * (1 + depth / 120))
        pace.record(8, budgets[-1], times[-1])

    assert max(times) < 1.05 * 90
    assert LEAST < budgets[-1] < 0.75 * budgets[10]


@pytest.mark.parametrize(("num_before", "num_now"), [(16, 8), (8, 16), (1, 16), (16, 1)])
def test_other_number_of_sequences_is_not_overrated(machine: Machine, num_before: int, num_now: int) -> None:
    pace = decoding(machine, num_before)
    run(pace, machine, num_before, 40)

    assert machine(num_now + pace.budget(num_now)) <= max(3 * machine(num_now), machine(num_now + LEAST)) * 1.001


def test_new_speed_is_learnt_from_a_few_steps() -> None:
    machine = MACHINES["weights and products one after the other"]
    pace = decoding(machine, 8)
    before = run(pace, machine, 8, 40)[-1]

    for _ in range(9):
        pace.record(8, 0, 2 * machine(8))
    after = run(pace, lambda num_tokens: 2 * machine(num_tokens), 8, 10)[-1]

    assert after == pytest.approx(before, abs=1)


# ---- in the engine ----


class PretendDevice:
    """Runs an engine's steps one after the other, as they are launched, on a clock of its own: a token takes 1, a step 5 more."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.plans: list[Plan] = []
        self.recorded: list[tuple[int, int, float]] = []
        self._now = self._free_at = 0.0
        self._done_at: dict[int, float] = {}
        forward, wait, record = engine._runner.forward, Flight.wait, engine._pace.record

        def launch(plan: Plan, *given: Any) -> torch.Tensor:
            self.plans.append(plan)
            self._free_at = self._done_at[plan.step] = max(self._now, self._free_at) + 5 + plan.num_tokens
            return forward(plan, *given)

        def await_end(flight: Flight) -> Any:
            self._now = max(self._now, self._done_at[flight.plan.step])
            return wait(flight)

        def watch(*given: Any) -> None:
            self.recorded.append(given)
            record(*given)

        patch.setattr(engine._runner, "forward", launch)
        patch.setattr(engine._pace, "record", watch)
        patch.setattr(Flight, "wait", await_end)
        patch.setattr("lmi_dist.engine.time", SimpleNamespace(perf_counter=lambda: self._now))

    @property
    def sizes_beside(self) -> list[int]:
        """Prompt tokens of the steps that had some beside sequences that decode."""
        return [plan.num_tokens - len(plan.decodes) for plan in self.plans if plan.decodes and plan.chunks]


def make(folder: Path, *, overlap: bool, **values: Any) -> Engine:
    config = {"model": str(folder), "dtype": "fp32", "max_model_len": 256, "max_batch_size": 16, "cpu_threads": 1, **values}
    return Engine(EngineConfig.of(config), overlap=overlap)


def let_prompt_arrive(engine: Engine) -> None:
    """While four others decode."""

    def ask(id: str, num_prompt_tokens: int, num_new: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        engine.add(Request(id=id, prompt=tiny_models.prompt_of(num_prompt_tokens), params=params, add_special_tokens=False))

    for number in range(4):
        ask(f"{number}", 6, 40)
    for _ in range(10):
        engine.step()
    ask("long", 200, 3)
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("overlap", [False, True])
def test_engine_tells_how_long_the_device_took(folder: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    engine = make(folder, overlap=overlap)
    device = PretendDevice(engine, monkeypatch)

    let_prompt_arrive(engine)

    sizes = [(len(plan.decodes), plan.num_tokens - len(plan.decodes)) for plan in device.plans]
    assert device.recorded == [(num_decoding, num, 5.0 + num_decoding + num) for num_decoding, num in sizes]


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_is_cut_by_what_steps_took(folder: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """Four that decode take 9: so a step may take 27, and that is 18 tokens of a prompt."""
    engine = make(folder, overlap=overlap)
    device = PretendDevice(engine, monkeypatch)

    let_prompt_arrive(engine)

    first, *between, last = device.sizes_beside
    assert LEAST <= first <= 18
    assert set(between) == {18}
    assert first + sum(between) + last == 200


@pytest.mark.parametrize("values", [{"max_decode_slowdown": 0}, {"enable_chunked_prefill": False}])
def test_prompt_is_whole_where_it_may_be(folder: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    engine = make(folder, overlap=False, **values)
    device = PretendDevice(engine, monkeypatch)

    let_prompt_arrive(engine)

    assert device.sizes_beside == [200]
