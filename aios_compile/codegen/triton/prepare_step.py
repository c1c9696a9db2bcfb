"""The first kernel of a step: unfold the packet that the host sent into the inputs of the others.

In: the packet (codegen/step_packet.py), i32; what the step before has sampled, i64, where it lies.
Out: every input of the program at its fixed place, as wide as the bucket: T tokens, S sequences, R
rows. A padded token is token 0 at position 0 of the trash page, a padded sequence has no tokens, a
padded row is greedy and has no lists; all of that is written in every step, so nothing of an
earlier step is left in the bucket.
Programs: BLOCK tokens each, then one a sequence, then BLOCK rows each, then PARTS for each list. A
token finds its sequence by bisection of query_starts. Bytes: the packet once, the inputs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.naming import symbol_of
from aios_compile.codegen.operand import Operand
from aios_compile.codegen.program import TensorEntry
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.step_packet import (
    LISTS,
    ROW_INPUTS,
    SEQUENCE_INPUTS,
    TOKEN_INPUTS,
    header_word,
    known_inputs,
)
from aios_compile.codegen.triton.frame import Launch, Variant, module_text, signature
from aios_compile.errors import CodegenError

NAME = "prepare_step"
BLOCK = 128
PARTS = 4  # programs that share a list
TYPES = {"i64": "int64", "i32": "int32", "f32": "float32"}


@dataclass(frozen=True)
class PrepareStepSpec:
    """inputs: of the program, in order. page_size: tokens. bits: of the largest S, at least one.
    samples: the program has sampled ids, which the next step may take as its tokens."""

    inputs: tuple[TensorEntry, ...]
    page_size: int
    bits: int
    samples: bool

    def dtype(self, name: str) -> str | None:
        """Return Triton's name of an input's dtype; None if the program has no such input."""
        found = [e.dtype for e in self.inputs if e.name == name]
        return TYPES[found[0]] if found else None

    def table_width(self) -> int:
        """Return the entries of a row of the page tables."""
        width = next(e.shape[1] for e in self.inputs if e.name == "page_tables")
        assert isinstance(width, int), "a page table has a fixed width"
        return width


def spec_of(
    inputs: Sequence[TensorEntry], page_size: int, max_num_seqs: int, samples: bool = True
) -> PrepareStepSpec:
    """Return the spec. Raises CodegenError for an input that no packet holds."""
    for entry in inputs:
        if entry.name not in known_inputs() or entry.dtype not in TYPES:
            raise CodegenError(f"no step packet holds the input {entry.name} ({entry.dtype})")
    bits = max(1, max_num_seqs).bit_length()
    return PrepareStepSpec(tuple(inputs), page_size, bits, samples)


def emit(spec: PrepareStepSpec) -> KernelSource:
    """Return the kernel module; operands: the packet, the ids sampled before, then the inputs."""
    symbol = symbol_of(NAME, spec)
    operands = [Operand("packet", "i32", (1,), (1,))]
    if spec.samples:
        operands.append(Operand("sampled", "i64", (1,), (1,)))
    first = len(operands)
    operands += [Operand(e.name, e.dtype, (1,), (1,)) for e in spec.inputs]
    head = signature(symbol, operands, ("BLOCK",))
    names = {e.name: f"{e.name}_{i}" for i, e in enumerate(spec.inputs, first)}
    body = [
        "program = tl.program_id(0)",
        "lane = tl.arange(0, BLOCK)",
        "num_tokens, num_sequences = tl.load(packet_0), tl.load(packet_0 + 1)",
        "num_rows = tl.load(packet_0 + 2)",
        "token_programs, row_programs = tl.cdiv(T, BLOCK), tl.cdiv(R + 1, BLOCK)",
        "first_row = token_programs + S",
        "first_list = first_row + row_programs",
        "if program < token_programs:",
        *_indent(_tokens(spec, names)),
        "elif program < first_row:",
        *_indent(_sequence(spec, names)),
        "elif program < first_list:",
        *_indent(_rows(spec, names)),
    ]
    lists = [kind for kind, (_, first, *_rest) in LISTS.items() if first in names]
    for number, kind in enumerate(lists):
        last = number == len(lists) - 1
        test = "else:" if last else f"elif program < first_list + {PARTS * (number + 1)}:"
        body += [test, *_indent(_list(spec, names, kind, number))]
    grid = f"(T + {BLOCK - 1}) // {BLOCK} + S + (R + {BLOCK}) // {BLOCK} + {PARTS * len(lists)}"
    launch = Launch(symbol, grid, (("BLOCK", BLOCK),), 4, 1)
    kernel = "\n".join([*head, *_indent(body)])
    comment = ["prepare_step: the inputs of a step from the packet that the host sent"]
    text = module_text(comment, operands, [kernel], [Variant(None, (launch,))])
    return KernelSource(NAME, symbol, "triton", text, len(operands))


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _begin(section: str) -> str:
    """Return the text of a section's address."""
    return f"packet_0 + tl.load(packet_0 + {header_word(section)})"


