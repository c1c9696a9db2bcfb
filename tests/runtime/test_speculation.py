"""Speculation changes no token: whatever proposes, however wrong it is, whatever is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aios_compile import SamplingParams
from aios_compile.runtime.draft_model import DraftModel
from aios_compile.runtime.engine import Engine
from aios_compile.runtime.events import Preempt, Schedule
from aios_compile.runtime.prompt_lookup import PromptLookup
from aios_compile.runtime.schedule_state import Plan, SchedulerOptions
from aios_compile.runtime.speculator import Proposer, Speculator
from tests.runtime.conftest import MakeEngine
from tests.runtime.fake_executor import FakeExecutor, FakeTokenizer, greedy, limits
from tests.runtime.proposers import Fixed, Oracle
from tests.runtime.test_lifecycle import fake, is_idle

SIZES: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 32, "max_num_logit_rows": 32},
    {"max_num_batched_tokens": 9, "max_num_logit_rows": 6},  # budgets cut the drafts
    {"max_num_logit_rows": 16},  # and somebody is preempted after every other step
    {"page_size": 1, "max_pages_per_sequence": 64},
]


def requests(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Return prompts and parameters of every kind that history matters to."""
    rng = random.Random(seed)
    prompts, params = [], []
    for i in range(10):
        prompts.append([rng.randrange(36) for _ in range(rng.choice([1, 2, 7, 20, 30]))])
        params.append(
            SamplingParams(
                max_tokens=rng.randint(1, 28),
                min_tokens=rng.choice([0, 0, 0]),
                temperature=rng.choice([0.0, 0.8, 1.5]),
                seed=i,
                n=rng.choice([1, 1, 1, 3]),
                top_p=rng.choice([1.0, 0.9]),
                top_k=rng.choice([0, 12]),
                repetition_penalty=rng.choice([1.0, 1.3]),
                presence_penalty=rng.choice([0.0, 0.9]),
                frequency_penalty=rng.choice([0.0, 0.7]),
                stop=rng.choice([[], ["th", "e"], [" a"]]),
                include_stop_str_in_output=rng.random() < 0.3,
                stop_token_ids=rng.choice([[], [5, 9, 30]]),
                bad_words=rng.choice([[], ["the", "ab"]]),
                logit_bias=rng.choice([None, {3: 2.0, 11: -3.0}]),
                logprobs=rng.choice([None, 0, 3]),
                prompt_logprobs=rng.choice([None, None, 1]),
            )
        )
    # four letters, and pairs of them that are banned: the first may be a draft of the same step
    pairs = {"allowed_token_ids": [17, 18, 19, 20], "bad_words": ["qr", "ss", "tq", "rt"]}
    for i in (1, 2, 5, 7):
        params[i] = SamplingParams(**{**vars(params[i]), **pairs, "max_tokens": 28})
    for i in range(0, 10, 3):  # stop tokens are banned until then
        values = {**vars(params[i]), "min_tokens": min(6, params[i].max_tokens or 6)}
        params[i] = SamplingParams(**values)
    return prompts, params


def seen(outputs: Any) -> list[Any]:
    """Return all that a caller sees of the results."""
    return [(o.outputs, o.prompt_logprobs) for o in outputs]


def speculator(proposer: Proposer, count: int = 5, **sizes: Any) -> Speculator:
    return Speculator(proposer, count, limits(**sizes))


def watch_steps(engine: Engine) -> list[Plan]:
    """Return a list that receives every plan of a step."""
    plans: list[Plan] = []
    advance = engine._core._advance

    def watched(event: Any) -> Plan:
        plan = advance(event)
        if isinstance(event, Schedule):
            plans.append(plan)
        return plan

    engine._core._advance = watched  # type: ignore[method-assign]
    return plans


def preempt_often(engine: Engine) -> None:
    core, rng = engine._core, random.Random(5)
    step = core.step

    def preempt_and_step() -> None:
        if core.state.running and rng.random() < 0.5:
            core._advance(Preempt(rng.choice(core.state.running).sequence_id))
        step()

    core.step = preempt_and_step  # type: ignore[method-assign]


def make_oracle(outputs: Any, wrong: float) -> Oracle:
    answers = {
        (tuple(o.prompt_token_ids), c.index): c.token_ids for o in outputs for c in o.outputs
    }
    return Oracle(answers, wrong)


