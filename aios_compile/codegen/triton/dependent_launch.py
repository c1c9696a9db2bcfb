"""Programmatic dependent launch: a kernel starts while the one before it still runs (sm_90 on).

Between two kernels of a graph a GPU drains and fills again, about 1.3 us on Hopper. With the launch
option `launch_pdl` a kernel is started as soon as all programs of the one before have said so
(`gdc_launch_dependents`, the first thing that each does here); it then waits where it first reads
what others wrote (`gdc_wait`: until the kernel before has ended and its memory can be seen). What
comes before the wait overlaps: addresses, and weights, which no kernel writes, are fetched into L2.
Each kernel waits for the one before it, so all earlier ones have ended too.
Compiled out in the interpreter; modules for other cards are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from aios_compile.codegen.operand import BYTES
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.configs import Config
from aios_compile.codegen.triton.linear_spec import LinearSpec
from aios_compile.codegen.triton.linear_text import w_row

HEAD = '''\
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
DEPENDENT = {} if INTERPRETED.value else {"launch_pdl": True}


@triton.jit
def wait_for_inputs():
    """Let the next kernel start; wait until what the one before has written can be read."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
'''
INTERPRETED = HEAD.partition("\n")[0] + "\n"
WAIT = "    wait_for_inputs()"
LINE_BYTES = 128  # of L2: what one prefetch brings
MOST_LINES = 2048  # of a program: beyond, the loads themselves are early enough


def with_dependent_launch(source: KernelSource) -> KernelSource:
    """Return the module with every launch dependent on the one before it."""
    text = source.text.replace(INTERPRETED, HEAD, 1)
    assert text != source.text, f"{source.symbol} does not begin as modules do"
    for kernel in dict.fromkeys(re.findall(r"kernel=(\w+),", text)):
        text = _waiting(text, kernel)
    text = text.replace("options=dict(", "options=dict(**DEPENDENT, ")
    return replace(source, text=text)


def _waiting(text: str, kernel: str) -> str:
    """Return the text with the wait in a kernel: behind its prefetches, else at its begin."""
    head, define, rest = text.partition(f"\ndef {kernel}(")
    if not define:  # a library's product, which no text of ours can make wait
        return text
    signature, colon, body = rest.partition("):\n")
    end = re.search(r"\n(?=\S)", body)
    mine, others = (body[: end.start()], body[end.start() :]) if end else (body, "")
    lines = mine.split("\n")
    last = max((i for i, x in enumerate(lines) if x.startswith("    prefetch(")), default=-1)
    lines.insert(last + 1, WAIT)
    return head + define + signature + colon + "\n".join(lines) + others


def prefetch_lines(spec: LinearSpec, config: Config) -> list[str]:
    """Return the lines that fetch a program's weights into L2, before it waits for its inputs."""
    if not config.prefetch:
        return []
    rows = [w_row(spec, "column", s) for s in range(spec.streams)]
    item = BYTES[spec.weight.operand.dtype]
    return prefetch_rows(rows, spec.depth * item, item, config.block_n, config.split)


def prefetch_rows(
    rows: Sequence[str], num_bytes: int, item: int, columns: int, split: int
) -> list[str]:
    """Return the lines that fetch rows into L2; none where they are more than a program should.

    rows: texts of the addresses [columns, 1] of a stream's rows of `num_bytes` in elements of
    `item`. Programs that share a tile's depth fetch a part each.
    """
    lines = -(-num_bytes // (LINE_BYTES * split))
    if lines * columns * len(rows) > MOST_LINES:
        return []
    first = f"part * {lines}" if split > 1 else "0"
    padded = 1 << max(0, lines - 1).bit_length()
    last = -(-num_bytes // LINE_BYTES) - 1
    return [f"prefetch({row}, {first}, {last}, {padded}, {LINE_BYTES // item})" for row in rows]
