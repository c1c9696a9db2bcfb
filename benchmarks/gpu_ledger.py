"""Time the candidates of a model's kernels on this GPU and keep what is best in its ledger."""

from __future__ import annotations

import argparse
import subprocess
import time
from typing import Any

from benchmarks.gpu_clock import Clock

PAGES = 512  # of the KV pool, which is compared after each candidate
CANDIDATES = 4  # of each range of rows, beside the model's choice


def known(options: argparse.Namespace, clock: Clock) -> Any:
    """Return how kernels are chosen where a ledger of this GPU is there; None without one."""
    from aios_compile.codegen.triton.choice import Tuning

    ledger = _ledger(options, clock)
    return Tuning(ledger=ledger) if ledger is not None else None


def _ledger(options: argparse.Namespace, clock: Clock) -> Any:
    import triton

    from aios_compile.codegen.triton.kernel_ledger import shipped
    from aios_compile.runtime.torch_device import card_name

    name, card = _gpu(clock), card_name(clock.device)
    found, line = shipped(name, card, triton.__version__, options.ledgers)
    print(line, flush=True)
    return found


def _gpu(clock: Clock) -> str:
    from aios_compile.runtime.torch_device import gpu_name

    return gpu_name(clock.device) if clock.cuda else "interpreter"


def ledger_row(shape: str, form: str, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Time what the ledger lacks for a model; write the ledger and return what was found.

    Each trial is of a whole step: its time without, the ratio and its quartiles.
    """
    import triton

    from aios_compile.codegen.triton.choice import Tuning
    from aios_compile.codegen.triton.kernel_ledger import KernelLedger, minor_version
    from aios_compile.gpu_kernel_selection import TOKENS, timed_steps
    from aios_compile.runtime.select_gpu_kernels import select_on_device
    from aios_compile.runtime.torch_device import card_name
    from benchmarks.gpu_ours import Model
    from benchmarks.shapes import config_of

    before = _ledger(options, clock)
    tuning = Tuning(ledger=before, timed=CANDIDATES if clock.cuda else 1)
    begin = time.perf_counter()
    buckets = list(TOKENS) if clock.cuda else [*options.batch, *options.tokens]
    length = max(options.context, *options.tokens) + 64
    config = config_of(shape, options.layers)
    pages = min(PAGES, options.pages)
    model = Model(config, buckets, length, clock, pages, form, tuning, captures=False)
    try:
        ready = time.perf_counter() - begin
        found = select_on_device(timed_steps(model.executor), options.seconds)
        late = model.executor.num_late_compilations
    finally:
        model.close()
    made = KernelLedger(
        _gpu(clock), card_name(clock.device), minor_version(triton.__version__),
        f"{time.strftime('%Y-%m-%d')} {_commit()}", found.entries,
    )  # fmt: skip
    path = (before.merged(made) if before is not None else made).write(options.ledgers)
    trials = [{**vars(trial), "text": str(trial)} for trial in found.choices.trials]
    together = [note for note in found.choices.notes if "all that are chosen" in note]
    return {
        "compiled_seconds": ready, "seconds": time.perf_counter() - begin - ready,
        "chosen": sum(t.chosen for t in found.choices.trials), "kernels": len(found.entries),
        "together": together, "notes": list(found.choices.notes), "trials": trials,
        "file": path.name, "late_compilations": late,
    }  # fmt: skip


def _commit() -> str:
    """Return the commit of the checkout, "" outside of one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()
