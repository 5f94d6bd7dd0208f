// Lanes: one vector of floats, at each instruction set. All else is written once, over Lanes.
//
// Everything here and in the other headers is in an anonymous namespace: the file is compiled once per instruction
// set, and a function shared by name would let the linker put AVX-512 code into the baseline.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)

struct Lanes {
    static constexpr int width = 16;
    __m512 x;
};

inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.x); }
inline Lanes splat(float a) { return {_mm512_set1_ps(a)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Lanes fnma(Lanes a, Lanes b, Lanes c) { return {_mm512_fnmadd_ps(a.x, b.x, c.x)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.x, b.x)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Lanes abs(Lanes a) { return {_mm512_abs_ps(a.x)}; }
inline Lanes round(Lanes a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes times_two_to(Lanes a, Lanes k) { return {_mm512_scalef_ps(a.x, k.x)}; }
inline Lanes where_greater(Lanes a, Lanes b, Lanes yes, Lanes no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ), no.x, yes.x)};
}
inline Lanes reciprocal(Lanes a) {  // for |a| in 1 .. 2^126: 14 bits, and a step of Newton's
    Lanes r = {_mm512_rcp14_ps(a.x)};
    return fma(r, fnma(a, r, splat(1.0f)), r);
}
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.x); }
inline float largest(Lanes a) { return _mm512_reduce_max_ps(a.x); }

inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// 32-bit words in lanes of 64 bits, whose upper halves mean nothing.
struct Words {
    static constexpr int width = 8;
    __m512i x;
};

inline Words load(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(uint64_t* p, Words a) { _mm512_storeu_si512(p, a.x); }
inline Words words(uint64_t a) { return {_mm512_set1_epi64(static_cast<long long>(a))}; }
inline Words operator*(Words a, Words b) { return {_mm512_mul_epu32(a.x, b.x)}; }  // all 64 bits of the product
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.x, b.x)}; }
inline Words upper(Words a) { return {_mm512_srli_epi64(a.x, 32)}; }
inline Words side_by_side(Words low, Words high) {
    return {_mm512_mask_blend_epi32(0xaaaa, low.x, _mm512_slli_epi64(high.x, 32))};
}

#elif defined(__AVX2__)

struct Lanes {
    static constexpr int width = 8;
    __m256 x;
};

inline Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a.x); }
inline Lanes splat(float a) { return {_mm256_set1_ps(a)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.x, b.x)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
inline Lanes fnma(Lanes a, Lanes b, Lanes c) { return {_mm256_fnmadd_ps(a.x, b.x, c.x)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.x, b.x)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.x, b.x)}; }
inline Lanes abs(Lanes a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.x)}; }
inline Lanes round(Lanes a) { return {_mm256_round_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes times_two_to(Lanes a, Lanes k) {  // for k in -126 .. 127, or NaN
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k.x), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.x, _mm256_castsi256_ps(bits))};
}
inline Lanes where_greater(Lanes a, Lanes b, Lanes yes, Lanes no) {
    return {_mm256_blendv_ps(no.x, yes.x, _mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ))};
}
inline Lanes reciprocal(Lanes a) { return splat(1.0f) / a; }
inline float sum(Lanes a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Lanes a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline void prefetch(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

struct Words {
    static constexpr int width = 4;
    __m256i x;
};

inline Words load(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store(uint64_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.x); }
inline Words words(uint64_t a) { return {_mm256_set1_epi64x(static_cast<long long>(a))}; }
inline Words operator*(Words a, Words b) { return {_mm256_mul_epu32(a.x, b.x)}; }
inline Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.x, b.x)}; }
inline Words upper(Words a) { return {_mm256_srli_epi64(a.x, 32)}; }
inline Words side_by_side(Words low, Words high) {
    return {_mm256_blend_epi32(low.x, _mm256_slli_epi64(high.x, 32), 0xaa)};
}

#else  // whatever the compiler makes of loops over four floats: SSE, NEON

struct Lanes {
    static constexpr int width = 4;
    float x[4];
};

#define REGARD_EACH(expression)                           \
    Lanes result;                                         \
    for (int n = 0; n < 4; ++n) result.x[n] = expression; \
    return result

