"""The text of a Triton kernel module: kernels, VARIANTS (all that can ever be compiled), launch.

A module offers four names. `TYPES`: Triton's type of each operand (inputs, outputs, workspace);
the sizes T, S, R, P follow as i32. `VARIANTS`: which launches serve up to `most` rows; constexprs,
warps and stages are fixed there, so that the set of binaries is known without running anything.
`launch(operands, T=, S=, R=, P=)` picks the variant and runs its launches in order. `WORKSPACE`:
(dtype, sizes) of each buffer that a caller gives after the outputs; its contents are nobody's.
While a GPU has to choose (select_kernels), a variant also lists `candidates`: other launches that
give the same bits. Such a module has `variant_of`, and `launch` takes the name of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aios_compile.codegen.naming import dim_name, variable
from aios_compile.codegen.operand import Dim, Operand
from aios_compile.codegen.triton.functions import called_by

POINTERS = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "f64": "*fp64", "bool": "*i1"}
POINTERS.update({"i64": "*i64", "i32": "*i32", "i16": "*i16", "i8": "*i8", "u8": "*u8"})
POINTERS["e4m3"] = "*u8"  # their bits: not every card has the type
JIT = '@triton.jit(do_not_specialize=["T", "S", "R", "P"])'

# How a module runs the variant for its rows; each module's text says with which operands.
LAUNCH = '''\
def launch(operands, T=1, S=1, R=1, P=1):
    """Run on tensors: the inputs, the outputs, the workspace."""
    variant = next(v for v in VARIANTS if v["most"] is None or {rows} <= v["most"])
    for call in variant["launches"]:
        grid, options = call["grid"](T, S, R, P), {{**call["constexprs"], **call["options"]}}
'''

# The same where there are candidates: one is named, and serves where the variant has it.
LAUNCH_CANDIDATE = '''\
def variant_of(T=1, S=1, R=1, P=1):
    """Return the variant that serves these sizes."""
    return next(v for v in VARIANTS if v["most"] is None or {rows} <= v["most"])


def launch(operands, T=1, S=1, R=1, P=1, candidate=None):
    """Run on tensors: the inputs, the outputs, the workspace. candidate: in a variant's place."""
    variant = variant_of(T, S, R, P)
    for call in variant.get("candidates", {{}}).get(candidate, variant["launches"]):
        grid, options = call["grid"](T, S, R, P), {{**call["constexprs"], **call["options"]}}
'''

HEAD = """\
{comment}
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


{kernels}


TYPES = ({types})
WORKSPACE = ({workspace})
VARIANTS = (
{variants}
)


"""
CALL = """        call["kernel"][grid](*operands, T, S, R, P, **options)
"""


@dataclass(frozen=True)
class Launch:
    """One launch. `grid`: text over T, S, R, P. `fused`: whether a * b + c may become one fma."""

    kernel: str
    grid: str
    constexprs: tuple[tuple[str, int | str], ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    fused: bool = True

    def text(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.constexprs)
        options = f"num_warps={self.num_warps}, num_stages={self.num_stages}"
        options += "" if self.fused else ", enable_fp_fusion=False"
        return (
            f"            dict(\n                kernel={self.kernel},\n"
            f"                grid=lambda T, S, R, P: ({self.grid},),\n"
            f"                constexprs=dict({values}),\n"
            f"                options=dict({options}),\n            ),"
        )


@dataclass(frozen=True)
class Variant:
    """The launches for up to `most` rows (None: any number). candidates: name -> other launches;
    name: of the variant's own, where there are some.
    """

    most: int | None
    launches: tuple[Launch, ...]
    candidates: tuple[tuple[str, tuple[Launch, ...]], ...] = ()
    name: str = ""

    def text(self) -> str:
        head = f"    dict(\n        most={self.most},\n        launches=("
        text = f"{head}\n{_listed(self.launches)}\n        ),\n"
        if self.candidates:
            found = [
                f'            "{n}": (\n{_listed(x)}\n            ),\n' for n, x in self.candidates
            ]
            text += f'        name="{self.name}",\n'
            text += f"        candidates={{\n{''.join(found)}        }},\n"
        return f"{text}    ),"


def _listed(launches: Sequence[Launch]) -> str:
    return "\n".join(launch.text() for launch in launches)


def python_dim(dim: Dim) -> str:
    """Return a dimension as Python text."""
    return str(dim) if isinstance(dim, int) else f"({dim_name(dim)})"


def signature(name: str, operands: Sequence[Operand], constexprs: Sequence[str] = ()) -> list[str]:
    """Return the decorator and the `def` line of a kernel over all operands."""
    arguments = [variable(o, i) for i, o in enumerate(operands)]
    arguments += ["T", "S", "R", "P", *(f"{c}: tl.constexpr" for c in constexprs)]
    return [JIT, f"def {name}({', '.join(arguments)}):"]


def module_text(
    comment: Sequence[str],
    operands: Sequence[Operand],
    kernels: Sequence[str],
    variants: Sequence[Variant],
    rows: Dim = 1,
    workspace: Sequence[Operand] = (),
) -> str:
    """Return the text of a module. `operands` holds the workspace too, at its end."""
    spaces = [f'("{o.dtype}", "{"*".join(python_dim(d) for d in o.shape)}"),' for o in workspace]
    choice = any(variant.candidates for variant in variants)
    text = HEAD + (LAUNCH_CANDIDATE if choice else LAUNCH) + CALL
    return text.format(
        comment="\n".join(f"# {line}".rstrip() for line in comment),
        kernels="\n\n\n".join([*called_by(kernels), *kernels]),
        types=" ".join(f'"{POINTERS[o.dtype]}",' for o in operands),
        workspace=" ".join(spaces),
        variants="\n".join(v.text() for v in variants),
        rows=python_dim(rows),
    )
