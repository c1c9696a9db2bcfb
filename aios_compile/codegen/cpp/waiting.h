/* How threads wait: they spin, step aside on a core that they share, and sleep in the kernel. */
#pragma once
#include <atomic>
#include <cstdint>
#include <ctime>
#include <pthread.h>
#include <sched.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace aios {

constexpr long QUIET_SPINS = 1000; /* about 50 us: longer than most phases of a small model */
constexpr int MAX_WORKERS = 256;

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

/* Wakes threads that sleep until something has changed. `ready` looks at what may change, with
 * sequentially consistent loads; who changes it does so by such a store and rings afterwards: then
 * either the changer sees the sleeper, or the sleeper the change. */
struct Bell {
    alignas(64) std::atomic<int> rung{0};
    alignas(64) std::atomic<int> sleepers{0};

    void ring() {
        if (!sleepers.load()) return;
        rung.fetch_add(1);
        wake(&rung);
    }

    /* Spin, then sleep, until ready(). `when_late` is called once, as the quiet spins are over.
     * Nobody yields: on Linux 6.18 a thread that yields gives its whole slice away, and beside four
     * other programs on four cores a token of the bundled model took 15 ms instead of 0.4. */
    template <class Ready, class Late> void wait(Ready ready, long spins, Late when_late) {
        for (long i = 0; i < spins; i++) {
            if (ready()) return;
            if (i == QUIET_SPINS) when_late();
            pause_once();
        }
        sleepers.fetch_add(1);
        for (;;) {
            const int now = rung.load();
            if (ready()) break;
            park(&rung, now);
        }
        sleepers.fetch_sub(1);
    }
};

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

}  // namespace aios
