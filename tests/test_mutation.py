"""The mutation tool: what it mutates, what it leaves out, and that it tells a kill from a pass."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutation import areas, operators, report, text_operators
from tests.mutation.coverage import TOP, Map, place_of
from tests.mutation.selection import FIRST, Selector, sample

SOURCE = '''
"""Text - not code."""
LIMIT = 3

def f(a: int, b: int) -> bool:
    """Nor is this: 1 < 2."""
    if not a:
        raise ValueError(f"{a - b} < 0")
    log("a - b", a < b)
    g(a, b)
    return a < b and a + 1 != 0
'''


def test_each_mutant_is_one_mistake_and_messages_have_none() -> None:
    found = {(m.operator, m.before, m.after) for m in operators.mutants_of("x.py", SOURCE)}
    assert found == {
        ("constant", "3", "4"),
        ("constant", "3", "2"),
        ("negate condition", "not a", "a"),
        ("remove not", "not a", "a"),
        ("drop statement", "g(a, b)", "pass"),
        ("swap arguments", "g(a, b)", "g(b, a)"),
        ("default result", "a < b and a + 1 != 0", "False"),
        ("and/or", "a < b and a + 1 != 0", "a < b or a + 1 != 0"),
        ("drop operand", "a < b and a + 1 != 0", "a < b"),
        ("drop operand", "a < b and a + 1 != 0", "a + 1 != 0"),
        ("comparison", "a < b", "a <= b"),
        ("comparison", "a + 1 != 0", "a + 1 == 0"),
        ("arithmetic", "a + 1", "a - 1"),
        ("constant", "1", "2"),
        ("constant", "0", "1"),
    }


def test_a_mutant_is_the_file_with_one_line_changed() -> None:
    right = ast.unparse(ast.parse(SOURCE)).splitlines()
    for mutant in operators.mutants_of("x.py", SOURCE):
        wrong = ast.unparse(operators.mutated_tree("x.py", SOURCE, mutant.number)).splitlines()
        assert len(wrong) == len(right)
        (changed,) = [b for a, b in zip(right, wrong) if a != b]
        assert mutant.after in changed


def test_generated_code_is_mutated_line_by_line() -> None:
    text = (
        "// a < b\n#pragma unroll\nfor (i = 0; i < n; ++i) x += a * 2;  // i < n\nprefetch(p + 1);"
    )
    found = [(m.line, m.operator, m.after) for m in text_operators.mutations(text)]
    assert {line for line, _, _ in found} == {2}
    assert (2, "comparison", "for (i = 0; i <= n; ++i) x += a * 2;") in found
    assert (2, "constant", "for (i = 0; i < n; ++i) x += a * 3;") in found
    assert not list(text_operators.mutations("a name"))


def test_every_file_of_an_area_has_mutants_and_a_sample_is_drawn_by_the_seed() -> None:
    for area in areas.AREAS:
        assert areas.files_of(area)
    first, again = (sample("planner", 1, 20) for _ in range(2))
    assert first == again != sample("planner", 2, 20)
    assert len({m.key for m in sample("planner", 1, 0)}) == len(sample("planner", 1, 0)) > 100


def test_tests_that_run_the_line_come_first_the_quick_and_the_files_own_before_others() -> None:
    mutant = next(m for m in sample("planner", 1, 0) if m.function == "plan_memory")
    text = (areas.PACKAGE / mutant.file).read_text().splitlines()
    lines = {mutant.file: [TOP, place_of("plan_memory", text[mutant.line - 1])]}
    elsewhere = {mutant.file: [TOP]}
    tests = {
        "tests/x/test_plan_memory.py::slow": (9.0, lines),
        "tests/x/test_other.py::quick": (0.1, lines),
        "tests/x/test_plan_memory.py::quick": (0.1, lines),
        "tests/x/test_other.py::elsewhere": (0.1, elsewhere),
        "tests/x/test_other.py::endless": (99.0, lines),
    }
    known = Map({t: s for t, (s, _) in tests.items()}, {t: ran for t, (_, ran) in tests.items()})
    selector = Selector(known, set(tests))
    names = [t.rpartition("/")[2] for t in selector.choose(mutant, FIRST)]
    own, other = "test_plan_memory.py", "test_other.py"
    assert names == [f"{own}::quick", f"{other}::quick", f"{own}::slow"]
    selector.learn(mutant.file, "tests/x/test_plan_memory.py::slow")
    assert next(iter(selector.choose(mutant, FIRST))).endswith("::slow")


CHILD = """
import json, sys
from tests.mutation import operators, server
from tests.mutation.areas import PACKAGE
file, test = "runtime/stop.py", "tests/runtime/test_stop.py::test_min_tokens_delays_stop_strings"
text = (PACKAGE / file).read_text()
found = [m for m in operators.mutants_of(file, text) if m.function == "find_stop"]
found = [m for m in found if (m.before, m.after) in (("position >= 0", "position > 0"), ("0", "1"))]
print(json.dumps([(m.after, server.run(m, {test: 0.1}).outcome) for m in found]))
"""


@pytest.mark.nightly
def test_a_mutant_is_killed_by_a_test_that_sees_it_only() -> None:
    """And the checkout is as it was: the mutant lives in the child's memory."""
    before = (areas.PACKAGE / "runtime/stop.py").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=areas.ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(areas.ROOT)}, check=True,
    )  # fmt: skip
    outcomes = json.loads(done.stdout)
    assert {outcome for _, outcome in outcomes} == {"killed", "survived"}, outcomes
    assert (areas.PACKAGE / "runtime/stop.py").read_bytes() == before


def test_survivors_that_change_nothing_do_not_count(tmp_path: Path) -> None:
    mutants = sample("planner", 1, 4)
    outcomes = ["killed", "timeout", "survived", "survived"]
    lines = [
        {"area": "planner", "mutant": vars(m), "outcome": o, "test": "", "num_tests": 1,
         "seconds": 1.0} for m, o in zip(mutants, outcomes)
    ]  # fmt: skip
    (tmp_path / "results-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = report.load(tmp_path)
    equivalent = {mutants[2].key: "equivalent: told so"}
    planner, total = report.rows(found, equivalent)
    assert (planner.tried, planner.killed, planner.equivalent, planner.survived) == (4, 2, 1, 1)
    assert total.share == 2 / 3 and "told so" in report.table(found, equivalent)
