"""A batch that only moves on by a token each is what a builder without a past would make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from aios_compile.runtime.batch_builder import BatchBuilder
from aios_compile.sampling_params import SamplingParams
from tests.runtime.conftest import MakeEngine


@pytest.mark.parametrize("buckets", [(), (8, 16, 64)])
def test_a_batch_that_moves_on_is_the_same_made_anew(
    make_engine: MakeEngine, buckets: tuple[int, ...]
) -> None:
    """With penalties, banned words, prompts and preemptions in between, over borders of pages."""
    engine = make_engine(num_pages=26, max_num_seqs=8, token_buckets=buckets)
    builder, counts = engine._core._builder, [0, 0]
    build = builder.build

    def watched(*args: Any) -> Any:
        before = builder._steady
        batch = build(*args)
        counts[before is not None and builder._steady is before] += 1
        anew = BatchBuilder(builder.limits).build(*args)
        for name, value in vars(anew).items():
            got = getattr(batch, name)
            if name == "page_tables":  # what lies behind a sequence's pages is nobody's
                lengths = -(-anew.context_lengths // builder.limits.page_size)
                for row, length in enumerate(lengths):
                    assert np.array_equal(got[row, :length], value[row, :length])
            else:
                assert np.array_equal(got, value), name
        return batch

    builder.build = watched  # type: ignore[method-assign]
    kinds: list[dict[str, Any]] = [
        {}, {"repetition_penalty": 1.4}, {"min_tokens": 9}, {"logprobs": 2}, {"temperature": 0.0},
    ]  # fmt: skip
    params = [SamplingParams(max_tokens=12 + 2 * i, **kinds[i % 5]) for i in range(14)]
    engine.generate([[i, 3, 5][: 1 + i % 3] for i in range(14)], params)
    assert min(counts) > 10 and engine.stats.num_preemptions > 0, (counts, engine.stats)
