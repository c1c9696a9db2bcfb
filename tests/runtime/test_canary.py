"""Nobody sees another's data (R6): a long random trace on a pool that is always too small.

The fake executor asserts that each row reads its own prefix, freed pages are poisoned before every
step, and each finished greedy answer equals the model run alone.
"""

from __future__ import annotations

import random
from typing import Any

from aios_compile.runtime.admission import Admission
from aios_compile.runtime.decisions import DecisionLog
from aios_compile.runtime.engine_core import EngineCore
from aios_compile.runtime.events import Preempt
from aios_compile.runtime.request import Request
from aios_compile.sampling_params import SamplingParams
from tests.runtime.fake_executor import FakeExecutor, greedy, limits

NUM_STEPS = 1500


def test_random_trace() -> None:
    rng = random.Random(7)
    executor = FakeExecutor(limits(num_pages=14, max_num_batched_tokens=9, token_buckets=(4, 16)))
    core = EngineCore(executor, None, seed=1, log=DecisionLog())
    executor.free_pages = lambda: list(core.state.pool.free)
    admission = Admission(executor.limits, None, frozenset())
    alive: list[Request] = []
    num_done = 0
    while core.stats.num_steps < NUM_STEPS or alive:
        if rng.random() < 0.3 and core.stats.num_steps < NUM_STEPS and len(alive) < 12:
            alive.append(_request(rng, admission))
            core.submit([alive[-1]])
        if rng.random() < 0.03 and alive:
            core.abort([rng.choice(alive)])
        if rng.random() < 0.05 and core.state.running:
            core._advance(Preempt(rng.choice(core.state.running).sequence_id))
        if core._inbox or core._aborted or core.state.has_work:
            core._take_commands()
        if core.state.has_work:
            core.step()
        core.state.check_integrity()
        for request in [r for r in alive if not r.num_unfinished]:
            alive.remove(request)
            num_done += _check(request)
    assert num_done > NUM_STEPS // 15 and core.stats.num_preemptions > 100
    assert core.state.pool.num_free == core.state.pool.num_pages - 1
    core.request_close()
    core.run()
    assert executor.num_closed == 1


def _request(rng: random.Random, admission: Admission) -> Request:
    prompt = [rng.randrange(50) for _ in range(rng.choice([1, 3, 4, 5, 12, 25]))]
    fields: dict[str, Any] = {"max_tokens": rng.randint(1, 20), "n": rng.choice([1, 1, 2, 4])}
    fields["prompt_logprobs"] = rng.choice([None, None, 0])
    params = SamplingParams(temperature=0, **fields)
    return Request(admission.admit(prompt, params), None, streams=False)


def _check(request: Request) -> bool:
    output = request.output()
    for completion in output.outputs:
        expected = greedy(output.prompt_token_ids, len(completion.token_ids))
        assert completion.token_ids == expected
        assert completion.finish_reason in ("length", "abort")
    return output.outputs[0].finish_reason == "length"
