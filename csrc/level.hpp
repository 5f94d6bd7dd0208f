// What one instruction set offers, and how work is shared among threads.
#pragma once

#include <atomic>

#include "regard.h"

// The numbers 0 .. count, which threads take one by one: rows differ in how many keys they see.
struct regard_queue {
    std::atomic<int64_t> next{0};
    int64_t count;

    explicit regard_queue(int64_t count) : count(count) {}
    bool take(int64_t& n) { return (n = next.fetch_add(1, std::memory_order_relaxed)) < count; }
};

// Runs body(queue, context) on as many threads as there are, at most `queue.count`; and how many that are.
typedef void (*regard_body)(regard_queue&, void* context);
struct regard_threads {
    void (*run)(regard_queue&, regard_body, void* context);
    int64_t (*count)();
    void (*went)(const int64_t paths[3]);  // takes note of Scratch::paths
};

struct regard_level {
    int64_t (*prepared_count)(const regard_problem*);
    int (*prepare)(const regard_problem*, const regard_threads*, int64_t first);
    int (*forward)(const regard_problem*, const regard_threads*);
    int (*scores)(const regard_problem*, const regard_threads*);
    int (*backward)(const regard_problem*, const regard_threads*);
};

extern const regard_level regard_baseline, regard_avx2, regard_avx512;
