"""What the fuzzer draws: every pattern fires alone, every context and operator is drawn."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import PIPELINE
from aios_compile.passes.runner import run_pipeline
from aios_compile.study.fuzz.builder import Builder, Pattern, draw_sizes
from aios_compile.study.fuzz.campaign import passes_of
from aios_compile.study.fuzz.contexts import SOURCES, USES
from aios_compile.study.fuzz.example import Example, Setup, capture, options_of, stages_of
from aios_compile.study.fuzz.generate import INFO_OF, OFTEN, REPEATS, draw
from aios_compile.study.fuzz.graph_ops import OPS
from aios_compile.study.fuzz.names import PLANTED
from aios_compile.study.fuzz.patterns import PATTERNS
from aios_compile.study.fuzz.program import Rejected


def test_every_pass_has_a_pattern() -> None:
    names = {info_of(p).name for p in PIPELINE}
    assert {p.pass_name for p in PATTERNS} == names == set(PLANTED)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"{p.pass_name}-{p.name}")
def test_a_pattern_fires_alone(pattern: Pattern) -> None:
    rng = random.Random(1)
    b, sizes = Builder(rng), draw_sizes(rng)
    given = {
        p.name: b.parameter(p.shape, p.dtype, p.kind, p.name, p.below, p.scale)
        for p in pattern.parameters(sizes)
    }
    b.results = list(pattern.plant(b, given, sizes).results)
    setup = Setup(
        steps=pattern.steps,
        gathered=pattern.pass_name in ("gather_last_tokens", "sample_tokens"),
        sampled=pattern.pass_name == "sample_tokens",
        stored=pattern.stored,
        quantization=pattern.quantization,
        rounded=pattern.rounded,
        kv=pattern.kv,
        target=INFO_OF[pattern.pass_name].target or "cpp",
    )
    module = capture(Example(b.program(), setup))
    stages = stages_of(setup)
    results = run_pipeline(module, stages, options_of(setup), verify=0)
    hits = {r.name: r.hits for r in results if r.kept}
    assert hits[pattern.pass_name], hits


def test_all_kinds_are_drawn() -> None:
    """At least 20 kinds of context; every operator; settings; no pass is rare."""
    assert len(SOURCES) + len(USES) + len(REPEATS) >= 20
    seen: Counter[str] = Counter()
    setups: Counter[str] = Counter()
    for number in range(600):
        example = draw(1, number)
        seen.update(example.planted)
        changed = replace(Setup(), seed=example.setup.seed)
        setups.update(
            name
            for name in ("tokens", "steps", "gathered", "sampled", "disabled", "order", "region")
            if getattr(example.setup, name) != getattr(changed, name)
        )
    missing = [f"source {n}" for n in SOURCES] + [f"use {n}" for n in USES]
    missing += [f"repeat {n}" for n in REPEATS] + [f"op {n}" for n in OPS]
    missing += [f"pass {p.pass_name}" for p in PATTERNS if p.pass_name in passes_of("cpp")]
    assert [name for name in missing if not seen[name]] == []
    planted = {name: seen[f"pass {name}"] for name in passes_of("cpp") if name not in OFTEN}
    assert min(planted.values()) >= 600 / 60, planted
    assert all(setups[n] for n in ("tokens", "steps", "sampled", "disabled", "order", "region"))


@pytest.mark.parametrize("name", ["quantize_kv", "round_activations"])
def test_contexts_of_one_pass(name: str) -> None:
    """Those whose setup is their own stand in as many kinds of context as the rest."""
    kinds = {k for i in range(60) for k in draw(2, i, passes=(name,)).planted}
    assert len([k for k in kinds if not k.startswith("pa")]) >= 20, kinds


def test_an_example_is_a_function_of_its_number() -> None:
    assert draw(3, 5) == draw(3, 5) and draw(3, 5) != draw(4, 5)


@pytest.mark.parametrize("name", ["raise_rope", "merge_qkv"])
def test_a_pass_can_be_asked_for(name: str) -> None:
    assert all(f"pass {name}" in draw(0, i, passes=(name,)).planted for i in range(5))


def test_an_operator_can_be_asked_for() -> None:
    assert all("op topk" in draw(0, i, ops=("topk",)).planted for i in range(5))


def test_a_region_gives_out_no_mask() -> None:
    """Found by number 298: a border through an attention, its mask a result of the layer."""
    pattern = next(p for p in PATTERNS if (p.pass_name, p.name) == ("raise_attention", "window"))
    rng = random.Random(1)
    b, sizes = Builder(rng), draw_sizes(rng)
    given = {p.name: b.parameter(p.shape, p.dtype) for p in pattern.parameters(sizes)}
    b.results = list(pattern.plant(b, given, sizes).results)
    cut = capture(Example(b.program(), Setup(steps=True, region=(0.0, 0.6))))
    whole = capture(Example(b.program(), Setup(steps=True, region=(0.0, 1.0))))
    assert not cut.regions() and whole.regions()
    scores = capture(Example(b.program(), Setup(steps=True, region=(0.7, 1.0))))
    assert not scores.regions()  # number 4687: no layer is given them either


def test_rope_of_an_odd_width_is_rejected() -> None:
    """Found by number 255: the reference broadcast the one element."""
    b = Builder(random.Random(1))
    x = b.parameter(("T", 1))
    with pytest.raises(Rejected):
        b.add(f"aios.rope.default(torch.unsqueeze({x}, -2), {x}, {x}, False)")
