// How many float32 multiply-adds one core does a second at most: independent ones, all in registers.
#include <chrono>

typedef float Vector __attribute__((vector_size(WIDTH * 4)));

extern "C" double fma_per_second() {
    constexpr int CHAINS = 12, STEPS = 1 << 20;  // enough chains to hide the latency, and few enough for 16 registers
    Vector sums[CHAINS] = {}, factor = {}, term = {};
    for (int n = 0; n < WIDTH; ++n) factor[n] = 0.5f, term[n] = 1.0f;
    const auto start = std::chrono::steady_clock::now();
    for (int step = 0; step < STEPS; ++step) {
#pragma GCC unroll 12
        for (int n = 0; n < CHAINS; ++n) sums[n] = sums[n] * factor + term;
        __asm__ volatile("" ::"m"(factor) : );
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    volatile float kept = 0.0f;
    for (const Vector& sum : sums) kept = kept + sum[0];
    return static_cast<double>(STEPS) * CHAINS * WIDTH / taken.count();
}
