"""Counters of the engine's thread, and how they read as metrics."""

from __future__ import annotations

from dataclasses import dataclass

from aios_compile.runtime.kv_cache import PagePool
from aios_compile.runtime.metrics import Family, counter, gauge
from aios_compile.runtime.speculator import SpeculationStats


@dataclass
class EngineStats:
    """Counters since the engine started. executor_us is the part of step_us inside the executor.

    num_tokens were computed; num_cached_tokens were not, because the prefix cache had them, and
    num_prompt_tokens are those of all sequences that could look there. num_steps_ahead were begun
    while the one before ran; num_steps_in_vain, which count as no steps, were begun so and dropped.
    """

    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_evictions: int = 0
    num_steps_ahead: int = 0
    num_steps_in_vain: int = 0
    step_us: float = 0.0
    executor_us: float = 0.0


def queue_and_pages(num_running: int, num_waiting: int, pool: PagePool) -> tuple[Family, ...]:
    """Return the gauges: what is there now."""
    total = pool.num_pages - 1
    return (
        gauge("requests_running", "requests that had their first step", num_running),
        gauge("requests_waiting", "requests that had no step yet", num_waiting),
        gauge("kv_pages", "pages of the KV cache", total),
        gauge("kv_pages_used", "pages held by sequences", total - pool.num_free),
    )


def counters(stats: EngineStats, drafts: SpeculationStats) -> tuple[Family, ...]:
    """Return the counters of steps, the prefix cache and drafts."""
    looked_up, drafted = stats.num_prompt_tokens, drafts.num_draft_tokens
    return (
        counter("steps_total", "steps of the batch", stats.num_steps),
        counter("steps_ahead_total", "begun while the one before ran", stats.num_steps_ahead),
        counter("steps_in_vain_total", "begun so and dropped", stats.num_steps_in_vain),
        counter("step_tokens_total", "tokens computed by steps", stats.num_tokens),
        counter("step_seconds_total", "time in steps", stats.step_us / 1e6),
        counter("executor_seconds_total", "time in kernels", stats.executor_us / 1e6),
        counter("preemptions_total", "pages taken back", stats.num_preemptions),
        counter("prefix_cache_query_tokens_total", "prompt tokens looked up", looked_up),
        counter("prefix_cache_hit_tokens_total", "not computed", stats.num_cached_tokens),
        counter("prefix_cache_evictions_total", "pages given up", stats.num_evictions),
        counter("draft_tokens_total", "drafts verified", drafted),
        counter("accepted_tokens_total", "drafts accepted", drafts.num_accepted_tokens),
    )