class NearlyRight(FakeExecutor):
    """A draft model: the target's logits, but for one row in four."""

    def _logits(self, batch: Any) -> Any:
        logits = super()._logits(batch)
        for row, position in enumerate(batch.sample_positions.tolist()):
            if position % 4 == 0:
                logits[row] = logits[row][::-1]
        return logits


PROPOSERS: dict[str, Callable[[Any, dict[str, Any]], Proposer]] = {
    "right": lambda outputs, sizes: make_oracle(outputs, 0.0),
    "often wrong": lambda outputs, sizes: make_oracle(outputs, 0.3),
    "always wrong": lambda outputs, sizes: Fixed(lambda s, k: [(s.tokens[-1] + 1) % 50] * k),
    "out of the vocabulary": lambda outputs, sizes: Fixed(lambda s, k: [3, 50, -1][:k]),
    "too many": lambda outputs, sizes: Fixed(lambda s, k: [1] * (k + 3)),
    "lookup": lambda outputs, sizes: PromptLookup(1, 3),
    "draft model": lambda outputs, sizes: DraftModel(NearlyRight(limits(**sizes))),
}


@pytest.mark.parametrize("sizes", SIZES, ids=["wide", "narrow", "preempting", "page 1"])
@pytest.mark.parametrize("name", PROPOSERS)
def test_nothing_that_a_caller_sees_changes(
    name: str, sizes: dict[str, Any], make_engine: MakeEngine
) -> None:
    prompts, params = requests(len(name))
    plain = make_engine(FakeTokenizer(), eos_token_ids=[7], **sizes)
    expected = plain.generate(prompts, params)
    proposer = PROPOSERS[name](expected, sizes)
    helper = speculator(proposer, **sizes)
    engine = make_engine(FakeTokenizer(), eos_token_ids=[7], speculator=helper, **sizes)
    if sizes == SIZES[2]:
        preempt_often(engine)
    outputs = engine.generate(prompts, params)
    assert seen(outputs) == seen(expected)
    assert is_idle(engine) and not helper._lengths, "something is kept for requests that ended"
    stats = engine.speculation
    assert stats is not None and not stats.failure
    if name in ("right", "often wrong", "draft model"):
        assert stats.num_accepted_tokens > 10
        assert sizes == SIZES[2] or engine.stats.num_steps < plain.stats.num_steps
    if name == "right":
        assert stats.num_accepted_tokens >= 0.9 * stats.num_draft_tokens
    assert sizes != SIZES[2] or engine.stats.num_preemptions > 3


def test_a_right_guess_saves_steps(make_engine: MakeEngine) -> None:
    expected = make_engine().generate([[1, 2, 3]], temperature=0, max_tokens=41)
    sizes = SIZES[0]
    helper = speculator(make_oracle(expected, 0.0), 4, **sizes)
    engine = make_engine(speculator=helper, **sizes)
    outputs = engine.generate([[1, 2, 3]], temperature=0, max_tokens=41)
    assert outputs[0].outputs[0].token_ids == greedy([1, 2, 3], 41)
    # the prompt's step gives one token, each step after it five
    assert engine.stats.num_steps == 1 + 40 // 5
    assert helper.stats.num_accepted_tokens == helper.stats.num_draft_tokens == 32
    assert helper.stats.mean_accepted_length == 5
    metrics = engine.metrics()
    assert metrics.value("draft_tokens_total") == metrics.value("accepted_tokens_total") == 32


def test_a_wrong_proposer_falls_silent(make_engine: MakeEngine) -> None:
    helper = speculator(Fixed(lambda s, k: [49] * k), **SIZES[0])
    engine = make_engine(speculator=helper, **SIZES[0])
    plans = watch_steps(engine)
    engine.generate([[1, 2]], temperature=0, max_tokens=60, logit_bias={49: -100})
    assert len(plans) == 60
    drafted = [sum(c.num_drafts for c in plan.chunks) for plan in plans]
    assert sum(1 for count in drafted if count) <= 9 and max(drafted) == 5


def test_drafts_never_go_past_the_end(make_engine: MakeEngine) -> None:
    asked: list[int] = []

    def propose(sequence: Any, count: int) -> list[int]:
        asked.append(sequence.num_output_tokens + count)
        return [1] * count

    helper = speculator(Fixed(propose), 8, **SIZES[0])
    engine = make_engine(speculator=helper, **SIZES[0])
    engine.generate([[1, 2]], temperature=0, max_tokens=10)
    assert asked and max(asked) < 10, "a draft that could never be a token of the output"
    output = engine.generate([list(range(40))], temperature=0, max_tokens=None)[0].outputs[0]
    assert output.token_ids == greedy(list(range(40)), 24)