def _tokens(spec: PrepareStepSpec, names: dict[str, str]) -> list[str]:
    lines = [
        "t = program * BLOCK + lane",
        "inside = t < num_tokens",
        f"starts = {_begin('query_starts')}",
        "s = tl.zeros([BLOCK], tl.int32)",
        "end = s + num_sequences",
        f"for step in range({spec.bits}):",
        "    middle = (s + end) // 2",
        "    below = tl.load(starts + middle) <= t",
        "    s, end = tl.where(below, middle, s), tl.where(below, end, middle)",
        f"context = tl.load({_begin('context_lengths')} + s, mask=inside, other=0)",
        "last = tl.load(starts + s + 1, mask=inside, other=0)",
        "position = tl.where(inside, context - last + t, 0)",
        f"first = tl.load({_begin('table_starts')} + s, mask=inside, other=0)",
        f"place = {_begin('pages')} + first + position // {spec.page_size}",
        "page = tl.load(place, mask=inside, other=0).to(tl.int64)",
        "within = tl.where(inside, position, t - num_tokens)",
        f"given = tl.load({_begin('token_ids')} + t, mask=inside, other=0)",
    ]
    if spec.samples:
        lines += [
            "taken = tl.load(sampled_1 + (-1 - given), mask=given < 0, other=0)",
            "given = tl.where(given < 0, taken, given)",
        ]
    values = {
        "token_ids": "given",
        "positions": "position",
        "sequence_lengths": (
            f"tl.maximum(tl.load({_begin('first_lengths')} + s, mask=inside, other=1), "
            "position + 1)"
        ),
        "slots": f"page * {spec.page_size} + within % {spec.page_size}",
    }
    for name in TOKEN_INPUTS:
        if name in names:
            value = f"({values[name]}).to(tl.{spec.dtype(name)})"
            lines.append(f"tl.store({names[name]} + t, {value}, mask=t < T)")
    return lines


def _sequence(spec: PrepareStepSpec, names: dict[str, str]) -> list[str]:
    """Return the lines for one sequence: its end, its context, its row of the page tables."""
    lines = [
        "s = program - token_programs",
        "there = s < num_sequences",
        f"table = {_begin('table_starts')} + s",
        "first = tl.load(table, mask=there, other=0)",
        "used = tl.load(table + 1, mask=there, other=0) - first",
    ]
    start, context, tables = (names.get(name) for name in SEQUENCE_INPUTS)
    if start:
        kind = spec.dtype("query_starts")
        lines += [
            f"end = tl.load({_begin('query_starts')} + tl.minimum(s + 1, num_sequences))",
            f"tl.store({start} + s + 1, end.to(tl.{kind}))",
            f"tl.store({start} + s * 0, tl.full([], 0, tl.{kind}), mask=s == 0)",
        ]
    if context:
        value = f"tl.load({_begin('context_lengths')} + s, mask=there, other=0)"
        kind = spec.dtype("context_lengths")
        lines.append(f"tl.store({context} + s, {value}.to(tl.{kind}))")
    if tables:
        kind, width = spec.dtype("page_tables"), spec.table_width()
        lines += [
            "for begin in range(0, tl.cdiv(used, BLOCK)):",
            "    at = begin * BLOCK + lane",
            f"    page = tl.load({_begin('pages')} + first + at, mask=at < used, other=0)",
            f"    row = {tables} + s.to(tl.int64) * {width} + at",
            f"    tl.store(row, page.to(tl.{kind}), mask=at < {width})",
        ]
    return lines


def _rows(spec: PrepareStepSpec, names: dict[str, str]) -> list[str]:
    lines = ["r = (program - first_row) * BLOCK + lane", "inside = r < num_rows"]
    for name, neutral in ROW_INPUTS.items():
        if name not in names:
            continue
        kind, begin = spec.dtype(name), _begin(name)
        if name == "seeds":  # 64 bits
            half = f"tl.load({begin} + 2 * r{{}}, mask=inside, other=0).to(tl.int64)"
            low, high = f"({half.format('')} & 0xFFFFFFFF)", half.format(" + 1")
            value = f"{low} | ({high} << 32)"
        elif kind == "float32":
            value = f"tl.load({begin} + r, mask=inside, other=0).to(tl.float32, bitcast=True)"
            value = f"tl.where(inside, {value}, {float(neutral)})"
        else:
            value = f"tl.load({begin} + r, mask=inside, other={neutral}).to(tl.{kind})"
        lines.append(f"tl.store({names[name]} + r, {value}, mask=r < R)")
    for starts, *_ in LISTS.values():
        if starts in names:
            value = (
                f"tl.load({_begin(starts)} + tl.minimum(r, num_rows)).to(tl.{spec.dtype(starts)})"
            )
            lines.append(f"tl.store({names[starts]} + r, {value}, mask=r <= R)")
    return lines


def _list(spec: PrepareStepSpec, names: dict[str, str], kind: str, number: int) -> list[str]:
    """Return the lines that copy one list's columns, PARTS programs side by side."""
    starts, *columns = LISTS[kind]
    lines = [
        f"part = program - first_list - {PARTS * number}",
        f"length = tl.load({_begin(starts)} + num_rows)",
        f"for step in range(0, tl.cdiv(length, BLOCK * {PARTS})):",
        f"    at = (step * {PARTS} + part) * BLOCK + lane",
        "    there = at < length",
    ]
    for name in columns:
        if name in names:
            cast = "float32, bitcast=True" if spec.dtype(name) == "float32" else spec.dtype(name)
            value = f"tl.load({_begin(name)} + at, mask=there, other=0).to(tl.{cast})"
            lines.append(f"    tl.store({names[name]} + at, {value}, mask=there)")
    return lines
