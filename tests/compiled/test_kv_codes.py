"""kv_cache_dtype="int8", "fp8": perplexity, bytes, invariance, windows, eager, weights, a process.

Few models, compiled once: the tests share their options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aios_compile.engine_process import start_front
from aios_compile.errors import ConfigError
from aios_compile.model_source import open_source
from aios_compile.runtime.program_runner import state_page_bytes
from aios_compile.study.verify_logits import verify_logits
from tests import zoo
from tests.compiled.conftest import SMALL_STEPS, Load
from tests.compiled.invariance import check, check_freed_window_pages
from tests.compiled.test_batch_invariance import EXAMPLE, PROMPT
from tests.compiled.test_quantized import WIDE, held_out, perplexity
from tests.variants import nightly

INT8: dict[str, Any] = {"kv_cache_dtype": "int8"}
FP8: dict[str, Any] = {"kv_cache_dtype": "fp8"}
BOTH = pytest.mark.parametrize("codes", [INT8, FP8], ids=["int8", "fp8"])
# What the codes may change: perplexity of the example, logits of random weights, and the largest
# budget of the certificate (half a step of e4m3 is up to 1/16 of a value).
LIMITS = {"int8": (1e-3, 0.05, 0.1), "fp8": (2e-3, 0.15, 0.4)}
SMALL = {"kv_cache_memory_bytes": 1 << 18}  # few pages: the eager references copy them each step


@pytest.mark.nightly
@BOTH
def test_the_example_checkpoint(
    codes: dict[str, Any], load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity within 0.1 % (fp8: 0.2 %) of the bf16 cache (all of the text: -0.008 %) at 9 bits
    a value (heads of 32); the report; R3.

    Chunks, neighbours, cached prefixes, copied and swapped pages: scales go with their codes.
    """
    plain = load(EXAMPLE, "auto", **WIDE)
    monkeypatch.setenv("AIOS_VERIFY", "1")
    name = codes["kv_cache_dtype"]
    model = load(EXAMPLE, "auto", **WIDE, **codes)
    text = held_out()[:2048]
    change = perplexity(model, text) / perplexity(plain, text) - 1
    print(f"{name} KV: perplexity {change:+.4%}")
    assert 0 < abs(change) < LIMITS[name][0]
    (values,) = (s for s in model.program.states if s.name.startswith("layer_0_v_cache_"))
    width = values.page_shape[-1]
    before, after = (sum(state_page_bytes(m.program)) / 16 for m in (plain, model))
    assert after == before / 2 * (1 + 4 / width)
    report = model.report()
    assert f"KV cache in {name}" in str(report)
    assert f", a scale a token and head: {after:,.0f} bytes a tok" in str(report)
    row = report["quantize_kv"]
    assert row.max_error is not None and row.error_budget is not None
    assert row.hits == 1 and 1e-4 < row.max_error < row.error_budget < LIMITS[name][2]
    counts = check(model, PROMPT, 6)
    assert counts["num_cached_tokens"] > 20 and counts["swapped"] > 1


@pytest.mark.parametrize("codes", [*nightly(INT8), FP8], ids=["int8", "fp8"])
def test_windows_eager_and_the_pool(
    codes: dict[str, Any], load: Load, zoo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that left the window of 7 are poisoned; AIOS_EAGER gives the same tokens."""
    model, floats = load("mistral_window", **SMALL, **codes), load("mistral_window", **SMALL)
    for loaded in (model, floats):
        assert loaded.limits.num_pages == (1 << 18) // sum(state_page_bytes(loaded.program))
    assert model.limits.num_pages >= 3 * floats.limits.num_pages  # float32: 32 bits, not 8 + 2
    assert max(check_freed_window_pages(model)) > 0

    source = open_source(zoo.make("mistral_window", zoo_folder, "float32"), model.options)
    assert "no budget is held against" in verify_logits(model, source)
    assert "allowed" in verify_logits(floats, source)
    monkeypatch.setenv("AIOS_EAGER", "1")
    eager = load("mistral_window", **SMALL, **codes)
    ids = zoo.token_ids(zoo.make("mistral_window", zoo_folder, "float32"))
    want = floats(ids)
    largest, found = want.abs().max(), model(ids)
    allowed = LIMITS[codes["kv_cache_dtype"]][1]
    assert 1e-5 * largest < (found - want).abs().max() < allowed * largest
    # a key on the border between two codes may fall either way: one code, not more
    assert (eager(ids) - found).abs().max() < allowed / 5 * largest
    given = {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
    some = [ids[:20], ids[5:9], ids[:1]]
    ours, theirs = model.generate(some, **given), eager.generate(some, **given)
    assert [r.outputs[0].token_ids for r in ours] == [r.outputs[0].token_ids for r in theirs]


@pytest.mark.nightly
def test_with_quantised_weights_and_in_a_process_of_its_own(load: Load, zoo_folder: Path) -> None:
    both = {**INT8, "quantization": "int4"}
    model, plain = load("qwen3_gqa", **both), load("qwen3_gqa", quantization="int4")
    path = zoo.make("qwen3_gqa", zoo_folder, "float32")
    ids = zoo.token_ids(path)
    want = plain(ids)
    assert 0 < (model(ids) - want).abs().max() < 0.05 * want.abs().max()
    fields = {"max_tokens": 12, "temperature": 0.7, "seed": 5, "ignore_eos": True, "logprobs": 1}
    expected = model.generate(ids[:30], **fields).outputs
    options = {**SMALL_STEPS, "num_threads": 1, "progress": False, **both}
    with start_front(str(path), **options) as front:
        assert front.generate([ids[:30]], **fields)[0].outputs == expected


def test_what_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='fp8_e5m2'.*a KV cache of e5m2"):
        load("qwen3_gqa", kv_cache_dtype="fp8_e5m2")
