// Half precision in and out, memory, and the random numbers of dropout.
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "lanes.hpp"
#include "regard.h"

namespace {

constexpr int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }
template <class T>
constexpr T least(T a, T b) {
    return a < b ? a : b;
}
template <class T>
constexpr T most(T a, T b) {
    return a > b ? a : b;
}

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float from_bfloat16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

inline float from_float16(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
    float x = from_bits(magnitude << 13) * 5.192296858534828e33f;  // 2^112, which normalises what is subnormal too
    uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0u;
    return from_bits(to_bits(x) | sign | special);
}

inline uint16_t to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays one
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_float16(float x) {
    uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 2^16 or more
    if (magnitude < 0x38800000) {  // subnormal: adding 1/2 leaves the rounded count of 2^-24 in the last bits
        uint32_t count = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
        return static_cast<uint16_t>(sign | count);
    }
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

// Row `row` of (o, h) as floats: columns of them, then zeros up to `padded`.
inline void read_row(const regard_tensor& x, int64_t o, int64_t h, int64_t row, int columns, int padded, float* to) {
    int64_t at = o * x.outer + h * x.inner + row * x.row;
    if (x.dtype == REGARD_FLOAT32) {
        const float* from = static_cast<const float*>(x.data) + at;
        if (x.column == 1)
            std::memcpy(to, from, sizeof(float) * static_cast<size_t>(columns));
        else
            for (int n = 0; n < columns; ++n) to[n] = from[n * x.column];
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(x.data) + at;
        if (x.dtype == REGARD_BFLOAT16) {
            for (int n = 0; n < columns; ++n) to[n] = from_bfloat16(from[n * x.column]);
        } else {
            for (int n = 0; n < columns; ++n) to[n] = from_float16(from[n * x.column]);
        }
    }
    for (int n = columns; n < padded; ++n) to[n] = 0.0f;
}

// The same row, where it is if it can be read there, or else in `to`.
inline const float* row_of(const regard_tensor& x, int64_t o, int64_t h, int64_t row, int columns, int padded,
                           float* to) {
    if (x.dtype == REGARD_FLOAT32 && x.column == 1 && columns == padded)
        return static_cast<const float*>(x.data) + o * x.outer + h * x.inner + row * x.row;
    read_row(x, o, h, row, columns, padded, to);
    return to;
}

inline void write_row(const regard_tensor& x, int64_t o, int64_t h, int64_t row, int columns, const float* from) {
    int64_t at = o * x.outer + h * x.inner + row * x.row;
    if (x.dtype == REGARD_FLOAT32) {
        float* to = static_cast<float*>(x.data) + at;
        for (int n = 0; n < columns; ++n) to[n * x.column] = from[n];
    } else {
        uint16_t* to = static_cast<uint16_t*>(x.data) + at;
        for (int n = 0; n < columns; ++n)
            to[n * x.column] = x.dtype == REGARD_BFLOAT16 ? to_bfloat16(from[n]) : to_float16(from[n]);
    }
}

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t GAP = 64;  // between pieces, so that the sanitizer sees who leaves his own
#else
constexpr size_t GAP = 0;
#define ASAN_POISON_MEMORY_REGION(start, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) static_cast<void>(0)
#endif

// One allocation in pieces, each aligned to cache lines. `lay_out` takes them, twice: first to find how much they are.
// False where there was no memory for them.
class Arena {
public:
    template <class LayOut>
    explicit Arena(LayOut lay_out) {
        lay_out(*this);
        size_ = used_ + ALIGNMENT;
        whole_ = std::malloc(size_);
        if (!whole_) return;
        used_ = ALIGNMENT - reinterpret_cast<uintptr_t>(whole_) % ALIGNMENT;
        lay_out(*this);
    }
    ~Arena() {
        if (whole_) ASAN_UNPOISON_MEMORY_REGION(whole_, size_);
        std::free(whole_);
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    explicit operator bool() const { return whole_ != nullptr; }

    template <class T>
    T* take(int64_t count) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(T),
                     whole = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + GAP;
        char* piece = whole_ ? static_cast<char*>(whole_) + used_ : nullptr;
        if (piece) ASAN_POISON_MEMORY_REGION(piece + bytes, whole - bytes);
        used_ += whole;
        return reinterpret_cast<T*>(piece);
    }

private:
    static constexpr size_t ALIGNMENT = LINE * sizeof(float);
    void* whole_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

// Philox4x32-10 (Salmon et al. 2011) of the counters (block, row, map, 0) for 8 blocks from first_block on: 32 words.
inline void philox(uint64_t first_block, uint32_t row, uint32_t map, uint64_t seed, uint32_t* to) {
    constexpr int BLOCKS = 8;
    uint64_t blocks[BLOCKS], first_words[BLOCKS], last_words[BLOCKS];
    for (int n = 0; n < BLOCKS; ++n) blocks[n] = first_block + static_cast<uint64_t>(n);
    for (int n = 0; n < BLOCKS; n += Words::width) {
        Words c0 = load(blocks + n), c1 = words(row), c2 = words(map), c3 = words(0);
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const Words first = c0 * words(0xD2511F53u), second = c2 * words(0xCD9E8D57u);
            c0 = upper(second) ^ c1 ^ words(k0), c1 = second;
            c2 = upper(first) ^ c3 ^ words(k1), c3 = first;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        store(first_words + n, side_by_side(c0, c1));
        store(last_words + n, side_by_side(c2, c3));
    }
    uint64_t pairs[2 * BLOCKS];
    for (int n = 0; n < BLOCKS; ++n) pairs[2 * n] = first_words[n], pairs[2 * n + 1] = last_words[n];
    for (int n = 0; n < 2 * BLOCKS; ++n) {
        to[2 * n] = static_cast<uint32_t>(pairs[n]);
        to[2 * n + 1] = static_cast<uint32_t>(pairs[n] >> 32);
    }
}

}  // namespace
