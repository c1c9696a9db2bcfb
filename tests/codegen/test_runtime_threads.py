"""The thread pool under ThreadSanitizer, on a busy machine, and with more workers than cores."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aios_compile.codegen.cpp import build

# ThreadSanitizer of older compilers cannot start where the kernel spreads addresses widely.
FIXED_ADDRESSES = ["setarch", "-R"] if shutil.which("setarch") else []
PROGRAM = """
#include "prelude.h"
#include "runtime.h"
#include <cstdio>
static int64_t a[4096], b[4096];
static int64_t items(const Sizes *n) { return n->T; }
static void first(const Sizes *, void *const *, int64_t i, int64_t end) {
    for (; i < end; i++) a[i] += i;
}
static void second(const Sizes *n, void *const *, int64_t i, int64_t end) {
    for (; i < end; i++) b[i] = a[n->T - 1 - i];  /* reads what other workers wrote */
}
static void run_step(aios::Worker *w, const Run *r) {
    aios::launch(w, r, items, first, nullptr);
    aios::barrier(w);
    aios::launch(w, r, items, second, nullptr);
    aios::barrier(w);
}
int main(int, char **argv) {
    const int workers = atoi(argv[1]);
    const long spins = atol(argv[2]);
    Run run{};
    int64_t steps = 0;
    for (int round = 0; round < 3; round++) {
        aios::Pool *pool = pool_new(workers, spins, 2);
        if (pool_size(pool) != workers) return 3;
        for (int i = 0; i < 60; i++) {
            run.n.T = 1 + (i * 37) % 4096;
            for (int64_t j = 0; j < 4096; j++) a[j] = 0;
            pool_step(pool, &run);
            for (int64_t j = 0; j < run.n.T; j++)
                if (b[j] != run.n.T - 1 - j) return 1;
            steps++;
        }
        pool_free(pool);
    }
    printf("%ld steps\\n", (long)steps);
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    (folder / "pool.cpp").write_text(PROGRAM)
    command = [
        build.find_compiler().path,
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=thread",
        "-Wno-psabi",
    ]
    command += ["-pthread", "-I", str(build.HEADER_FOLDER), str(folder / "pool.cpp")]
    subprocess.run([*command, "-o", str(folder / "pool")], check=True)
    return folder / "pool"


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("spins", [0, 2000])
def test_no_data_race_and_no_lost_wake_up(program: Path, workers: int, spins: int) -> None:
    run = subprocess.run(
        [*FIXED_ADDRESSES, str(program), str(workers), str(spins)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout == "180 steps\n"


ASIDE = """
#include "prelude.h"
#include "runtime.h"
#include <cstdio>
static void run_step(aios::Worker *, const Run *) {}
int main() {
    static aios::Places places;
    cpu_set_t before, after;
    sched_getaffinity(0, sizeof before, &before);
    int moved = 0;
    for (int i = 0; i < 20; i++) {
        const int here = sched_getcpu();
        places.cores[1].number.store(here); /* the other worker was seen where this one is */
        places.step_aside(0, 2);
        moved += places.cores[0].number.load() != here;
    }
    sched_getaffinity(0, sizeof after, &after);
    if (!CPU_EQUAL(&before, &after)) return 1;
    cpu_set_t one; /* nowhere to go: nothing happens */
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sched_setaffinity(0, sizeof one, &one);
    places.cores[1].number.store(sched_getcpu());
    places.step_aside(0, 2);
    sched_getaffinity(0, sizeof after, &after);
    if (!CPU_EQUAL(&one, &after)) return 2;
    printf("%d of %d\\n", moved, CPU_COUNT(&before));
    return 0;
}
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux moves threads")
def test_a_worker_leaves_the_core_that_it_shares(tmp_path: Path) -> None:
    """Nearly always: the kernel may move it back in the moment before it is looked at."""
    (tmp_path / "aside.cpp").write_text(ASIDE)
    command = [build.find_compiler().path, "-std=c++17", "-O1", "-Wno-psabi", "-pthread"]
    command += ["-I", str(build.HEADER_FOLDER), str(tmp_path / "aside.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "aside")], check=True)
    run = subprocess.run([str(tmp_path / "aside")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.returncode
    moved, cores = map(int, run.stdout.split(" of "))
    assert moved >= 15 if cores > 1 else moved == 0
