"""Draw examples from a seed and a number: random graphs, and patterns in contexts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from aios_compile.codegen.cpp import build
from aios_compile.errors import ConfigError
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import STAGES
from aios_compile.study.fuzz.builder import Builder, Pattern, Planted, draw_sizes
from aios_compile.study.fuzz.contexts import SOURCES, USES
from aios_compile.study.fuzz.example import Example, Setup
from aios_compile.study.fuzz.graph_ops import OPS
from aios_compile.study.fuzz.patterns import PATTERNS
from aios_compile.study.fuzz.program import Parameter, Rejected

TOKENS = (1, 2, 3, 15, 16, 17, 31, 33, 40, 48)
OPTIONAL = [info_of(p).name for s in STAGES for p in s.passes if not info_of(p).required]
INFO_OF = {info_of(p).name: info_of(p) for s in STAGES for p in s.passes}
HALVES = ("bf16", "f16")
# Passes that random graphs and the patterns of others reach in more than every 20th example.
OFTEN = frozenset({
    "widen_activations", "fold_constants", "eliminate_common_subexpressions", "raise_linear",
    "raise_attention", "page_attention", "eliminate_views", "own_outputs", "copy_strided_inputs",
    "gather_last_tokens", "fuse_linear_epilogue", "fuse_pointwise", "form_kernels",
    "raise_rms_norm", "raise_layer_norm",
})  # fmt: skip
# Only the Triton target has them, and its part of a campaign is small.
SELDOM = {"fuse_norm_into_linear": 36, "fuse_kv_write_into_attention": 14}
REPEATS = ("once", "chained", "same_inputs", "other_weights", "beside_another")


def draw(
    seed: int,
    number: int,
    passes: Sequence[str] = (),
    ops: Sequence[str] = (),
    target: str = "cpp",
) -> Example:
    """Draw example `number`. passes: plant one of their patterns; ops: use one of these."""
    rng = random.Random(f"{seed}/{number}")
    for _ in range(1000):
        try:
            if ops or (not passes and rng.random() < 0.35):
                return random_graph(rng, ops)
            known = [p for p in PATTERNS if _is_for(p, target)]
            chosen = [p for p in known if p.pass_name in passes] if passes else known
            if not chosen:
                break
            name = _pass(rng, sorted({p.pass_name for p in chosen}))
            return planted(rng, rng.choice([p for p in chosen if p.pass_name == name]))
        except Rejected:
            continue
    raise ConfigError(f"nothing can be drawn for {', '.join([*passes, *ops])} on {target}")


def _pass(rng: random.Random, names: Sequence[str]) -> str:
    """Draw a pass; those that nothing else reaches are likelier."""
    return rng.choices(names, [1 if n in OFTEN else SELDOM.get(n, 4) for n in names])[0]


def _is_for(pattern: Pattern, target: str) -> bool:
    if pattern.rounded and not build.Target.host().bf16_dot:
        return False  # no kernel for it here
    return INFO_OF[pattern.pass_name].runs_on(target)


def random_graph(rng: random.Random, ops: Sequence[str] = ()) -> Example:
    """Draw a graph of up to a dozen operators, the last of them one of `ops`."""
    b = Builder(rng)
    width = rng.choice([1, 2, 7, 16, 24, 33, 64])
    dtype = rng.choice(["f32"] * 6 + ["bf16", "f16"])
    b.parameter(("T", width), dtype)
    b.parameter(rng.choice([("T", width), ("T", 1), (width,), ("T", 2, width)]), dtype)
    b.parameter(("T",), "i64", below=24)
    used = _grow(b, rng.randint(1, 11))
    if ops:
        used.append(_operator(b, ops))
    floats = b.tensors("f32", "bf16", "f16", "i64", "b8")
    newest = [s.name for s in b.statements if s.name in floats]
    if not newest:
        raise Rejected("no value was made")
    b.results = newest[-rng.choice([1, 1, 2, 3]) :]
    return _example(b, _setup(rng, steps=False), [f"op {name}" for name in used])


def _example(b: Builder, setup: Setup, labels: Sequence[str]) -> Example:
    program = b.program()
    if setup.steps and any(b.shape(name).count("T") > 1 for name in program.results):
        raise Rejected("a step gives out a tensor of T x T, which is refused by name")
    if any(p.dtype in HALVES and p.kind != "weight" for p in program.parameters):
        # certificates would round an input for the program before widening and not after it
        setup = replace(setup, proven=False)
    return Example(program, setup, tuple(labels))


def _grow(b: Builder, count: int) -> list[str]:
    """Add operators drawn at random; return their names."""
    used = []
    for _ in range(count):
        for _ in range(8):
            try:
                used.append(_operator(b, tuple(OPS)))
                break
            except Rejected:
                continue
    return used


def _operator(b: Builder, names: Sequence[str]) -> str:
    name = b.rng.choice(list(names))
    text = OPS[name]
    values = {field: _operand(b, field) for field in sorted(set(re.findall(r"\{(\w)\}", text)))}
    x = values.get("x", "")
    if x:
        shape = b.shape(x)
        if not shape or ({"D", "w", "v", "h"} & set(values) and not isinstance(shape[-1], int)):
            raise Rejected("the last dimension is the tokens")
        width = int(shape[-1]) if isinstance(shape[-1], int) else 1
        half = (width + 1) // 2
        values |= {"D": str(width), "h": str(half), "r": str(width - half)}
        values["d"] = str(b.rng.randrange(len(shape)))
        if name in ("topk", "roll") and not isinstance(shape[-1], int):
            raise Rejected("there may be fewer tokens, or a size that is no polynomial")
        if name == "aios_linear" and b.dtype(x) in HALVES:
            raise Rejected("it is raised from linears that were widened")
        if name == "squeeze" and not isinstance(shape[int(values["d"])], int):
            raise Rejected("one token would be squeezed away")
        if "{w}" in text:
            values["w"] = b.weight(24, width, dtype=b.dtype(x))
        if "{v}" in text:
            values["v"] = b.weight(width, dtype=b.dtype(x))
        if "{u}" in text:
            values["u"] = b.weight(24, dtype=b.dtype(x))
        if "{e}" in text:
            values["e"] = b.weight(3, 24, width, dtype=b.dtype(x))
    elif "{w}" in text:
        values["w"] = b.weight(24, 10)
    b.add(text.format(**values))
    return name


def _operand(b: Builder, field: str) -> str:
    """Return a value for a field of an expression; newer ones are likelier."""
    kinds = {"x": (), "y": (), "i": ("i64",), "b": ("b8",)}
    if field not in kinds:
        return field
    found = b.tensors(*kinds[field])
    if field == "b" and not found:
        found = [b.add(f"torch.gt({b.tensors()[-1]}, 0.1)")]
    if not found:
        raise Rejected(f"no value for {field}")
    return b.rng.choice(found[-4:] if b.rng.random() < 0.8 else found)


def planted(rng: random.Random, pattern: Pattern) -> Example:
    """Plant a pattern in a context: sources of its inputs, repetition, users of its results."""
    b = Builder(rng)
    sizes = draw_sizes(rng)
    labels = [f"pass {pattern.pass_name}", f"pattern {pattern.name}"]
    if rng.random() < 0.25:
        b.parameter(("T", sizes["D"]))
        _grow(b, rng.randint(1, 3))
    repeat = rng.choice(REPEATS if rng.random() < 0.5 else ("once",))
    first, given = _plant(b, pattern, sizes, labels)
    if repeat == "chained":
        _chain(b, pattern, sizes, given, first)
    elif repeat == "same_inputs":
        b.results += pattern.plant(b, given, sizes).results[:1]
    elif repeat == "other_weights":
        fresh = {
            p.name: _bind(b, p, "an_input") for p in pattern.parameters(sizes) if p.kind == "weight"
        }
        b.results += pattern.plant(b, {**given, **fresh}, sizes).results[:1]
    elif repeat == "beside_another":
        other = rng.choice([p for p in PATTERNS if not p.steps or pattern.steps])
        second, _ = _plant(b, other, draw_sizes(rng), [])
        b.results += second.results[:1]
    name = rng.choice(list(USES)) if rng.random() < 0.75 else "given_out"
    USES[name](b, first)
    labels += [f"repeat {repeat}", f"use {name}"]
    setup = _setup(rng, pattern.steps, pattern)
    if pattern.steps:
        setup = _with_head(b, rng, setup, first)
    return _example(b, setup, labels)


def _plant(
    b: Builder, pattern: Pattern, sizes: dict[str, int], labels: list[str]
) -> tuple[Planted, dict[str, str]]:
    given = {}
    for p in pattern.parameters(sizes):
        name = b.rng.choice(list(SOURCES)) if b.rng.random() < 0.6 else "an_input"
        if p.kind != "activation":
            name = "an_input"
        given[p.name] = _bind(b, p, name)
        labels += [f"source {name}"] if p.kind == "activation" else []
    return pattern.plant(b, given, sizes), given


def _bind(b: Builder, p: Parameter, source: str) -> str:
    """Return a value for a pattern's parameter."""
    if p.kind == "input":
        return b.parameter(p.shape, p.dtype, p.kind, p.name)
    if p.kind == "weight":
        half = p.dtype == "f32" and b.rng.random() < 0.15
        return b.parameter(
            p.shape, "bf16" if half and len(p.shape) == 1 else p.dtype, "weight", scale=p.scale
        )
    if p.below != 2:
        return b.parameter(p.shape, p.dtype, below=p.below)
    try:
        return SOURCES[source](b, p)
    except Rejected:
        return b.parameter(p.shape, p.dtype, scale=p.scale)


