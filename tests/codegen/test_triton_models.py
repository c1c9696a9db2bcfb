"""All kernels of two models, plain and quantised, are pinned for four targets; some are compiled.

Each kernel is planned and emitted, and its seal compared with the ledger's (triton_ledger.py). What
differs is compiled at once; of the rest one launch of each emitter for each target is. All are in
tests/nightly/test_triton_models.py. With another version of Triton or ptxas than the ledger's the
sample is compiled and may not spill, and no resources are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import pointwise
from aios_compile.codegen.triton.cards import CARDS, card_of
from aios_compile.codegen.triton.compile_ahead import Binary, compile_ahead
from aios_compile.study.gpu_compile import memory_table
from aios_compile.study.kernel_table import kernel_rows
from aios_compile.study.plan_model import Planned
from tests.codegen.kernels import operands_of, trace
from tests.codegen.triton_kernels import load
from tests.codegen.triton_ledger import Kernel, Ledger, compiler, hold
from tests.codegen.triton_models import LEDGER, MODELS, kernels_of, planned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("model", MODELS)
def test_kernels_launches_and_bytes_of_a_model(model: str, folder: Path, tmp_path: Path) -> None:
    """One test, so that one process plans the model."""
    kernels, ledger = kernels_of(model, folder), Ledger(LEDGER)
    compiled = hold(
        kernels, ledger, lambda s, target, only: compile_ahead(s, target, tmp_path, 1, only)
    )
    assert len({k.target for k in compiled}) > 1
    pinned = {label for label in ledger.rows if label.split(" ")[1] == model}
    gone = pinned - {kernel.label for kernel in kernels}
    assert not gone, f"the model has no such kernel, take its line out: {gone}"
    for form in ("bf16", "int8", "int4", "fp8"):
        plan = planned(model, form, "cuda:90", folder)
        assert plan is not None
        check_launches_and_bytes(plan, form)
        if form == "bf16":
            card = card_of("cuda:90")
            assert "KV cache" in memory_table(plan.program, card, 0.9)
            small = replace(card, memory_bytes=10**9)
            assert "does not fit" in memory_table(plan.program, small, 0.9)


def check_launches_and_bytes(plan: Planned, form: str) -> None:
    rows = kernel_rows(plan.module, plan.emitted, plan.program)
    floor = sum(row.weight_bytes + row.kv_bytes for row in rows)
    most = 1.01 if form == "bf16" else 1.02  # the goal is 1.05
    assert sum(row.bytes_a_token for row in rows) <= most * floor
    items = plan.program.function("layer").items
    modules = [load(plan.emitted.sources[item.kernel]) for item in items]
    launches = {}
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 2048):
        chosen = [
            next(v for v in module.VARIANTS if v["most"] is None or tokens <= v["most"])
            for module in modules
        ]
        launches[tokens] = sum(len(variant["launches"]) for variant in chosen)
    assert {launches[n] for n in (1, 2, 4, 8, 16, 32)} == {5}
    if form == "bf16":  # norms, and new keys, by themselves
        assert launches[64] <= launches[128] == launches[2048] == 8


def test_the_sample_has_every_emitter_for_every_target() -> None:
    ledger = Ledger(LEDGER)
    kinds = {(label.split(" ")[0], label.split(" | ")[1]) for label in ledger.rows}
    sample = ledger.sample()
    assert len(sample) == len(kinds) and len(kinds) >= 36
    assert {label.split(" ")[0] for label in sample} == {*CARDS}
    assert {label.split(" ")[1] for label in sample} == {*MODELS}


class Compiler:
    """Stands for compile_ahead: says what every launch uses, and counts."""

    def __init__(self, registers: int = 40, spill_bytes: int = 0) -> None:
        self.registers, self.spill_bytes, self.compiled = registers, spill_bytes, 0

    def __call__(
        self, sources: Sequence[KernelSource], target: str, only: Mapping[str, int]
    ) -> list[list[Binary]]:
        self.compiled += len(sources)
        return [
            [Binary(f"{s.symbol}_run", None, {}, 4, self.registers, self.spill_bytes, 64, "", "")]
            for s in sources
        ]


def kernel(change: Callable[[str], str] | None = None) -> Kernel:
    """Return a small kernel, its text changed by a function."""
    body = trace(lambda x, y: x * y + x, ((64,), torch.float32), ((64,), torch.float32))
    spec = pointwise.spec_of(body, operands_of(body))
    assert spec is not None
    source = pointwise.emit(spec)
    if change is not None:
        before = source.text
        source = replace(source, text=change(before))
        assert source.text != before
    return Kernel("cuda:90", "a model", source)


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of two kernels, the small one and one that is the sample."""
    file = tmp_path / "ledger.txt"
    monkeypatch.setenv("UPDATE_RESOURCES", "1")
    other = Kernel("cuda:80", "a model", kernel().source)
    hold([kernel(), other], Ledger(file), Compiler())
    monkeypatch.delenv("UPDATE_RESOURCES")
    assert len(file.read_text().splitlines()) == 3
    monkeypatch.setattr(Ledger, "sample", lambda self: {other.label: 0})
    return file


