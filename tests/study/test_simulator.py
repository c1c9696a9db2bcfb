"""The cost model and the simulator: what is put in comes out."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aios_compile.cli.main import app
from aios_compile.errors import LogError
from aios_compile.runtime.batch import Limits
from aios_compile.runtime.policies import RANKS
from aios_compile.runtime.schedule_state import Chunk, Plan, SchedulerOptions
from aios_compile.study.cost_model import KNOTS, CostModel, features, fit, fit_log, is_changed
from aios_compile.study.simulator import Arrival, percentile, recorded, simulate, synthetic
from tests.runtime.test_replay import write_log

LIMITS = Limits(64, 8, 8, 40, 200, 16, 512, 1000)


def cost_of(step_us: float, token_us: float, *slopes: float) -> CostModel:
    """Return a model that is linear in the tokens."""
    rises = [step_us + token_us, *(token_us * (b - a) for a, b in pairwise(KNOTS))]
    return CostModel(tuple(rises), *slopes)


COST = cost_of(300.0, 20.0, 5.0, 0.1, 0.01, 50.0)


def a_plan(num_tokens: int, num_rows: int, start: int, num_pages: int) -> Plan:
    plan = Plan(
        chunks=[Chunk(0, start, num_tokens, num_rows)], num_tokens=num_tokens, num_rows=num_rows
    )
    plan.copies += [(1, 2)] * num_pages
    return plan


def test_the_fit_finds_the_costs_of_a_simulated_machine() -> None:
    rng = random.Random(0)
    plans = [
        a_plan(rng.randint(1, 512), rng.randint(1, 16), rng.randint(0, 300), rng.choice([0, 3]))
        for _ in range(600)
    ]
    true = cost_of(400.0, 13.0, 7.0, 0.2, 0.02, 90.0)
    rows = [features(plan) for plan in plans]
    times = [true(plan) * rng.uniform(0.98, 1.02) for plan in plans]
    found = fit(rows, times)
    assert [found(plan) for plan in plans] == pytest.approx([true(p) for p in plans], rel=0.05)
    for count in (10, 200, 2000):  # the last is beyond all that was seen
        assert found.step_us(count) == pytest.approx(true.step_us(count), rel=0.1)
    assert found.context_us == pytest.approx(0.02, rel=0.1)
    assert found.key_us == pytest.approx(0.2, rel=0.1)
    assert found.median_error < 0.02 and found.num_steps == 600 and not found.stalls_a_second
    for place in range(0, 600, 40):  # another process had the core
        times[place] += 50_000
    stalled = fit(rows, times)
    assert [stalled(p) for p in plans] == pytest.approx([found(p) for p in plans], rel=0.05), (
        "what is far off does not bend the model"
    )
    assert stalled.stalls_us == pytest.approx((50_000,) * 15, rel=0.05)
    total = sum(stalled.drawn(plan, rng, False)[1] for plan in plans * 9)
    assert total == pytest.approx(9 * sum(times), rel=0.1), "stalls come as often as they came"


def test_a_tile_of_kernels_is_seen() -> None:
    rng = random.Random(1)
    plans = [a_plan(rng.randint(1, 40), 1, 0, 0) for _ in range(400)]
    times = [300.0 + 100 * -(-plan.num_tokens // 4) for plan in plans]
    found = fit([features(plan) for plan in plans], times)
    assert found(a_plan(4, 1, 0, 0)) == pytest.approx(400, rel=0.05)
    assert found(a_plan(5, 1, 0, 0)) == pytest.approx(500, rel=0.05)


def test_no_cost_is_negative() -> None:
    plans = [a_plan(t, 1, 100 - t, 0) for t in range(1, 60)]
    times = [100.0 + plan.num_tokens - features(plan)[-7] / 500 for plan in plans]
    assert min(fit([features(plan) for plan in plans], times).coefficients) >= 0


def test_features_of_a_plan() -> None:
    plan = Plan(chunks=[Chunk(0, 10, 1, 1), Chunk(1, 4, 3, 0)], num_tokens=4, num_rows=1)
    plan.copies.append((1, 2))
    # the query at 10 sees 11 keys; those at 4, 5, 6 see 5, 6, 7, which are 7 different ones
    assert features(plan, 2, 30)[len(KNOTS) :] == (1, 11 + 7, 11 + 5 + 6 + 7, 1, 2, 30, 0, 0, 0)
    assert features(plan, changed=True)[-2:] == (1, 1)
    assert features(plan)[: len(KNOTS)] == (1, 1, 1, *(0,) * (len(KNOTS) - 3))


def test_a_batch_that_changed_costs_more() -> None:
    """A decode that only moves on was begun ahead and keeps its arrays; one after a change not."""
    decode, other = a_plan(1, 1, 7, 0), Plan(chunks=[Chunk(1, 3, 1, 1)], num_tokens=1, num_rows=1)
    prompt = Plan(chunks=[Chunk(0, 0, 7, 1)], num_tokens=7, num_rows=1, num_prefill_tokens=7)
    seen = [(decode, decode), (decode, other), (decode, prompt), (prompt, decode), (decode, None)]
    assert [is_changed(*pair) for pair in seen] == [False, True, True, True, False]
    plans = [a_plan(t, t, 7, 0) for t in (1, 2, 4, 8)]
    rows = [features(plans[i % 4], changed=bool(i % 3)) for i in range(60)]
    times = [300.0 + (200 + 30 * plans[i % 4].num_rows) * bool(i % 3) for i in range(60)]
    found = fit(rows, times)
    assert found.changed_us == pytest.approx(200) and found.changed_row_us == pytest.approx(30)
    arrivals = [Arrival(0, (1, 2), (5,) * count) for count in (3, 6)]
    options = SchedulerOptions()
    base, more = (
        simulate(arrivals, LIMITS, options, replace(COST, changed_us=cost)).duration_us
        for cost in (0.0, 1000.0)
    )
    assert more - base == pytest.approx(2000), "after the prompts, and when one has ended"


def test_long_steps_are_as_far_off_as_long_steps_were() -> None:
    """A step's share of noise shrinks with its length: p99 is made of the long ones."""
    rng = random.Random(2)
    plans = [a_plan(256 if i % 20 == 0 else 2, 1, 0, 0) for i in range(800)]
    expected = [400.0 if plan.num_tokens == 2 else 12_000.0 for plan in plans]
    found = fit(
        [features(plan) for plan in plans],
        [
            us * (rng.uniform(0.7, 1.3) if us == 400.0 else rng.uniform(0.99, 1.01))
            for us in expected
        ],
    )
    for num_tokens, us, most in ((2, 400.0, 0.3), (256, 12_000.0, 0.01)):
        plan = a_plan(num_tokens, 1, 0, 0)
        drawn = [found.drawn(plan, rng, False)[1] / us - 1 for _ in range(300)]
        assert most / 2 < max(drawn) < 1.2 * most and -1.2 * most < min(drawn) < -most / 2
    few = fit([features(plan) for plan in plans[:30]], expected[:30])
    assert few.noise_from_us == (0.0,), "two long steps are no class of their own"