def _chain(
    b: Builder, pattern: Pattern, sizes: dict[str, int], given: dict[str, str], first: Planted
) -> None:
    """Plant the pattern again behind itself, where its result fits an input."""
    result = first.results[0]
    fits = [
        p.name
        for p in pattern.parameters(sizes)
        if p.kind == "activation" and p.shape == b.shape(result) and p.dtype == b.dtype(result)
    ]
    if not fits:
        raise Rejected("the result fits no input")
    again = pattern.plant(b, {**given, b.rng.choice(fits): result}, sizes)
    b.results += again.results


def _with_head(b: Builder, rng: random.Random, setup: Setup, first: Planted) -> Setup:
    """Put logits [T, V] first among the results, as every model has them."""
    x = first.results[0]
    shape = b.shape(x)
    if len(shape) < 2 or "T" not in shape:
        raise Rejected("no row a token")
    flat = x if shape[0] == "T" else b.add(f"torch.transpose({x}, 0, {shape.index('T')})")
    rows = b.add(f"torch.reshape({flat}, [{flat}.size(0), -1])")
    width = b.shape(rows)[-1]
    if not isinstance(width, int):
        raise Rejected("no row a token")
    logits = b.add(f"torch.mul(F.linear({rows}, {b.weight(rng.choice([40, 61]), width)}), 2.0)")
    # what mixes tokens, or has no row a token, is nothing that a step gives out
    b.results = [logits, *(r for r in b.results if b.shape(r)[:1] == ("T",))]
    return setup


