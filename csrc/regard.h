// The C ABI: one struct that says everything about a problem, and the functions that take it.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define REGARD_EXPORT extern "C" __declspec(dllexport)
#else
#define REGARD_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum regard_dtype { REGARD_FLOAT32, REGARD_FLOAT16, REGARD_BFLOAT16 };
enum regard_pair { REGARD_TANH, REGARD_SIGMOID, REGARD_LEAKY_RELU, REGARD_L1 };
enum regard_status { REGARD_OK, REGARD_NO_MEMORY };

// (outer, inner, row, column); strides count elements, and are 0 where the tensor is shared.
struct regard_tensor {
    void* data;
    int64_t outer, inner, row, column;
    int64_t dtype;
};

// A bound of the keys of row i: data[...] (0 where null) + offset + slope · i, clamped to 0 .. keys.
struct regard_bound {
    const int64_t* data;
    int64_t outer, inner, row;
    int64_t offset, slope;
};

struct regard_problem {
    int64_t pair;
    float negative_slope;
    int64_t outer, inner;   // leading dimensions: batch, heads
    int64_t group;          // query heads that share one key-value head
    int64_t queries, keys;  // rows of either
    int64_t hidden, width;  // columns of query and key; of value
    int64_t v_heads;        // v is (v_heads, hidden); head h has row h % v_heads
    const float* v;         // null for l1
    regard_tensor query, key, value, out;
    float* lse;       // (outer, inner, queries)
    float* prepared;  // keys laid out by regard_prepare, or null
    int64_t prepared_outer, prepared_inner;
    int64_t intervals;  // 0 (every key), 1 or 2 a row
    regard_bound low[2], high[2];
    const uint8_t* keep;  // or null
    int64_t keep_outer, keep_inner, keep_row, keep_column;
    const int64_t* seed;     // of dropout, or null
    int64_t first_row;       // where row 0 stands in the whole problem
    uint64_t dropped_below;  // of 2^32
    float kept_factor;
    float* scores;  // (outer, inner, queries, keys): written by regard_scores and regard_shifted_scores, the weights of
                    // regard_read
    // What moves the keys of regard_shifted_scores, key + weight · features. These are what was seen of each key, or of
    // the keys around it, Σ filters[channel][each][t] · seen[key + t − taps / 2][each], which is 0 beyond the keys.
    int64_t channels;             // columns of the weight, (rows: hidden), and features
    regard_tensor weight, seen;   // rows of the latter: keys
    const float* filters;         // (channels, seen_channels, taps), or null
    int64_t seen_channels, taps;  // taps are odd
    // Backward: gradients come contiguous in float32, and go so, one for each of (outer, inner).
    const float* grad_out;     // (outer, inner, queries, width)
    const float* grad_lse;     // (outer, inner, queries)
    const float* grad_scores;  // (outer, inner, queries, keys), instead of the two above
    float *grad_query, *grad_key, *grad_value, *grad_v;
};
