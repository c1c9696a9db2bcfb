"""Attention and head rows compiled for a GPU that is not here, the pages about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx

from aios_compile.errors import CodegenError
from aios_compile.ir import ops  # noqa: F401  (registers the ops)
from tests.codegen.harness import make_body

pytest.importorskip("triton")

from aios_compile.codegen.source import KernelSource
from aios_compile.codegen.triton import paged_attention
from aios_compile.codegen.triton.cards import card_of
from aios_compile.codegen.triton.compile_ahead import compile_ahead
from aios_compile.study import gpu_compile, gpu_pages
from aios_compile.study.kernel_table import KernelRow
from aios_compile.study.line_nodes import nodes_of_lines


def attention() -> tuple[KernelSource, fx.GraphModule]:
    """Return Qwen3-0.6B's attention over bfloat16 pages, 4096 positions, and the kernel's body."""

    def body(q, k, v, starts, lengths, tables):
        op = torch.ops.aios.paged_attention.default
        return op(q, k, v, starts, lengths, tables, 0.088, None, None, None, None)

    inputs = {
        "q": (("T", 16, 128), torch.float32),
        "k": ((64, 8, 128, 16), torch.bfloat16),
        "v": ((64, 8, 16, 128), torch.bfloat16),
        "starts": ((6,), torch.int64),
        "lengths": (("S",), torch.int64),
        "tables": (("S", 256), torch.int64),
    }
    graph, operands = make_body(body, inputs)
    spec = paged_attention.spec_of(graph, operands)
    assert spec is not None
    return paged_attention.emit(spec), graph


def test_attention_streams_pages_in_16_byte_copies_and_spills_nothing(tmp_path: Path) -> None:
    source, graph = attention()
    ((split, whole),) = compile_ahead([source], "cuda:90", tmp_path)
    for binary in (split, whole):
        text = binary.assembly()
        assert binary.spill_bytes == 0 and binary.registers <= 255
        assert "cp.async.cg.shared.global" in text, "16 bytes a copy, past the first-level cache"
        assert "ld.global.b16" not in text, "K and V are never read element by element"
    assert "wgmma.mma_async" in whole.assembly(), "prefill multiplies with Hopper's tensor cores"
    row = KernelRow(source.name, source.symbol, 28, 0, 28 << 20, 0, (), ("decoder.py:1",))
    nodes = nodes_of_lines(source.text, graph)
    report = gpu_compile.report_of(row, (split, whole), card_of("cuda:90"), nodes)
    assert report.launches == 1 and report.decode_binaries() == [split]
    (held,) = report.held
    assert held.programs == 65536 // (-(-split.registers // 8) * 8 * 128) == 2
    assert report.floor_us < report.predicted_us and report.bytes == 1 << 20
    step = gpu_compile.StepReport("cuda:90", "H200", (report,), report.floor_us * 28)
    index = gpu_pages.write_pages(step, tmp_path)
    page = (tmp_path / f"{source.name}.html").read_text()
    last = len(source.text.split("\n"))
    for lines in (gpu_pages.ptx_lines(split, nodes), gpu_pages.sass_lines(split, nodes)):
        linked = {int(x.split("#L")[1].split("'")[0]) for x in lines if "#L" in x}
        assert len(linked) > 30 and max(linked) <= last
        assert sum("title='paged_attention" in x for x in lines) > len(lines) / 2
    assert f"id='L{last}'" in page and "decoder.py:1" in page and "HGMMA" in page
    assert f"<td>2 ({held.limit})</td>" in index.read_text()
    assert "<span id='Npaged_attention_default'>" in page and "href='#Npaged_atten" in page
    assert f"{source.name}.html" in index.read_text() and "decoder.py:1" in index.read_text()
    written = (tmp_path / f"{source.symbol}.py").read_text().split("\n")
    assert any("# <- paged_attention_default" in line for line in written)
    assert [x.partition("  # <-")[0] for x in written] == source.text.split("\n")
    assert "HGMMA" in Path(whole.text).with_suffix(".sass").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["launches"] == 28


def test_a_card_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CodegenError, match="cuda:75"):
        gpu_compile.plan_for(tmp_path, "cuda:75", {})
