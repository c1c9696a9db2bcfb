"""Random values that a program can run on: weights, runtime inputs and states, from one seed.

A graph of level 2 or 3 does not run on arbitrary integers: slots, page tables and sequence starts
must fit each other. A `Step` says which positions of which sequences are computed; all values
follow from it.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aios_compile.ir.module import IRModule, placeholders
from aios_compile.ir.quantized import LARGEST_CODE
from aios_compile.ir.symbols import size_names

MAX_PAGES = 16  # a sampled cache has at most this many pages, whatever the pool will have
PAGE_SIZE = 16
_ROW_KINDS = 8  # rows of a sampled step differ in what decides the token, see _sampling_inputs
_PERIOD = 999_983  # prime: rows of a table that repeats differ


@dataclass(frozen=True)
class Value:
    """A placeholder of the outer graph. kind: "weight", "input", "state" or "free" (tests).

    source: the runtime input's name, else the placeholder's. shape: ints, or texts over the size
    names ("T", "S + 1").
    """

    name: str
    kind: str
    source: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """The tokens of one step: sequence s brings `lengths[s]` tokens from position `starts[s]` on.

    rows: the token indices whose logits are wanted. prompts: where all of a few prompts is computed
    in some steps, the length of each; which: the prompt that sequence s is from. Without prompts
    the sequences have a past that nobody computed.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    prompts: tuple[int, ...] = ()
    which: tuple[int, ...] = (0,)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def places(self) -> list[int]:
        """Return the place of each token among those of all prompts, one after the other."""
        begins = [sum(self.prompts[:i]) for i in self.which] if self.prompts else self._apart()
        spans = zip(begins, self.starts, self.lengths)
        return [b + s + i for b, s, n in spans for i in range(n)]

    def _apart(self) -> list[int]:
        ends = [s + n for s, n in zip(self.starts, self.lengths)]
        return [sum(ends[:i]) for i in range(len(ends))]


