// Monotonic alignment: what lies on the keys moves to the right, and stops at some. In float32, summed in double.
#include "regard.h"

namespace {

// How likely it is to stop at a key, and to go on: the less likely as it was rounded, the other what that leaves of 1.
struct Odds {
    double stop, go;
    Odds(float stopping, float going)
        : stop(stopping < going ? stopping : 1.0 - going), go(stopping < going ? 1.0 - stopping : going) {}
};

// Each key waits for what comes from the one before, so that LANES sequences are done at once.
template <int LANES>
void align(int64_t rows, int64_t keys, const float* stop, const float* go, const float* previous, float* weights,
           float* gone) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* before = row ? weights + (row - 1) * keys : previous;
        const int64_t apart = row ? rows * keys : keys;
        double moving[LANES] = {};
        for (int64_t j = 0; j < keys; ++j)
            for (int n = 0; n < LANES; ++n) {
                const int64_t at = (n * rows + row) * keys + j;
                const Odds odds(stop[at], go[at]);
                moving[n] += before[n * apart + j];
                weights[at] = static_cast<float>(odds.stop * moving[n]);
                moving[n] *= odds.go;
            }
        for (int n = 0; n < LANES; ++n) gone[n * rows + row] = static_cast<float>(moving[n]);
    }
}

// grad_logits holds what arrived at each key until its gradient is known, and grad_previous the gradients by the
// weights of one row after another, from the last on.
template <int LANES>
void align_backward(int64_t rows, int64_t keys, const float* stop, const float* go, const float* previous,
                    const float* weights, const float* grad_weights, const float* grad_gone, float* grad_logits,
                    float* grad_previous) {
    for (int64_t at = 0; at < LANES * keys; ++at) grad_previous[at] = 0.0f;
    for (int64_t row = rows - 1; row >= 0; --row) {
        const float* before = row ? weights + (row - 1) * keys : previous;
        const int64_t apart = row ? rows * keys : keys;
        double moving[LANES] = {}, gradient[LANES];
        for (int64_t j = 0; j < keys; ++j)
            for (int n = 0; n < LANES; ++n) {
                const int64_t at = (n * rows + row) * keys + j;
                moving[n] += before[n * apart + j];
                grad_logits[at] = static_cast<float>(moving[n]);
                moving[n] *= Odds(stop[at], go[at]).go;
            }
        for (int n = 0; n < LANES; ++n) gradient[n] = grad_gone[n * rows + row];
        for (int64_t j = keys - 1; j >= 0; --j)
            for (int n = 0; n < LANES; ++n) {
                const int64_t at = (n * rows + row) * keys + j;
                const Odds odds(stop[at], go[at]);
                const double stopping = static_cast<double>(grad_weights[at]) + grad_previous[n * keys + j];
                const double arrived = grad_logits[at];
                grad_logits[at] = static_cast<float>(odds.stop * odds.go * arrived * (stopping - gradient[n]));
                gradient[n] = odds.stop * stopping + odds.go * gradient[n];
                grad_previous[n * keys + j] = static_cast<float>(gradient[n]);
            }
    }
}

constexpr int LANES = 4;

}  // namespace

// stop, go and weights (samples, rows, keys), previous (samples, keys), gone (samples, rows); all contiguous.
REGARD_EXPORT void regard_monotonic(int64_t samples, int64_t rows, int64_t keys, const float* stop, const float* go,
                                    const float* previous, float* weights, float* gone) {
    for (int64_t n = 0, step; n < samples; n += step) {
        step = n + LANES <= samples ? LANES : 1;
        const int64_t at = n * rows * keys;
        (step == 1 ? align<1> : align<LANES>)(rows, keys, stop + at, go + at, previous + n * keys, weights + at,
                                              gone + n * rows);
    }
}

// And gradients of the same shapes: by weights and by gone in, by the log-odds of stopping and by previous out.
REGARD_EXPORT void regard_monotonic_backward(int64_t samples, int64_t rows, int64_t keys, const float* stop,
                                             const float* go, const float* previous, const float* weights,
                                             const float* grad_weights, const float* grad_gone, float* grad_logits,
                                             float* grad_previous) {
    for (int64_t n = 0, step; n < samples; n += step) {
        step = n + LANES <= samples ? LANES : 1;
        const int64_t at = n * rows * keys;
        (step == 1 ? align_backward<1> : align_backward<LANES>)(rows, keys, stop + at, go + at, previous + n * keys,
                                                                weights + at, grad_weights + at, grad_gone + n * rows,
                                                                grad_logits + at, grad_previous + n * keys);
    }
}
