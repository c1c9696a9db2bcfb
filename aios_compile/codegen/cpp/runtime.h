/* The step's runtime: a pool of threads, and work shared by chunks.
 *
 * One parallel region a step: the engine's thread is worker 0, the others wait for the next step.
 * A phase ends when its items are done, not when every worker has come by: a worker that the
 * machine does not run holds nobody up, unless it stopped inside a chunk. When it runs again it
 * walks on through phases that are done, or finds that its step is over. Whatever the workers share
 * is therefore tagged with the number of the step, and a worker reads a copy of the step's sizes
 * and pointers. What those point to stays until the workers are out (pool_rest).
 */
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>

#include "run.h"
#include "waiting.h"

namespace aios {

/* The number of a step (Pool::sequence), and what was counted in that step. Numbers grow and wrap:
 * all 32 bits are compared, and words are touched far more often than every 2^30 steps. */
struct Tagged {
    uint32_t step, count;

    static Tagged of(uint64_t word) {
        return {static_cast<uint32_t>(word >> 32), static_cast<uint32_t>(word)};
    }
    uint64_t word() const { return static_cast<uint64_t>(step) << 32 | count; }
    bool is_later_than(uint32_t other) const { return static_cast<int32_t>(step - other) > 0; }
    uint32_t in(uint32_t other) const { return step == other ? count : 0; }
};

typedef std::atomic<uint64_t> Word; /* a Tagged */

/* What the workers know together of one launch, in each step anew. */
struct Launched {
    alignas(64) Word claimed{0}; /* items */
    Word extent{0};              /* items of its second pass and one; COUNTING meanwhile */
    alignas(64) Word done{0};    /* items */
};
constexpr uint32_t COUNTING = ~0u;

constexpr size_t RUN_WORDS = sizeof(Run) / 8;
static_assert(sizeof(Run) % 8 == 0, "copied in words");

struct Pool;

/* One worker inside a step. `next` numbers the launches; it is equal on all workers. */
struct Worker {
    Pool *pool = nullptr;
    int id = 0;
    uint32_t step = 0;
    bool late = false;          /* the step is over: nothing is left to be done in it */
    int64_t next = 0, ended = 0; /* launches before `ended` are in phases that are over */
    int64_t *totals = nullptr;   /* items of each launch */
    alignas(64) Word own{0};     /* launches whose share of this worker is taken; read by all */
};

struct Pool {
    std::atomic<int> num_workers{1}; /* grows while they are started */
    long spins;
    Launched *launched = nullptr;
    Worker *workers = nullptr;
    int64_t *totals = nullptr;
    pthread_t threads[MAX_WORKERS];
    std::atomic<bool> stop{false};
    Places places;
    Bell started, advanced;
    alignas(64) std::atomic<uint32_t> sequence{1}; /* of the step: even; odd between steps */
    std::atomic<uint64_t> run[RUN_WORDS];
    alignas(64) std::atomic<int> num_inside{0}; /* workers that may read what `run` points to */
    int64_t phase_began = 0; /* nanoseconds, in a run that is timed */
};

static inline int64_t time_now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

typedef int64_t (*Items)(const Sizes *);
typedef int64_t (*FinishItems)(const Sizes *, void *const *);
typedef void (*Kernel)(const Sizes *, void *const *, int64_t, int64_t);

/* One of a kernel's candidates: which of them runs changes no bit of a result. */
struct Candidate {
    Kernel kernel;
    FinishItems finish_items;
    Kernel finish;
};

/* Take the share that is worker `of`'s own in a launch; false if it is taken. Launches come in
 * order, and who leaves one has left no share of it: one number a worker is enough. */
static inline bool take_own(Worker *w, int of, int64_t launch) {
    Word *own = &w->pool->workers[of].own;
    uint64_t seen = own->load(std::memory_order_relaxed);
    const Tagged taken{w->step, static_cast<uint32_t>(launch + 1)};
    do {
        const Tagged now = Tagged::of(seen);
        if (now.is_later_than(w->step) || now.in(w->step) >= taken.count) return false;
    } while (!own->compare_exchange_weak(seen, taken.word(), std::memory_order_relaxed));
    return true;
}

/* Claim items of those that are shared, `least` or more but at the end; return whether there were
 * any, from *begin to *end. */
static inline bool claim(Worker *w, Launched *l, int64_t shared, int64_t least, int64_t *begin,
                         int64_t *end) {
    const int64_t workers = w->pool->num_workers;
    uint64_t seen = l->claimed.load(std::memory_order_relaxed);
    do {
        const Tagged now = Tagged::of(seen);
        w->late = now.is_later_than(w->step);
        *begin = now.in(w->step);
        if (w->late || *begin >= shared) return false;
        const int64_t left = shared - *begin, most = left * 3 / (workers * 4);
        const int64_t chunk = most > least ? most : least;
        *end = *begin + (chunk < left ? chunk : left);
    } while (!l->claimed.compare_exchange_weak(
        seen, Tagged{w->step, static_cast<uint32_t>(*end)}.word(), std::memory_order_relaxed));
    return true;
}

/* Count items as done; whoever counts the last lets the others on. */
static inline void count(Worker *w, Launched *l, int64_t items, int64_t total) {
    uint64_t seen = l->done.load(std::memory_order_relaxed);
    Tagged next;
    do {
        next = {w->step, static_cast<uint32_t>(Tagged::of(seen).in(w->step) + items)};
    } while (!l->done.compare_exchange_weak(seen, next.word()));
    if (next.count == total) w->pool->advanced.ring();
}

/* Run `total` items; no result depends on who runs what.
 *
 * Of a few items, three quarters are shared out at once: a claim costs what a row of a small model
 * does, and the same worker meets the same rows again. A share whose worker has not come yet goes
 * to who has nothing else to do. The others are claimed in chunks by who is free: three quarters
 * of an equal share of what is left, at the end an eighth of a whole one (guided self-scheduling,
 * Polychronopoulos and Kuck 1987). 7 claims of two workers end as evenly as 16 equal ones, and a
 * kernel begins less often, which costs a quantised linear 0.4 us each time, and the hardware's
 * prefetch its stream: 1.02x a step of int4 beside halves, which were 9 claims. */
constexpr int FEW_ITEMS = 32; /* a worker */
static inline int64_t own_share(int64_t total, int workers) {
    return total <= FEW_ITEMS * workers ? total * 3 / (workers * 4) : 0;
}

/* own: items of each worker that are shared out at once. */
static inline void share(Worker *w, const Run *r, int64_t total, int64_t own, Kernel kernel,
                         void *const *p) {
    const int workers = w->pool->num_workers;
    const int64_t index = w->next++;
    w->totals[index] = total;
    Launched *l = &w->pool->launched[index];
    const int64_t first = own * workers; /* of the items that are claimed */
    const int64_t least = (total + workers * 8 - 1) / (workers * 8);
    int64_t items = 0, begin, end;
    if (own && take_own(w, w->id, index)) {
        kernel(&r->n, p, w->id * own, (w->id + 1) * own);
        items += own;
    }
    while (!w->late && claim(w, l, total - first, least, &begin, &end)) {
        kernel(&r->n, p, first + begin, first + end);
        items += end - begin;
    }
    for (int of = 0; own && !w->late && of < workers; of++)
        if (take_own(w, of, index)) {
            kernel(&r->n, p, of * own, (of + 1) * own);
            items += own;
        }
    if (items) count(w, l, items, total);
}

static inline void share(Worker *w, const Run *r, int64_t total, Kernel kernel, void *const *p) {
    const int workers = w->pool->num_workers;
    if (workers == 1) return kernel(&r->n, p, 0, total);
    share(w, r, total, own_share(total, workers), kernel, p);
}

static inline void launch(Worker *w, const Run *r, Items items, Kernel kernel, void *const *p) {
    share(w, r, items(&r->n), kernel, p);
}

/* Wait until all launches since the last barrier are done. */
static inline void barrier(Worker *w) {
    Pool *pool = w->pool;
    if (pool->num_workers == 1) return;
    pool->places.note(w->id);
    for (; w->ended < w->next && !w->late; w->ended++) {
        const Word *done = &pool->launched[w->ended].done;
        const int64_t total = w->totals[w->ended];
        auto is_done = [&] {
            const Tagged now = Tagged::of(done->load());
            w->late = now.is_later_than(w->step);
            return w->late || now.in(w->step) == total;
        };
        pool->advanced.wait(is_done, pool->spins,
                            [&] { pool->places.step_aside(w->id, pool->num_workers); });
    }
}

/* Return the items of a launch's second pass. They depend on the step's inputs, which may be read
 * only while the step lasts: so one worker counts them, and the step cannot end before it has. */
static inline int64_t second_pass(Worker *w, const Run *r, FinishItems items, void *const *p) {
    Pool *pool = w->pool;
    if (pool->num_workers == 1) return items(&r->n, p);
    if (w->late) return 0;
    Word *extent = &pool->launched[w->next - 1].extent;
    uint64_t seen = extent->load();
    for (;;) {
        const Tagged now = Tagged::of(seen);
        if (now.is_later_than(w->step)) return w->late = true, 0;
        if (now.step == w->step) break;
        if (!extent->compare_exchange_weak(seen, Tagged{w->step, COUNTING}.word())) continue;
        const int64_t total = items(&r->n, p);
        seen = Tagged{w->step, static_cast<uint32_t>(total + 1)}.word();
        extent->store(seen);
        pool->advanced.ring();
    }
    auto is_counted = [&] { return (seen = extent->load(), Tagged::of(seen).count != COUNTING); };
    pool->advanced.wait(is_counted, pool->spins, [] {});
    const Tagged now = Tagged::of(seen);
    w->late = now.is_later_than(w->step);
    return w->late ? 0 : now.count - 1;
}

/* A kernel whose results need a second pass over some inputs. */
static inline void launch(Worker *w, const Run *r, Items items, Kernel kernel,
                          FinishItems finish_items, Kernel finish, void *const *p) {
    launch(w, r, items, kernel, p);
    const int64_t total = second_pass(w, r, finish_items, p);
    if (total == 0) return;
    barrier(w);
    share(w, r, total, finish, p);
}

static inline void launch(Worker *w, const Run *r, Items items, const Candidate &c,
                          void *const *p) {
    launch(w, r, items, c.kernel, c.finish_items, c.finish, p);
}

/* The end of a phase, which is one kernel's that has candidates (else -1). In a run that asks for
 * it the caller's thread times the phase, from barrier to barrier. */
static inline void barrier(Worker *w, const Run *r, int kernel) {
    barrier(w);
    if (!r->nanoseconds || w->id) return;
    const int64_t now = time_now();
    if (kernel >= 0) r->nanoseconds[kernel] += now - w->pool->phase_began;
    w->pool->phase_began = now;
}

}  // namespace aios

