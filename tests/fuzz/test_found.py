"""Programs that the fuzzer found, each with its story: shrunk, mended, and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from aios_compile.study.fuzz.example import Example, Setup, run_example
from aios_compile.study.fuzz.program import Parameter
from aios_compile.study.fuzz.script import read_program


@dataclass(frozen=True)
class Found:
    """A program as text over parameters "name kind dtype shape", and how it was compiled."""

    parameters: tuple[Parameter, ...]
    text: str
    setup: Setup


def x(name: str, *shape: int | str, dtype: str = "f32", below: int = 2) -> Parameter:
    return Parameter(name, shape, dtype, below=below)


def w(name: str, *shape: int) -> Parameter:
    return Parameter(name, shape, kind="weight", scale=0.3)


FOUND: dict[str, Found] = {
    # A lane past the end counted the one k again: the sum was 16 times too large.
    "cumulative sum of one column": Found(
        (x("a", "T", 1),), "v = torch.cumsum(a, -1)\nreturn (v,)", Setup(tokens=(1, 15))
    ),
    # Rope turned the layout of what follows; its fake values kept the strides of before, so that
    # own_outputs took the result for dense memory and the caller read rows of another token.
    "rotated heads without eliminate_views": Found(
        (x("a", 2, "T", 16), x("c", "T", 16), x("s", "T", 16)),
        """
parts = torch.split(a, 8, -1)
low = parts[0]
high = parts[1]
turned = torch.cat([torch.neg(high), low], -1)
rotated = torch.add(torch.mul(a, c), torch.mul(turned, s))
v = torch.tanh(rotated)
return (v,)
""",
        Setup(tokens=(1, 3), disabled=("eliminate_views",)),
    ),
    # raise_linear swallowed the reshape to rows, and no kernel reads two dimensions of rows.
    "linear of heads": Found(
        (x("a", "T", 3, 16), w("m", 20, 16)),
        "v = F.linear(a, m)\nreturn (v,)",
        Setup(tokens=(1, 17)),
    ),
    "linear of one head": Found(
        (x("a", "T", 1, 8), w("m", 64, 8)),
        "v = F.linear(a, m)\nreturn (v, v)",
        Setup(tokens=(1, 17)),
    ),
    # ... and a view of rows that lie heads first is none: that needs a reshape.
    "linear of heads that lie first": Found(
        (x("a", 4, "T", 32), w("m", 24, 32)),
        "v = F.linear(torch.permute(a, [1, 0, 2]), m)\nreturn (v,)",
        Setup(tokens=(1, 17)),
    ),
    # The region's result was a view, then a copy: its call still told the strides of the view.
    "region that returns a transposed weight": Found(
        (x("a", "T", 24), w("m", 16, 24)),
        "v = F.linear(torch.tanh(a), m)\nreturn (v,)",
        Setup(tokens=(5,), region=(0.4, 0.7)),
    ),
    # What calls gave to a region had other strides after a pass than when it was captured.
    "region that reads a part of merged projections": Found(
        (x("a", "T", 32), w("q", 16, 32), w("k", 16, 32), w("u", 16, 32), w("h", 40, 16)),
        """
q1 = torch.transpose(torch.reshape(F.linear(a, q), [-1, 2, 8]), 0, 1)
k1 = torch.transpose(torch.reshape(F.linear(a, k), [-1, 2, 8]), 0, 1)
v1 = torch.transpose(torch.reshape(F.linear(a, u), [-1, 2, 8]), 0, 1)
o = aios.sdpa.default(q1, k1, v1, None, True, None, True)
r = torch.reshape(torch.transpose(o, 0, 1), [-1, 16])
z = F.linear(r, h)
return (z, r)
""",
        Setup(steps=True, region=(0.35, 0.9)),
    ),
    # Attention, rope and the cache's write stream rows; views with gaps had no kernel.
    "attention of every second column": Found(
        (x("q", "T", 2, 32), x("k", "T", 2, 32), x("u", "T", 2, 1), w("h", 40, 32)),
        """
