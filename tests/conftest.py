"""Shared by all tests: one thread for torch, a cache of their own, no settings of the developer."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aios_compile.codegen.cpp import build
from tests.quick_builds import precompile_once

# Before torch is imported by anyone, and for child processes: the machine may be shared.
os.environ["OMP_NUM_THREADS"] = "1"
# Triton reads it when it is first imported; what compiles for a GPU does so in a child process.
os.environ["TRITON_INTERPRET"] = "1"
for _name in [name for name in os.environ if name.startswith("AIOS_")]:
    del os.environ[_name]

# A test of these takes minutes: begun last, it would keep one worker busy alone.
LONGEST = (
    "fuzz/test_random_programs.py",
    "nightly/test_scheduler.py",
    "interpreted/test_fuzz.py",
    "nightly/test_aarch64.py",
    "nightly/test_batch_invariance.py",
    "nightly/test_kill_engine.py",
)
GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the goldens anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `nightly`; with NIGHTLY set run everything, the longest first."""
    if "NIGHTLY" in os.environ:
        items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
        return
    left_out = [item for item in items if item.get_closest_marker("nightly")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Take what is imported by now out of the garbage collector's sight; share captures.

    torch and transformers are a million objects, and walking them was a tenth of the tests' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    if "aios_compile.capture.capture" in sys.modules:  # tests without torch stay without
        from tests.shared_captures import share_captures

        share_captures()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Point the artefact cache at a folder of this run, shared by its workers."""
    os.environ["AIOS_CACHE_DIR"] = str(shared_folder(tmp_path_factory) / "aios-cache")


@pytest.fixture(autouse=True, scope="session")
def _one_prelude(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Precompile the kernels' header once a run and set of flags, wherever objects go."""
    build.precompile = precompile_once(shared_folder(tmp_path_factory) / "preludes")


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this run, the same in all its workers."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return a function that compares a text with tests/goldens/<name>; see --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDENS / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.read_text() == text, (
            f"{path} differs: pytest --update-golden, then read the diff"
        )

    return compare