def test_what_does_not_reach_the_binary_leaves_a_seal_whole(pinned: Path) -> None:
    symbol = kernel().source.symbol
    for change in (
        lambda t: t.replace(
            "import triton\n", "# model: decoder.py:7 in forward\nimport triton\n", 1
        ),
        lambda t: t.replace("import triton\n", "import triton  # why\n\n", 1),
    ):
        assert kernel(change).digest == kernel().digest
    text = kernel().source.text.replace(symbol, "other_0123abcd")
    renamed = KernelSource("other_0123abcd", "other_0123abcd", "triton", text, 3)
    assert Kernel("cuda:90", "a model", renamed).digest == kernel().digest
    assert Kernel("cuda:80", "a model", renamed).digest != kernel().digest
    unlike = Compiler(registers=99)
    assert not hold([kernel()], Ledger(pinned), unlike) and not unlike.compiled


CHANGES = {
    "a template": lambda t: t.replace("tl.load(", "1.0 * tl.load(", 1),
    "a configuration": lambda t: t.replace("num_warps=4", "num_warps=8"),
    "a number of a launch": lambda t: t.replace(
        "grid=lambda T, S, R, P: (", "grid=lambda T, S, R, P: (1 + "
    ),
    "a type": lambda t: t.replace('"*fp32"', '"*bf16"', 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_compiled_and_held_to_its_pin(change: str, pinned: Path) -> None:
    given, same = kernel(CHANGES[change]), Compiler()
    with pytest.warns(UserWarning, match="1 kernels were compiled, their text is not the pinned"):
        assert list(hold([given], Ledger(pinned), same)) == [given]
    with pytest.raises(AssertionError, match="pinned"):
        hold([given], Ledger(pinned), Compiler(registers=41))


def test_a_tampered_pin_is_found(pinned: Path) -> None:
    text = pinned.read_text()
    for old, new in ((" 40 64", " 39 64"), (" 40 64", " 40 0"), ("a model", "a modal")):
        pinned.write_text(text.replace(old, new))
        with pytest.raises(AssertionError, match="pinned"):
            hold([kernel()], Ledger(pinned), Compiler())
    pinned.write_text(text)
    assert not hold([kernel()], Ledger(pinned), Compiler(registers=39))  # the seal says enough


def test_spills_fail_whatever_is_pinned(pinned: Path) -> None:
    other = Kernel("cuda:80", "a model", kernel().source)
    with pytest.raises(AssertionError, match="spill_bytes=8"):
        hold([other], Ledger(pinned), Compiler(spill_bytes=8))
    with pytest.raises(AssertionError, match="41 64"):
        hold([other], Ledger(pinned), Compiler(registers=41))


def test_another_compiler_compiles_the_sample_alone(pinned: Path) -> None:
    other = Kernel("cuda:80", "a model", kernel().source)
    pinned.write_text(pinned.read_text().replace(compiler(), "triton 9"))
    same, text = Compiler(registers=99), pinned.read_text()
    with pytest.warns(UserWarning, match=r"is of triton 9, this is .*: 1 of 2 kernels were comp"):
        found = hold([kernel(), other], Ledger(pinned), same)
    assert list(found) == [other] and same.compiled == 1 and pinned.read_text() == text
    with pytest.raises(AssertionError, match="spill_bytes=8"):
        hold([kernel(), other], Ledger(pinned), Compiler(spill_bytes=8))
