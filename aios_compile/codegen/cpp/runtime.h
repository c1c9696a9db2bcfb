/* The step's runtime: a thread pool with spin-then-park barriers, and work shared by chunks.
 *
 * One parallel region a step: the engine's thread is worker 0, the others wait for the next step.
 * A waiting worker spins, then spins and yields in turn, and after about a millisecond sleeps in
 * the kernel. With six other programs on two cores and 53 barriers a step, a token took 46 ms
 * without the yields, 1.3 to 3 ms with them, and 0.9 ms on one worker.
 */
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <new>
#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct Run {
    Sizes n;
    char *arena;
    char *const *weights;
    char *const *states;
    char *const *inputs;
    char *const *rows; /* argument rows of all region calls, one after another */
    const uint8_t *choices; /* of each kernel, for this number of tokens */
    int64_t *nanoseconds; /* of each kernel that has candidates, to be added to; or null */
} Run;

namespace aios {

static inline void pause_once() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

static inline void park(std::atomic<int> *word, int value) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<int *>(word), FUTEX_WAIT_PRIVATE, value, 0, 0, 0);
#else
    (void)word, (void)value;
    timespec t{0, 50000};
    nanosleep(&t, nullptr);
#endif
}

static inline void wake(std::atomic<int> *word) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<int *>(word), FUTEX_WAKE_PRIVATE, 1 << 30, 0, 0, 0);
#else
    (void)word;
#endif
}

constexpr long QUIET_SPINS = 1000; /* about 50 us: longer than most phases of a small model */
constexpr long YIELD_EVERY = 64;
constexpr int MAX_WORKERS = 256;

/* Wait until *word is no longer `now`: spin, spin and yield, sleep. `when_late` is called once, as
 * the quiet spins are over. Who changes the word wakes the sleepers, if there are any. */
template <class Late>
static inline void await(std::atomic<int> *word, int now, std::atomic<int> *sleepers, long spins,
                         Late when_late) {
    for (long i = 0; i < spins; i++) {
        if (word->load(std::memory_order_acquire) != now) return;
        if (i == QUIET_SPINS) when_late();
        if (i >= QUIET_SPINS && i % YIELD_EVERY == 0)
            sched_yield(); /* on a busy machine another worker may be waiting for this core */
        else
            pause_once();
    }
    sleepers->fetch_add(1);
    while (word->load() == now) park(word, now);
    sleepers->fetch_sub(1);
}

/* Which core each worker was seen on. On a busy machine Linux may leave two workers on one core
 * (the one that wakes another draws it near), where they wait for each other by turns. With four
 * other programs on four cores a token of the bundled model took 0.88 ms, and 0.36 ms since waiting
 * workers step aside (means of three runs by turns). */
struct Places {
    struct alignas(64) Core { std::atomic<int> number{-1}; };
    Core cores[MAX_WORKERS + 1]; /* the last: of the thread that begins steps (step_line.h) */

    void note(int id) {
#if defined(__linux__)
        cores[id].number.store(sched_getcpu(), std::memory_order_relaxed);
#endif
    }

    /* If another worker was last seen on this worker's core, move to one where none was. */
    void step_aside(int id, int num_workers) {
#if defined(__linux__)
        const int here = sched_getcpu();
        bool shared = false;
        cpu_set_t allowed, others;
        if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed)) return;
        others = allowed;
        for (int i = 0; i < num_workers; i++) {
            const int core = cores[i].number.load(std::memory_order_relaxed);
            shared = shared || (i != id && core == here);
            if (core >= 0 && core < CPU_SETSIZE) CPU_CLR(core, &others);
        }
        const int host = cores[MAX_WORKERS].number.load(std::memory_order_relaxed);
        shared = shared || host == here;
        if (host >= 0 && host < CPU_SETSIZE) CPU_CLR(host, &others);
        if (!shared || !CPU_COUNT(&others)) return;
        sched_setaffinity(0, sizeof others, &others);   /* moves at once */
        sched_setaffinity(0, sizeof allowed, &allowed); /* and is as free as before */
        note(id);
#else
        (void)id, (void)num_workers;
#endif
    }
};

struct Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> phase{0};
    alignas(64) std::atomic<int> sleepers{0};
    Places places;

    void wait(int id, int num_workers, long spins) {
        wait(id, num_workers, spins, [] {});
    }

    /* The worker that comes last calls `last` before anybody goes on. */
    template <class Last> void wait(int id, int num_workers, long spins, Last last) {
        if (num_workers == 1) return last();
        places.note(id);
        int now = phase.load();
        if (arrived.fetch_add(1) == num_workers - 1) {
            last();
            arrived.store(0);
            phase.store(now + 1);
            if (sleepers.load()) wake(&phase);
            return;
        }
        await(&phase, now, &sleepers, spins, [&] { places.step_aside(id, num_workers); });
    }
};

struct Pool {
    int num_workers;
    long spins;
    std::atomic<int> stop{0};
    Barrier barrier;
    std::atomic<int64_t> *counters = nullptr;
    int64_t num_counters = 0;
    const Run *run = nullptr;
    int64_t phase_began = 0; /* nanoseconds, in a run that is timed */
    pthread_t threads[MAX_WORKERS];
};

static inline int64_t time_now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000 + t.tv_nsec;
}

/* One worker inside a step. `next` numbers the launches; it is equal on all workers. */
struct Worker {
    Pool *pool;
    int id;
    int64_t next;
};

typedef int64_t (*Items)(const Sizes *);
typedef int64_t (*FinishItems)(const Sizes *, void *const *);
typedef void (*Kernel)(const Sizes *, void *const *, int64_t, int64_t);