def whole(num_tokens: int) -> Step:
    """Return a step that is one whole sequence; logits of its last and of some other tokens."""
    return Step((0,), (num_tokens,), _rows(num_tokens, num_tokens // 2), (num_tokens,))


def _rows(num_tokens: int, *more: int) -> tuple[int, ...]:
    """Return the tokens whose logits are wanted: in a longer step enough for every sampler."""
    many = range(0, num_tokens, 2) if num_tokens > 2 * _ROW_KINDS else ()
    return tuple(sorted({*more, num_tokens - 1, *many}))


def chunks(*prompts: int) -> list[Step]:
    """Return whole prompts cut into a prefill and a later chunk each, which reads the cache.

    The first chunks of all prompts are one step, so are the second ones.
    """
    if prompts == (1,):
        return [whole(1)]
    cuts = [max(1, n * 2 // 3) for n in prompts]
    rests = [n - c for n, c in zip(prompts, cuts)]
    numbers = tuple(range(len(prompts)))
    zeros = (0,) * len(prompts)
    first = Step(zeros, tuple(cuts), (), prompts, numbers)
    second = Step(tuple(cuts), tuple(rests), (), prompts, numbers)
    wanted = {p for step in each_whole(*prompts) for p in _places(step, step.rows)}
    steps = []
    for step in (first, second):
        lasts = {sum(step.lengths[: i + 1]) - 1 for i in numbers}
        rows = {i for i, place in enumerate(step.places) if place in wanted}
        steps.append(replace(step, rows=tuple(sorted(rows | lasts))))
    return steps


def each_whole(*prompts: int) -> list[Step]:
    """Return a step for each whole prompt."""
    alone = [whole(n) for n in prompts]
    return [replace(step, prompts=prompts, which=(i,)) for i, step in enumerate(alone)]


def _places(step: Step, rows: Sequence[int]) -> list[int]:
    return [step.places[row] for row in rows]


def mixed(num_tokens: int, longest: int = 34) -> Step:
    """Return one batch of a decode, a prefill chunk amid a sequence, and a fresh prefill.

    longest: how many tokens the decode's sequence may have.
    """
    past = max(longest - 1, 33)
    if num_tokens == 1:
        return Step((17,), (1,), (0,))
    if num_tokens < 8:
        return Step((20, 0), (1, num_tokens - 1), (0, num_tokens - 1))
    middle = (num_tokens - 1) * 2 // 3
    lengths = (1, middle, num_tokens - 1 - middle)
    return Step((past, 7, 0), lengths, _rows(num_tokens, 0, middle))


def describe(module: IRModule) -> list[Value]:
    """List the placeholders of the outer graph with dtypes and symbolic shapes."""
    found = []
    names = size_names(module.mode)
    for node in placeholders(module.root.graph):
        kind, source = "free", node.name
        if node.name in module.weights:
            kind = "weight"
        elif node.name in module.inputs:
            kind, source = "input", module.inputs[node.name]
        elif node.name in module.states:
            kind, source = "state", node.name
        value = node.meta["val"]
        shape = shape_of(value, names)
        if kind == "state" and isinstance(shape[0], int):
            shape = (min(shape[0], MAX_PAGES), *shape[1:])
        found.append(Value(node.name, kind, source, value.dtype, shape))
    return found


def shape_of(value: Tensor, names: Mapping[str, str]) -> tuple[int | str, ...]:
    """Return a fake tensor's shape with symbols by their size names (see symbols.size_names)."""
    return tuple(s if isinstance(s, int) else _rename(str(s), names) for s in value.shape)


def _rename(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), text)


def size(text: int | str, sizes: Mapping[str, int]) -> int:
    """Evaluate a dimension: an int, or a sum of products such as "2*T + 1"."""
    if isinstance(text, int):
        return text
    total = 0
    for term in text.split("+"):
        product = 1
        for factor in term.split("*"):
            name = factor.strip()
            product *= int(name) if name.lstrip("-").isdigit() else sizes[name]
        total += product
    return total


def sizes_of(step: Step) -> dict[str, int]:
    """Return the symbolic sizes of a step; the sampler's lists are two entries a row."""
    rows = len(step.rows)
    return {
        "T": step.num_tokens,
        "S": len(step.starts),
        "R": rows,
        "NP": 2 * rows,
        "NB": 2 * rows,
        "NA": 2 * rows,
    }


def random_tensor(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Return seeded values for a name: weights around 0, vectors around 1, small integers."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    if dtype == torch.bool or not dtype.is_floating_point:
        return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)
    count = math.prod(shape)
    values = torch.randn(min(count, _PERIOD), generator=generator)
    values = (1 + 0.25 * values if len(shape) == 1 else 0.05 * values).to(dtype)
    if count > _PERIOD:  # large tables repeat: making normals takes longer than running on them
        values = values.repeat(-(-count // _PERIOD))[:count]
    return values.reshape(tuple(shape))


def random_state(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Return a cache full of values of about 1: floats, or codes (int8, e4m3) and their scales."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    if dtype in LARGEST_CODE:
        return torch.randint(-127, 128, tuple(shape), generator=generator).float().to(dtype)
    if "_scales" in name:
        return ((0.5 + torch.rand(tuple(shape), generator=generator)) / 64).to(dtype)
    return random_tensor(name, shape, dtype, seed) * 20


def summary(name: str, value: Any) -> str:
    """Return one line with the shape and a checksum of a result."""
    if isinstance(value, (tuple, list)):
        return "; ".join(summary(f"{name}[{i}]", v) for i, v in enumerate(value))
    flat = value.detach().reshape(-1).to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    weights = torch.arange(1, len(flat) + 1, dtype=torch.float64).remainder(97) + 1
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{name} {dtype}{list(value.shape)} checksum {float((flat * weights).sum()):.6e}"


def sample(values: Iterable[Value], step: Step, seed: int) -> dict[str, Tensor]:
    """Return a tensor for every placeholder: what a printed level runs on.

    States hold random values everywhere, so that reading another sequence's page shows.
    """
    values = list(values)
    sizes = sizes_of(step)
    runtime = runtime_inputs(values, step, seed, vocabulary=_vocabulary(values))
    found = {}
    for value in values:
        if value.kind == "input" and value.source in runtime:
            found[value.name] = runtime[value.source].to(value.dtype)
            continue
        shape = [size(s, sizes) for s in value.shape]
        make = random_state if value.kind == "state" else random_tensor
        found[value.name] = make(value.name, shape, value.dtype, seed)
    return found


def sample_inputs(module: IRModule, step: Step, seed: int) -> dict[str, Tensor]:
    """Return random values for every placeholder of the outer graph, by name."""
    return sample(describe(module), step, seed)


def _vocabulary(values: Sequence[Value]) -> int:
    """Return a bound that token ids may take: the smallest row count of the outer tables."""
    rows = [v.shape[0] for v in values if v.kind == "weight" and len(v.shape) == 2]
    return min((r for r in rows if isinstance(r, int)), default=2)


def page_size_of(values: Iterable[Value]) -> int:
    """Return the page size of the caches, read off a `k_cache` state [N, G, D, page]."""
    for value in values:
        if value.kind == "state" and "k_cache" in value.name:
            assert isinstance(value.shape[-1], int)
            return value.shape[-1]
    return PAGE_SIZE


def runtime_inputs(
    values: Sequence[Value], step: Step, seed: int, *, vocabulary: int, prompt: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Return the runtime inputs of a step by runtime name: those in `values` that are known.

    prompt: the token ids, over and over, instead of random ones.
    """
    made = every_input(values, step, seed, vocabulary=vocabulary, prompt=prompt)
    wanted = [v.source for v in values if v.kind == "input"]
    return {name: made[name] for name in wanted if name in made}


def every_input(
    values: Sequence[Value], step: Step, seed: int, *, vocabulary: int, prompt: Sequence[int] = ()
) -> dict[str, Tensor]:
    """Return every runtime input of a step that is known, whether `values` has it or not."""
    wanted = {v.source: v for v in values if v.kind == "input"}
    generator = torch.Generator().manual_seed(seed)
    page_size = page_size_of(values)
    width = wanted["page_tables"].shape[1] if "page_tables" in wanted else 8
    assert isinstance(width, int)
    made = _sequence_inputs(step, generator, vocabulary, page_size, width, prompt)
    made.update(_sampling_inputs(step, generator, vocabulary))
    return made


def _sequence_inputs(
    step: Step,
    generator: torch.Generator,
    vocabulary: int,
    page_size: int,
    width: int,
    given: Sequence[int],
) -> dict[str, Tensor]:
    length = max(len(step.prompts), 1) * max(
        [*step.prompts, *(s + n for s, n in zip(step.starts, step.lengths))]
    )
    prompt = torch.randint(0, vocabulary, (length,), generator=generator)
    if given:
        prompt = torch.tensor(given)[torch.arange(length) % len(given)]
    free = (1 + torch.randperm(MAX_PAGES - 1, generator=generator)).tolist()
    tables = torch.zeros(len(step.starts), width, dtype=torch.int64)
    ids, positions, slots, lengths, starts = [], [], [], [], [0]
    for s, (begin, count) in enumerate(zip(step.starts, step.lengths)):
        where = torch.arange(begin, begin + count)
        total = step.prompts[step.which[s]] if step.prompts else begin + count
        num_pages = -(-total // page_size)
        pages = torch.tensor([free.pop() for _ in range(num_pages)])
        tables[s, :num_pages] = pages[:width]
        first = sum(step.prompts[: step.which[s]]) if step.prompts else 0
        ids.append(prompt[first + where])
        positions.append(where)
        slots.append(pages[where // page_size] * page_size + where % page_size)
        lengths.append(torch.full((count,), total))
        starts.append(starts[-1] + count)
    return {
        "token_ids": torch.cat(ids),
        "positions": torch.cat(positions),
        "slots": torch.cat(slots),
        "sequence_lengths": torch.cat(lengths),
        "query_starts": torch.tensor(starts),
        "context_lengths": torch.tensor([b + n for b, n in zip(step.starts, step.lengths)]),
        "page_tables": tables,
        "logit_rows": torch.tensor(step.rows),
    }


def _sampling_inputs(step: Step, generator: torch.Generator, vocabulary: int) -> dict[str, Tensor]:
    """Return sampling inputs of eight kinds of rows, in turn, one parameter deciding in each.

    Even rows are greedy: of two ids with a large bias the second wins (row 0), unless one of the
    penalties takes it back (2: repetition, 4: presence, 6: frequency). Odd rows draw: with a
    top_k (1), top_p (3) or min_p (5), or have their token given (7). The second row of kind 0 may
    not take the id that wins.
    """
    rows = len(step.rows)
    kind = torch.arange(rows) % _ROW_KINDS
    greedy, pairs = kind % 2 == 0, torch.arange(rows + 1) * 2
    ids = torch.stack([torch.randperm(max(vocabulary, 3), generator=generator)[:3] for _ in kind])

    def where(row: int, value: float, other: float) -> Tensor:
        return torch.where(kind == row, value, other)

    zeros = torch.zeros(2 * rows, dtype=torch.int64)
    biases = torch.tensor([100.0, 120.0]) * greedy[:, None] + torch.tensor([0.5, -0.5])
    return {
        "temperature": torch.where(greedy, 0.0, 0.7),
        "top_k": where(1, 3, 0).to(torch.int64),
        "top_p": where(3, 0.3, 1.0),
        "min_p": where(5, 0.7, 0.0),
        "seeds": torch.randint(0, 2**62, (rows,), generator=generator),
        "sample_positions": torch.arange(rows) + 1,
        "repetition_penalty": where(2, 1.5, 1.0),
        "presence_penalty": where(4, 40.0, 0.0),
        "frequency_penalty": where(6, 12.0, 0.0),  # only twice as much changes the winner
        "penalty_starts": pairs,
        "penalty_ids": ids[:, 1:].reshape(-1),
        "penalty_counts": torch.tensor([2, 0]).repeat(rows),
        "bias_starts": pairs,
        "bias_ids": ids[:, :2].reshape(-1),
        "bias_values": biases.reshape(-1),
        "allowed_starts": (torch.arange(rows + 1) > _ROW_KINDS) * 2,
        "allowed_ids": torch.cat([ids[_ROW_KINDS:, ::2].reshape(-1), zeros])[: 2 * rows],
        "logprob_counts": torch.full((rows,), 5),
        "given_ids": torch.ones(rows, dtype=torch.int64),
        "has_given": (kind == 7).to(torch.int64),
    }
