"""Batches of several sequences over pages: what each step runs, and the runtime's arrays for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_compile.ir import inputs
from aios_compile.ir.module import IRModule
from aios_compile.ir.ops import TABLE

assert TABLE
PAGE = 16
MAX_TOKENS = 48  # of one step
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 40)


@dataclass(frozen=True)
class Chunk:
    """Tokens begin .. begin + count - 1 of a sequence."""

    sequence: int
    begin: int
    count: int


@dataclass(frozen=True)
class Plan:
    """Sequences by length, and the steps that they are computed in."""

    lengths: tuple[int, ...]
    steps: tuple[tuple[Chunk, ...], ...]


def whole(num_tokens: int) -> Plan:
    """Return one sequence in one step."""
    return Plan((num_tokens,), ((Chunk(0, 0, num_tokens),),))


def draw_plan(rng: random.Random) -> Plan:
    """Draw up to three sequences, each cut into chunks at any token, several in a step."""
    lengths = tuple(rng.choice(LENGTHS) for _ in range(rng.choice([1, 2, 2, 3])))
    done = [0] * len(lengths)
    steps = []
    while any(d < n for d, n in zip(done, lengths)):
        chunks, room = list[Chunk](), MAX_TOKENS
        for s in rng.sample(range(len(lengths)), len(lengths)):
            left = lengths[s] - done[s]
            if not left or (chunks and rng.random() < 0.3):
                continue
            count = min(room, left, rng.choice([1, 3, 15, 16, 17, left, left]))
            if count:
                chunks.append(Chunk(s, done[s], count))
                done[s] += count
                room -= count
        steps.append(tuple(chunks))
    return Plan(lengths, tuple(steps))


def runtime_inputs(
    module: IRModule, plan: Plan, step: Sequence[Chunk], ids: Sequence[Tensor], seed: int
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the runtime's inputs of a step by name, and its sizes.

    ids: the token ids of each sequence. Logits are wanted of the last token of each chunk, and of
    its first.
    """
    tables = _pages(plan, seed)
    width = 8
    starts, rows, at = [0], [], 0
    for chunk in step:
        rows += sorted({at, at + chunk.count - 1})
        at += chunk.count
        starts.append(at)
    where = [torch.arange(c.begin, c.begin + c.count) for c in step]
    pages = torch.zeros(len(step), width, dtype=torch.int64)
    for i, chunk in enumerate(step):
        pages[i, : len(tables[chunk.sequence])] = tables[chunk.sequence]
    slots = [tables[c.sequence][w // PAGE] * PAGE + w % PAGE for c, w in zip(step, where)]
    lengths = [torch.full((c.count,), plan.lengths[c.sequence]) for c in step]
    described = inputs.describe(module)
    story = inputs.Step(tuple(c.begin for c in step), tuple(c.count for c in step), tuple(rows))
    made = inputs.every_input(described, story, seed, vocabulary=40)
    made |= {
        "token_ids": torch.cat([ids[c.sequence][w] for c, w in zip(step, where)]),
        "positions": torch.cat(where),
        "slots": torch.cat(slots),
        "sequence_lengths": torch.cat(lengths),
        "query_starts": torch.tensor(starts),
        "context_lengths": torch.tensor([c.begin + c.count for c in step]),
        "page_tables": pages,
        "logit_rows": torch.tensor(rows),
    }
    return made, inputs.sizes_of(story)


def _pages(plan: Plan, seed: int) -> list[Tensor]:
    """Return the pages of each sequence, in no order; page 0 is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // PAGE) for n in plan.lengths]
    free = 1 + torch.randperm(inputs.MAX_PAGES - 1, generator=generator)
    return list(torch.split(free[: sum(counts)], counts))
