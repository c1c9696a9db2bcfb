"""Every environment variable that is read, in one table. docs/env.md is generated from it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from aios_compile.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its default as text, and what it does."""

    name: str
    default: str
    help: str

    def get(self) -> str:
        return os.environ.get(self.name, self.default)

    def get_int(self, low: int, high: int) -> int:
        """Return the value as an int in [low, high]; raise ConfigError that names the variable."""
        text = self.get()
        if not text.lstrip("-").isdigit() or not low <= int(text) <= high:
            raise ConfigError(f"{self.name}={text!r} is not a whole number from {low} to {high}")
        return int(text)

    def get_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.get().split(",") if name.strip())


DEBUG = Variable(
    "AIOS_DEBUG",
    "0",
    "0..5: 1 prints the passes, 2 adds op deltas and refusals, 3 the last level, 4 all levels and "
    "kernels, 5 the decisions of the scheduler; from 1 on a user's mistake shows its traceback",
)
DUMP = Variable("AIOS_DUMP", "", "folder that receives every level, kernel, plan and certificate")
DISABLE = Variable("AIOS_DISABLE", "", "passes to leave out, separated by commas")
BISECT = Variable("AIOS_BISECT", "", "run only the first N optional rewrites; empty runs all")
VERIFY = Variable(
    "AIOS_VERIFY",
    "1",
    "0: no checks while compiling, 1: each changed region against fp64, 2: also the whole model's "
    "logits against eager after loading",
)
EAGER = Variable("AIOS_EAGER", "0", "1: run the last level in eager PyTorch instead of kernels")
CACHE_DIR = Variable("AIOS_CACHE_DIR", "", "folder of the artefact cache; default ~/.cache/aios")
CACHE_LIMIT = Variable("AIOS_CACHE_LIMIT_BYTES", "21474836480", "size at which old artefacts go")
HUGE_WEIGHTS = Variable(
    "AIOS_HUGE_WEIGHTS",
    "1",
    "1: while the C++ target serves, large weights move to huge pages wherever the page cache "
    "has them in small ones; 0: they stay as the page cache has them, which processes share",
)
SELECT_KERNELS = Variable(
    "AIOS_SELECT_KERNELS",
    "3",
    "seconds in which candidates of linears are timed when a model is compiled: on the C++ target "
    "of large ones, in steps of one token; on a GPU of those that its ledger lacks, in steps of 1 "
    "to 2,048 tokens; 0: the standard ones, and no ledger",
)
OVERLAP = Variable(
    "AIOS_OVERLAP",
    "1",
    "1: a decode step runs while the host takes in the one before and prepares the next: on a GPU "
    "always, on the C++ target where a core is left for the host (fewer threads than cores) and a "
    "few timed steps show no loss; 2: always; 0: never",
)
SPLIT_STEPS = Variable(
    "AIOS_SPLIT_STEPS",
    "1",
    "1: where the last cache holds a model's weights, the workers of the C++ target share out the "
    "sequences of a decode step, not its kernels; 0: always its kernels",
)
CXX = Variable("AIOS_CXX", "", "C++ compiler; default c++, then g++, then clang++")

VARIABLES = (
    *(DEBUG, DUMP, DISABLE, BISECT, VERIFY, EAGER, CACHE_DIR, CACHE_LIMIT),
    *(HUGE_WEIGHTS, SELECT_KERNELS, OVERLAP, SPLIT_STEPS, CXX),
)


def num_cores() -> int:
    """Return the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def markdown() -> str:
    """Return docs/env.md."""
    rows = [f"| `{v.name}` | `{v.default}` | {v.help} |" for v in VARIABLES]
    head = "# Environment variables\n\nGenerated from `aios_compile/env.py`.\n\n"
    return head + "\n".join(["| name | default | meaning |", "|---|---|---|", *rows]) + "\n"
