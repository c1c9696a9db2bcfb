"""What an engine measures about itself: counters, gauges and histograms, and their text form.

One writer (the engine's thread); readers take a snapshot at any time. The text is the Prometheus
exposition format 0.0.4 (prometheus.io/docs/instrumenting/exposition_formats); names follow its
rules: base units, `_total` on counters. Buckets of the latencies are vLLM's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS_S = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5,
)  # fmt: skip
REQUEST_BUCKETS_S = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
RECENT_ENDS = 32  # requests whose ends give the rate of the retry hint
MAX_RETRY_AFTER_S = 60

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sample:
    """One number; suffix is appended to the family's name (histograms have three kinds)."""

    value: float
    labels: Labels = ()
    suffix: str = ""


@dataclass(frozen=True)
class Family:
    """All samples of one name. kind: "counter", "gauge" or "histogram"."""

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...]


class Histogram:
    """Counts of values in (bound before, bound]; the last bucket has no upper bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds, value)] += times
        self._sum += value * times

    def samples(self) -> tuple[Sample, ...]:
        """Return cumulative buckets, sum and count, consistent with each other in the counts."""
        counts, total, found = list(self._counts), 0, []
        for bound, count in zip((*self.bounds, float("inf")), counts):
            total += count
            found.append(Sample(total, (("le", _number(bound)),), "_bucket"))
        return (*found, Sample(self._sum, (), "_sum"), Sample(total, (), "_count"))


class EngineMetrics:
    """What happens to requests. Times are microseconds of one monotonic clock."""

    def __init__(self) -> None:
        self.ttft_s = Histogram(TTFT_BUCKETS_S)
        self.inter_token_s = Histogram(INTER_TOKEN_BUCKETS_S)
        self.queue_s = Histogram(REQUEST_BUCKETS_S)
        self.request_s = Histogram(REQUEST_BUCKETS_S)
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.finished: Counter[str] = Counter()  # by finish_reason
        self.errors: Counter[str] = Counter()  # by code, refused requests included
        self._ends_us: deque[int] = deque(maxlen=RECENT_ENDS)

    def on_end(self, now_us: int, total_us: int, reason: str) -> None:
        """Count a request that ended, with its time since submission."""
        self.request_s.observe(total_us / 1e6)
        self.finished[reason] += 1
        self._ends_us.append(now_us)

    def retry_after_s(self, num_waiting: int, now_us: int) -> int:
        """Return whole seconds after which the queue is expected to have room, 1 to 60."""
        ends = list(self._ends_us)
        if len(ends) < 2:
            return 1
        seconds_each = (now_us - ends[0]) / 1e6 / len(ends)
        return int(min(MAX_RETRY_AFTER_S, max(1, num_waiting * seconds_each)))

    def families(self) -> list[Family]:
        histograms = (
            ("time_to_first_token_seconds", "from submission to the first token", self.ttft_s),
            ("inter_token_latency_seconds", "between two tokens of a request", self.inter_token_s),
            ("request_queue_time_seconds", "from submission to the first step", self.queue_s),
            ("request_latency_seconds", "from submission to the end", self.request_s),
        )
        return [
            *(Family(name, "histogram", text, h.samples()) for name, text, h in histograms),
            counter("prompt_tokens_total", "tokens of admitted prompts", self.num_prompt_tokens),
            counter("generation_tokens_total", "tokens generated", self.num_output_tokens),
            by_label("requests_finished_total", "ended requests", "reason", self.finished),
            by_label("request_errors_total", "refused and failed", "code", self.errors),
        ]


def counter(name: str, help_text: str, value: float) -> Family:
    return Family(name, "counter", help_text, (Sample(value),))


def gauge(name: str, help_text: str, value: float) -> Family:
    return Family(name, "gauge", help_text, (Sample(value),))


def by_label(name: str, help_text: str, label: str, values: Mapping[str, int]) -> Family:
    """Return a counter with one sample a value of `label`."""
    rows = sorted(dict(values).items())
    return Family(name, "counter", help_text, tuple(Sample(v, ((label, k),)) for k, v in rows))


def accumulated(before: tuple[Family, ...], now: tuple[Family, ...]) -> tuple[Family, ...]:
    """Return `now` on top of what an engine that is gone had counted; gauges are those of `now`.

    A counter must not fall when an engine is started again: a scraper would take that for a reset.
    """
    old = {family.name: family for family in before if family.kind != "gauge"}
    found = []
    for family in now:
        known = old.pop(family.name, None)
        if known is None or family.kind == "gauge":
            found.append(family)
            continue
        values = {(s.labels, s.suffix): s.value for s in known.samples}
        for s in family.samples:
            values[s.labels, s.suffix] = values.get((s.labels, s.suffix), 0.0) + s.value
        samples = tuple(Sample(value, *key) for key, value in values.items())
        found.append(Family(family.name, family.kind, family.help, samples))
    return (*found, *old.values())


@dataclass(frozen=True)
class MetricsSnapshot:
    """All families at one moment."""

    families: tuple[Family, ...]

    def value(self, name: str, suffix: str = "", **labels: str) -> float:
        """Return one sample's value; 0 for a label that has not occurred, KeyError for a name."""
        wanted = tuple(labels.items())
        for family in self.families:
            if family.name == name:
                for sample in family.samples:
                    if (sample.labels, sample.suffix) == (wanted, suffix):
                        return sample.value
                return 0.0
        raise KeyError(name)

    def prometheus_text(self, prefix: str = "aios_") -> str:
        """Return the exposition: HELP and TYPE lines, then one line a sample."""
        return "".join(line + "\n" for f in self.families for line in _lines(f, prefix))


def _lines(family: Family, prefix: str) -> Iterable[str]:
    name = prefix + family.name
    yield f"# HELP {name} {family.help}"
    yield f"# TYPE {name} {family.kind}"
    for sample in family.samples:
        labels = ",".join(f'{key}="{_escape(value)}"' for key, value in sample.labels)
        where = f"{{{labels}}}" if labels else ""
        yield f"{name}{sample.suffix}{where} {_number(sample.value)}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(float(value))
