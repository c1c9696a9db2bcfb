"""One token a row: logprobs, masks, penalties and a seeded Gumbel-max draw over logits[R, V].

The definition is ir/sample_reference.py; on equal logits the tokens are those of the C++ sampler,
bit for bit. Layouts: logits float32 (any row stride), the inputs of `aios::sample` one value a row,
lists in one array with row starts; outputs as in the op. Five launches: statistics of chunks of the
vocabulary; rows with lists or filters, one program a row; the draw by chunks; the token's place in
the order by chunks; rows. Every number of a chunk is combined in a fixed order.
Bytes: logits once for each of statistics, draw and place; a filtered row reads its copy about ten
times from L2. Workspace: a copy of the logits, 16 KB and a few numbers a chunk for each row.
Algorithms: top-k and top-p by radix selection instead of sorting, weights are whole numbers in
global counters; Gumbel-max (Gumbel, 1954) with Philox4x32-10 (Salmon et al., SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, fx

from aios_compile.codegen.cpp import sample
from aios_compile.codegen.cpp.sample import OUTPUTS, SampleSpec
from aios_compile.codegen.linear_index import product
from aios_compile.codegen.naming import symbol_of, variable
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton.choice import Tuning
from aios_compile.codegen.triton.frame import Launch, Variant, module_text, python_dim, signature
from aios_compile.codegen.triton.launch_forms import candidates, choose
from aios_compile.ir.sample_op import INPUTS, MAX_LOGPROBS

TEMPLATES = Path(__file__).parent / "templates"
CHUNK = 4096  # logits of one program: 32 a thread
BLOCK = 4096  # logits that the one program of a filtered row holds at a time
TOPS = 32  # room for the likeliest tokens of a chunk: a power of two that holds MAX_LOGPROBS
WARPS = {"rewrite": 16, "draw": 16}  # 4 in the others
# Warps of the draw and of the rank that the clock may choose, the standard first: largest values
# and counts are the same in any order. Of the others, which add floats, it may not.
FORMS = ((16, 4), (8, 4), (4, 4), (16, 8), (8, 8))
LISTS = ("penalty_starts", "bias_starts", "allowed_starts")
FILTERS = ("temperature", "top_k", "top_p", "min_p")
# The template's functions in the order of their launches: what each is given, its constexprs.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "measure": ("logits", "stride", "stats"),
    "rewrite": (
        *("logits", "stride", "z", "bins", "stats", *FILTERS, "repetition_penalty"),
        *("presence_penalty", "frequency_penalty", "penalty_starts", "penalty_ids"),
        *("penalty_counts", "bias_starts", "bias_ids", "bias_values", "allowed_starts"),
        *("allowed_ids", "has_given"),
    ),
    "draw": (
        *("logits", "stride", "z", "stats", "best", "best_id", *FILTERS, *LISTS),
        *("seeds", "sample_positions", "has_given"),
    ),
    "rank": (
        *("logits", "stride", "best", "best_id", "ranks", "top_values", "top_places"),
        *("given_ids", "has_given", "logprob_counts"),
    ),
    "finish": (
        *("logits", "stride", "stats", "best", "best_id", "ranks", "top_values", "top_places"),
        *("given_ids", "has_given", "logprob_counts", "sampled_ids", "logprobs", "out_ranks"),
        *("top_ids", "top_logprobs", "finite", "top_stride", "top_logprob_stride"),
    ),
}


@dataclass(frozen=True)
class TritonSampleSpec:
    """The C++ spec, every operand in order, and the logits of one program."""

    base: SampleSpec
    operands: tuple[Operand, ...]
    chunk: int = CHUNK

    @property
    def vocabulary(self) -> int:
        size = self.base.inputs[0].operand.shape[1]
        assert isinstance(size, int), "the vocabulary has a fixed size"
        return size

    @property
    def rows(self) -> Dim:
        return self.base.inputs[0].operand.shape[0]


def spec_of(body: fx.GraphModule, operands: Sequence[Operand]) -> TritonSampleSpec | None:
    """Return the spec of a body that is one aios.sample whose six results are its outputs."""
    base = sample.spec_of(body, operands)
    return None if base is None else TritonSampleSpec(base, tuple(operands))


def reference(spec: TritonSampleSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs in eager PyTorch."""
    return sample.reference(spec.base, *tensors)


