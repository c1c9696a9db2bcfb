"""Report, dump and ablation: what a compile did can be read, run and opened."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aios_compile.errors import CacheError
from aios_compile.ir import snapshot
from aios_compile.ir.module import IRModule
from aios_compile.ir.printer import checksums
from aios_compile.passes import catalogue
from aios_compile.passes.context import PassOptions
from aios_compile.passes.graph_pass import info_of
from aios_compile.passes.pipeline import PIPELINE, STAGES
from aios_compile.passes.result import PassResult
from aios_compile.passes.runner import run_pipeline
from aios_compile.study.ablation import ablate, cost_of
from aios_compile.study.dump import Dumper, dump_artefact
from aios_compile.study.memory_picture import bytes_text, memory_svg
from aios_compile.study.report import WIDTH, Report
from tests.passes.helpers import captured

ROOT = Path(__file__).resolve().parents[2]
PLAN = {
    "arena_bytes": 3072,
    "naive_bytes": 4096,
    "lower_bound_bytes": 2048,
    "buffers": [
        {"name": "x", "bytes": 2048, "offset": 0, "first": 0, "last": 2},
        {"name": "<h>", "bytes": 1024, "offset": 2048, "first": 1, "last": 3},
    ],
}


class Compiled:
    """A compiled tiny decoder: an artefact folder without kernels, and its program."""

    def __init__(self, folder: Path) -> None:
        self.captured = captured("qwen3")
        self.module: IRModule = snapshot.take(self.captured)
        dumper = Dumper(folder / "levels")
        dumper.level("captured", self.module)
        self.first = checksums(self.module)
        results = run_pipeline(self.module, STAGES, PassOptions(), dump=dumper)
        self.report = Report.of(results, ["a note"])
        (folder / "kernels").mkdir()
        (folder / "kernels" / "linear.cpp").write_text("// decoder.py:1\n")
        (folder / "step.cpp").write_text("//\n")
        rows = self.report.to_json()
        for name, value in (
            ("plan.json", PLAN),
            ("report.json", rows),
            ("certificates.json", rows["passes"]),
        ):
            (folder / name).write_text(json.dumps(value))
        self.folder = folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("artefact"))


@pytest.fixture(scope="module")
def dumped(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump_artefact(compiled.folder, tmp_path_factory.mktemp("dump") / "out").parent


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_every_pass_has_a_row_and_keeps_its_budget(compiled: Compiled) -> None:
    assert [p.name for p in compiled.report.passes] == [
        p.__name__ for p in PIPELINE if info_of(p).target in ("", "cpp")
    ]
    assert all(p.kept for p in compiled.report.passes), str(compiled.report)
    for p in compiled.report.passes:
        if p.hits:
            assert p.max_error is not None and p.error_budget is not None
            assert p.max_error <= p.error_budget


def test_the_report_fits_and_survives_json(compiled: Compiled) -> None:
    text = str(compiled.report)
    table = text.split("note:")[0].splitlines()
    rows = [line for line in table if "refused, " not in line]
    assert max(len(line) for line in rows) <= WIDTH
    again = Report.from_json(json.loads(json.dumps(compiled.report.to_json())))
    assert str(again) == text and "a note" in text
    assert again.hits()["raise_rms_norm"] == again["raise_rms_norm"].hits > 0
    with pytest.raises(KeyError, match="raise_rope"):
        again["nonsense"]


def test_what_was_not_kept_is_said() -> None:
    rows = (
        PassResult("a", "exact", False, kept=False, reason="error 1e-3 of logits " * 5),
        PassResult("b", "exact", False, kept=False, reason="disabled"),
        PassResult("c", "exact", True, refusals=("an extra user (model.py:3)",)),
    )
    text = str(Report(rows))
    assert "NOT KEPT" in text and "a: not kept, error 1e-3" in text
    assert "disabled" in text and "c: refused, an extra user (model.py:3)" in text


def test_each_level_runs_and_the_ends_agree_with_memory(compiled: Compiled, dumped: Path) -> None:
    levels = sorted((dumped / "levels").glob("*.py"))
    kept = [p.name for p in compiled.report.passes if p.kept and p.hits]
    assert [p.stem[3:] for p in levels] == ["captured", *kept]
    code = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    print('#', path); runpy.run_path(path, run_name='__main__')\n"
    )
    done = run_python("-c", code, *map(str, levels))
    assert done.returncode == 0, done.stderr
    printed = [part.splitlines()[1:] for part in done.stdout.split("# ")[1:]]
    assert len(printed) == len(levels) and all(printed)
    assert printed[0] == compiled.first
    assert printed[-1] == checksums(compiled.module)


def test_a_dump_needs_no_torch(compiled: Compiled, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from aios_compile.study.dump import dump_artefact\n"
        "print(dump_artefact(Path(sys.argv[1]), Path(sys.argv[2])))\n"
    )
    done = run_python("-c", code, str(compiled.folder), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "index.html").exists()


class Links(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v for k, v in attrs if k in ("href", "src") and v]


def test_the_index_leads_everywhere(dumped: Path) -> None:
    links = Links()
    links.feed((dumped / "index.html").read_text())
    assert all((dumped / link).is_file() for link in links.found), links.found
    assert not any(re.match(r"\w+:", link) for link in links.found), "works offline"
    expected = {"plan.json", "memory.svg", "certificates.json", "recipes.txt", "step.cpp"}
    assert expected <= set(links.found) and "kernels/linear.cpp" in links.found
    assert sum(link.startswith("levels/") for link in links.found) == len(
        list((dumped / "levels").iterdir())
    )


def test_recipes_name_the_checkpoint(dumped: Path) -> None:
    text = (dumped / "recipes.txt").read_text()
    assert "checkpoint['model.layers.0.self_attn.q_proj.weight']" in text and "cat(" in text


def test_a_dump_does_not_overwrite_a_strange_folder(compiled: Compiled, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CacheError, match="no dump"):
        dump_artefact(compiled.folder, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_dump_can_be_written_again(compiled: Compiled, dumped: Path) -> None:
    assert dump_artefact(compiled.folder, dumped).exists()


def test_the_memory_picture_shows_boxes_and_bounds() -> None:
    root = ElementTree.fromstring(memory_svg(PLAN))
    titles = [e.text or "" for e in root.iter() if e.tag.endswith("title")]
    assert len(titles) == 2 and titles[1].startswith("<h>: 1,024 bytes at 2,048, phases 1 to 3")
    text = memory_svg(PLAN)
    assert "without sharing 4.0 KiB" in text and "1.50x" in text and "stroke-dasharray" in text
    assert bytes_text(10) == "10 bytes" and bytes_text(3 << 30) == "3.0 GiB"


def test_an_empty_plan_is_drawn_too() -> None:
    empty: dict[str, Any] = {
        "arena_bytes": 0, "naive_bytes": 0, "lower_bound_bytes": 0, "buffers": []
    }  # fmt: skip
    assert ElementTree.fromstring(memory_svg(empty)).tag.endswith("svg")


def test_ablation_counts_launches_and_bytes(compiled: Compiled) -> None:
    few = {"raise_rope", "merge_qkv"}
    optional = [p for p in PIPELINE if not p.info.required and p.__name__ not in few]
    result = ablate(compiled.captured, STAGES, PassOptions(), only=few)
    assert result.everything == cost_of(compiled.module) and set(result.without) == few
    for cost in result.without.values():
        assert not isinstance(cost, str)
        assert cost.launches_a_layer > result.everything.launches_a_layer
        assert cost.bytes_a_token > result.everything.bytes_a_token
    assert "raise_rope" in str(result) and optional and not result.idle()


def test_weights_dominate_the_bytes_of_a_token(compiled: Compiled) -> None:
    parameters = sum(t.numel() * t.element_size() for t in compiled.captured.tensors.values())
    moved = cost_of(compiled.module, context=1).bytes_a_token
    table = 101 * 32 * 4  # the embedding is looked up, not read
    assert 0.9 * (parameters - table) < moved < 2 * parameters


def test_the_catalogue_names_every_pass() -> None:
    text = catalogue.markdown()
    for function in PIPELINE:
        assert f"### {function.__name__}\n" in text
    assert text.count("Before:") == text.count("After:") == len(PIPELINE)