static void run_step(aios::Worker *w, const Run *r);

namespace aios {

/* A pool of one: its worker takes all items and waits for nobody. */
static Pool nobody_else;

static void run_parts(const Sizes *, void *const *p, int64_t begin, int64_t end) {
    Worker alone;
    alone.pool = &nobody_else;
    for (const Part *part = static_cast<const Part *>(*p) + begin; begin < end; begin++, part++) {
        run_step(&alone, &part->run);
        for (int64_t i = 0; i < part->num_copies; i++)
            memcpy(part->copies[i].to, part->copies[i].from, part->copies[i].bytes);
    }
}

/* Run a step: together, or part by part. A part's worker meets no rows of another's, so that there
 * is one barrier instead of one a phase, and nothing that a core wrote is read by another. Where
 * two cores share no cache, which a virtual machine does not tell, a line costs 150 ns and more: a
 * step of 16 of a small model took 0.75 ms there and 0.40 on two near cores, in parts 0.32 on any.
 * The same worker takes the same sequences each time, and its cache has their keys and values. */
static void run_whole(Worker *w, const Run *r) {
    const int workers = w->pool->num_workers;
    if (!r->parts || workers == 1) return run_step(w, r);
    void *const p[] = {const_cast<Part *>(r->parts)};
    share(w, r, r->num_parts, r->num_parts / workers, run_parts, p);
    barrier(w);
}

static inline void begin_step(Worker *w, uint32_t step) {
    w->step = step;
    w->late = false;
    w->next = w->ended = 0;
}

/* Go into step `sequence` unless it is over: copy what it is about. */
static inline bool enter(Pool *pool, uint32_t sequence, Run *r) {
    pool->num_inside.fetch_add(1);
    uint64_t words[RUN_WORDS];
    for (size_t i = 0; i < RUN_WORDS; i++) words[i] = pool->run[i].load(std::memory_order_acquire);
    if (pool->sequence.load() != sequence) return false;
    memcpy(r, words, sizeof *r);
    return true;
}

static inline void leave(Pool *pool) {
    if (pool->num_inside.fetch_sub(1) == 1) pool->advanced.ring();
}

static void *worker_loop(void *argument) {
    Worker *w = static_cast<Worker *>(argument);
    Pool *pool = w->pool;
    for (uint32_t seen = 0, now = 0;; seen = now) {
        auto is_ready = [&] {
            now = pool->sequence.load();
            return pool->stop.load() || (now != seen && now % 2 == 0);
        };
        pool->started.wait(is_ready, pool->spins,
                           [&] { pool->places.step_aside(w->id, pool->num_workers); });
        if (pool->stop.load()) return nullptr;
        Run r;
        if (enter(pool, now, &r)) {
            begin_step(w, now);
            run_whole(w, &r);
        }
        leave(pool);
    }
}

}  // namespace aios

