"""Metrics: what is counted, and the text that an exporter serves."""

from __future__ import annotations

import re

import pytest

from aios_compile.errors import EngineError, PromptTooLongError, error_code
from aios_compile.runtime.health import Pulse, judge
from aios_compile.runtime.metrics import (
    Family,
    Histogram,
    MetricsSnapshot,
    accumulated,
    by_label,
    counter,
    gauge,
)
from tests.runtime.conftest import MakeEngine
from tests.runtime.test_lifecycle import fake

SAMPLE = re.compile(r'^[a-zA-Z_:][\w:]*(\{\w+="([^"\\\n]|\\.)*"(,\w+="([^"\\\n]|\\.)*")*\})? \S+$')


def test_a_histogram_has_cumulative_buckets() -> None:
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.1, 1), (0.11, 2), (5.0, 1)):
        histogram.observe(value, times)
    samples = {(s.suffix, s.labels): s.value for s in histogram.samples()}
    assert samples == {
        ("_bucket", (("le", "0.1"),)): 1,
        ("_bucket", (("le", "1"),)): 3,
        ("_bucket", (("le", "+Inf"),)): 4,
        ("_sum", ()): pytest.approx(5.32),
        ("_count", ()): 4,
    }


def test_the_text_is_the_exposition_format() -> None:
    families = (counter("things_total", "what", 3), by_label("odd_total", "o", "k", {'a"\\\n': 2}))
    text = MetricsSnapshot(families).prometheus_text()
    assert text == (
        "# HELP aios_things_total what\n# TYPE aios_things_total counter\naios_things_total 3\n"
        "# HELP aios_odd_total o\n# TYPE aios_odd_total counter\n"
        'aios_odd_total{k="a\\"\\\\\\n"} 2\n'
    )


def test_requests_are_counted_and_timed(make_engine: MakeEngine) -> None:
    engine = make_engine(num_pages=10, max_num_seqs=4)
    fake(engine).step_seconds, fake(engine).overlap = 0.002, "never"  # it sleeps in two at once
    outputs = engine.generate([[1, 2, 3, 4, 5]] * 6, temperature=0, max_tokens=12)
    m = engine.metrics()
    assert m.value("prompt_tokens_total") == 30 and m.value("generation_tokens_total") == 72
    assert m.value("requests_finished_total", reason="length") == 6
    assert m.value("time_to_first_token_seconds", "_count") == 6
    assert m.value("inter_token_latency_seconds", "_count") == 66
    assert m.value("inter_token_latency_seconds", "_bucket", le="0.001") == 0, "a step takes 2 ms"
    assert m.value("request_queue_time_seconds", "_count") == 6
    assert m.value("request_latency_seconds", "_sum") == pytest.approx(
        sum(o.metrics.total_us for o in outputs) / 1e6
    )
    assert m.value("preemptions_total") == engine.stats.num_preemptions > 0
    assert m.value("requests_running") == m.value("requests_waiting") == 0
    assert m.value("kv_pages") == 9 and m.value("kv_pages_used") == 0
    with pytest.raises(KeyError):
        m.value("no_such_name")


def test_gauges_while_requests_run_and_wait(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    fake(engine).step_seconds = 0.01
    streams = [engine.stream([i, 2, 3, 4, 5], max_tokens=50) for i in range(5)]
    next(streams[0])
    m = engine.metrics()
    assert m.value("requests_running") == 2 and m.value("requests_waiting") == 3
    assert m.value("kv_pages_used") >= 4
    for stream in streams:
        stream.close()


def test_every_line_of_an_engine_can_be_parsed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.generate([[1, 2]], max_tokens=3)
    text = engine.metrics().prometheus_text()
    names = set()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            name = line.split()[2]
            assert name not in names, "a family twice"
            names.add(name)
        elif not line.startswith("# HELP"):
            assert SAMPLE.match(line), line
    assert len(names) >= 15 and text.endswith("\n")


def test_errors_are_counted_by_code(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def fail(batch: object) -> None:
        raise MemoryError("planted")

    fake(engine).before_step = fail
    with pytest.raises(EngineError):
        engine.generate([[1]])
    assert engine.metrics().value("request_errors_total", code="engine_failed") == 1
    assert engine.metrics().value("requests_finished_total", reason="error") == 1
    assert error_code(PromptTooLongError("x")) == "prompt_too_long"
    assert error_code(ValueError("x")) == "internal"


@pytest.mark.parametrize(
    ("pulse", "alive", "expected"),
    [
        (Pulse(), True, (True, False, False)),
        (Pulse(None, 99), True, (True, True, False)),
        (Pulse(None, 99), False, (False, False, False)),
        (Pulse(95, 90), True, (True, True, False)),
        (Pulse(80, 79), True, (False, False, True)),
        (Pulse(None, 50), True, (True, False, False)),
    ],
)
def test_live_and_ready(pulse: Pulse, alive: bool, expected: tuple[bool, bool, bool]) -> None:
    health = judge(pulse, alive=alive, at_us=100, stall_us=10, probe_us=20)
    assert (health.live, health.ready, health.stalled) == expected
    assert bool(health.reason) != health.ready


def test_what_an_engine_that_is_gone_counted_is_added() -> None:
    def families(tokens: int, running: int, **ends: int) -> tuple[Family, ...]:
        histogram = Histogram((1.0, 2.0))
        histogram.observe(1.5, tokens)
        return (
            counter("tokens", "", tokens),
            gauge("running", "", running),
            by_label("ends", "", "reason", ends),
            Family("times", "histogram", "", histogram.samples()),
        )

    found = MetricsSnapshot(
        accumulated(families(5, 3, stop=2, abort=1), families(7, 1, stop=1, length=4))
    )
    assert (found.value("tokens"), found.value("running")) == (12, 1)
    assert [found.value("ends", reason=r) for r in ("stop", "abort", "length")] == [3, 1, 4]
    assert found.value("times", "_bucket", le="1") == 0 < found.value("times", "_bucket", le="2")
    assert found.value("times", "_count") == 12 and found.value("times", "_sum") == 18
    alone = accumulated(families(5, 3, stop=2), ())  # the next one has not said anything yet
    assert [family.name for family in alone] == ["tokens", "ends", "times"]