q1 = torch.transpose(aten.slice.Tensor(q, 2, 0, 32, 2), 0, 1)
k1 = torch.transpose(aten.slice.Tensor(k, 2, 1, 32, 2), 0, 1)
v1 = torch.transpose(aten.expand.default(u, [-1, -1, 16]), 0, 1)
o = aios.sdpa.default(q1, k1, v1, None, True, None, True)
z = F.linear(torch.reshape(torch.transpose(o, 0, 1), [-1, 32]), h)
return (z,)
""",
        Setup(steps=True, seed=2),
    ),
}
FOUND["softmax of a number"] = Found(
    (Parameter("a", (5,)), x("b", "T", 3)),
    """
s = torch.select(a, 0, 0)
return (torch.softmax(s, 0), torch.flip(s, [0]), torch.log_softmax(s, -1), b)
""",
    Setup(tokens=(1,)),
)
# A weight made of weights was replayed after the values on its way had been replaced; and one that
# is given out as it is had no line of the model for its copy.
FOUND["constants that are given out"] = Found(
    (x("a", 33), w("k", 17), w("m", 17, 17), w("n", 17, 1)),
    """
p = torch.mul(torch.unsqueeze(torch.arange(torch.narrow(a, -1, 0, 17).size(0)), -1), k)
q = torch.mul(m, n)
return (p, q, torch.sin(q))
""",
    Setup(tokens=(1,)),
)
# The same views, written as codes.
columns = FOUND["attention of every second column"]
FOUND["int8 cache of every second column"] = replace(
    columns, setup=Setup(steps=True, seed=2, kv="int8")
)
# Values of no elements were no dense memory to the compiler: their strides count a size of 0 as 1.
FOUND["values of no elements"] = Found(
    (x("a", "T", 2, 16),),
    """
none = aten.slice.Tensor(a, 2, 16, 16)
v = torch.cat([torch.tanh(a), torch.neg(none)], -1)
return (v, torch.exp(none))
""",
    Setup(tokens=(1, 5)),
)
# The proof of paging joined the chunks of an output along its first dimension, here the heads.
FOUND["attention that is given out heads first"] = Found(
    (x("q", 3, "T", 16), w("h", 40, 48)),
    """
o = aios.sdpa.default(q, q, q, None, True, None, True)
z = F.linear(torch.reshape(torch.transpose(o, 0, 1), [-1, 48]), h)
return (z, o)
""",
    Setup(steps=True, proven=True),
)
# A kernel had taken a reshape in while its source was dense; then the region gave rows of heads.
FOUND["reshape of what a region permutes"] = Found(
    (x("a", 1, "T", 3, 32),),
    """
columns = aten.slice.Tensor(a, 3, 0, 32, 2)
e = torch.exp(torch.clamp(torch.permute(columns, [0, 2, 1, 3]), -3.0, 3.0))
heads = torch.permute(torch.select(e, 0, 0), [1, 0, 2])
return (torch.reshape(torch.clone(heads), [-1, 48]),)
""",
    Setup(tokens=(1,), region=(0.11, 0.35)),
)
# Added one after another, 408 values of two kinds were rounded in one direction.
FOUND["sum over all of what no vector loads"] = Found(
    (x("a", "T", 24),),
    "return (torch.sum(torch.sigmoid(torch.gt(a, 0.1)), [-1, -2], True),)",
    Setup(seed=666424899, tokens=(17,)),
)


@pytest.mark.parametrize("name", FOUND)
def test_it_is_mended(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = FOUND[name]
    lines = "\n    ".join(found.text.strip().splitlines())
    program = read_program(f"def program():\n    {lines}\n", found.parameters)
    objects: Path = tmp_path_factory.getbasetemp() / "found-objects"
    outcome = run_example(Example(program, found.setup), objects)
    assert not outcome.refused, outcome.refused
