// Half precision in and out, memory, and the random numbers of dropout.
#pragma once

#include <cstddef>
#include <cstdlib>

#include "lanes.hpp"
#include "regard.h"

namespace {

constexpr int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }
template <class T> constexpr T least(T a, T b) { return a < b ? a : b; }
template <class T> constexpr T most(T a, T b) { return a > b ? a : b; }

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
        if (x.column == 1) std::memcpy(to, from, sizeof(float) * static_cast<size_t>(columns));
        else for (int n = 0; n < columns; ++n) to[n] = from[n * x.column];
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

// One allocation, aligned to cache lines, handed out in pieces. Sizes are asked first, with no memory behind it.
class Arena {
public:
    Arena() = default;
    explicit Arena(size_t bytes) : whole_(std::malloc(bytes + 64)) {
        if (whole_) next_ = static_cast<char*>(whole_) + (64 - reinterpret_cast<uintptr_t>(whole_) % 64);
    }
    ~Arena() { std::free(whole_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <class T> T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(next_);
        size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        used_ += bytes;
        if (next_) next_ += bytes;
        return piece;
    }
    explicit operator bool() const { return whole_ != nullptr; }
    size_t used() const { return used_; }

private:
    void* whole_ = nullptr;
    char* next_ = nullptr;
    size_t used_ = 0;
};

// Philox4x32-10 (Salmon et al. 2011) of the counters (block, row, map, 0) for 8 blocks at a time: 32 words in order.
inline void philox(uint32_t first_block, uint32_t row, uint32_t map, uint64_t seed, uint32_t* words) {
    constexpr int N = 8;
    uint32_t c0[N], c1[N], c2[N], c3[N];
    for (int n = 0; n < N; ++n) c0[n] = first_block + static_cast<uint32_t>(n), c1[n] = row, c2[n] = map, c3[n] = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int n = 0; n < N; ++n) {
            uint64_t first = static_cast<uint64_t>(c0[n]) * 0xD2511F53u, second = static_cast<uint64_t>(c2[n]) * 0xCD9E8D57u;
            c0[n] = static_cast<uint32_t>(second >> 32) ^ c1[n] ^ k0;
            c2[n] = static_cast<uint32_t>(first >> 32) ^ c3[n] ^ k1;
            c1[n] = static_cast<uint32_t>(second);
            c3[n] = static_cast<uint32_t>(first);
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int n = 0; n < N; ++n) words[4 * n] = c0[n], words[4 * n + 1] = c1[n], words[4 * n + 2] = c2[n], words[4 * n + 3] = c3[n];
}

}  // namespace
