"""The thread pool under ThreadSanitizer, with workers that come late or are more than the cores."""

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
        if (round == 2) { /* as after four billion steps: the numbers wrap in the middle */
            const uint32_t number = 0u - 59u;
            const uint64_t word = aios::Tagged{number - 1, 0}.word();
            pool->sequence.store(number);
            for (int i = 0; i < 2; i++) {
                pool->launched[i].claimed.store(word);
                pool->launched[i].done.store(word);
            }
            for (int i = 0; i < workers; i++) pool->workers[i].own.store(word);
        }
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


LINE = """
#include "prelude.h"
#include "step_line.h"
#include <cstdio>
static int64_t a[64], sampled[1];  /* a step samples its token and one more */
static int64_t all(const Sizes *) { return 64; }
static int64_t one(const Sizes *) { return 1; }
static void first(const Sizes *, void *const *p, int64_t i, int64_t end) {
    for (; i < end; i++) a[i] = *static_cast<const int64_t *>(p[0]) + i;
}
static void second(const Sizes *, void *const *, int64_t, int64_t) { sampled[0] = a[63] - 62; }
static void run_step(aios::Worker *w, const Run *r) {
    void *const p[] = {r->inputs[0]};
    aios::launch(w, r, all, first, p);
    aios::barrier(w);
    aios::launch(w, r, one, second, p);
    aios::barrier(w);
}
int main(int, char **argv) {
    const int workers = atoi(argv[1]);
    aios::Pool *pool = pool_new(workers, atol(argv[2]), 2);
    aios::Line *line = line_new(pool);
    int64_t ids[2], kept[2], last = 0, steps = 0, held = 0;
    const int64_t source[] = {0};
    int32_t hold = 0;
    char *inputs[] = {reinterpret_cast<char *>(&ids[0]), reinterpret_cast<char *>(&ids[1])};
    Run runs[2]{};
    Copy copies[2];
    Begun begun[2]{};
    int numbers[2];
    for (int i = 0; i < 2; i++) {
        runs[i].n.T = 1;
        runs[i].inputs = &inputs[i];
        copies[i] = {reinterpret_cast<char *>(sampled), reinterpret_cast<char *>(&kept[i]), 8};
        begun[i] = {&runs[i], &ids[i], source, sampled, &hold, &copies[i], 1, 0, WAITING};
    }
    numbers[0] = line_begin(line, &begun[0]);
    for (int i = 0; i < 200; i++) {
        const int now = i & 1, next = now ^ 1;
        if (!line_make_sure(&begun[now])) return 5; /* nothing holds it back any more */
        if (i % 5 == 0) __atomic_store_n(&hold, 1, __ATOMIC_RELEASE);
        numbers[next] = line_begin(line, &begun[next]);  /* behind the one that runs */
        if (!line_wait(line, &begun[now], numbers[now])) return 1;
        if (ids[now] != last || kept[now] != ++last) return 2;
        steps++;
        const bool out = i % 3 == 0 && line_leave_out(&begun[next]);
        const bool ran = (i % 5 == 0 || out) && line_wait(line, &begun[next], numbers[next]);
        if (out && ran) return 3;
        __atomic_store_n(&hold, 0, __ATOMIC_RELEASE);
        if (i % 5 == 0 || out) { /* it was held back, or had its turn before: the next one again */
            if (ran && kept[next] != ++last) return 4;
            held += !ran;
            numbers[next] = line_begin(line, &begun[next]);
        }
    }
    line_free(line);
    pool_step(pool, &runs[0]);
    pool_free(pool);
    printf("%ld steps, some held: %d\\n", (long)steps, held > 0);
    return 0;
}
"""


PARTS = """
#include "prelude.h"
#include "runtime.h"
#include <cstdio>
/* Each token's result is made of its neighbours' in the same part, in two phases. */
constexpr int PART = 40;
static int64_t tokens[256], results[256], arenas[6][2 * PART];
static int64_t items(const Sizes *n) { return n->T; }
static void first(const Sizes *, void *const *p, int64_t i, int64_t end) {
    int64_t *a = static_cast<int64_t *>(p[0]);
    for (; i < end; i++) a[i] = static_cast<const int64_t *>(p[1])[i] * 3;
}
static void second(const Sizes *n, void *const *p, int64_t i, int64_t end) {
    int64_t *a = static_cast<int64_t *>(p[0]);
    for (; i < end; i++) a[PART + i] = a[i] + a[n->T - 1 - i];
}
static void run_step(aios::Worker *w, const Run *r) {
    void *const p[] = {r->arena, r->inputs[0]};
    aios::launch(w, r, items, first, p);
    aios::barrier(w);
    aios::launch(w, r, items, second, p);
    aios::barrier(w);
}
int main(int, char **argv) {
    aios::Pool *pool = pool_new(atoi(argv[1]), atol(argv[2]), 2);
    Part parts[6]{};
    Copy copies[6];
    char *inputs[6];
    Run run{};
    for (int step = 0; step < 200; step++) {
        const int num = 1 + step % 6, each = 1 + step * 7 % PART;
        for (int i = 0; i < num * each; i++) tokens[i] = step * 1000 + i, results[i] = 0;
        for (int i = 0; i < num; i++) {
            inputs[i] = reinterpret_cast<char *>(tokens + i * each);
            parts[i].run.n.T = each;
            parts[i].run.arena = reinterpret_cast<char *>(arenas[i]);
            parts[i].run.inputs = &inputs[i];
            copies[i] = {reinterpret_cast<char *>(arenas[i] + PART),
                         reinterpret_cast<char *>(results + i * each), each * 8};
            parts[i].copies = &copies[i];
            parts[i].num_copies = 1;
        }
        run = parts[0].run; /* of a pool of one worker, which splits nothing */
        run.parts = parts;
        run.num_parts = num;
        pool_step(pool, &run);
        const int seen = pool_size(pool) > 1 ? num * each : each;
        const int64_t *found = pool_size(pool) > 1 ? results : arenas[0] + PART;
        for (int i = 0; i < seen; i++) {
            const int turned = i / each * each + each - 1 - i % each;
            if (found[i] != 3 * (tokens[i] + tokens[turned])) return 1;
        }
    }
    pool_free(pool);
    printf("200 steps\\n");
    return 0;
}
"""