inline Lanes load(const float* p) { REGARD_EACH(p[n]); }
inline void store(float* p, Lanes a) {
    for (int n = 0; n < 4; ++n) p[n] = a.x[n];
}
inline Lanes splat(float a) { REGARD_EACH(a); }
inline Lanes operator+(Lanes a, Lanes b) { REGARD_EACH(a.x[n] + b.x[n]); }
inline Lanes operator-(Lanes a, Lanes b) { REGARD_EACH(a.x[n] - b.x[n]); }
inline Lanes operator*(Lanes a, Lanes b) { REGARD_EACH(a.x[n] * b.x[n]); }
inline Lanes operator/(Lanes a, Lanes b) { REGARD_EACH(a.x[n] / b.x[n]); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { REGARD_EACH(a.x[n] * b.x[n] + c.x[n]); }
inline Lanes fnma(Lanes a, Lanes b, Lanes c) { REGARD_EACH(c.x[n] - a.x[n] * b.x[n]); }
inline Lanes min(Lanes a, Lanes b) { REGARD_EACH(a.x[n] < b.x[n] ? a.x[n] : b.x[n]); }
inline Lanes max(Lanes a, Lanes b) { REGARD_EACH(a.x[n] > b.x[n] ? a.x[n] : b.x[n]); }
inline Lanes abs(Lanes a) { REGARD_EACH(a.x[n] < 0 ? -a.x[n] : a.x[n]); }
inline Lanes round(Lanes a) { REGARD_EACH((a.x[n] + 12582912.0f) - 12582912.0f); }  // 1.5 · 2^23, for |a| < 2^22
inline Lanes times_two_to(Lanes a, Lanes k) {                                       // for k in -126 .. 127, or NaN
    Lanes result;
    for (int n = 0; n < 4; ++n) {
        int32_t bits = (static_cast<int32_t>(k.x[n] < 127.0f ? k.x[n] : 127.0f) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, 4);
        result.x[n] = a.x[n] * power;
    }
    return result;
}
inline Lanes where_greater(Lanes a, Lanes b, Lanes yes, Lanes no) { REGARD_EACH(a.x[n] > b.x[n] ? yes.x[n] : no.x[n]); }
inline Lanes reciprocal(Lanes a) { return splat(1.0f) / a; }
inline float sum(Lanes a) { return (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]); }
inline float largest(Lanes a) {
    Lanes b = {{a.x[2], a.x[3], a.x[2], a.x[3]}};
    Lanes c = max(a, b);
    return c.x[0] > c.x[1] ? c.x[0] : c.x[1];
}

inline void prefetch(const float*) {}

struct Words {
    static constexpr int width = 1;
    uint64_t x;
};

inline Words load(const uint64_t* p) { return {*p}; }
inline void store(uint64_t* p, Words a) { *p = a.x; }
inline Words words(uint64_t a) { return {a}; }
inline Words operator*(Words a, Words b) { return {(a.x & 0xffffffff) * (b.x & 0xffffffff)}; }
inline Words operator^(Words a, Words b) { return {a.x ^ b.x}; }
inline Words upper(Words a) { return {a.x >> 32}; }
inline Words side_by_side(Words low, Words high) { return {(low.x & 0xffffffff) | high.x << 32}; }

#endif

// min and max give their second operand where either is NaN, at every level: what may be NaN goes second.

constexpr int W = Lanes::width;
constexpr int LINE = 16;  // floats in a line of the cache
constexpr int AHEAD = 8;  // steps that one row alone, which waits for memory, prefetches
constexpr float LOG2_E = 1.44269504088896341f;

// e^(x + rest), 0 below 2^-126 and inf above 2^128, to one unit in the last place; `rest` is what x was rounded by.
inline Lanes exponential(Lanes x, Lanes rest) {
    const Lanes lowest = splat(-87.3365f), highest = splat(88.7228f);
    Lanes clamped = min(highest, max(lowest, x));
    Lanes k = round(clamped * splat(LOG2_E));
    k = min(k, splat(127.0f));
    Lanes f = fnma(k, splat(0.693145752f), clamped);
    f = fnma(k, splat(1.42860677e-6f), f) + rest;
    Lanes p = splat(1.97902453e-4f);  // (e^f - 1 - f) / f^2 for |f| < 0.347, within 2^-34 of e^f
    p = fma(p, f, splat(1.39447593e-3f));
    p = fma(p, f, splat(8.33349768e-3f));
    p = fma(p, f, splat(4.16662954e-2f));
    p = fma(p, f, splat(1.66666657e-1f));
    p = fma(p, f, splat(0.5f));
    Lanes y = times_two_to(fma(p, f * f, f) + splat(1.0f), k);
    y = where_greater(lowest, x, splat(0.0f), y);
    return where_greater(x, highest, splat(INFINITY), y);
}

inline Lanes exponential(Lanes x) { return exponential(x, splat(0.0f)); }

// 2^x of N vectors, within 2^-23 of it, and 2^-126 below that and 2^60 above. Each step is done of all vectors before
// the next, which has to wait for it.
template <int N>
inline void powers_of_two(Lanes (&x)[N]) {
    Lanes k[N], p[N];
    for (int n = 0; n < N; ++n) x[n] = max(splat(-126.0f), min(splat(60.0f), x[n]));
    for (int n = 0; n < N; ++n) k[n] = round(x[n]);
    for (int n = 0; n < N; ++n) x[n] = x[n] - k[n];
    for (int n = 0; n < N; ++n) p[n] = fma(splat(1.32695551e-3f), x[n], splat(9.6712932e-3f));
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], x[n], splat(5.55071086e-2f));
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], x[n], splat(2.40222469e-1f));
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], x[n], splat(6.93147004e-1f));
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], x[n], splat(1.0f));
    for (int n = 0; n < N; ++n) x[n] = times_two_to(p[n], k[n]);
}

}  // namespace