def workspace_of(spec: TritonSampleSpec) -> list[Operand]:
    """Return the buffers: a row's logits and counters, a chunk's numbers."""
    rows, chunks = spec.rows, -(-spec.vocabulary // spec.chunk)

    def buffer(name: str, dtype: str, *shape: Dim) -> Operand:
        strides = tuple(product(shape[i + 1 :]) for i in range(len(shape)))
        return Operand(name, dtype, shape, strides)

    return [
        buffer("z", "f32", rows, spec.vocabulary),
        buffer("bins", "i64", rows, 2048),
        buffer("stats", "f32", rows, chunks, 2),
        buffer("best", "f32", rows, chunks),
        buffer("best_id", "i64", rows, chunks),
        buffer("ranks", "i64", rows, chunks),
        buffer("top_values", "f32", rows, chunks, TOPS),
        buffer("top_places", "i64", rows, chunks, TOPS),
    ]


def emit(spec: TritonSampleSpec, tuning: Tuning | None = None) -> KernelSource:
    """Return the kernel module. tuning: see launch_forms.choose."""
    symbol = symbol_of("sample", spec)
    workspace = workspace_of(spec)
    operands = [*spec.operands, *workspace]
    chunks = -(-spec.vocabulary // spec.chunk)
    padded = 1 << max(0, chunks - 1).bit_length()
    constants = {"V": spec.vocabulary, "CHUNK": spec.chunk, "CHUNKS": chunks, "PADDED": padded}
    constants |= {"MAX_LOGPROBS": MAX_LOGPROBS, "TOPS": TOPS}
    parts = ["\n".join(f"{name} = tl.constexpr({value})" for name, value in constants.items())]
    parts += [(TEMPLATES / f"{f}.py.txt").read_text().rstrip() for f in ("sample_math", "sample")]
    texts = _texts(spec, operands)
    rows, launches = python_dim(spec.rows), []
    for function, names in ARGUMENTS.items():
        whole_row = function in ("rewrite", "finish")
        constexprs: tuple[tuple[str, int | str], ...] = ()
        if whole_row:
            constexprs = (("BLOCK", BLOCK),) if function == "rewrite" else (("ALL", padded * TOPS),)
        name, given = f"{symbol}_{function}", [texts[n] for n in names]
        head = signature(name, operands, [n for n, _ in constexprs])
        call = ", ".join([*given, *(n for n, _ in constexprs)])
        parts.append("\n".join([*head, f"    {function}({call})"]))
        grid = rows if whole_row else f"{rows} * {chunks}"
        launches.append(Launch(name, grid, constexprs, WARPS.get(function, 4), 1, fused=False))
    forms = {}
    for draw, rank in FORMS:
        warps = dict(zip(ARGUMENTS, (None, None, draw, rank, None)))
        pairs = zip(launches, warps.values())
        forms[f"draw {draw}, rank {rank} warps"] = tuple(
            replace(launch, num_warps=w or launch.num_warps) for launch, w in pairs
        )
    place = f"sample {spec.vocabulary} by {spec.chunk}"
    found = choose(forms, place, None, tuning)
    variant = Variant(None, found.chosen, tuple(found.others.items()), found.name)
    comment = ["sample: one token a row of logits", *(f"model: {x}" for x in spec.base.lines)]
    text = module_text(comment, operands, parts, [variant], 1, workspace)
    return KernelSource(
        "sample", symbol, "triton", text, len(spec.operands), (), spec.base.lines,
        tuple(workspace), candidates=candidates([found], place),
    )  # fmt: skip


def _texts(spec: TritonSampleSpec, operands: Sequence[Operand]) -> dict[str, str]:
    """Return the text of each name in ARGUMENTS: a pointer, or a stride."""
    texts = {"stride": python_dim(spec.base.inputs[0].operand.strides[0])}
    for name, view in zip(("logits", *INPUTS), spec.base.inputs):
        offset = "" if view.offset == 0 else f" + {python_dim(view.offset)}"
        texts[name] = variable(spec.operands[view.index], view.index) + offset
    for name, (index, operand) in zip(OUTPUTS, spec.base.outputs):
        texts["out_ranks" if name == "ranks" else name] = variable(operands[index], index)
        if name.startswith("top_"):
            stride = "top_stride" if name == "top_ids" else "top_logprob_stride"
            texts[stride] = python_dim(operand.strides[0])
    for index in range(len(spec.operands), len(operands)):
        texts[operands[index].name] = variable(operands[index], index)
    return texts
