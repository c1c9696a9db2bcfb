"""Choose the sizes of an engine from the plan, the user's options and the free memory."""

from __future__ import annotations

from aios_compile.codegen.program import Program
from aios_compile.config import CompileOptions
from aios_compile.errors import ConfigError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.program_runner import state_page_bytes
from aios_compile.runtime.schedule_state import SchedulerOptions

DEFAULT_KV_SHARE = 0.4  # of the memory that is free at the start, when no size was given
PINNED_BYTES = 2 << 30  # to swap to, beside a GPU, when no size was given: pinning takes time


def make_limits(program: Program, options: CompileOptions, free_bytes: int) -> Limits:
    """Return the sizes of the runtime: the plan's, and as many KV pages as memory allows."""
    settings, sizes = program.settings, program.sizes
    width = settings["max_pages_per_sequence"]
    page_bytes = max(1, sum(state_page_bytes(program)))
    wanted = sizes["S"] * width + 1
    budget = options.kv_cache_memory_bytes
    if budget is None:
        budget = max(int(free_bytes * DEFAULT_KV_SHARE), page_bytes * (width + 1))
    pages = min(wanted, budget // page_bytes)
    if pages < 2:
        raise ConfigError(
            f"kv_cache_memory_bytes={budget} holds {pages} pages of {page_bytes} bytes, "
            "expected at least 2",
            advice=f"give at least {2 * page_bytes} bytes",
        )
    return Limits(
        max_num_batched_tokens=sizes["T"],
        max_num_seqs=sizes["S"],
        max_num_logit_rows=sizes["R"],
        max_pages_per_sequence=width,
        num_pages=pages,
        page_size=settings["page_size"],
        max_model_len=settings["max_model_len"],
        vocab_size=settings["vocab_size"],
    )


def make_scheduler_options(
    program: Program, options: CompileOptions, limits: Limits, can_swap: bool
) -> SchedulerOptions:
    """Return what the scheduler is told about the model, the machine and the user's wishes.

    By default a step that carries running streams takes prompt tokens for a quarter of the largest
    step, so that a long prompt slows them by little; a step of prompts alone is not cut.
    """
    page_bytes = max(1, sum(state_page_bytes(program)))
    host_bytes = options.swap_space_bytes
    if host_bytes and not can_swap:
        raise ConfigError(
            f"swap_space_bytes={host_bytes}: this executor does not swap to host memory",
            advice="leave it at None: preempted sequences are computed again",
        )
    if host_bytes is None:
        host_bytes = limits.num_pages * page_bytes // 4
        if program.settings.get("family") == "triton":
            # less the page to spare: pinned memory is taken in powers of two
            host_bytes = min(host_bytes, PINNED_BYTES - page_bytes)
    chunk = options.chunked_prefill_size or max(1, limits.max_num_batched_tokens // 4)
    return SchedulerOptions(
        policy=options.scheduling_policy,
        enable_prefix_caching=options.enable_prefix_caching,
        chunked_prefill_size=chunk,
        window_tokens=program.settings.get("window_tokens"),
        num_host_pages=host_bytes // page_bytes if can_swap else 0,
    )
