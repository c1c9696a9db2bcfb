"""R17 at length: kill -9 of the engine's process at 100 random moments, and 20 stopped ones."""

from __future__ import annotations

import signal

import aios_compile
from aios_compile.engine_process import start_front
from tests.compiled.test_batch_invariance import EXAMPLE
from tests.runtime.killing import answers, fake_front, requests, run_while_killing


def test_a_hundred_kills() -> None:
    asked = requests(60, 11)
    with fake_front(step_seconds=0.003) as front:
        num_done = run_while_killing(front, asked, answers(asked), 100, seed=3, num_clients=12)
        assert front.epoch >= 100 and num_done > 200


def test_a_hundred_kills_of_the_shipped_model() -> None:
    """Two threads that run generated code: what a process leaves half done belongs to it alone."""
    asked = requests(40, 13)
    options = {"num_threads": 2, "max_num_seqs": 16}
    with aios_compile.load_and_compile(EXAMPLE, progress=False, **options) as model:
        expected = [model.generate([prompt], **fields)[0] for prompt, fields in asked]
    with start_front(str(EXAMPLE), progress=False, **options) as front:
        num_done = run_while_killing(front, asked, expected, 100, seed=5, longest_life_s=0.4)
        assert front.epoch >= 100 and num_done > 200


def test_twenty_stopped_processes() -> None:
    asked = requests(20, 12)
    with fake_front(step_seconds=0.003, stall_s=0.5) as front:
        run_while_killing(front, asked, answers(asked), 20, num_clients=6, how=signal.SIGSTOP)
