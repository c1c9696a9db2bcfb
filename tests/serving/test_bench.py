"""`aios bench` on the example checkpoint: plausible numbers, and a cost model to simulate with."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from aios_compile.cli.main import app
from aios_compile.study.cost_model import KNOTS, CostModel, read_steps
from benchmarks.engine_workload import make_workload, ours
from tests.serving.conftest import EXAMPLE


def test_the_command(tmp_path: Path) -> None:
    cost, log = tmp_path / "cost.json", tmp_path / "log.jsonl"
    options = ["--num-threads", "1", "--no-progress", "--rounds", "1"]
    options += ["--decision-log", str(log), "--save-cost", str(cost)]
    result = CliRunner().invoke(app, ["bench", str(EXAMPLE), *options, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["num_sequences"] for row in found["decode"]] == [1, 2, 3, 4, 5, 6, 8, 9, 12, 16]
    assert [row["num_tokens"] for row in found["prefill"]] == [3, 6, 12, 24, 48, 96, 160, 256, 384]
    model = CostModel.load(cost)
    assert 0 < model.step_us(1) < model.step_us(64) and model.num_steps > 100
    busy = [k for k in read_steps(log).rows if k[len(KNOTS) + 4]]  # requests came meanwhile
    assert len(busy) >= 8, "what taking in a request costs would be fitted to chance"
    result = CliRunner().invoke(
        app, ["simulate", str(log), "--cost", str(cost), "--arrivals", "poisson"]
    )
    assert result.exit_code == 0 and "ttft_p90_ms" in result.output


def test_shared_prefixes_are_computed_once(example: object) -> None:
    """The workload of benchmarks/engine.py: at least 95 % of the shared prefill is saved."""
    stats = example.engine.stats  # type: ignore[attr-defined]
    work = make_workload(16, shared_tokens=48, own_tokens=8, output_tokens=6, seed=1)
    before = stats.num_cached_tokens
    at_once = ours(example, work, "a", 16)
    assert stats.num_cached_tokens - before >= 0.95 * work.num_sharable_tokens
    one_at_a_time = ours(example, work, "b", 1)
    assert at_once.tokens == one_at_a_time.tokens and len(at_once.ttft_s) == 16
