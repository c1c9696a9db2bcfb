"""The cost model and the simulator: what is put in comes out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aios_compile.cli.main import app
from aios_compile.errors import LogError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.policies import RANKS
from aios_compile.runtime.schedule_state import Chunk, Plan, SchedulerOptions
from aios_compile.study.cost_model import COSTS, CostModel, features, fit, fit_log
from aios_compile.study.simulator import percentile, recorded, simulate, synthetic
from tests.runtime.test_replay import write_log

LIMITS = Limits(64, 8, 8, 40, 200, 16, 512, 1000)
COST = CostModel(300.0, 20.0, 5.0, 0.01, 50.0)


def test_the_fit_finds_the_costs_of_a_simulated_machine() -> None:
    rng = random.Random(0)
    rows = [
        (1.0, rng.randint(1, 512), rng.randint(1, 16), rng.randint(1, 50_000), rng.choice([0, 3]))
        for _ in range(400)
    ]
    true = CostModel(400.0, 13.0, 7.0, 0.02, 90.0).coefficients
    times = [float(true @ row) * rng.uniform(0.98, 1.02) for row in rows]
    found = fit(rows, times)
    assert found.coefficients == pytest.approx(true, rel=0.1)
    assert found.median_error < 0.02 and found.num_steps == 400
    for place in range(0, 400, 40):  # another process had the core
        times[place] *= 9
    disturbed = fit(rows, times)
    total = sum(disturbed.coefficients @ row for row in rows)
    assert total == pytest.approx(sum(times)), "all steps together last as long as measured"
    ratio = disturbed.coefficients / true
    assert ratio.max() / ratio.min() < 1.15, "what is far off does not bend the model"


def test_no_cost_is_negative() -> None:
    rows = [(1.0, t, 1.0, 1000.0 / t, 0.0) for t in range(1, 60)]
    assert min(fit(rows, [100.0 + row[1] - row[3] / 50 for row in rows]).coefficients) >= 0


def test_features_of_a_plan() -> None:
    plan = Plan(chunks=[Chunk(0, 10, 1, 1), Chunk(1, 4, 3, 0)], num_tokens=4, num_rows=1)
    plan.copies.append((1, 2))
    # the query at 10 sees 11 keys; those at 4, 5, 6 see 5, 6, 7
    assert features(plan) == (1.0, 4, 1, 11 + 5 + 6 + 7, 1)


def test_cost_models_are_json(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    COST.save(path)
    assert json.loads(path.read_text())["version"] == 1 and CostModel.load(path) == COST
    for text in ("", "[]", "{}", '{"version": 2}', '{"version": 1, "step_us": "x"}'):
        path.write_text(text)
        with pytest.raises(LogError):
            CostModel.load(path)


@pytest.mark.parametrize("policy", sorted(RANKS))
@pytest.mark.parametrize("kind", ["poisson", "bursts"])
def test_everything_that_arrives_ends(kind: str, policy: str) -> None:
    arrivals = synthetic(
        kind, 60, rate=40.0, prompt_tokens=20, output_tokens=15, shared_tokens=24,
        most_tokens=300, num_tenants=3,
    )  # fmt: skip
    result = simulate(arrivals, LIMITS, SchedulerOptions(policy=policy), COST)
    assert len(result.ttft_us) == len(result.latency_us) == 60
    assert result.num_output_tokens == sum(len(a.output) for a in arrivals)
    assert len(result.inter_token_us) == result.num_output_tokens - 60
    assert result.num_cached_tokens > 24 * 40, "tenants share their prefix"
    assert result.summary()["output_tokens_per_s"] > 0


def test_one_request_takes_what_its_steps_cost() -> None:
    (arrival,) = synthetic(
        "poisson", 1, rate=1.0, prompt_tokens=5, output_tokens=9, shared_tokens=30, most_tokens=300
    )
    result = simulate([arrival], LIMITS, SchedulerOptions(), CostModel(100.0, 10.0, 0, 0, 0))
    prompt, outputs = len(arrival.prompt), len(arrival.output)
    assert result.ttft_us == [pytest.approx(100.0 + 10.0 * prompt)]
    assert result.duration_us == pytest.approx(100.0 * outputs + 10.0 * (prompt + outputs - 1))


def test_a_simulation_of_a_log_has_its_arrivals_and_its_options(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path)
    limits, options, arrivals, really = recorded(path)
    assert options.num_host_pages == 6 and limits.num_pages == 10
    assert len(arrivals) == 34 == len(really.latency_us)  # 30 requests, 4 of them with n=2
    simulated = simulate(arrivals, limits, options, fit_log(path))
    assert simulated.num_output_tokens == really.num_output_tokens
    assert set(simulated.summary()) == set(really.summary())


def test_percentiles() -> None:
    assert percentile([], 50) == 0 and percentile([3.0], 99) == 3.0
    assert percentile([float(i) for i in range(100)], 90) == 90.0


def test_the_commands(tmp_path: Path) -> None:
    log, cost, picture = (tmp_path / name for name in ("log.jsonl", "cost.json", "out.svg"))
    write_log(log)
    run = CliRunner().invoke
    result = run(app, ["replay", str(log)])
    assert result.exit_code == 0 and "decisions made again" in result.output
    result = run(app, ["simulate", str(log), "--save-cost", str(cost), "--plot", str(picture)])
    assert result.exit_code == 0 and "ttft_p50_ms" in result.output
    assert "in the log" in result.output and picture.read_text().startswith("<svg")
    options = ["--arrivals", "bursts", "--cost", str(cost), "--scheduling-policy", "fair_share"]
    result = run(app, ["simulate", str(log), *options, "--num-requests", "20", "--json"])
    assert result.exit_code == 0 and json.loads(result.output)["simulated"]["requests"] == 20
    for bad in (["--arrivals", "x"], ["--rate", "0"], ["--scheduling-policy", "x"]):
        assert run(app, ["simulate", str(log), *bad]).exit_code == 1
    log.write_text(log.read_text().replace('"kind":"chunk"', '"kind":"wait"', 1))
    result = run(app, ["replay", str(log)])
    assert result.exit_code == 1
    assert all(name in CostModel.__dataclass_fields__ for name in COSTS)
