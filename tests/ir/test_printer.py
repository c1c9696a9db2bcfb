"""Every printed level is a script that computes what the program in memory computes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from aios_compile.ir import snapshot
from aios_compile.ir.inputs import chunks, mixed, runtime_inputs, sample_inputs, size, whole
from aios_compile.ir.module import IRModule
from aios_compile.ir.printer import checksums, to_python
from tests.passes.helpers import captured


@pytest.fixture(scope="module")
def module() -> IRModule:
    return captured("qwen3")


def test_a_printed_level_gives_the_same_checksums(
    module: IRModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; tests/study/test_study.py runs such files in one of their own."""
    path = tmp_path / "level.py"
    path.write_text(to_python(module, "A level.", seed=3))
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == checksums(module, seed=3)
    assert checksums(module, seed=3) != checksums(module, seed=4)


def test_a_printed_level_shows_shapes_and_model_lines(module: IRModule) -> None:
    text = to_python(module)
    assert "def region_layer(" in text and "def program(" in text
    assert '"f32[T, 32]"' in text
    assert "# decoder.py:" in text and "self.o_proj" in text


def test_a_snapshot_is_independent(module: IRModule) -> None:
    text = snapshot.module_text(module)
    copy = snapshot.take(module)
    for graph_module in copy.graphs().values():
        for node in graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.add.Tensor
        ):
            node.args = (node.args[0], node.args[0])
    assert snapshot.module_text(module) == text != snapshot.module_text(copy)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 19])
def test_batches_tell_one_story(num_tokens: int) -> None:
    assert mixed(num_tokens).num_tokens == num_tokens
    assert sum(step.num_tokens for step in chunks(num_tokens)) == num_tokens
    assert max(whole(num_tokens).rows) == num_tokens - 1


def test_slots_follow_from_pages() -> None:
    from aios_compile.ir.inputs import Value

    names = ("slots", "positions", "page_tables", "query_starts", "context_lengths")
    shapes: dict[str, tuple[int | str, ...]] = {"page_tables": ("S", 8)}
    values = [Value(n, "input", n, torch.int64, shapes.get(n, ("T",))) for n in names]
    given = runtime_inputs(values, mixed(19), 0, vocabulary=64)
    starts, tables = given["query_starts"].tolist(), given["page_tables"]
    for s, length in enumerate(given["context_lengths"].tolist()):
        tokens = range(starts[s], starts[s + 1])
        assert [int(given["positions"][t]) for t in tokens] == list(
            range(length - len(tokens), length)
        )
        for t in tokens:
            position = int(given["positions"][t])
            assert int(given["slots"][t]) == int(tables[s, position // 16]) * 16 + position % 16
    used = tables[tables > 0].tolist()
    assert len(used) == len(set(used)), "sequences share no page, page 0 is nobody's"


def test_sizes_are_read_from_texts() -> None:
    assert size("2*T + 1", {"T": 5}) == 11 and size("S + 1", {"S": 2}) == 3 and size(7, {}) == 7


def test_sampled_values_are_the_same_for_a_seed(module: IRModule) -> None:
    first, second = (sample_inputs(module, whole(5), 1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
