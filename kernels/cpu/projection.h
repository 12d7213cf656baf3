// A projection of long rows to few numbers, z = phi . row, and its two gradients, for blocks of tokens kept in cache.
//
// phi (m, D) is packed as [D / CHUNK][m][CHUNK], and rows, which are float, lie a vector apart from a multiple of CHUNK:
// rows of D floats are often 4096 bytes apart, where they evict each other from the L1 cache.
#pragma once

#include "common.h"

#include <type_traits>

// What is accumulated at once: TILE tokens by ROWS rows of phi, TILE tokens by a CHUNK of a row, OUTER rows of phi by a
// CHUNK. With their operands these fill the 32 vector registers of AVX-512, or the 16 of AVX2.
#if defined(__AVX512F__)
constexpr i64 TILE = 6, OUTER = 4;
#else
constexpr i64 TILE = 2, OUTER = 2;
#endif
constexpr i64 ROWS = 4, SPAN = 4, CHUNK = SPAN * WIDTH;
constexpr i64 FORWARD_BLOCK = 6, BACKWARD_BLOCK = 18;  // tokens in the cache together, whole tiles of them

struct Projection {
    i64 m, D, width, stride;  // width = D to a whole chunk, stride from row to row
    floats packed;            // as many sums as this hold a gradient of phi

    Projection(i64 m, i64 D, const float* phi)
        : m(m), D(D), width((D + CHUNK - 1) / CHUNK * CHUNK), stride(width + WIDTH), packed(width * m) {
        for (i64 j = 0; j < m; j++)
            for (i64 d = 0; d < D; d += CHUNK)
                memcpy(&packed[d * m + j * CHUNK], phi + j * D + d, std::min(CHUNK, D - d) * sizeof(float));
    }

    void add_unpacked(const float* sums, float* phi) const {
        for (i64 j = 0; j < m; j++)
            for (i64 d = 0; d < D; d += CHUNK)
                sweep(std::min(CHUNK, D - d), [&](i64 c, auto part) {
                    float* to = phi + j * D + d + c;
                    store(to, load(to, part) + load(sums + d * m + j * CHUNK + c), part);
                });
    }

    // dphi and dbias from the sums of each chunk of tokens, added in order
    void add_chunks(i64 chunks, const floats& dphi_sums, const floats& dbias_sums, float* dphi, float* dbias) const {
        std::fill(dphi, dphi + m * D, 0.0f);
        std::fill(dbias, dbias + m, 0.0f);
        for (i64 chunk = 0; chunk < chunks; chunk++) {
            add_unpacked(&dphi_sums[chunk * packed.size()], dphi);
            for (i64 j = 0; j < m; j++) dbias[j] += dbias_sums[chunk * m + j];
        }
    }
};

// span(first row of phi, how many as a compile-time constant), MOST at a time
template <int MOST, class Span>
INLINE void row_groups(i64 m, Span&& span) {
    i64 j = 0;
    for (; j + MOST <= m; j += MOST) span(j, std::integral_constant<int, MOST>{});
    switch (m - j) {
        case 3: span(j, std::integral_constant<int, 3>{}); break;
        case 2: span(j, std::integral_constant<int, 2>{}); break;
        case 1: span(j, std::integral_constant<int, 1>{}); break;
    }
}

// dots[t][j] = <row t, phi row j> for TILE rows and M rows of phi from j on
template <int M>
INLINE void project_tile(const Projection& p, const float* rows, i64 j, float* dots) {
    const float* phi = p.packed.data() + j * CHUNK;
    vec acc[TILE][M] = {};
    for (i64 d = 0; d < p.width; d += CHUNK)
        for (i64 v = 0; v < CHUNK; v += WIDTH) {
            vec x[TILE];
            UNROLL
            for (int t = 0; t < TILE; t++) x[t] = load(rows + t * p.stride + d + v);
            UNROLL
            for (int q = 0; q < M; q++) {
                vec f = load(phi + d * p.m + q * CHUNK + v);
                KEEP(f);
                UNROLL
                for (int t = 0; t < TILE; t++) acc[t][q] += x[t] * f;
            }
        }
    UNROLL
    for (int t = 0; t < TILE; t++)
        UNROLL
        for (int q = 0; q < M; q++) dots[t * p.m + j + q] = sum(acc[t][q]);
}

