"""Who needs what of a GPU's memory: weights, arena, inputs, graphs; the rest becomes KV pages.

Everything is known before anything is allocated, so that a card that is too small is told so with
the numbers, and not by a failing allocation in the middle of a request.
"""

from __future__ import annotations

import math

from aios_compile.codegen.operand import BYTES, dim_value
from aios_compile.codegen.program import Program
from aios_compile.errors import ConfigError
from aios_compile.runtime.gpu_executor import token_buckets
from aios_compile.runtime.program_runner import state_page_bytes
from aios_compile.runtime.staging import FIRST_LIST

GRAPH_BYTES = 128 << 10  # allowed for a node of a captured graph; an estimate, not measured yet
CONTEXT_BYTES = 512 << 20  # CUDA context, modules of kernels, torch's own
TORCH_BYTES = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "float16": 2, "bfloat16": 2}


def needs(program: Program) -> dict[str, int]:
    """Return the bytes of everything but KV pages, by what needs them."""
    weights = sum(math.prod(w.shape) * TORCH_BYTES.get(w.dtype, 4) for w in program.weights)
    sizes = {**program.sizes, **dict.fromkeys(("NP", "NB", "NA"), FIRST_LIST)}
    inputs = sum(
        math.prod(dim_value(d, sizes) for d in entry.shape) * BYTES[entry.dtype]
        for entry in program.inputs
    )
    graphs = len(token_buckets(program.sizes["T"])) * program.num_launches * GRAPH_BYTES
    return {
        "weights": weights,
        "arena": program.plan.arena_bytes + 4 * program.counters,
        "inputs": inputs,
        "graphs": graphs,
        "driver": CONTEXT_BYTES,
    }


def kv_pages(program: Program, total: int, free: int, utilization: float, least: int = 2) -> int:
    """Return the KV pages for a card of `total` bytes of which `free` are free.

    Raises ConfigError with the table of who needs what when fewer than `least` pages fit.
    """
    wanted = needs(program)
    page = max(1, sum(state_page_bytes(program)))
    budget = min(int(total * utilization), free)
    pages = (budget - sum(wanted.values())) // page
    if pages < least:
        table = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in wanted.items())
        raise ConfigError(
            f"the model does not fit: {budget / 1e6:.0f} MB may be used (gpu_memory_utilization="
            f"{utilization} of {total / 1e6:.0f} MB, {free / 1e6:.0f} MB free); {table}; a KV page "
            f"is {page / 1e6:.2f} MB, expected at least {least}",
            advice="raise gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs",
        )
    return int(pages)
