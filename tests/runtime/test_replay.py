"""The decision log: every decision comes again, no prompt is in it, damage is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aios_compile.errors import LogError
from aios_compile.runtime.decisions import KINDS
from aios_compile.runtime.policies import RANKS
from aios_compile.runtime.replay import replay_log
from aios_compile.runtime.schedule_state import SchedulerOptions
from aios_compile.study.cost_model import fit_log
from aios_compile.study.simulator import recorded
from tests.runtime.conftest import checked_engine
from tests.runtime.fake_executor import FakeExecutor


def write_log(path: Path, policy: str = "fcfs") -> None:
    """Run requests that share prefixes on a pool that is too small, and log all of it."""
    engine = checked_engine(
        num_pages=10,
        max_num_batched_tokens=9,
        decision_sink=path,
        options=SchedulerOptions(policy=policy, num_host_pages=6, chunked_prefill_size=4),
    )
    shared = [44, 45, 46, 47, 48, 49, 44, 45, 46, 47]
    prompts = [[*shared[: i % 11], i % 7, 3, 43] for i in range(30)]
    params = [
        engine.defaults.params(
            temperature=0, max_tokens=4 + i % 9, n=1 + (i % 8 == 0),
            priority=i % 3, tenant="acme"[: i % 2 * 4],
        )
        for i in range(30)
    ]  # fmt: skip
    engine.generate(prompts, params)
    engine.logits([43, 44, 45])
    engine.close()


@pytest.mark.parametrize("policy", sorted(RANKS))
def test_every_decision_is_made_again(policy: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path, policy)
    result = replay_log(path)
    assert result.difference is None and result.num_decisions > 200
    assert set(result.kinds) <= set(KINDS)
    assert {"hit", "evict", "chunk", "decode", "copy", "fork", "finish"} <= set(result.kinds)
    assert "preempt" in result.kinds or "swap_out" in result.kinds


def test_no_prompt_and_no_tenant_is_in_the_log(tmp_path: Path) -> None:
    """R12. Equal prefixes show as equal, and nothing else about a token does."""
    path = tmp_path / "log.jsonl"
    write_log(path)
    assert "acme" not in path.read_text()
    arrivals, tokens = [], set()
    for line in path.read_text().splitlines():
        event = json.loads(line).get("event", {})
        if event.get("type") == "Arrive":
            arrivals.append(event)
            tokens |= set(event["tokens"])
        if event.get("type") == "Commit":
            tokens |= {token for chunk in event["sampled"] for token in chunk}
    assert len(tokens) > 200 and min(tokens) > 1000, "a token id of 0 to 49 is a prompt's"
    same = [a["tokens"] for a in arrivals if a["tenant"] == arrivals[4]["tenant"]]
    assert same[2][:4] == same[3][:4] != same[4][:1]
    first = {tuple(a["tokens"][:2]) for a in arrivals if len(a["tokens"]) > 8}
    assert len(first) == 2, "one prefix, under two tenants"


def test_a_changed_decision_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path)
    lines = path.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if '"kind":"chunk"' in line)
    lines[number] = lines[number].replace('"tokens":', '"tokens":1')
    path.write_text("\n".join(lines))
    difference = replay_log(path).difference
    assert difference is not None and difference.line == number + 1
    assert difference.logged != difference.replayed
    del lines[number]
    path.write_text("\n".join(lines))
    assert replay_log(path).difference is not None


def test_a_log_whose_writer_was_killed_replays_up_to_there(tmp_path: Path) -> None:
    """At any byte of its last two steps; while it is written, all but the last event is there."""
    path = tmp_path / "log.jsonl"
    write_log(path)
    whole = path.read_bytes()
    places = {len(whole) - 1, len(whole) - 2, *range(len(whole) - 900, len(whole), 41)}
    results = []
    for place in sorted(places):
        path.write_bytes(whole[:place])
        result = replay_log(path)
        assert result.difference is None
        results.append((result.num_decisions, result.is_cut))
    assert results == sorted(results, key=lambda r: r[0]) and {c for _, c in results} == {
        True,
        False,
    }
    engine = checked_engine(decision_sink=path)
    engine.generate([[1, 2, 3]], temperature=0, max_tokens=3)
    assert replay_log(path).kinds["decode"] == 2, "lines wait in a buffer"
    engine.close()


def test_a_reader_who_leaves_is_a_disconnect() -> None:
    engine = checked_engine()
    executor = engine._core.executor
    assert isinstance(executor, FakeExecutor)
    executor.step_seconds = 0.02
    stream, other = (engine.stream([1, 2], max_tokens=60) for _ in range(2))
    next(stream)
    stream.close()
    next(other)
    engine.abort(other.request_id)
    list(other)
    reasons = [d.reason for d in engine.log.ring if d.kind == "abort"]
    engine.close()
    assert reasons == ["the caller is gone", "the caller asked for it"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no header"),
        ("{}", "no header"),
        ("not json", "not JSON"),
        ("[1]", "got list"),
        ('{"header":{"version":99}}', "version 99"),
        ('{"header":{"version":1}}', "the header is damaged"),
        ('{"header":{"version":1,"limits":{"num_pages":-1},"options":{}}}', "header is damaged"),
    ],
)
def test_a_damaged_header_is_told(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(LogError, match=expected):
        replay_log(path)


def test_damaged_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(LogError, match="cannot be read"):
        replay_log(path)
    write_log(path)
    lines = path.read_text().splitlines()
    for change, expected in (
        (lambda x: [x[0], *x[2:]], "before the first event"),
        (lambda x: [*x[:5], x[5][:20], *x[6:]], ":6: not JSON"),
        (lambda x: [*x[:1], '{"event":{"type":"Nonsense"}}'], ":2: the record is damaged"),
        (lambda x: [x[0], '{"event":{"type":"Abort","now_us":1}}'], ":2: the record is damaged"),
        (lambda x: [x[0], '{"event":{"type":"Preempt","sequence_id":7,"now_us":1}}'], "follow"),
        (lambda x: [y.replace('"sequence_id":3', '"sequence_id":"x"') for y in x], "damaged"),
        (lambda x: [y.replace('"num_sequences":2', '"num_sequences":1e11') for y in x], "damaged"),
        (lambda x: [y.replace('"tokens":[', '"tokens":[null,') for y in x], "damaged"),
    ):
        path.write_text("\n".join(change(list(lines))))
        for read in (replay_log, recorded, fit_log):
            with pytest.raises(LogError, match=expected):
                read(path)