def _setup(rng: random.Random, steps: bool, pattern: Pattern | None = None) -> Setup:
    """Draw how a program is compiled and run."""
    own = pattern.pass_name if pattern else ""
    others = [n for n in OPTIONAL if n != own]
    many = rng.choice([0, 0, 0, 1, 1, 3, 8])
    disabled = tuple(sorted(rng.sample(others, many)))
    region: tuple[float, float] | None = None
    if rng.random() < 0.3:
        begin = rng.random() * 0.8
        region = (begin, begin + rng.random() * (1 - begin))
    sampled = own == "sample_tokens" or (steps and rng.random() < 0.1)
    gathered = sampled or own == "gather_last_tokens" or (steps and rng.random() < 0.3)
    return Setup(
        seed=rng.randrange(1 << 30),
        tokens=tuple(sorted({1, *rng.sample(TOKENS, 2)})),
        steps=steps,
        gathered=gathered,
        sampled=sampled,
        disabled=disabled,
        order=rng.choice([0, 0, 0, rng.randrange(1, 1 << 20)]),
        region=region,
        proven=bool(pattern and pattern.lossy) or rng.random() < 0.04,
        stored=pattern.stored if pattern else "",
        quantization=pattern.quantization if pattern else "",
        rounded=bool(pattern and pattern.rounded),
        kv=pattern.kv if pattern else "",
    )
