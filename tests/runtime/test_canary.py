"""Nobody sees another's data (R6): long random traces on pools that are always too small.

Scheduler alone: a memory whose slots hold (tenant, prefix) carries out every plan, see world.py.
Whole runtime: the fake executor asserts that each row reads its own prefix from pages that its own
tenant wrote, freed pages are poisoned, and each finished answer equals the model run alone.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from aios_compile.runtime.admission import Admission
from aios_compile.runtime.batch import Batch
from aios_compile.runtime.decisions import DecisionLog
from aios_compile.runtime.engine_core import EngineCore
from aios_compile.runtime.events import Preempt
from aios_compile.runtime.request import Request
from aios_compile.runtime.schedule_state import Plan, SchedulerOptions
from aios_compile.runtime.scheduler import replay
from aios_compile.sampling_params import SamplingParams
from tests.runtime.fake_executor import FakeExecutor, greedy, limits
from tests.runtime.random_worlds import random_event, random_world

NUM_STEPS = 1500
SHARED = list(range(14))
NUM_TRACE_STEPS = 100_000  # tests/nightly: ten times as many
PARTS = 4


def trace(seed: int, num_steps: int) -> int:
    """Let random things happen in random worlds for so many steps; return the number of hits."""
    rng = random.Random(seed)
    num_done = num_hits = num_worlds = 0
    while num_done < num_steps:
        world = random_world(rng)
        for _ in range(200):
            random_event(world, rng)
        world.drain()
        num_done += world.state.step
        num_hits += world.num_hits
        num_worlds += 1
        if num_worlds % 20 == 0:
            assert replay(world.limits, world.records, world.options) == world.decisions
    return num_hits


@pytest.mark.parametrize("part", range(PARTS))
def test_random_worlds(part: int) -> None:
    assert trace(part, NUM_TRACE_STEPS // PARTS) > NUM_TRACE_STEPS // PARTS // 20


class TenantExecutor(FakeExecutor):
    """Remembers which tenant wrote each slot; a read of another tenant's is an error."""

    def __init__(self, core_limits: Any) -> None:
        super().__init__(core_limits)
        self.owners = np.full(len(self.tokens), -1)
        self.host_owners: dict[int, Any] = {}
        self.tenants_of: dict[int, list[int]] = {}  # of a batch's sequences, by its buffers
        self.tenants: list[int] = []  # of the sequences of this step
        self.on_read = self.check_owner
        self.num_reads = 0

    def pages(self) -> Any:
        return self.owners.reshape(-1, self.limits.page_size)

    def check_owner(self, s: int, slots: Any) -> None:
        self.num_reads += len(slots)
        assert np.all(self.owners[slots] == self.tenants[s]), "a foreign read"

    def _step(self, batch: Batch) -> Any:
        self.tenants = self.tenants_of[batch.token_ids.ctypes.data]
        for s, tenant in enumerate(self.tenants):
            own = slice(batch.query_starts[s], batch.query_starts[s + 1])
            self.owners[batch.slots[own]] = tenant
        return super()._step(batch)

    def copy_pages(self, pairs: Any) -> None:
        super().copy_pages(pairs)
        for source, target in pairs:
            self.pages()[target] = self.pages()[source]

    def swap_out(self, pairs: Any) -> None:
        super().swap_out(pairs)
        self.host_owners |= {host: self.pages()[page].copy() for page, host in pairs}

    def swap_in(self, pairs: Any) -> None:
        super().swap_in(pairs)
        for host, page in pairs:
            self.pages()[page] = self.host_owners.pop(host)


def test_random_trace() -> None:
    rng = random.Random(7)
    executor = TenantExecutor(limits(num_pages=14, max_num_batched_tokens=9, token_buckets=(4, 16)))
    options = SchedulerOptions("fair_share", num_host_pages=9, chunked_prefill_size=5)
    core = EngineCore(executor, None, seed=1, log=DecisionLog(), options=options)
    executor.free_pages = lambda: list(core.state.pool.free)

    def noting(build: Any) -> Any:
        def noted(first: Any, *others: Any) -> Batch:
            batch: Batch = build(first, *others)
            is_plan = isinstance(first, Plan)  # else a guess: sequences, and their states
            ids = core.state.in_flight_ids
            states = [core.state.sequences[i] for i in ids] if is_plan else others[0]
            place = batch.token_ids.ctypes.data
            executor.tenants_of[place] = [int(state.tenant or 0) for state in states]
            return batch

        return noted

    for builder in core._ahead._builders:
        builder.build = noting(builder.build)  # type: ignore[method-assign]
        builder.build_next = noting(builder.build_next)  # type: ignore[method-assign]
    admission = Admission(executor.limits, None, frozenset())
    alive: list[Request] = []
    num_done = 0
    while core.stats.num_steps < NUM_STEPS or alive:
        if rng.random() < 0.3 and core.stats.num_steps < NUM_STEPS and len(alive) < 12:
            alive.append(_request(rng, admission))
            core.inbox.submit([alive[-1]])
        if rng.random() < 0.03 and alive:
            core.inbox.abort([rng.choice(alive)])
        if rng.random() < 0.05 and core.state.running:
            how = rng.choice(["swap", "recompute"])
            core._advance(Preempt(rng.choice(core.state.running).sequence_id, how))
        if core.inbox.has_news or core.state.has_work:
            core._take_commands()
        if core.state.has_work:
            core.step()
        core.state.check_integrity()
        for request in [r for r in alive if not r.num_unfinished]:
            alive.remove(request)
            num_done += _check(request)
    assert num_done > NUM_STEPS // 15 and core.stats.num_preemptions > 100
    assert core.stats.num_steps_ahead > 100 and core.stats.num_steps_in_vain > 10
    assert core.stats.num_cached_tokens > 1000 and executor.num_reads > 10 * NUM_STEPS
    assert core.state.pool.num_free == core.state.pool.num_pages - 1
    core.inbox.request_close()
    core.run()
    assert executor.num_closed == 1


def _request(rng: random.Random, admission: Admission) -> Request:
    own = [rng.randrange(50) for _ in range(rng.choice([1, 3, 4, 5, 12]))]
    prompt = [*SHARED[: rng.randint(0, 14)], *own]
    fields: dict[str, Any] = {"max_tokens": rng.randint(1, 20), "n": rng.choice([1, 1, 2, 4])}
    fields["prompt_logprobs"] = rng.choice([None, None, 0])
    params = SamplingParams(temperature=0, tenant=rng.choice(["", "1", "2"]), **fields)
    return Request(admission.admit(prompt, params), None, streams=False)


def _check(request: Request) -> bool:
    output = request.output()
    for completion in output.outputs:
        expected = greedy(output.prompt_token_ids, len(completion.token_ids))
        assert completion.token_ids == expected
        assert completion.finish_reason in ("length", "abort")
    return output.outputs[0].finish_reason == "length"
