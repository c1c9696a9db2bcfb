"""Every part of benchmarks/gpu.py at a tiny size: none runs for the first time on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from aios_compile.codegen.triton.kernel_ledger import KernelLedger
from aios_compile.runtime import select_gpu_kernels
from aios_compile.study import triton_check
from benchmarks import gpu, gpu_random
from benchmarks.gpu_clock import Clock
from tests.variants import nightly

TINY = "--device interpreter --shapes micro --batch 1 --context 20 --tokens 2 --repeats 1"
TINY += " --cases 1 --random 2 --pages 16 --requests 1 --lengths 2,3 --forms int4,fp8 --seconds 900"


PARTS = ["peers", *nightly("engine", "ours", "ledger")]  # the longest


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_and_goes_on_where_it_was(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LEAST_ROUNDS", "MOST_ROUNDS"):  # the interpreter takes seconds for a step
        monkeypatch.setattr(select_gpu_kernels, name, 1)
    out = tmp_path / "rows.jsonl"
    arguments = [part, "--out", str(out), "--ledgers", str(tmp_path), *TINY.split()]
    if part == "ledger":  # of 8 tokens, that tensor cores multiply: there is a choice
        arguments += ["--tokens", "8", "--forms", "int4"]
    assert gpu.main([*arguments, "--minutes", "0"]) == 3, "no time: no row"
    assert gpu.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [row for row in rows if "error" in row], rows
    assert len(rows) >= {"ours": 9, "ledger": 2, "peers": 5, "engine": 3}[part]
    before = out.read_text()
    assert gpu.main(arguments) == 0 and out.read_text() == before, "rows that are there stay"
    if part == "ledger":
        ledger = KernelLedger.from_json(json.loads((tmp_path / "interpreter.json").read_text()))
        assert len(ledger.entries) == sum(row["kernels"] for row in rows) > 0
        assert all(row["trials"] and not row["late_compilations"] for row in rows)
    if part != "ours":
        return
    by_name = {row["row"]: row for row in rows}
    for kind in ("", "int4 ", "fp8 "):
        row = by_name[f"ours micro {kind}decode batch 1 context 20"]
        assert row["late_compilations"] == 0 and row["host_us"] > 0
    names = [row["name"] for row in by_name["ours micro kernels"]["rows"]]
    assert names[-2:] == ["prepare_step", "collect_results"]


@pytest.mark.nightly
def test_random_programs_are_held_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the row does on a GPU; a kernel that gives a wrong number is named."""
    clock = Clock("interpreter", 1)
    row = gpu_random.random_row(1, 3, clock)
    assert row["examples"] == 1 and not row["refused"] and row["fired"]
    launch = triton_check.TritonKernels.launch

    def wrong(*arguments: Any) -> Any:
        return [r * 1.01 if r.is_floating_point() else r for r in launch(*arguments)]

    monkeypatch.setattr(triton_check.TritonKernels, "launch", wrong)
    with pytest.raises(AssertionError, match="seed 3 number 0: wrong"):
        gpu_random.random_row(1, 3, clock)


def test_a_row_that_fails_is_kept_and_the_next_runs(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "rows.jsonl", again=False)
    rows = [("bad", lambda: 1 / 0), ("good", lambda: {"us": 1.0})]
    assert gpu.run(rows, results, 60)
    assert "ZeroDivisionError" in gpu.table(results) and "good" in gpu.table(results)
    again = gpu.Results(results.path, again=True)
    assert again.lacks("bad") and not again.lacks("good")