LATE = """
#include "prelude.h"
#include "runtime.h"
#include <cstdio>
/* In step 3 worker 1 stops where the machine may take its core away, until step 7 is over. Worker 0
 * comes when it has. */
enum { BEFORE_OWN = 1, BEFORE_BARRIER, BEFORE_SECOND_PASS, AT_THE_END };
static std::atomic<int> place{0}, stopped{0}, go_on{0};
static int64_t a[512], b[512], c[512], extent[1];
static int64_t items(const Sizes *n) { return n->T; }
static int64_t counted(const Sizes *, void *const *p) { return *static_cast<int64_t *>(p[0]); }
static void stop_at(aios::Worker *w, const Run *r, int where) {
    if (r->n.S != 3 || (w->id == 1 && place.load() != where)) return;
    if (w->id == 1) stopped.store(1);
    while (w->id < 2 && !(w->id ? go_on : stopped).load()) sched_yield();
}
static void first(const Sizes *n, void *const *, int64_t i, int64_t end) {
    for (; i < end; i++) a[i] += i + n->S;
}
static void second(const Sizes *n, void *const *, int64_t i, int64_t end) {
    for (; i < end; i++) b[i] += a[n->T - 1 - i];
}
static void third(const Sizes *n, void *const *, int64_t i, int64_t end) {
    for (; i < end; i++) c[i] += b[n->T - 1 - i];
}
static void run_step(aios::Worker *w, const Run *r) {
    void *const p[] = {extent};
    stop_at(w, r, BEFORE_OWN);
    aios::launch(w, r, items, first, p);
    stop_at(w, r, BEFORE_BARRIER);
    aios::barrier(w);
    aios::launch(w, r, items, second, p);
    stop_at(w, r, BEFORE_SECOND_PASS);
    aios::barrier(w);
    aios::launch(w, r, items, third, counted, third, p);
    aios::barrier(w);
    stop_at(w, r, AT_THE_END);
}
int main(int, char **argv) {
    const int workers = atoi(argv[1]);
    for (int round = 0; round < 2 * AT_THE_END; round++) {
        const int where = 1 + round / 2, few = round % 2; /* few items are shared out at once */
        place.store(where), stopped.store(0), go_on.store(0);
        aios::Pool *pool = pool_new(workers, atol(argv[2]), 4);
        for (int step = 1; step < 12; step++) {
            Run run{}; /* another one each time, at one place: the late worker has its own copy */
            const int64_t T = few == (step % 4 == 3) ? 1 + step * 7 % 60 : 100 + step * 53 % 400;
            run.n = {T, step, 0, 0};
            extent[0] = step % 2 ? T : 0; /* some steps have a second pass */
            for (int64_t i = 0; i < 512; i++) a[i] = b[i] = c[i] = 0;
            pool_step(pool, &run);
            if (step == 7) go_on.store(1), pool_rest(pool);
            for (int64_t i = 0; i < T; i++)
                if (a[i] != i + step || c[i] != (i + step) * (1 + step % 2))
                    return printf("wrong: stopped at %d, step %d\\n", where, step);
        }
        pool_free(pool);
    }
    printf("never held up\\n");
    return 0;
}
"""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("late"), LATE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("threads"), PROGRAM)


@pytest.mark.parametrize(("workers", "spins"), [(1, 2000), (2, 0), (4, 2000)])
def test_steps_that_are_split(workers: int, spins: int, parts: Path) -> None:
    """Fewer parts than workers, and more."""
    assert output_of(parts, workers, spins) == "200 steps\n"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("parts"), PARTS)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("line"), LINE)


def compiled(folder: Path, text: str) -> Path:
    (folder / "pool.cpp").write_text(text)
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
    assert output_of(program, workers, spins) == "180 steps\n"


@pytest.mark.parametrize(("workers", "spins"), [(1, 2000), (2, 0), (2, 2000)])
def test_steps_begun_ahead(line: Path, workers: int, spins: int) -> None:
    """Ids go from step to step; a step that is held back or left out does not run."""
    assert output_of(line, workers, spins) == "200 steps, some held: 1\n"


@pytest.mark.parametrize(("workers", "spins"), [(2, 0), (2, 2000), (4, 2000)])
def test_a_worker_that_is_not_run_holds_nobody_up(late: Path, workers: int, spins: int) -> None:
    """The others do its share; when it runs again it finds its phase or its step over."""
    assert output_of(late, workers, spins) == "never held up\n"


def output_of(program: Path, workers: int, spins: int) -> str:
    run = subprocess.run(
        [*FIXED_ADDRESSES, str(program), str(workers), str(spins)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    return run.stdout


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
