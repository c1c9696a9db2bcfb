"""The counts of `make test` come from its report: what ran, failed or was skipped, by group."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from tests.run_groups import (
    BUDGET_SECONDS,
    TOTAL_SECONDS,
    Result,
    budget_of,
    count,
    groups,
    summarise,
    total_line,
    type_check,
)

REPORT = """<testsuites><testsuite>
  <testcase classname="tests.test_cache" name="a" time="0.5" />
  <testcase classname="tests.test_cache.TestIt" name="b" time="0.25" />
  <testcase classname="tests.codegen.test_linear" name="a" time="2"><failure /></testcase>
  <testcase classname="tests.codegen.test_linear" name="b" time="1"><error /></testcase>
  <testcase classname="tests.codegen.test_linear" name="c" time="1">
    <skipped message="the processor lacks avx_vnni" /></testcase>
  <testcase classname="tests.codegen.test_linear" name="d" time="1">
    <skipped message="no reason" /></testcase>
</testsuite></testsuites>"""


def test_cases_are_counted_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    cases = ElementTree.fromstring(REPORT).iter("testcase")
    results = count(cases, ["unit", "codegen", "ir"])
    assert results["unit"] == Result(2, 0, 0, 0, 0.75)
    assert results["codegen"] == Result(0, 2, 1, 1, 5.0) and results["ir"].counted == (0, 0)
    pinned = {"unit": (2, 0), "codegen": (3, 1), "ir": (0, 0)}
    assert not summarise(results, pinned)  # two failed
    passing = {name: result._replace(failed=0) for name, result in results.items()}
    assert summarise(passing, {**pinned, "codegen": (1, 1)})
    assert not summarise(passing, pinned)  # two vanished
    assert "codegen: ran and skipped (1, 1), pinned (3, 1)" in capsys.readouterr().out


def test_every_folder_of_tests_is_a_group() -> None:
    assert {"unit", "codegen", "compiled", "foreign", "runtime"} <= set(groups())


def test_the_budgets_fit_the_whole() -> None:
    """Two workers share the groups; their start takes half a minute."""
    assert set(BUDGET_SECONDS) <= set(groups())
    assert sum(budget_of(name) for name in groups()) / 2 + 30 <= TOTAL_SECONDS


def test_a_run_far_over_its_budget_says_so() -> None:
    """Twice as many workers may take half as long."""
    assert "OVER" not in total_line(1.2 * TOTAL_SECONDS, 2)
    assert "OVER BUDGET, 140% of it" in total_line(1.4 * TOTAL_SECONDS, 2)
    assert "OVER" in total_line(0.7 * TOTAL_SECONDS, 4)


def test_wrong_types_are_shown_after_the_tests_and_fail(capfd: pytest.CaptureFixture[str]) -> None:
    with type_check(("-c", "print('a.py:3: error: int')\nraise SystemExit(1)")) as finish:
        print("a test's line")
        assert not finish()
    lines = capfd.readouterr().out.split("\n")
    assert lines[:3] == ["a test's line", "", "mypy --strict: a.py:3: error: int"]
    assert "TYPES ARE WRONG" in lines[3] and "ended with 1" in lines[3]
    with type_check(("-c", "print('Success')")) as finish:
        assert finish()
    assert "WRONG" not in capfd.readouterr().out
    with type_check(("-c", "import time; time.sleep(60)")):
        pass  # an interrupted run leaves no process
