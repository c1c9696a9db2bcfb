"""A worker that comes when its step is over: each function of the runtime sends it on, one by one.

test_runtime_threads.py stops whole workers. Where one may stop inside a function no kernel runs, so
here a worker of an old step is made by hand and calls them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from aios_compile.codegen.cpp import build

PROGRAM = """
#include "prelude.h"
#include "runtime.h"
#include <cstdio>
#include <thread>
using aios::Tagged;
constexpr uint32_t OLD = 10, NEW = 12; /* numbers of steps */
constexpr int64_t TOTAL = 40;
static int64_t num_counted = 0;
static std::atomic<int64_t> num_run{0};
static int64_t items(const Sizes *) { return TOTAL; }
static int64_t counted(const Sizes *, void *const *) { return num_counted++, TOTAL; }
static std::atomic<int> *sleepers;
static int64_t counted_slowly(const Sizes *, void *const *) {
    while (!sleepers->load()) sched_yield();
    return num_counted++, TOTAL;
}
static void kernel(const Sizes *, void *const *, int64_t i, int64_t end) { num_run += end - i; }
static void run_step(aios::Worker *w, const Run *r) {
    aios::launch(w, r, items, kernel, counted, kernel, nullptr);
    aios::barrier(w);
    aios::launch(w, r, items, kernel, counted, kernel, nullptr);
    aios::barrier(w);
}
#define CHECK(what) if (!(what)) return printf("line %d: %s\\n", __LINE__, #what), 1

/* Worker 1 of the old step, as it comes out of its first launch. */
static void make_old(aios::Worker *w, aios::Pool *pool, int64_t *totals) {
    w->pool = pool;
    w->id = 1;
    aios::begin_step(w, OLD);
    w->totals = totals;
    w->next = 1;
    totals[0] = TOTAL;
}

/* Each function by itself; the new step has begun, and has come as far as `extent` says. */
static int alone(aios::Pool *pool, Run *r) {
    int64_t totals[4], begin = 0, end = 0;
    aios::Worker w;
    aios::Launched *l = pool->launched;
    make_old(&w, pool, totals);
    const uint64_t claimed = Tagged{NEW, 5}.word();
    l->claimed.store(claimed);
    CHECK(!aios::claim(&w, l, TOTAL, 1, &begin, &end) && w.late && l->claimed.load() == claimed);

    make_old(&w, pool, totals);
    const uint64_t taken = Tagged{NEW, 0}.word(); /* fewer launches than the old step had */
    pool->workers[1].own.store(taken);
    CHECK(!aios::take_own(&w, 1, 3) && pool->workers[1].own.load() == taken);

    make_old(&w, pool, totals);
    l->done.store(Tagged{NEW, 3}.word()); /* not all: who takes it for its own step waits */
    aios::barrier(&w);
    CHECK(w.late);

    const uint32_t counts[] = {aios::COUNTING, 1, 8}; /* of items, and one */
    for (const uint32_t count : counts) {
        make_old(&w, pool, totals);
        const uint64_t extent = Tagged{NEW, count}.word();
        l->extent.store(extent);
        CHECK(aios::second_pass(&w, r, counted, nullptr) == 0 && w.late);
        CHECK(num_counted == 0 && l->extent.load() == extent);
    }

    make_old(&w, pool, totals);
    l->extent.store(Tagged{OLD, aios::COUNTING}.word());
    int64_t found = -1; /* another worker counts; before this one wakes up the next step has */
    std::thread waits([&] { found = aios::second_pass(&w, r, counted, nullptr); });
    while (!pool->advanced.sleepers.load()) sched_yield();
    l->extent.store(Tagged{NEW, 8}.word());
    pool->advanced.ring();
    waits.join();
    CHECK(found == 0 && w.late && num_counted == 0);

    aios::Worker other; /* in their step: one counts, and wakes up the one that sleeps meanwhile */
    int64_t totals_of_other[4];
    make_old(&w, pool, totals);
    make_old(&other, pool, totals_of_other);
    l->extent.store(0);
    sleepers = &pool->advanced.sleepers;
    std::thread one([&] { found = aios::second_pass(&other, r, counted_slowly, nullptr); });
    CHECK(aios::second_pass(&w, r, counted_slowly, nullptr) == TOTAL);
    one.join();
    CHECK(found == TOTAL && num_counted == 1 && !w.late && !other.late);
    num_counted = 0;

    std::atomic<bool> is_out{false}; /* who is inside may still read what the step points to */
    pool->num_inside.fetch_add(1);
    std::thread inside([&] {
        while (!sleepers->load()) sched_yield();
        is_out = true;
        aios::leave(pool);
    });
    pool_rest(pool);
    CHECK(is_out);
    inside.join();
    return 0;
}