extern "C" {

void pool_free(aios::Pool *p);

/* Return a pool of `num_workers` (the caller's thread is one of them), or null. */
aios::Pool *pool_new(int num_workers, long spins, int64_t num_counters) {
    if (num_workers < 1 || num_workers > aios::MAX_WORKERS) return nullptr;
    aios::Pool *p = new (std::nothrow) aios::Pool;
    if (!p) return nullptr;
    p->spins = spins;
    p->launched = new (std::nothrow) aios::Launched[num_counters];
    p->workers = new (std::nothrow) aios::Worker[num_workers];
    p->totals = new (std::nothrow) int64_t[num_workers * num_counters];
    if (!p->launched || !p->workers || !p->totals) return pool_free(p), nullptr;
    for (int i = 0; i < num_workers; i++) {
        p->workers[i].pool = p;
        p->workers[i].id = i;
        p->workers[i].totals = p->totals + i * num_counters;
    }
    for (int i = 1; i < num_workers; i++) {
        if (pthread_create(&p->threads[i], nullptr, aios::worker_loop, &p->workers[i])) break;
        p->num_workers = i + 1; /* fewer are enough; no step begins before this is known */
    }
    return p;
}

int pool_size(const aios::Pool *p) { return p->num_workers; }

/* Run one step on the pool; returns when all of it is done. */
void pool_step(aios::Pool *p, const Run *r) {
    const uint32_t sequence = p->sequence.load() + 1; /* it was odd: the step before is over */
    uint64_t words[aios::RUN_WORDS];
    memcpy(words, r, sizeof *r);
    for (size_t i = 0; i < aios::RUN_WORDS; i++)
        p->run[i].store(words[i], std::memory_order_release);
    if (r->nanoseconds) p->phase_began = aios::time_now();
    aios::begin_step(&p->workers[0], sequence);
    p->sequence.store(sequence);
    p->started.ring();
    aios::run_whole(&p->workers[0], r);
    p->sequence.store(sequence + 1); /* who has not come yet need not */
}

/* Wait until no worker is inside the step that is over: it may read what the step's pointers point
 * to, as it walks through. To be called before that memory goes, and between steps. */
void pool_rest(aios::Pool *p) {
    p->advanced.wait([&] { return p->num_inside.load() == 0; }, p->spins, [] {});
}

void pool_free(aios::Pool *p) {
    p->stop.store(true);
    p->started.ring();
    for (int i = 1; i < p->num_workers; i++) pthread_join(p->threads[i], nullptr);
    delete[] p->totals;
    delete[] p->workers;
    delete[] p->launched;
    delete p;
}
}
