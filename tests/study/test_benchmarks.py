"""What the benchmarks count by, and how they compare: no clock, no peer needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks import report
from benchmarks.floors import BITS, Rates, Work, decode_floor, prefill_floor
from benchmarks.interleaved import compare
from benchmarks.ours import weight_bytes
from benchmarks.shapes import SHAPES

RATES = Rates(bandwidth=30e9, fma=200e9, int8=800e9, bf16=400e9)


class Packed(NamedTuple):
    """A program's weight entry, as far as the counting reads it."""

    shape: tuple[int, ...]
    dtype: str
    packed: str


# Published sizes: 10^9 weights of linears and head, GB a step at 16, 8.5 and 4.5 bits, KV bytes.
@pytest.mark.parametrize(
    ("shape", "linear", "head", "bytes_a_step", "kv_bytes"),
    [
        ("qwen3-0.6b", 0.440, 0.156, (1.192, 0.633, 0.335), 114_688),
        ("llama-3.2-1b", 0.973, 0.263, (2.471, 1.313, 0.695), 32_768),
        ("qwen3-1.7b", 1.409, 0.311, (3.441, 1.828, 0.968), 114_688),
    ],
)
def test_work_counts_the_published_sizes(
    shape: str, linear: float, head: float, bytes_a_step: tuple[float, ...], kv_bytes: int
) -> None:
    work = Work.of(SHAPES[shape])
    assert work.linear_weights / 1e9 == pytest.approx(linear, abs=6e-4)
    assert work.head_weights / 1e9 == pytest.approx(head, abs=6e-4)
    found = [work.weight_bytes(BITS[name]) / 1e9 for name in ("bf16", "int8", "int4")]
    assert found == pytest.approx(bytes_a_step, abs=6e-4)
    assert work.kv_bytes() == kv_bytes


def test_attention_counts_each_pair_once() -> None:
    work = Work(0, 0, 0, query_channels=3)
    pairs = sum(1 for query in range(5) for key in range(7 + 5) if key <= 7 + query)
    assert work.attention_operations(5, context=7) == 4 * 3 * pairs


def test_a_decode_step_is_bound_by_bytes_until_the_batch_computes_longer() -> None:
    work = Work.of(SHAPES["qwen3-0.6b"])
    weights = work.weight_bytes(4.5)
    one = decode_floor(RATES, work, "int4", weights, batch=1, context=0)
    assert one == pytest.approx(weights / 30e9)
    behind = decode_floor(RATES, work, "int4", weights, batch=1, context=8192)
    assert behind - one == pytest.approx(8192 * 114_688 / 30e9)
    many = decode_floor(RATES, work, "int4", weights, batch=64, context=0)
    linears = 64 * 2 * (work.linear_weights + work.head_weights) / 800e9
    attention = 64 * 4 * work.query_channels / 200e9  # each new token sees itself
    assert many == pytest.approx(linears + attention)


def test_a_prompt_is_the_sum_of_its_operations_over_their_peaks() -> None:
    work = Work.of(SHAPES["qwen3-0.6b"])
    found = prefill_floor(RATES, work, "bf16", work.weight_bytes(16), tokens=256)
    linears = 2 * (work.linear_weights * 256 + work.head_weights) / 400e9
    attention = 4 * work.query_channels * 256 * 257 / 2 / 200e9
    assert found == pytest.approx(linears + attention)


def test_an_embedding_table_of_its_own_is_not_read_in_a_step() -> None:
    entries = [
        Packed((1024,), "bfloat16", ""),
        Packed((2048, 1024), "bfloat16", ""),  # gathered, a row a token
        Packed((2048, 576), "uint8", "quant16.int4_g32_f16"),
        Packed((64, 32), "bfloat16", "rows16"),
    ]
    program = types.SimpleNamespace(weights=entries)
    assert weight_bytes(program) == 1024 * 2 + 2048 * 576 + 64 * 32 * 2


def test_ratios_are_of_pairs_and_the_better_bandwidth_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.interleaved.REST_SECONDS", 0.0)
    turns: list[str] = []
    times = {"ours": iter([1.0, 2.0, 4.0]), "peer": iter([3.0, 2.0, 8.0])}
    bandwidths = iter([10.0, 20.0, 20.0, 5.0, 8.0, 8.0])

    def turn(name: str) -> float:
        turns.append(name)
        return next(times[name])

    found = compare(
        lambda: turn("ours"),
        {"peer": lambda: turn("peer")},
        lambda: Rates(next(bandwidths), 1.0, 1.0, 1.0),
        lambda rates: 10.0 / rates.bandwidth,
        rounds=3,
    )
    assert turns == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert found["peers"]["peer"]["ratio"] == {"median": 2.0, "least": 1.0, "most": 3.0}
    assert found["share"] == {"median": 0.3125, "least": 0.25, "most": 0.5}
    assert found["rates"]["bandwidth"] == 20.0


@pytest.fixture()
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the peer's module; where llama-cpp-python is missing, behind a stub of its names."""
    if importlib.util.find_spec("llama_cpp") is None:
        stub = types.ModuleType("llama_cpp")
        stub.__version__ = "0"  # type: ignore[attr-defined]
        stub.llama_log_callback = lambda function: function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "llama_cpp", stub)
        monkeypatch.delitem(sys.modules, "benchmarks.peers.llama_cpp", raising=False)
    return importlib.import_module("benchmarks.peers.llama_cpp")


def test_a_row_beside_a_slow_build_of_llama_cpp_is_void(llama_cpp: Any) -> None:
    healthy = llama_cpp.health("Q8_0", rate=0.48 * 30e9, bandwidth=30e9)
    assert not healthy["void"] and healthy["share"] == pytest.approx(0.48)
    assert not llama_cpp.health("BF16", rate=0.9 * 30e9, bandwidth=30e9)["void"]
    assert llama_cpp.health("Q4_0", rate=0.8 * 0.45 * 30e9 - 1, bandwidth=30e9)["void"]
    row = {
        "tokens": 1,
        "seconds": {"median": 0.02},
        "share": {"median": 0.5, "least": 0.4, "most": 0.6},
        "peers": {
            "llama.cpp": {
                "ratio": {"median": 9.0, "least": 8.0, "most": 10.0},
                "health": llama_cpp.health("Q4_0", rate=1e9, bandwidth=30e9),
            }
        },
    }
    assert "9.00x (8.00-10.00) VOID" in " ".join(report.cells("decode", row))


def test_results_are_kept_row_by_row(tmp_path: Path) -> None:
    where = {"date": "2026-01-01", "commit": "abc", "processor": {}, "versions": {}}
    row = {"seconds": {"median": 0.0123456789}, "rounds": 9}
    report.Results(tmp_path / "r.json", "tiny", 2).add("int4", "decode", row, where)
    again = report.Results(tmp_path / "r.json", "tiny", 2)
    assert again.has("int4", "decode") and not again.has("int4", "batch8")
    kept = again.data["rows"]["int4"]["decode"]
    assert kept["seconds"]["median"] == 0.012346 and kept["commit"] == "abc"
    with pytest.raises(AssertionError, match="another shape"):
        report.Results(tmp_path / "r.json", "tiny", 4)