/* One of a kernel's candidates: which of them runs changes no bit of a result. */
struct Candidate {
    Kernel kernel;
    FinishItems finish_items;
    Kernel finish;
};

/* Run `total` items; no result depends on who runs what. Of a few, three quarters are shared out
 * at once: a claim costs what a row of a small model does, and the same worker meets the same rows
 * again. The others are claimed in chunks by whoever is free: three quarters of an equal share of
 * what is left, at the end an eighth of a whole one (guided self-scheduling, Polychronopoulos and
 * Kuck 1987). 7 claims of two workers end as evenly as 16 equal ones, and a kernel begins so much
 * less often, which costs a quantised linear 0.4 us a time, and the hardware's prefetch its stream:
 * 1.02x a step of int4 beside halves, which were 9 claims. */
constexpr int FEW_ITEMS = 32; /* a worker */
static inline void share(Worker *w, const Run *r, int64_t total, Kernel kernel, void *const *p) {
    const int workers = w->pool->num_workers;
    const int64_t index = w->next++;
    if (workers == 1) {
        kernel(&r->n, p, 0, total);
        return;
    }
    const int64_t own = total <= FEW_ITEMS * workers ? total * 3 / (workers * 4) : 0;
    if (own) kernel(&r->n, p, w->id * own, (w->id + 1) * own);
    const int64_t shared = own * workers, least = (total + workers * 8 - 1) / (workers * 8);
    std::atomic<int64_t> *counter = &w->pool->counters[index * 8]; /* one cache line each */
    int64_t begin = counter->load(std::memory_order_relaxed);
    while (shared + begin < total) {
        const int64_t left = total - shared - begin, most = left * 3 / (workers * 4);
        const int64_t chunk = most > least ? most : least, count = chunk < left ? chunk : left;
        if (!counter->compare_exchange_weak(begin, begin + count, std::memory_order_relaxed))
            continue;
        kernel(&r->n, p, shared + begin, shared + begin + count);
        begin = counter->load(std::memory_order_relaxed);
    }
}

static inline void launch(Worker *w, const Run *r, Items items, Kernel kernel, void *const *p) {
    share(w, r, items(&r->n), kernel, p);
}

static inline void barrier(Worker *w) {
    w->pool->barrier.wait(w->id, w->pool->num_workers, w->pool->spins);
}

/* A kernel whose results need a second pass over some inputs: all workers see the same inputs, so
 * they agree on whether there is one. */
static inline void launch(Worker *w, const Run *r, Items items, Kernel kernel,
                          FinishItems finish_items, Kernel finish, void *const *p) {
    launch(w, r, items, kernel, p);
    const int64_t total = finish_items(&r->n, p);
    if (total == 0) return;
    barrier(w);
    share(w, r, total, finish, p);
}

static inline void launch(Worker *w, const Run *r, Items items, const Candidate &c,
                          void *const *p) {
    launch(w, r, items, c.kernel, c.finish_items, c.finish, p);
}

/* The end of a phase, which is one kernel's that has candidates (else -1). In a run that asks for
 * it the phase is timed from barrier to barrier, by whoever comes last: a worker that was not
 * running does not know when the others began. */
static inline void barrier(Worker *w, const Run *r, int kernel) {
    Pool *pool = w->pool;
    pool->barrier.wait(w->id, pool->num_workers, pool->spins, [&] {
        if (!r->nanoseconds) return;
        const int64_t now = time_now();
        if (kernel >= 0) r->nanoseconds[kernel] += now - pool->phase_began;
        pool->phase_began = now;
    });
}

}  // namespace aios

static void run_step(aios::Worker *w, const Run *r);

static void *worker_loop(void *argument) {
    aios::Worker w = *static_cast<aios::Worker *>(argument);
    delete static_cast<aios::Worker *>(argument);
    for (;;) {
        aios::barrier(&w); /* the step begins, or the pool stops */
        if (w.pool->stop.load()) return nullptr;
        w.next = 0;
        run_step(&w, w.pool->run);
    }
}

extern "C" {

/* Return a pool of `num_workers` (the caller's thread is one of them), or null. */
aios::Pool *pool_new(int num_workers, long spins, int64_t num_counters) {
    if (num_workers < 1 || num_workers > aios::MAX_WORKERS) return nullptr;
    aios::Pool *p = new (std::nothrow) aios::Pool;
    if (!p) return nullptr;
    p->num_workers = num_workers;
    p->spins = spins;
    p->num_counters = num_counters;
    p->counters = new (std::nothrow) std::atomic<int64_t>[num_counters * 8];
    if (!p->counters) {
        delete p;
        return nullptr;
    }
    for (int i = 1; i < num_workers; i++) {
        aios::Worker *w = new aios::Worker{p, i, 0};
        if (pthread_create(&p->threads[i], nullptr, worker_loop, w)) {
            delete w; /* fewer workers are enough; those that started count */
            p->num_workers = i;
            break;
        }
    }
    return p;
}

int pool_size(const aios::Pool *p) { return p->num_workers; }

/* Run one step on the pool; returns when every worker is done. */
void pool_step(aios::Pool *p, const Run *r) {
    for (int64_t i = 0; i < p->num_counters; i++)
        p->counters[i * 8].store(0, std::memory_order_relaxed);
    p->run = r;
    if (r->nanoseconds) p->phase_began = aios::time_now();
    aios::Worker w{p, 0, 0};
    aios::barrier(&w);
    run_step(&w, r);
}

void pool_free(aios::Pool *p) {
    p->stop.store(1);
    aios::Worker w{p, 0, 0};
    aios::barrier(&w);
    for (int i = 1; i < p->num_workers; i++) pthread_join(p->threads[i], nullptr);
    delete[] p->counters;
    delete p;
}
}
