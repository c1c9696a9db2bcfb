"""Where drafts come from: prompt lookup against a search, the draft model's slots, lengths."""

from __future__ import annotations

import random
from typing import Any

import pytest

from aios_compile import SamplingParams
from aios_compile.runtime.admission import Admission
from aios_compile.runtime.draft_model import DraftModel
from aios_compile.runtime.penalties import PenaltyCounts
from aios_compile.runtime.prompt_lookup import NgramIndex
from aios_compile.runtime.request import Sequence, as_int64, mix_seed
from aios_compile.runtime.speculator import DraftLength, SpeculationStats
from tests.runtime.conftest import checked_engine
from tests.runtime.fake_executor import FakeExecutor, greedy, limits


def search(tokens: list[int], low: int, high: int, count: int) -> list[int]:
    """Return what followed the longest end that occurred before, at its latest occurrence."""
    for size in range(high, low - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                found = list(tokens)
                for place in range(end, end + count):
                    found.append(found[place])
                return found[len(tokens) :]
    return []


@pytest.mark.parametrize("seed", range(6))
def test_prompt_lookup_equals_a_search(seed: int) -> None:
    rng = random.Random(seed)
    low, high = rng.choice([(1, 1), (1, 3), (2, 4), (3, 3)])
    index, tokens, hits = NgramIndex(low, high), [], 0
    for _ in range(150):
        tokens += [rng.randrange(4) for _ in range(rng.randint(1, 3))]
        index.update(tokens)
        count = rng.randint(1, 6)
        drafts = index.draft(tokens, count)
        assert drafts == search(tokens, low, high, count)
        hits += bool(drafts)
    assert hits > 50


def test_a_period_is_continued_past_the_end() -> None:
    index, tokens = NgramIndex(1, 3), [9, 1, 2, 3, 1, 2, 3, 1]
    index.update(tokens)
    assert index.draft(tokens, 7) == [2, 3, 1, 2, 3, 1, 2]


def test_lengths_follow_success_and_failure() -> None:
    length = DraftLength(8, 8)
    asked = []
    for accepted in (0, 0, 0, 1, 2, 3, 8, 2):
        asked.append(length.next())
        length.update(asked[-1], min(accepted, asked[-1]))
    assert asked == [8, 4, 2, 1, 2, 4, 4, 8]
    assert length.next() == 3, "two of eight came true: three next time"


def test_a_sequence_that_never_guesses_right_stops_guessing() -> None:
    length, num_asked = DraftLength(4, 4), 0
    for _ in range(100):
        count = length.next()
        if count:
            num_asked += 1
            length.update(count, 0)
    assert num_asked <= 9
    while not length.next():
        pass
    length.update(1, 1)
    assert length.next() == 2 and length.next_pause == 1


def test_penalties_ahead_and_taken_back() -> None:
    rng = random.Random(1)
    params = SamplingParams(repetition_penalty=1.2)
    for _ in range(50):
        prompt = [rng.randrange(8) for _ in range(5)]
        counts = PenaltyCounts(prompt, params)
        for _ in range(rng.randint(0, 70)):
            counts.add(rng.randrange(90))
        before = dict(zip(counts.ids.tolist(), counts.counts.tolist()))
        ahead = [rng.randrange(100) for _ in range(rng.randint(1, 6))]
        ids, values = counts.with_ahead(ahead)
        assert dict(zip(counts.ids.tolist(), counts.counts.tolist())) == before
        for token in ahead:
            counts.add(token)
        after = dict(zip(counts.ids.tolist(), counts.counts.tolist()))
        assert dict(zip(ids.tolist(), values.tolist())) == after and len(ids) == len(after)
        for token in reversed(ahead):
            counts.remove(token)
        assert dict(zip(counts.ids.tolist(), counts.counts.tolist())) == before


def test_statistics() -> None:
    stats = SpeculationStats(10, 40, 20, draft_us=480.0)
    assert (stats.acceptance_rate, stats.mean_accepted_length) == (0.5, 3.0)
    assert str(stats) == (
        "20 of 40 drafts accepted (50%), 3.00 tokens a verification, 12 us to make a draft"
    )


def sequence(
    prompt: list[int], number: int = 0, executor_limits: Any = None, **fields: Any
) -> Sequence:
    admission = Admission(executor_limits or limits(), None, frozenset())
    params = SamplingParams(**{"temperature": 0, "max_tokens": 40, **fields})
    made = Sequence(admission.admit(prompt, params), 0, None)
    made.sequence_id = number
    return made


def test_a_draft_model_continues_its_own_guesses_and_rolls_back() -> None:
    """The fake model reads every page back: a stale or foreign one trips its asserts."""
    drafter = DraftModel(FakeExecutor(limits()))
    real = sequence([1, 2, 3, 4, 5])
    assert drafter.propose([(real, 3)]) == [greedy(real.tokens, 3)]
    first = greedy(real.tokens, 3)
    for appended in ([first[0], 9], [7], [], [1, 2, 3], [11]):  # partly right, wrong, none
        real.tokens += appended
        assert drafter.propose([(real, 4)]) == [greedy(real.tokens, 4)]
    real.tokens += greedy(real.tokens, 4)  # all right
    assert drafter.propose([(real, 2)]) == [greedy(real.tokens, 2)]


def test_random_lives_of_many_sequences_share_a_draft_model() -> None:
    rng = random.Random(3)
    small = limits(num_pages=1 + 3 * 16)  # slots for three
    drafter = DraftModel(FakeExecutor(small))
    assert drafter.num_slots == 3
    alive: dict[int, Sequence] = {}
    drafted = 0
    for step in range(300):
        if len(alive) < 6 and rng.random() < 0.3:
            prompt = [rng.randrange(50) for _ in range(rng.randint(1, 30))]
            alive[step] = sequence(prompt, step)
        chosen = [s for s in alive.values() if rng.random() < 0.7]
        rng.shuffle(chosen)
        wanted = [(s, rng.randint(1, 4)) for s in chosen]
        for (real, count), tokens in zip(wanted, drafter.propose(wanted)):
            assert tokens == greedy(real.tokens, len(tokens)) and len(tokens) <= count
            drafted += len(tokens)
            real.tokens += tokens[: rng.randint(0, len(tokens))] + [rng.randrange(50)]
        for number in [n for n, s in alive.items() if len(s.tokens) > 55]:
            drafter.forget(number)
            del alive[number]
    assert drafted > 100


def test_a_draft_model_samples_with_the_requests_own_noise() -> None:
    """Same logits, seed and position: the same token, also with penalties and at temperature."""
    fields = {"temperature": 1.3, "seed": 4, "repetition_penalty": 1.5, "max_tokens": 12}
    engine = checked_engine()
    answer = engine.generate([[1, 2, 3]], **fields)[0].outputs[0].token_ids
    engine.close()
    drafter = DraftModel(FakeExecutor(limits()))
    real = sequence([1, 2, 3], **fields)
    real.seed = as_int64(mix_seed(4, 0))
    assert drafter.propose([(real, 4)]) == [answer[:4]]
    for token in answer[:2]:
        real.tokens.append(token)
        assert real.penalties is not None
        real.penalties.add(token)
    assert drafter.propose([(real, 4)]) == [answer[2:6]]


def test_no_drafts_beyond_the_draft_models_context() -> None:
    drafter = DraftModel(FakeExecutor(limits(max_model_len=20)))
    assert drafter.propose([(sequence(list(range(18))), 4)]) == [[]]
    assert len(drafter.propose([(sequence(list(range(16)), 1), 4)])[0]) == 4