/* All of a step that is over: nothing is run or counted, no word is touched. Who is late knows of
 * no second pass any more: its launches have other numbers than those that ran. */
static int walk(Run *r, int how_far) { /* the next step is not begun, claimed from, counted */
    int64_t totals[4];
    aios::Worker w;
    aios::Pool *pool = pool_new(2, 0, 4);
    pool->sequence.store(OLD - 1);
    num_run = num_counted = 0;
    pool_step(pool, r);
    pool_rest(pool);
    CHECK(num_run == 4 * TOTAL && num_counted == 2);
    aios::Launched *l = pool->launched;
    if (how_far > 0) l->claimed.store(Tagged{NEW, 1}.word());
    if (how_far > 1) l->extent.store(Tagged{NEW, TOTAL + 1}.word());
    uint64_t before[4][3];
    for (int i = 0; i < 4; i++) {
        uint64_t *b = before[i];
        b[0] = l[i].claimed, b[1] = l[i].extent, b[2] = l[i].done;
    }
    make_old(&w, pool, totals);
    w.next = 0;
    run_step(&w, r);
    CHECK(num_run == 4 * TOTAL && num_counted == 2 && w.late == how_far > 0);
    for (int i = 0; i < 4; i++) {
        const uint64_t *b = before[i];
        CHECK(b[0] == l[i].claimed && b[1] == l[i].extent && b[2] == l[i].done);
    }
    pool_free(pool);
    return 0;
}

/* A copy of what a step is about, made while the next one's is written, is not taken. */
static int torn() {
    aios::Pool *pool = pool_new(1, 0, 4);
    Run run{}, late;
    const uint32_t first = pool->sequence.load() + 1;
    pool_step(pool, &run);
    const bool entered = aios::enter(pool, first, &late);
    aios::leave(pool);
    CHECK(!entered);
    std::atomic<int> num_entered{0}, num_wrong{0};
    std::atomic<bool> stop{false};
    std::thread other([&] {
        while (!stop.load()) {
            Run r;
            const uint32_t now = pool->sequence.load();
            if (now % 2) continue;
            if (aios::enter(pool, now, &r)) {
                num_entered++;
                num_wrong += r.n.T != now || r.choices != reinterpret_cast<uint8_t *>(r.n.T);
            }
            aios::leave(pool);
        }
    });
    for (int i = 0; i < 100000 || (num_entered.load() < 500 && i < 20000000); i++) {
        run.n.T = pool->sequence.load() + 1; /* the first word, and almost the last */
        run.choices = reinterpret_cast<uint8_t *>(run.n.T);
        pool_step(pool, &run);
    }
    stop.store(true);
    other.join();
    CHECK(num_entered.load() >= 500 && num_wrong.load() == 0);
    pool_free(pool);
    return 0;
}

/* What changes between a sleeper's last look and its sleep wakes it up all the same. */
static int woken() {
    aios::Bell bell;
    bool changed = false;
    const auto look = [&] {
        const bool seen = changed;
        if (bell.sleepers.load()) changed = true, bell.ring();
        return seen;
    };
    bell.wait(look, 0, [] {});
    CHECK(changed && !bell.sleepers.load());
    return 0;
}

int main() {
    Run run{};
    aios::Pool *pool = pool_new(2, 0, 4);
    const int failed = alone(pool, &run);
    pool_free(pool);
    return failed || walk(&run, 0) || walk(&run, 1) || walk(&run, 2) || torn() || woken();
}
"""


def test_it_does_nothing_in_a_step_that_is_over(tmp_path: Path) -> None:
    (tmp_path / "late.cpp").write_text(PROGRAM)
    command = [build.find_compiler().path, "-std=c++17", "-O1", "-Wno-psabi", "-pthread"]
    command += ["-I", str(build.HEADER_FOLDER), str(tmp_path / "late.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "late")], check=True)
    run = subprocess.run(
        [str(tmp_path / "late")], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout
