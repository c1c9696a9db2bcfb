"""The scheduler's proofs at length: a million canary steps, 5,000 x 100 steps, every state."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.runtime.test_canary import trace

MACHINE = "tests/runtime/test_scheduler_machine.py"


@pytest.mark.parametrize("part", range(10))
def test_a_million_canary_steps(part: int) -> None:
    assert trace(1000 + part, 100_000) > 5000


def test_the_state_machine_and_the_exhaustive_search() -> None:
    """In a process of its own: the sizes are read when the module is imported."""
    sizes = {"SCHEDULER_EXAMPLES": "5000", "SCHEDULER_STEPS": "100", "SCHEDULER_STATES": "400000"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", MACHINE], env={**os.environ, **sizes}, check=True
    )