def test_a_proposer_that_fails_ends_speculation_and_nothing_else(
    make_engine: MakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    def propose(sequence: Any, count: int) -> list[int]:
        if sequence.num_output_tokens > 5:
            raise MemoryError("planted")
        return [1] * count

    helper = speculator(Fixed(propose), **SIZES[0])
    engine = make_engine(speculator=helper, **SIZES[0])
    for _ in range(2):
        outputs = engine.generate([[1, 2], [3]], temperature=0, max_tokens=20)
        assert [o.outputs[0].token_ids for o in outputs] == [greedy([1, 2], 20), greedy([3], 20)]
    assert helper.stats.failure == "MemoryError: planted" and "planted" in str(helper.stats)
    assert capfd.readouterr().err.count("speculation stopped: MemoryError") == 1


@pytest.mark.parametrize("is_accepted", [False, True])
def test_not_finite_logits_count_only_where_the_row_is_used(
    is_accepted: bool, make_engine: MakeEngine
) -> None:
    """A row after a wrong draft is about a text that nobody writes."""
    right = greedy([7, 8, 9], 20)

    def propose(sequence: Any, count: int) -> list[int]:
        if list(sequence.admitted.prompt_token_ids) != [7, 8, 9]:
            return []
        done = sequence.num_output_tokens
        guess = right[done] if is_accepted else (right[done] + 1) % 50
        return [guess]

    engine = make_engine(speculator=speculator(Fixed(propose), 1, **SIZES[0]), **SIZES[0])

    spoilt: list[int] = []

    def spoil(batch: Any, logits: Any) -> None:
        # the request under test came first, so its rows are the first ones
        if batch.num_rows > 1 and batch.query_starts[1] == 2 and batch.sample_positions[1] >= 8:
            spoilt.append(int(batch.sample_positions[1]))
            logits[1, 3] = np.nan

    fake(engine).after_logits = spoil
    outputs = engine.generate([[7, 8, 9], [1]], temperature=0, max_tokens=20)
    first, other = outputs[0].outputs[0], outputs[1].outputs[0]
    assert other.token_ids == greedy([1], 20) and spoilt
    if is_accepted:
        assert first.finish_reason == "error"
        assert first.token_ids == right[: spoilt[0] - 3], "up to the row that was spoilt"
    else:
        assert first.finish_reason == "length" and first.token_ids == right
    assert is_idle(engine)


def test_drafts_in_a_pool_that_is_too_small(make_engine: MakeEngine) -> None:
    """They take what is free, and those who run still get their pages."""
    sizes = {"num_pages": 13, "max_num_logit_rows": 32, "max_num_batched_tokens": 32}
    prompts = [[1] * 12, [2] * 12, [3] * 12]
    expected = make_engine(**sizes).generate(prompts, max_tokens=30, seed=1)
    helper = speculator(make_oracle(expected, 0.1), 8, **sizes)
    engine = make_engine(speculator=helper, **sizes)
    assert seen(engine.generate(prompts, max_tokens=30, seed=1)) == seen(expected)
    assert engine.stats.num_preemptions > 0 and helper.stats.num_accepted_tokens > 20


def test_replay_makes_the_same_decisions_with_drafts(
    make_engine: MakeEngine, tmp_path: Any
) -> None:
    from aios_compile.runtime.decisions import read_log
    from aios_compile.runtime.scheduler import replay

    expected = make_engine().generate([[1, 2], [3, 4, 5]], temperature=0, max_tokens=30)
    helper = speculator(make_oracle(expected, 0.2), 4, **SIZES[0])
    options = SchedulerOptions(enable_prefix_caching=False)
    engine = make_engine(
        speculator=helper, decision_sink=tmp_path / "log", options=options, **SIZES[0]
    )
    engine.generate([[1, 2], [3, 4, 5]], temperature=0, max_tokens=30)
    engine.close()
    events, decisions = read_log(tmp_path / "log")
    assert sum(bool(e.get("drafts")) for e in events) > 3
    assert any(d.kind == "draft" for d in decisions)
    accepted = sum(d.detail["accepted"] for d in decisions if d.kind == "accept")
    assert accepted == helper.stats.num_accepted_tokens > 0
    assert [e["type"] for e in events].count("Commit") == engine.stats.num_steps
    assert replay(engine.admission.limits, events, options) == decisions
