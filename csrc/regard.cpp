// What the library exports: the same functions at the best instruction set that this processor has.
#include "level.hpp"

#include <atomic>
#include <thread>

#if defined(REGARD_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace {

const char* const NAMES[] = {"baseline", "avx2", "avx512"};

#if defined(REGARD_X86)

const regard_level* const LEVELS[] = {&regard_baseline, &regard_avx2, &regard_avx512};

int best_level() {
#if defined(_MSC_VER)
    int leaf[4];
    __cpuid(leaf, 1);
    const bool saved = (leaf[2] >> 27 & 1) != 0, fma = (leaf[2] >> 12 & 1) != 0, f16c = (leaf[2] >> 29 & 1) != 0;
    const unsigned long long state = saved ? _xgetbv(0) : 0;
    __cpuidex(leaf, 7, 0);
    const bool avx2 = (leaf[1] >> 5 & 1) != 0 && fma && f16c && (state & 6) == 6;
    const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // f, dq, bw, vl
    const bool avx512 = avx2 && (static_cast<unsigned>(leaf[1]) & wanted) == wanted && (state & 0xe6) == 0xe6;
#else
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return avx512 ? 2 : avx2 ? 1 : 0;
}

#else

const regard_level* const LEVELS[] = {&regard_baseline};
int best_level() { return 0; }

#endif

int level = best_level();

void run_serially(void (*body)(void*), void* context, int64_t) { body(context); }
int64_t one_thread() { return 1; }

// torch's own threads, once regard_use_threads has said where they are.
typedef int (*torch_parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);
typedef int (*torch_get_num_threads)(uint32_t* count);
torch_parallel_for parallel_for;
torch_get_num_threads get_num_threads;
bool serial;

int64_t torch_threads() {
    uint32_t count = 1;
    return get_num_threads(&count) == 0 ? count : 1;
}

void run_on_torch_threads(void (*body)(void*), void* context, int64_t most) {
    struct Task {
        void (*body)(void*);
        void* context;
    } task{body, context};
    const int64_t threads = torch_threads();
    const auto one = [](int64_t, int64_t, void* given) {
        const Task& its = *static_cast<Task*>(given);
        its.body(its.context);
    };
    parallel_for(0, most < threads ? most : threads, 1, one, &task);
}

void yield() { std::this_thread::yield(); }

std::atomic<int64_t> paths[3];

void note_paths(const int64_t taken[3]) {
    for (int n = 0; n < 3; ++n) paths[n] += taken[n];
}

regard_threads threads() {
    if (parallel_for && !serial) return {run_on_torch_threads, torch_threads, yield, note_paths};
    return {run_serially, one_thread, yield, note_paths};
}

}  // namespace

// What a caller's struct must be as large as.
REGARD_EXPORT int64_t regard_problem_size() { return sizeof(regard_problem); }

REGARD_EXPORT const char* regard_level_name() { return NAMES[level]; }

// Names in order; a level above the processor's is not taken, and the one in force is returned.
REGARD_EXPORT int regard_set_level(int wanted) {
    if (wanted >= 0 && wanted <= best_level()) level = wanted;
    return level;
}

REGARD_EXPORT void regard_use_threads(torch_parallel_for share, torch_get_num_threads count) {
    parallel_for = share;
    get_num_threads = count;
}

REGARD_EXPORT void regard_set_serial(int whether) { serial = whether != 0; }

// How many groups of hidden units, in how many tiles, went which way (see Path) since the library was loaded.
REGARD_EXPORT void regard_paths(int64_t* fast, int64_t* capped, int64_t* direct) {
    *fast = paths[0], *capped = paths[1], *direct = paths[2];
}

// Floats that p.prepared needs for each (outer, group) of that many keys.
REGARD_EXPORT int64_t regard_prepared_count(const regard_problem* p) { return LEVELS[level]->prepared_count(p); }

// Lays the keys out in p.prepared, from key `first` on where those before it are there already.
REGARD_EXPORT int regard_prepare(const regard_problem* p, int64_t first) {
    const regard_threads sharing = threads();
    return LEVELS[level]->prepare(p, &sharing, first);
}

REGARD_EXPORT int regard_forward(const regard_problem* p) {
    const regard_threads sharing = threads();
    return LEVELS[level]->forward(p, &sharing);
}

REGARD_EXPORT int regard_scores(const regard_problem* p) {
    const regard_threads sharing = threads();
    return LEVELS[level]->scores(p, &sharing);
}

// Of one query and moved keys; additive pairs only.
REGARD_EXPORT int regard_shifted_scores(const regard_problem* p) {
    const regard_threads sharing = threads();
    return LEVELS[level]->shifted_scores(p, &sharing);
}

// p.out of one row of weights for each map.
REGARD_EXPORT int regard_read(const regard_problem* p) {
    const regard_threads sharing = threads();
    return LEVELS[level]->read(p, &sharing);
}

REGARD_EXPORT int regard_backward(const regard_problem* p) {
    const regard_threads sharing = threads();
    return LEVELS[level]->backward(p, &sharing);
}
