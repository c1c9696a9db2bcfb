/* Steps that are begun now and waited for later: the caller plans the next one meanwhile.
 *
 * A thread of its own runs them on the pool one after another, as worker 0. At most two are begun
 * and not waited for: the one that runs, and the next, which takes the ids that the one before it
 * samples, so that no worker waits for the caller between the two.
 */
#pragma once
#include "runtime.h"

enum { WAITING = 0, SURE = 1, RUNNING = 2, ENDED = 3, LEFT_OUT = 4 };

/* One step. Memory of the caller's; it stays as it is until the step has ended. */
typedef struct Begun {
    const Run *run;
    int64_t *token_ids;     /* [T], inputs of the step */
    const int64_t *sources; /* [T] row of the step before that samples token i, -1: it is known */
    const int64_t *sampled; /* [R], what the step before has sampled */
    const int32_t *hold;    /* not 0 when its turn comes: left out, unless it is SURE */
    const Copy *copies;     /* results to be kept: the next step overwrites them */
    int64_t num_copies;
    int64_t nanoseconds; /* that it took */
    int32_t state;
} Begun;

namespace aios {

/* A number that only grows (it may wrap), for one thread to set and others to wait for. */
struct Count {
    alignas(64) std::atomic<int> value{0};
    Bell bell;

    bool is_below(int number) const {
        const unsigned distance = static_cast<unsigned>(number) - static_cast<unsigned>(load());
        return static_cast<int>(distance) > 0;
    }
    int load() const { return value.load(); }

    void set(int number) {
        value.store(number);
        bell.ring();
    }

    void reach(int number, long spins) {
        bell.wait([&] { return !is_below(number); }, spins, [] {});
    }
};

struct Line {
    Pool *pool;
    pthread_t thread;
    std::atomic<int> stop{0};
    Count begun, ended;
    Begun *steps[2] = {nullptr, nullptr};
};

static inline int next_of(int number) {
    return static_cast<int>(static_cast<unsigned>(number) + 1u);
}

/* Move a step on from WAITING; false: somebody else has. */
static inline bool take_turn(Begun *b, int32_t state) {
    int32_t waiting = WAITING;
    return __atomic_compare_exchange_n(&b->state, &waiting, state, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

static inline int32_t state_of(const Begun *b) {
    return __atomic_load_n(&b->state, __ATOMIC_ACQUIRE);
}

}  // namespace aios

extern "C" void pool_step(aios::Pool *p, const Run *r);

namespace aios {

/* The thread of steps was woken by the caller, and Linux may have drawn it to the caller's core,
 * where it would wait until the caller sleeps: beside other programs nearly every step did. */
static inline void leave_callers_core(Pool *pool) {
#if defined(__linux__)
    Places &places = pool->places;
    if (places.cores[MAX_WORKERS].number.load(std::memory_order_relaxed) == sched_getcpu())
        places.step_aside(0, pool->num_workers);
#endif
}

static inline void run_begun(Pool *pool, Begun *b) {
    const int64_t began = time_now();
    for (int64_t i = 0; b->sources && i < b->run->n.T; i++)
        if (b->sources[i] >= 0) b->token_ids[i] = b->sampled[b->sources[i]];
    pool_step(pool, b->run);
    for (int64_t i = 0; i < b->num_copies; i++)
        memcpy(b->copies[i].to, b->copies[i].from, b->copies[i].bytes);
    b->nanoseconds = time_now() - began;
    __atomic_store_n(&b->state, ENDED, __ATOMIC_RELEASE);
}

static void *line_loop(void *argument) {
    Line *line = static_cast<Line *>(argument);
    for (int number = 0;; number = next_of(number)) {
        line->begun.reach(next_of(number), line->pool->spins);
        if (line->stop.load()) return nullptr;
        leave_callers_core(line->pool);
        Begun *b = line->steps[number & 1];
        const bool held = b->hold && __atomic_load_n(b->hold, __ATOMIC_ACQUIRE);
        if (take_turn(b, held ? LEFT_OUT : RUNNING) ? !held : state_of(b) == SURE)
            run_begun(line->pool, b);
        line->ended.set(next_of(number));
    }
}

}  // namespace aios

extern "C" {

/* Return a line of steps on a pool that nobody else uses while one of them runs; or null. */
aios::Line *line_new(aios::Pool *pool) {
    aios::Line *line = new (std::nothrow) aios::Line;
    if (!line) return nullptr;
    line->pool = pool;
    if (pthread_create(&line->thread, nullptr, aios::line_loop, line)) {
        delete line;
        return nullptr;
    }
    return line;
}

/* Begin a step behind the one that runs, if any; return its number for line_wait. */
int line_begin(aios::Line *line, Begun *b) {
    const int number = line->begun.load();
    line->pool->places.note(aios::MAX_WORKERS);
    b->state = WAITING;
    line->steps[number & 1] = b;
    line->begun.set(aios::next_of(number));
    return aios::next_of(number);
}

/* Leave a step out if its turn has not come; return whether it is left out. */
int line_leave_out(Begun *b) {
    aios::take_turn(b, LEFT_OUT);
    return aios::state_of(b) == LEFT_OUT;
}

/* Let a step run whatever holds it back; return whether it does or did: it was not left out. */
int line_make_sure(Begun *b) {
    aios::take_turn(b, SURE);
    return aios::state_of(b) != LEFT_OUT;
}

/* Wait for a step's end; return whether it was run. The caller spins as long as workers do: to wake
 * one that sleeps costs the thread of steps 10 to 16 us before it begins the next step, and the
 * caller 30 (a step of the bundled model took 138 us with, 82 us without, of 16 sequences 395 and
 * 360: int8, two threads of a virtual machine). */
int line_wait(aios::Line *line, const Begun *b, int number) {
    line->ended.reach(number, line->pool->spins);
    return aios::state_of(b) == ENDED;
}

/* Wait for all steps, then end the thread; before the pool is freed. */
void line_free(aios::Line *line) {
    const int number = line->begun.load();
    line->ended.reach(number, line->pool->spins);
    line->stop.store(1);
    line->begun.set(aios::next_of(number));
    pthread_join(line->thread, nullptr);
    delete line;
}
}