// dots[t][j] = <row t, phi row j> for `count` rows, rounded up to whole tiles
inline void project(const Projection& p, i64 count, const float* rows, float* dots) {
    for (i64 t = 0; t < count; t += TILE)
        row_groups<ROWS>(p.m, [&](i64 j, auto M) {
            project_tile<decltype(M)::value>(p, rows + t * p.stride, j, dots + t * p.m);
        });
}

// dphi[j] += sum over `count` tokens of weight[t][j] * row t, for one chunk and M rows of phi
template <int M>
INLINE void outer_tile(const Projection& p, i64 count, const float* rows, const float* weights, float* dphi) {
    vec acc[M][SPAN];
    UNROLL
    for (int q = 0; q < M; q++)
        UNROLL
        for (int v = 0; v < SPAN; v++) acc[q][v] = load(dphi + q * CHUNK + v * WIDTH);
    for (i64 t = 0; t < count; t++) {
        vec x[SPAN];
        UNROLL
        for (int v = 0; v < SPAN; v++) {
            x[v] = load(rows + t * p.stride + v * WIDTH);
            KEEP(x[v]);
        }
        UNROLL
        for (int q = 0; q < M; q++) {
            vec w = splat(weights[t * p.m + q]);
            KEEP(w);
            UNROLL
            for (int v = 0; v < SPAN; v++) acc[q][v] += x[v] * w;
        }
    }
    UNROLL
    for (int q = 0; q < M; q++)
        UNROLL
        for (int v = 0; v < SPAN; v++) store(dphi + q * CHUNK + v * WIDTH, acc[q][v]);
}

// row t = sum_j weight[t][j] phi[j] + shrink[t] row t, for one chunk and TILE tokens
INLINE void project_back(const Projection& p, float* rows, const float* weights, const float* shrink,
                         const float* phi) {
    vec acc[TILE][SPAN];
    UNROLL
    for (int t = 0; t < TILE; t++)
        UNROLL
        for (int v = 0; v < SPAN; v++) acc[t][v] = load(rows + t * p.stride + v * WIDTH) * shrink[t];
    for (i64 j = 0; j < p.m; j++) {
        vec f[SPAN];
        UNROLL
        for (int v = 0; v < SPAN; v++) {
            f[v] = load(phi + j * CHUNK + v * WIDTH);
            KEEP(f[v]);
        }
        UNROLL
        for (int t = 0; t < TILE; t++) {
            vec w = splat(weights[t * p.m + j]);
            KEEP(w);
            UNROLL
            for (int v = 0; v < SPAN; v++) acc[t][v] += f[v] * w;
        }
    }
    UNROLL
    for (int t = 0; t < TILE; t++)
        UNROLL
        for (int v = 0; v < SPAN; v++) store(rows + t * p.stride + v * WIDTH, acc[t][v]);
}

// Uses a block's rows for the gradient of phi, and leaves in their place what reaches them through the projection.
inline void through_projection(const Projection& p, i64 count, float* rows, const float* weights, const float* shrink,
                               float* dphi) {
    for (i64 d = 0; d < p.width; d += CHUNK) {
        row_groups<OUTER>(p.m, [&](i64 j, auto M) {
            outer_tile<decltype(M)::value>(p, count, rows + d, weights + j, dphi + d * p.m + j * CHUNK);
        });
        for (i64 t = 0; t < count; t += TILE)
            project_back(p, rows + t * p.stride + d, weights + t * p.m, shrink + t, p.packed.data() + d * p.m);
    }
}