def test_cost_models_are_json(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    COST.save(path)
    assert json.loads(path.read_text())["version"] == 7 and CostModel.load(path) == COST
    for text in ("", "[]", "{}", '{"version": 2}', '{"version": 7, "noise": "x"}'):
        path.write_text(text)
        with pytest.raises(LogError):
            CostModel.load(path)
    without = {"version": 7, **asdict(COST), "noise": [], "noise_from_us": []}
    path.write_text(json.dumps(without))
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
    result = simulate([arrival], LIMITS, SchedulerOptions(), cost_of(100.0, 10.0))
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


def test_a_log_with_speculation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_log(path)
    path.write_text(path.read_text().replace('"drafts":[]', '"drafts":[[0,2]]', 1))
    with pytest.raises(LogError, match="speculation is not simulated"):
        recorded(path)


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
    for bad, expected in (
        (["--arrivals", "x"], "expected poisson"),
        (["--rate", "0"], "more than 0"),
        (["--rate", "nan"], "more than 0"),
        (["--scheduling-policy", "x"], "expected fcfs"),
        (["--num-pages", "3"], "expected at most"),
        (["--num-pages", "-4"], "num_pages=-4 must be"),
        (["--chunked-prefill-size", "-3"], "expected 0 or more"),
        (["--plot", str(tmp_path / "none" / "x.svg")], "No such file"),
    ):
        result = run(app, ["simulate", str(log), *bad])
        assert result.exit_code == 1 and expected in result.output, (bad, result.output)
    wider = ["--max-num-seqs", "9", "--arrivals", "bursts", "--rate", "1e6", "--json"]
    wider += ["--num-pages", "400", "--num-requests", "40"]
    result = run(app, ["simulate", str(log), *wider])
    narrow = run(app, ["simulate", str(log), *wider[2:]])
    steps = [json.loads(r.output)["simulated"]["steps"] for r in (result, narrow)]
    assert steps[0] < steps[1], "more sequences than the log had rows"
    log.write_text(log.read_text().replace('"kind":"chunk"', '"kind":"wait"', 1))
    result = run(app, ["replay", str(log)])
    assert result.exit_code == 1
    assert CostModel.load(cost).num_steps > 20
