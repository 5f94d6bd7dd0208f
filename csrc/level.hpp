// What one instruction set offers, and how work is shared among threads.
#pragma once

#include "regard.h"

// Runs body(context) on as many threads as there are, at most `most` of them; how many there are; lets others go first;
// and takes note of Scratch::paths.
struct regard_threads {
    void (*run)(void (*body)(void* context), void* context, int64_t most);
    int64_t (*count)();
    void (*yield)();
    void (*went)(const int64_t paths[3]);
};

struct regard_level {
    int64_t (*prepared_count)(const regard_problem*);
    int (*prepare)(const regard_problem*, const regard_threads*, int64_t first);
    int (*forward)(const regard_problem*, const regard_threads*);
    int (*scores)(const regard_problem*, const regard_threads*);
    int (*shifted_scores)(const regard_problem*, const regard_threads*);
    int (*read)(const regard_problem*, const regard_threads*);
    int (*backward)(const regard_problem*, const regard_threads*);
};

extern const regard_level regard_baseline, regard_avx2, regard_avx512;
