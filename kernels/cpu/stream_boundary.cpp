// stream_boundary: formulas, shapes and sources are in kernels/stream_boundary.py.
//
// Tokens go in blocks small enough for the L2 cache, so that X, y, gX, gu, X', dX and dy each cross the memory bus
// once. Inside a block everything is float; the streams are a run-time loop, because in the Walsh basis they never mix.
#include "common.h"

#include <type_traits>

namespace {

// Whole tiles a block; TILE * ROWS accumulators and their operands fill the 32 vector registers.
constexpr i64 FORWARD_BLOCK = 6, BACKWARD_BLOCK = 18, TILE = 6, ROWS = 4;

// The projection and its gradient are packed as [D / CHUNK][m][CHUNK], and rows of X' are a vector apart from a multiple
// of CHUNK: rows of n C floats are often 4096 bytes apart, where they evict each other from the L1 cache.
constexpr i64 CHUNK = 4 * WIDTH;

struct Shape {
    i64 tokens, n, C, factors, m, D, width, stride;  // m = 2 n + factors logits, D = n C, width = D to a whole chunk
    float scale;                                     // of the orthonormal Walsh transform

    Shape(i64 tokens, i64 n, i64 C) : tokens(tokens), n(n), C(C), factors(0) {
        while ((i64)1 << factors < n) factors++;
        m = 2 * n + factors;
        D = n * C;
        width = (D + CHUNK - 1) / CHUNK * CHUNK;
        stride = width + WIDTH;
        scale = 1.0f / std::sqrt((float)n);
    }
};

// In place, orthonormal.
INLINE void walsh(const Shape& s, float* x) {
    for (i64 half = 1; half < s.n; half *= 2)
        for (i64 base = 0; base < s.n; base += 2 * half)
            for (i64 i = base; i < base + half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    for (i64 i = 0; i < s.n; i++) x[i] *= s.scale;
}

// decay[S] = product over the factors k in S of (2 p[k] - 1); the first factor is the highest bit of S
INLINE void decay_of(const Shape& s, const float* p, float* decay) {
    decay[0] = 1;
    for (i64 bit = 0; bit < s.factors; bit++) {
        float e = 2 * p[s.factors - 1 - bit] - 1;
        for (i64 low = 0; low < (i64)1 << bit; low++) decay[low | (i64)1 << bit] = decay[low] * e;
    }
}

// d loss / d p[k] from d loss / d decay: the doubling above, backwards. `gdecay` is used up.
INLINE void decay_gradient(const Shape& s, const float* p, const float* decay, float* gdecay, float* gp) {
    for (i64 bit = s.factors - 1; bit >= 0; bit--) {
        i64 k = s.factors - 1 - bit;
        float total = 0, e = 2 * p[k] - 1;
        for (i64 low = 0; low < (i64)1 << bit; low++) {
            float g = gdecay[low | (i64)1 << bit];
            total += g * decay[low];
            gdecay[low] += g * e;
        }
        gp[k] = 2 * total;
    }
}

void pack(const Shape& s, const float* phi, float* packed) {
    for (i64 j = 0; j < s.m; j++)
        for (i64 d = 0; d < s.D; d += CHUNK)
            memcpy(packed + d * s.m + j * CHUNK, phi + j * s.D + d, std::min(CHUNK, s.D - d) * sizeof(float));
}

void add_unpacked(const Shape& s, const float* packed, float* phi) {
    for (i64 j = 0; j < s.m; j++)
        for (i64 d = 0; d < s.D; d++) phi[j * s.D + d] += packed[d / CHUNK * CHUNK * s.m + j * CHUNK + d % CHUNK];
}

// Token t's X' as a float row: decay X + post y, or X where there is no y; each(stream, offset, X', part) sees it go
// by. Fetches the same rows of token `ahead`, because a block's work in between hides the way from memory.
template <class T, class Each>
INLINE void write_streams(const Shape& s, i64 t, i64 ahead, const T* X, const T* y, const float* coefficients,
                          float* row, Each&& each) {
    for (i64 i = 0; i < s.n; i++) {
        const T *x = X + t * s.D + i * s.C, *next = X + ahead * s.D + i * s.C;
        float* to = row + i * s.C;
        if (!y) {
            sweep(s.C, [&](i64 c, auto part) {
                __builtin_prefetch(next + c, 0, 2);
                vec v = load(x + c, part);
                store(to + c, v, part);
                each(i, c, v, part);
            });
            continue;
        }
        const T *f = y + t * s.C, *next_f = y + ahead * s.C;
        float post = coefficients[t * 2 * s.n + i], decay = coefficients[t * 2 * s.n + s.n + i];
        sweep(s.C, [&](i64 c, auto part) {
            __builtin_prefetch(next + c, 0, 2);
            if (!i) __builtin_prefetch(next_f + c, 0, 2);
            vec v = load(x + c, part) * decay + load(f + c, part) * post;
            store(to + c, v, part);
            each(i, c, v, part);
        });
    }
}

// dots[t][j] = <row t, phi row j> for TILE rows and M phi rows from j on
template <int M>
INLINE void project_tile(const Shape& s, const float* rows, const float* phi, i64 j, float* dots) {
    vec acc[TILE][M] = {};
    for (i64 d = 0; d < s.width; d += CHUNK)
        for (i64 v = 0; v < CHUNK; v += WIDTH) {
            vec x[TILE];
            UNROLL
            for (int t = 0; t < TILE; t++) x[t] = load(rows + t * s.stride + d + v);
            UNROLL
            for (int q = 0; q < M; q++) {
                vec p = load(phi + d * s.m + (j + q) * CHUNK + v);
                KEEP(p);
                UNROLL
                for (int t = 0; t < TILE; t++) acc[t][q] += x[t] * p;
            }
        }
    UNROLL
    for (int t = 0; t < TILE; t++)
        UNROLL
        for (int q = 0; q < M; q++) dots[t * s.m + j + q] = sum(acc[t][q]);
}

// span(first row of phi, how many as a compile-time constant), ROWS at a time
template <class Span>
INLINE void row_groups(i64 m, Span&& span) {
    i64 j = 0;
    for (; j + ROWS <= m; j += ROWS) span(j, std::integral_constant<int, ROWS>{});
    switch (m - j) {
        case 3: span(j, std::integral_constant<int, 3>{}); break;
        case 2: span(j, std::integral_constant<int, 2>{}); break;
        case 1: span(j, std::integral_constant<int, 1>{}); break;
    }
}

void project(const Shape& s, const float* rows, const float* phi, float* dots) {
    row_groups(s.m, [&](i64 j, auto M) { project_tile<decltype(M)::value>(s, rows, phi, j, dots); });
}

// gate = sigmoid(z + bias) for `count` tokens
INLINE void gates(const Shape& s, i64 count, const float* z, const float* bias, float* gate) {
    for (i64 k = 0; k < count; k++)
        for (i64 j = 0; j < s.m; j++) gate[k * s.m + j] = z[k * s.m + j] + bias[j];
    sweep(count * s.m, [&](i64 i, auto part) { store(gate + i, sigmoid(load(gate + i, part)), part); });
}

template <bool PAST, class T>
void forward(const Shape& s, i64 threads, const T* X, const T* y, const float* coefficients, const float* phi_rows,
             const float* bias, float eps, T* out, T* u, float* next, float* z, float* r) {
    floats phi(s.width * s.m);
    pack(s, phi_rows, phi.data());
    parallel(s.tokens, chunks_for(s.tokens), threads, [&](i64, i64 first, i64 last) {
        floats rows(FORWARD_BLOCK * s.stride), gate(FORWARD_BLOCK * s.m);
        for (i64 start = first; start < last; start += FORWARD_BLOCK) {
            i64 count = std::min(FORWARD_BLOCK, last - start);
            for (i64 k = 0; k < count; k++) {
                i64 t = start + k;
                vec squares = {};
                write_streams(s, t, std::min(t + FORWARD_BLOCK, last - 1), X, y, coefficients, &rows[k * s.stride],
                              [&](i64 i, i64 c, vec v, auto part) {
                                  squares += v * v;
                                  if (!y) return;
                                  store_maybe_past<PAST>(out + t * s.D + i * s.C + c, v, part);
                              });
                r[t] = 1.0f / std::sqrt(sum(squares) / s.D + eps);
            }
            for (i64 k = 0; k < count; k += TILE) project(s, &rows[k * s.stride], phi.data(), &gate[k * s.m]);
            for (i64 k = 0; k < count; k++)
                for (i64 j = 0; j < s.m; j++) z[(start + k) * s.m + j] = gate[k * s.m + j] * r[start + k];
            gates(s, count, z + start * s.m, bias, gate.data());
            for (i64 k = 0; k < count; k++) {
                i64 t = start + k;
                const float* row = &rows[k * s.stride];
                float *pre = &gate[k * s.m], *post = next + t * 2 * s.n;
                walsh(s, pre);
                for (i64 i = 0; i < s.n; i++) post[i] = 2 * pre[s.n + i];
                walsh(s, post);
                decay_of(s, pre + 2 * s.n, post + s.n);
                sweep(s.C, [&](i64 c, auto part) {
                    vec total = {};
                    for (i64 i = 0; i < s.n; i++) total += load(row + i * s.C + c, part) * pre[i];
                    store(u + t * s.C + c, total, part);
                });
            }
        }
    });
}

// dphi[j] += sum over the block's tokens of weight[t][j] * row t, for one chunk and M rows of phi
template <int M>
INLINE void outer_tile(const Shape& s, i64 count, const float* rows, const float* weights, float* dphi) {
    constexpr int N = CHUNK / WIDTH;
    vec acc[M][N];
    UNROLL
    for (int q = 0; q < M; q++)
        UNROLL
        for (int v = 0; v < N; v++) acc[q][v] = load(dphi + q * CHUNK + v * WIDTH);
    for (i64 t = 0; t < count; t++) {
        vec x[N];
        UNROLL
        for (int v = 0; v < N; v++) x[v] = load(rows + t * s.stride + v * WIDTH);
        UNROLL
        for (int q = 0; q < M; q++) {
            vec w = splat(weights[t * s.m + q]);
            KEEP(w);
            UNROLL
            for (int v = 0; v < N; v++) acc[q][v] += x[v] * w;
        }
    }
    UNROLL
    for (int q = 0; q < M; q++)
        UNROLL
        for (int v = 0; v < N; v++) store(dphi + q * CHUNK + v * WIDTH, acc[q][v]);
}

// row t = sum_j weight[t][j] phi[j] + shrink[t] row t, for one chunk and TILE tokens
INLINE void project_back(const Shape& s, float* rows, const float* weights, const float* shrink, const float* phi) {
    constexpr int N = CHUNK / WIDTH;
    vec acc[TILE][N];
    UNROLL
    for (int t = 0; t < TILE; t++)
        UNROLL
        for (int v = 0; v < N; v++) acc[t][v] = load(rows + t * s.stride + v * WIDTH) * shrink[t];
    for (i64 j = 0; j < s.m; j++) {
        vec p[N];
        UNROLL
        for (int v = 0; v < N; v++) p[v] = load(phi + j * CHUNK + v * WIDTH);
        UNROLL
        for (int t = 0; t < TILE; t++) {
            vec w = splat(weights[t * s.m + j]);
            KEEP(w);
            UNROLL
            for (int v = 0; v < N; v++) acc[t][v] += p[v] * w;
        }
    }
    UNROLL
    for (int t = 0; t < TILE; t++)
        UNROLL
        for (int v = 0; v < N; v++) store(rows + t * s.stride + v * WIDTH, acc[t][v]);
}

// Uses a block's rows of X' for the gradient of phi, and leaves in their place what reaches X' through the projection.
void through_projection(const Shape& s, i64 count, float* rows, const float* weights, const float* shrink,
                        const float* phi, float* dphi) {
    for (i64 d = 0; d < s.width; d += CHUNK) {
        row_groups(s.m, [&](i64 j, auto M) {
            outer_tile<decltype(M)::value>(s, count, rows + d, weights + j, dphi + d * s.m + j * CHUNK);
        });
        for (i64 k = 0; k < count; k += TILE)
            project_back(s, rows + k * s.stride + d, weights + k * s.m, shrink + k, phi + d * s.m);
    }
}

// Token t's last step: G = gX + pre gu + back is the gradient of X'; those of X, y and the coefficients follow from
// it. Without y, X' is X and gX reaches it on its own way.
template <bool PAST, class T>
INLINE void finish(const Shape& s, i64 t, const T* gX, const T* gu, const float* pre, const float* back, const T* X,
                   const T* y, const float* coefficients, T* dX, T* dy, float* dcoefficients, float* dy_row) {
    const T* g = gu + t * s.C;
    for (i64 i = 0; i < s.n; i++) {
        i64 at = t * s.D + i * s.C;
        const float* b = back + i * s.C;
        float p = pre[i];
        if (!y) {
            sweep(s.C, [&](i64 c, auto part) { store(dX + at + c, load(g + c, part) * p + load(b + c, part), part); });
            continue;
        }
        i64 own = t * 2 * s.n + i;
        float post = coefficients[own], decay = coefficients[own + s.n];
        vec on_post = {}, on_decay = {};
        sweep(s.C, [&](i64 c, auto part) {
            vec G = load(gX + at + c, part) + load(g + c, part) * p + load(b + c, part);
            on_post += G * load(y + t * s.C + c, part);
            on_decay += G * load(X + at + c, part);
            vec total = G * post;
            if (i) total += load(dy_row + c);
            store_maybe_past<PAST>(dX + at + c, G * decay, part);
            if (i + 1 < s.n)
                store(dy_row + c, total);
            else
                store(dy + t * s.C + c, total, part);
        });
        dcoefficients[own] = sum(on_post);
        dcoefficients[own + s.n] = sum(on_decay);
    }
}

template <bool PAST, class T>
void backward(const Shape& s, i64 threads, const T* gX, const T* gu, const float* gnext, const T* X, const T* y,
              const float* coefficients, const float* phi_rows, const float* bias, const float* z, const float* r,
              T* dX, T* dy, float* dcoefficients, float* dphi, float* dbias) {
    floats phi(s.width * s.m);
    pack(s, phi_rows, phi.data());
    i64 chunks = chunks_for(s.tokens), partial = s.m * s.width;
    floats dphi_sums(chunks * partial), dbias_sums(chunks * s.m);
    parallel(s.tokens, chunks, threads, [&](i64 chunk, i64 first, i64 last) {
        float *dphi_sum = &dphi_sums[chunk * partial], *dbias_sum = &dbias_sums[chunk * s.m];
        floats rows(BACKWARD_BLOCK * s.stride), dy_row(padded(s.C)), gdecay(s.n), decay(s.n);
        floats pre(BACKWARD_BLOCK * s.n), weights(BACKWARD_BLOCK * s.m), shrink(BACKWARD_BLOCK);
        floats gate(BACKWARD_BLOCK * s.m), dgate(s.m);
        for (i64 start = first; start < last; start += BACKWARD_BLOCK) {
            i64 count = std::min(BACKWARD_BLOCK, last - start);
            gates(s, count, z + start * s.m, bias, gate.data());
            for (i64 k = 0; k < count; k++) {
                i64 t = start + k;
                float *row = &rows[k * s.stride], *p = &gate[k * s.m + 2 * s.n];
                i64 ahead = std::min(t + BACKWARD_BLOCK, last - 1);
                const T *g = gu + t * s.C, *next_g = gu + ahead * s.C, *wanted_last = gX + t * s.D;
                vec along_u = {};
                write_streams(s, t, ahead, X, y, coefficients, row,
                              [&](i64 i, i64 c, vec v, auto part) {
                                  if (y) __builtin_prefetch(wanted_last + i * s.C + c, 0, 2);
                                  if (!i) __builtin_prefetch(next_g + c, 0, 2);
                                  along_u += v * load(g + c, part);
                                  if (c + WIDTH < s.C) return;
                                  dgate[i] = sum(along_u);
                                  along_u = vec{};
                              });
                for (i64 i = 0; i < s.n; i++) {
                    dgate[s.n + i] = 2 * gnext[t * 2 * s.n + i];
                    gdecay[i] = gnext[t * 2 * s.n + s.n + i];
                }
                walsh(s, &dgate[0]);
                walsh(s, &dgate[s.n]);
                decay_of(s, p, decay.data());
                decay_gradient(s, p, decay.data(), gdecay.data(), &dgate[2 * s.n]);
                float along = 0;
                for (i64 j = 0; j < s.m; j++) {
                    float g = gate[k * s.m + j], dz = dgate[j] * g * (1 - g);
                    along += dz * z[t * s.m + j];
                    dbias_sum[j] += dz;
                    weights[k * s.m + j] = r[t] * dz;
                }
                shrink[k] = -along * r[t] * r[t] / s.D;
                std::copy_n(&gate[k * s.m], s.n, &pre[k * s.n]);
                walsh(s, &pre[k * s.n]);
            }
            through_projection(s, count, rows.data(), weights.data(), shrink.data(), phi.data(), dphi_sum);
            for (i64 k = 0; k < count; k++)
                finish<PAST>(s, start + k, gX, gu, &pre[k * s.n], &rows[k * s.stride], X, y, coefficients, dX, dy,
                             dcoefficients, dy_row.data());
        }
    });
    std::fill(dphi, dphi + s.m * s.D, 0.0f);
    std::fill(dbias, dbias + s.m, 0.0f);
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        add_unpacked(s, &dphi_sums[chunk * partial], dphi);
        for (i64 j = 0; j < s.m; j++) dbias[j] += dbias_sums[chunk * s.m + j];
    }
}

}  // namespace

extern "C" {

void stream_boundary_forward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* X, const void* y,
                             const float* coefficients, const float* phi, const float* bias, double eps, void* out,
                             void* u, float* next, float* z, float* r) {
    Shape s(tokens, n, C);
    FOR_DTYPE(dtype, {
        auto run = out && streams_past_cache((T*)out, C, n * tokens) ? forward<true, T> : forward<false, T>;
        run(s, threads, (const T*)X, (const T*)y, coefficients, phi, bias, (float)eps, (T*)out, (T*)u, next, z, r);
    })
}

void stream_boundary_backward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* gX, const void* gu,
                              const float* gnext, const void* X, const void* y, const float* coefficients,
                              const float* phi, const float* bias, const float* z, const float* r, void* dX, void* dy,
                              float* dcoefficients, float* dphi, float* dbias) {
    Shape s(tokens, n, C);
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)dX, C, n * tokens) ? backward<true, T> : backward<false, T>;
        run(s, threads, (const T*)gX, (const T*)gu, gnext, (const T*)X, (const T*)y, coefficients, phi, bias, z, r,
            (T*)dX, (T*)dy, dcoefficients, dphi, dbias);
    })
}
}
