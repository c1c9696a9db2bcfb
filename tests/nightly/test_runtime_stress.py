"""The thread pool under random steps: other launches each time, workers that stop anywhere.

Every item must run once, in its step, after all of the phases before; a second pass is counted once
and while its step lasts. More workers than cores are part of it, with and without ThreadSanitizer.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from aios_compile.codegen.cpp import build
from tests.codegen.test_runtime_threads import FIXED_ADDRESSES

PROGRAM = """
#include "prelude.h"
#include "runtime.h"
#include <cstdio>
constexpr int MOST = 24, ITEMS = 600;
struct Launch { int64_t total, extent; int phase, index; }; /* extent -1: no second pass */
static Launch launches[2][MOST];  /* of this step and of the one before, which late workers read */
static std::atomic<int> ran[MOST][2][ITEMS], counted_in[MOST], left[MOST + 1], wrong{0};
static std::atomic<int64_t> current{0};

static uint64_t mix(uint64_t x) { /* splitmix64 */
    x += 0x9e3779b97f4a7c15, x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    return (x = (x ^ x >> 27) * 0x94d049bb133111eb) ^ x >> 31;
}
static void maybe_stop(int one_in) {
    static thread_local uint64_t seed = reinterpret_cast<uint64_t>(&seed);
    seed = mix(seed);
    if (seed % one_in) return;
    timespec t{0, static_cast<long>(seed >> 32) % 300000};
    nanosleep(&t, nullptr);
}
static int make(int64_t step, Launch *to) {
    uint64_t s = mix(step);
    const auto draw = [&](int n) { return static_cast<int>((s = mix(s)) >> 33) % n; };
    const int num = 1 + draw(MOST);
    for (int i = 0, phase = 0; i < num; i++) {
        const int kind = draw(4);
        to[i] = {kind == 0 ? draw(3) : kind == 1 ? draw(40) : draw(ITEMS), -1, phase, i};
        if (draw(3) == 0) to[i].extent = draw(2) ? 0 : draw(ITEMS); /* waits for its first pass */
        phase += draw(2) || to[i].extent >= 0;
    }
    return num;
}
static const Launch *of(void *const *p) { return static_cast<const Launch *>(p[0]); }
static void run(const Sizes *n, const Launch *l, int pass, int64_t i, int64_t end) {
    if (n->S != current.load() || left[l->phase].load()) wrong++;
    for (; i < end; i++) ran[l->index][pass][i]++;
    maybe_stop(40);
    if (n->S != current.load()) wrong++;
}
static int64_t items(const Sizes *n) { return launches[n->S % 2][n->P].total; }
static void first(const Sizes *n, void *const *p, int64_t i, int64_t end) {
    run(n, of(p), 0, i, end);
    if (of(p)->extent < 0) left[of(p)->phase + 1] -= static_cast<int>(end - i);
}
static void second(const Sizes *n, void *const *p, int64_t i, int64_t end) {
    if (of(p)->total && ran[of(p)->index][0][of(p)->total - 1] != 1) wrong++;
    run(n, of(p), 1, i, end);
    left[of(p)->phase + 1] -= static_cast<int>(end - i);
}
static int64_t counted(const Sizes *n, void *const *p) {
    maybe_stop(3);
    if (n->S != current.load()) wrong++;
    counted_in[of(p)->index]++;
    return of(p)->extent;
}
static void run_step(aios::Worker *w, const Run *r) {
    Run own = *r;
    const Launch *all = launches[r->n.S % 2];
    for (int i = 0; i < r->n.R && !w->late; i++) {
        maybe_stop(20);
        own.n.P = i;
        void *const p[] = {const_cast<Launch *>(&all[i])};
        if (all[i].extent < 0) aios::launch(w, &own, items, first, p);
        else aios::launch(w, &own, items, first, counted, second, p);
        maybe_stop(20);
        if (i + 1 == r->n.R || all[i + 1].phase != all[i].phase) aios::barrier(w);
    }
}
int main(int, char **argv) {
    const int64_t first_step = atol(argv[3]), num_steps = atol(argv[4]);
    aios::Pool *pool = pool_new(atoi(argv[1]), atol(argv[2]), 2 * MOST);
    for (int64_t step = first_step; step < first_step + num_steps; step++) {
        Run r{};
        pool_rest(pool); /* before what late workers of the step before last read is rewritten */
        Launch *now = launches[step % 2];
        const int num = make(step, now);
        for (int i = 0; i <= MOST; i++) left[i] = 0;
        for (int i = 0; i < num; i++) {
            counted_in[i] = 0;
            for (auto &pass : ran[i])
                for (auto &item : pass) item = 0;
            /* what phase k + 1 waits for: items of the last pass of each launch of phase k */
            const int64_t last = now[i].extent < 0 ? now[i].total : now[i].extent;
            left[now[i].phase + 1] += static_cast<int>(last);
        }
        r.n = {1, step, num, 0};
        current = step;
        pool_step(pool, &r);
        current = -1;
        for (int i = 0; i < num; i++) {
            const Launch &l = now[i];
            if (counted_in[i] != (l.extent >= 0)) wrong++;
            for (int64_t k = 0; k < ITEMS; k++)
                if (ran[i][0][k] != (k < l.total) || ran[i][1][k] != (k < l.extent)) wrong++;
        }
        if (wrong) return printf("wrong %d times in step %ld\\n", wrong.load(), (long)step), 1;
    }
    pool_free(pool);
    printf("%ld steps\\n", (long)num_steps);
    return 0;
}
"""
FLAGS = {"plain": ["-O2"], "tsan": ["-O1", "-g", "-fsanitize=thread"]}
NUM_STEPS = {"plain": 1000, "tsan": 400}


@pytest.fixture(scope="module", params=FLAGS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "stress.cpp").write_text(PROGRAM)
    command = [build.find_compiler().path, "-std=c++17", "-Wno-psabi", "-pthread"]
    command += [*FLAGS[request.param], "-I", str(build.HEADER_FOLDER), str(folder / "stress.cpp")]
    subprocess.run([*command, "-o", str(folder / request.param)], check=True)
    return folder / request.param


@pytest.mark.parametrize("workers", [2, 3, 4, 9])
@pytest.mark.parametrize("spins", [0, 200, 20000])
def test_every_item_runs_once_and_in_its_phase(program: Path, workers: int, spins: int) -> None:
    num_steps = NUM_STEPS[program.name]
    given = [str(n) for n in (workers, spins, 1000 * workers + spins, num_steps)]
    run = subprocess.run(
        [*FIXED_ADDRESSES, str(program), *given],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout, run.stderr[-3000:])
    assert run.stdout == f"{num_steps} steps\n"
