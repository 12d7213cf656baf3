// What every CPU kernel shares: vectors of a register's width, loads and stores of float and bfloat16, sweeps with a tail,
// and a loop over tokens whose results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

typedef int64_t i64;
#if defined(__AVX512F__)
constexpr i64 WIDTH = 16;
#else
constexpr i64 WIDTH = 8;  // one register of AVX2; the compiler takes two of NEON or SSE
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits32 __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t bits16 __attribute__((vector_size(2 * WIDTH)));

struct bf16 {
    uint16_t bits;
};

// Scratch memory aligned to a vector: loads that straddle two cache lines take twice as long.
template <class T>
struct Aligned {
    typedef T value_type;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};
typedef std::vector<float, Aligned<float>> floats;

#define INLINE static inline __attribute__((always_inline))
// For loops over registers: left rolled, gcc keeps the accumulators in memory.
#define UNROLL _Pragma("GCC unroll 16")
// Keeps a vector in its register, where gcc would load it again for every use.
#if defined(__AVX__)
#define KEEP(v) asm("" : "+v"(v))
#else
#define KEEP(v)
#endif

// How much of a vector a load or store touches: all of it, or the first `count` elements at the end of a row.
struct Whole {};
struct Part {
    int count;
};

INLINE vec splat(float value) { return value - (vec){}; }

INLINE vec load(const float* p, Whole = {}) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec widen(bits16 raw) {
    bits32 wide = __builtin_convertvector(raw, bits32) << 16;
    vec v;
    memcpy(&v, &wide, sizeof v);
    return v;
}

INLINE vec load(const bf16* p, Whole = {}) {
    bits16 raw;
    memcpy(&raw, p, sizeof raw);
    return widen(raw);
}

INLINE vec load(const float* p, Part part) {
    vec v = {};
    memcpy(&v, p, part.count * sizeof *p);
    return v;
}

INLINE vec load(const bf16* p, Part part) {
    bits16 raw = {};
    memcpy(&raw, p, part.count * sizeof *p);
    return widen(raw);
}

// Round to nearest, ties to even; a NaN stays one.
INLINE bits16 narrow(vec v) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    __m512 wide;
    memcpy(&wide, &v, sizeof wide);
    __m256bh half = _mm512_cvtneps_pbh(wide);
    bits16 raw;
    memcpy(&raw, &half, sizeof raw);
    return raw;
#else
    bits32 u;
    memcpy(&u, &v, sizeof u);
    bits32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    bits32 is_nan = (bits32)((u & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), bits16);
#endif
}

// For rows read once, in order: fetches 8 KiB ahead, because hardware prefetchers stop at every 4 KiB page. Past the end
// of the array this fetches nothing.
template <class T, class P>
INLINE vec load_ahead(const T* p, P part) {
    __builtin_prefetch((const char*)p + 8192, 0, 3);
    return load(p, part);
}

INLINE void store(float* p, vec v, Whole = {}) { memcpy(p, &v, sizeof v); }

INLINE void store(bf16* p, vec v, Whole = {}) {
    bits16 raw = narrow(v);
    memcpy(p, &raw, sizeof raw);
}

INLINE void store(float* p, vec v, Part part) { memcpy(p, &v, part.count * sizeof *p); }

INLINE void store(bf16* p, vec v, Part part) {
    bits16 raw = narrow(v);
    memcpy(p, &raw, part.count * sizeof *p);
}

// Stores that go past the cache: no line is read before it is overwritten, which saves a third of the traffic when the
// result is too large to be found in the cache anyway. `p` must be aligned (`streams_past_cache`).
INLINE void store_past(float* p, vec v, Whole = {}) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(p, (__m256)v);
#else
    store(p, v);
#endif
}

INLINE void store_past(bf16* p, vec v, Whole = {}) {
#if defined(__AVX512F__)
    bits16 raw = narrow(v);
    __m256i half;
    memcpy(&half, &raw, sizeof half);
    _mm256_stream_si256((__m256i*)p, half);
#elif defined(__AVX__)
    bits16 raw = narrow(v);
    __m128i half;
    memcpy(&half, &raw, sizeof half);
    _mm_stream_si128((__m128i*)p, half);
#else
    store(p, v);
#endif
}

template <class T>
INLINE void store_past(T* p, vec v, Part part) {
    store(p, v, part);
}

template <bool PAST, class T, class P>
INLINE void store_maybe_past(T* p, vec v, P part) {
    if constexpr (PAST)
        store_past(p, v, part);
    else
        store(p, v, part);
}

// Whether rows of `row` elements at p, `count` of them, are aligned and larger than a core's share of the cache.
template <class T>
INLINE bool streams_past_cache(const T* p, i64 row, i64 count) {
    return (uintptr_t)p % (WIDTH * sizeof(T)) == 0 && row % WIDTH == 0 && row * count * (i64)sizeof(T) >= 4 << 20;
}

// Adds halves, so that it stays in registers.
INLINE float sum(vec v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    eight halves[WIDTH / 8];
    memcpy(halves, &v, sizeof halves);
    eight half = WIDTH == 16 ? halves[0] + halves[WIDTH / 8 - 1] : halves[0];
    four quarters[2];
    memcpy(quarters, &half, sizeof quarters);
    four q = quarters[0] + quarters[1];
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// body(offset, Whole or Part) over a row of n elements.
template <class Body>
INLINE void sweep(i64 n, Body&& body) {
    i64 i = 0;
    for (; i + WIDTH <= n; i += WIDTH) body(i, Whole{});
    if (i < n) body(i, Part{(int)(n - i)});
}

INLINE i64 padded(i64 n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

INLINE float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// e^x to 1e-7: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). Adding 1.5 * 2^23 rounds to a whole number
// and leaves it in the low bits. A NaN stays one.
INLINE vec exp(vec x) {
    vec low = splat(-87.0f), high = splat(88.0f);
    x = low > x ? low : x;
    x = high < x ? high : x;
    vec shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    bits32 exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 127) << 23;
    vec power;
    memcpy(&power, &exponent, sizeof power);
    return p * power;
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

// body(chunk, first, last) over `items` cut into `chunks` equal runs. The cut does not depend on the number of
// threads, so sums kept per chunk and added in order are the same for any number.
template <class Body>
void parallel(i64 items, i64 chunks, i64 threads, Body&& body) {
    i64 size = (items + chunks - 1) / chunks;
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        i64 first = std::min(chunk * size, items), last = std::min(first + size, items);
        if (first < last) body(chunk, first, last);
    }
}

// Chunks for `tokens`: enough to share between cores, few enough that per-chunk sums stay cheap.
INLINE i64 chunks_for(i64 tokens) { return std::clamp<i64>(tokens / 256, 1, 16); }

#define FOR_DTYPE(code, ...)         \
    if (code == 0) {                 \
        typedef float T;             \
        __VA_ARGS__;                 \
    } else {                         \
        typedef bf16 T;              \
        __VA_ARGS__;                 \
    }
