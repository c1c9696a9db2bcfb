/* What a step is called with: sizes and tables of pointers (runtime/run_tables.py). */
#pragma once
#include "prelude.h"

typedef struct Copy {
    const char *from;
    char *to;
    int64_t bytes;
} Copy;

struct Part;

typedef struct Run {
    Sizes n;
    char *arena;
    char *const *weights;
    char *const *states;
    char *const *inputs;
    char *const *rows; /* argument rows of all region calls, one after another */
    const uint8_t *choices; /* of each kernel, for this number of tokens */
    int64_t *nanoseconds; /* of each kernel that has candidates, to be added to; or null */
    const struct Part *parts; /* steps of some of the sequences, in which this one falls; or null */
    int64_t num_parts;
} Run;

/* A step of some sequences that one worker runs alone, in an arena of its own; then its results are
 * copied to where those of the whole step are looked for. */
typedef struct Part {
    Run run;
    const Copy *copies;
    int64_t num_copies;
} Part;
