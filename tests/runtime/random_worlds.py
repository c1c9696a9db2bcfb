"""Random worlds, random events: one driver for the state machine, the canary and the nightly."""

from __future__ import annotations

import random

from aios_compile.runtime.events import Calibrate
from aios_compile.runtime.policies import RANKS
from aios_compile.runtime.schedule_state import SchedulerOptions
from tests.runtime.fake_executor import limits
from tests.runtime.world import ALPHABET, World


def random_world(rng: random.Random) -> World:
    """Return a small world: few pages, few tokens a step, any policy, any option."""
    most = limits(
        num_pages=rng.choice([4, 8, 12, 30]),
        page_size=rng.choice([1, 2, 3, 4]),
        max_num_batched_tokens=rng.choice([2, 5, 9, 64]),
        max_num_seqs=rng.choice([1, 2, 3, 8]),
        max_num_logit_rows=rng.choice([2, 4, 12]),
        max_pages_per_sequence=rng.choice([6, 16]),
    )
    options = SchedulerOptions(
        policy=rng.choice(sorted(RANKS)),
        enable_prefix_caching=rng.random() < 0.85,
        chunked_prefill_size=rng.choice([None, 1, 3]),
        window_tokens=rng.choice([None, None, None, 2, 5]),
        num_host_pages=rng.choice([0, 3, 20]),
        starvation_us=rng.choice([15, 400]),
        quantum_tokens=rng.choice([1, 8]),
    )
    return World(most, options)


def random_prompt(rng: random.Random, most: int) -> list[int]:
    """Return a prompt that begins like many others."""
    base = [(k * k) % ALPHABET for k in range(most)]
    cut = rng.randint(0, most)
    prompt = base[:cut] + [rng.randrange(ALPHABET) for _ in range(rng.randint(1, 4))]
    return prompt[: max(1, most)]


def random_event(world: World, rng: random.Random) -> None:
    """Let one thing happen."""
    draw = rng.random()
    running = world.state.running
    if draw < 0.22 and len(world.known) < 12:
        most = max(1, min(world.limits.capacity_tokens - 1, 24))
        world.arrive(
            random_prompt(rng, most),
            rng.choice([1, 1, 1, 2, 3]),
            rng.random() < 0.1,
            rng.choice(["", "", "a"]),
            rng.randint(0, 2),
            rng.choice([None, None, 30]),
        )
    elif draw < 0.25 and world.known:
        world.abort(rng.choice(sorted(world.known.items()))[1].request)
    elif draw < 0.30 and running:
        world.preempt(rng.choice(running).sequence_id, rng.choice(["auto", "swap", "recompute"]))
    elif draw < 0.32:
        world.expire()
    elif draw < 0.34:
        world.press(rng.choice([0, 0, 2, 99]))
    elif draw < 0.35:
        world.do(Calibrate(rng.choice([0.0, 10.0]), rng.choice([1.0, 100.0])))
    else:
        finish = {i for i in world.known if rng.random() < 0.1}
        drafts = rng.choice([0, 0, 1, 4])
        world.step(finish, drafts, rng.randint(0, 4), rng.random() < 0.1)
