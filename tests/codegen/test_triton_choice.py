"""The search for a linear's configuration, with a compiler that is asked as seldom as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import (
    choice,
    configs,
    fp8_linear,
    linear,
    quantized_configs,
    quantized_linear,
    resource_report,
)
from aios_compile.codegen.triton.cards import CARDS, card_of
from aios_compile.codegen.triton.choice import Tuning
from aios_compile.codegen.triton.configs import Config, Problem
from aios_compile.codegen.triton.cost_model import cost
from aios_compile.codegen.triton.emitters import ForCard
from aios_compile.codegen.triton.occupancy import Usage
from aios_compile.codegen.triton.resource_report import UNFIT, ResourceReport
from aios_compile.study import gpu_compile
from tests.codegen.test_triton_quantized_linear import plain, quantized_body
from tests.codegen.triton_shapes import linear_spec

PROBLEM = Problem(4096, 1024, 1, 2, 4, 2)
CARD = card_of("cuda:90")


class Compiler:
    """Reports what `answer` says, and counts what it was asked."""

    def __init__(self, answer) -> None:
        self.answer, self.asked = answer, []

    def build(self, config: Config) -> KernelSource:
        return KernelSource(repr(config), repr(config), "triton", repr(config), 0)

    def __call__(self, sources: Sequence[KernelSource]) -> list[Usage]:
        configs_asked = [eval_config(source) for source in sources]
        self.asked += configs_asked
        return [self.answer(config) for config in configs_asked]


def eval_config(source: KernelSource) -> Config:
    return next(c for c in EVERY if repr(c) == source.text)


EVERY = [
    c
    for most, kinds in configs.BOUNDS
    for kind in kinds
    for c in configs.candidates(PROBLEM, kind, most or configs.PREFILL_TOKENS, CARD)
]


def searched(answer, limit: int = 8):
    compiler = Compiler(answer)
    found = choice.choose(PROBLEM, CARD, Tuning(compiler, limit), compiler.build)
    return {c.most: c for c in found}, compiler.asked


def test_the_cheapest_by_its_true_occupancy_wins() -> None:
    """Nothing that was not compiled is estimated below it, and the reasons say so."""

    def usage(config: Config) -> Usage:
        return Usage(64 + config.block_n, 48 << 10, config.num_warps)

    found, asked = searched(usage, limit=64)
    assert len(asked) == len(set(asked)) < len(set(EVERY)) / 3, (
        "only what may still win is compiled"
    )
    for most, chosen in found.items():
        tokens = most or configs.PREFILL_TOKENS
        assert chosen.cost.reported and chosen.compiled > 0
        kinds = dict(configs.BOUNDS)[most]
        others = [c for kind in kinds for c in configs.candidates(PROBLEM, kind, tokens, CARD)]
        if most in choice.FEWER:  # tiles add in the order for 32 rows
            order = found[32].config.order
            others = [c for c in others if c.kind == "rows" or c.order == order]
        for other in others:
            known = usage(other) if other in asked else None
            assert chosen.cost.us <= cost(other, PROBLEM, tokens, CARD, known).us
        assert "programs a multiprocessor by" in chosen.text() and "(compiler)" in chosen.text()
        assert f"best of {len(others)}" in chosen.text() and "; next " in chosen.text()


def test_what_spills_is_out_and_the_search_goes_on() -> None:
    plain = {c.most: c for c in choice.choose(PROBLEM, CARD)}
    first = {c.config for c in plain.values()}

    def usage(config: Config) -> Usage:
        return Usage(255, 1 << 10, config.num_warps, 8 if config in first else 0)

    found, _ = searched(usage, limit=1)  # one is enough only if it fits
    for most, chosen in found.items():
        assert chosen.config not in first and math.isfinite(chosen.cost.us), most
        assert chosen.compiled >= 2 and chosen.spilled >= 1
    assert all(not c.cost.reported and c.compiled == 0 for c in plain.values())
    assert "(estimate)" in plain[1].text()


def test_a_limit_bounds_what_is_compiled() -> None:
    for limit in (1, 2):
        found, _ = searched(lambda c: Usage(255, 100 << 10, c.num_warps), limit=limit)
        assert all(c.compiled <= limit for c in found.values())


@pytest.mark.parametrize(
    ("emitter", "form"), [(quantized_linear, "int4_g32_f16"), (fp8_linear, "e4m3_g32_f32")]
)
def test_quantised_linears_are_searched_too(emitter, form: str) -> None:
    """What spills is out; parts of a depth have whole steps; every choice says why."""
    body, operands = quantized_body(plain, form, 1024, 3072)
    asked: list[str] = []

    def report(sources: Sequence[KernelSource]) -> list[Usage]:
        asked.extend(source.text for source in sources)
        return [Usage(64, 8 << 10, 4, 8 * ("SPLIT=1" in s.text)) for s in sources]

    spec = emitter.spec_of(body, operands)
    source = ForCard(emitter, CARD, Tuning(report, 4)).emit(spec)
    told = gpu_compile.CHOSEN.findall(source.text)
    assert len(told) == 4 and all("(compiler)" in line for line in told), told
    assert all("split" in line for line in told[:3]), "one program a tile spills"
    assert len(asked) == len(set(asked)) >= 4
    for most, configs_found in quantized_configs.ranges(PROBLEM, 32, CARD):
        assert len(configs_found) > 1 and len(set(configs_found)) == len(configs_found), most
        assert all(c.split == 1 or c.block_k * c.split <= 1024 for c in configs_found)


@pytest.mark.parametrize("target", CARDS)
def test_a_thread_reads_16_bytes_of_codes(target: str) -> None:
    """gfx942 read a head's int8 codes 8 bytes a load: its tile had half a strip a thread."""
    card = CARDS[target]
    for codes in (16, 32):  # in 16 bytes: int8, int4
        for most, found in quantized_configs.ranges(PROBLEM, codes, card)[:3]:
            for c in found:
                assert c.block_n * c.block_k // codes >= c.num_warps * card.warp, (most, c)


@pytest.mark.nightly
def test_the_compilers_numbers_are_read_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real compilation of one variant; the second time the folder answers."""
    spec = linear_spec("Qwen3-0.6B", "down")
    monkeypatch.setattr(configs, "BOUNDS", ((1, ("rows",)),))
    report = ResourceReport("cuda:90", 1, tmp_path / "resources")
    source = ForCard(linear, CARD, Tuning(report, 1)).emit(spec)
    assert report.num_compiled == 1
    (told,) = gpu_compile.CHOSEN.findall(source.text)
    assert told.startswith("up to 1 rows: rows ") and "(compiler)" in told
    again = ResourceReport("cuda:90", 1, tmp_path / "resources")
    assert ForCard(linear, CARD, Tuning(again, 1)).emit(spec) == source
    assert again.num_compiled == 0

    def refused(*arguments):
        raise resource_report.CodegenError("does not compile")

    monkeypatch.setattr(resource_report, "compile_ahead", refused)
    assert ResourceReport("cuda:90", 1)([source]) == [UNFIT]
