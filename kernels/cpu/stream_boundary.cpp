// stream_boundary: formulas, shapes and sources are in kernels/stream_boundary.py.
//
// Tokens go in blocks small enough for the L2 cache, so that X, y, gX, gu, X', dX and dy each cross the memory bus
// once. Inside a block everything is float; the streams are a run-time loop, because in the Walsh basis they never mix.
#include "common.h"

namespace {

constexpr i64 FORWARD_BLOCK = 8, BACKWARD_BLOCK = 16, TILE = 4, ROWS = 5;

struct Shape {
    i64 tokens, n, C, factors, m, D, width;  // m = 2 n + factors logits, D = n C, width = D to a whole vector

    Shape(i64 tokens, i64 n, i64 C) : tokens(tokens), n(n), C(C), factors(0) {
        while ((i64)1 << factors < n) factors++;
        m = 2 * n + factors;
        D = n * C;
        width = padded(D);
    }
};

// In place, orthonormal.
void walsh(float* x, i64 n) {
    for (i64 half = 1; half < n; half *= 2)
        for (i64 i = 0; i < n; i++)
            if (!(i & half)) {
                float a = x[i], b = x[i | half];
                x[i] = a + b;
                x[i | half] = a - b;
            }
    float scale = 1.0f / std::sqrt((float)n);
    for (i64 i = 0; i < n; i++) x[i] *= scale;
}

// decay[S] = product over the bits k of S of (2 p[k] - 1)
void decay_of(const float* p, i64 factors, float* decay) {
    decay[0] = 1;
    for (i64 k = 0; k < factors; k++)
        for (i64 low = 0; low < (i64)1 << k; low++) decay[low | (i64)1 << k] = decay[low] * (2 * p[k] - 1);
}

// d loss / d p[k], given d loss / d decay
void decay_gradient(const float* p, i64 factors, const float* gdecay, float* gp) {
    for (i64 k = 0; k < factors; k++) {
        gp[k] = 0;
        for (i64 S = 0; S < (i64)1 << factors; S++) {
            if (!(S >> k & 1)) continue;
            float others = 2;
            for (i64 j = 0; j < factors; j++)
                if (j != k && (S >> j & 1)) others *= 2 * p[j] - 1;
            gp[k] += gdecay[S] * others;
        }
    }
}

std::vector<float> pad_rows(const float* phi, const Shape& s) {
    std::vector<float> rows(s.m * s.width, 0.0f);
    for (i64 j = 0; j < s.m; j++) memcpy(&rows[j * s.width], phi + j * s.D, s.D * sizeof(float));
    return rows;
}

// Token t's X' as a float row: decay X + post y, or X where there is no y; also stored to `out` when given.
template <class T>
INLINE void write_streams(const Shape& s, i64 t, const T* X, const T* y, const float* coefficients, T* out,
                          float* row) {
    for (i64 i = 0; i < s.n; i++) {
        const T* x = X + t * s.D + i * s.C;
        float* dst = row + i * s.C;
        if (!y) {
            sweep(s.C, [&](i64 c, auto part) { store(dst + c, load(x + c, part), part); });
            continue;
        }
        const T* f = y + t * s.C;
        float post = coefficients[t * 2 * s.n + i], decay = coefficients[t * 2 * s.n + s.n + i];
        auto mixed = [&](i64 c, auto part) { return load(x + c, part) * decay + load(f + c, part) * post; };
        if (!out) {
            sweep(s.C, [&](i64 c, auto part) { store(dst + c, mixed(c, part), part); });
            continue;
        }
        T* to = out + t * s.D + i * s.C;
        sweep(s.C, [&](i64 c, auto part) {
            vec v = mixed(c, part);
            store(dst + c, v, part);
            store(to + c, v, part);
        });
    }
}

// dots[t][j] = <row t, phi row j> for TILE rows and M phi rows from j on
template <int M>
INLINE void project_tile(i64 width, const float* rows, const float* phi, i64 m, i64 j, float* dots) {
    vec acc[TILE][M] = {};
    for (i64 d = 0; d < width; d += WIDTH) {
        vec x[TILE];
        UNROLL
        for (int t = 0; t < TILE; t++) x[t] = load(rows + t * width + d);
        UNROLL
        for (int q = 0; q < M; q++) {
            vec p = load(phi + (j + q) * width + d);
            UNROLL
            for (int t = 0; t < TILE; t++) acc[t][q] += x[t] * p;
        }
    }
    UNROLL
    for (int t = 0; t < TILE; t++)
        UNROLL
        for (int q = 0; q < M; q++) dots[t * m + j + q] = sum(acc[t][q]);
}

void project(const Shape& s, const float* rows, const float* phi, float* dots) {
    i64 j = 0;
    for (; j + ROWS <= s.m; j += ROWS) project_tile<ROWS>(s.width, rows, phi, s.m, j, dots);
    switch (s.m - j) {
        case 4: project_tile<4>(s.width, rows, phi, s.m, j, dots); break;
        case 3: project_tile<3>(s.width, rows, phi, s.m, j, dots); break;
        case 2: project_tile<2>(s.width, rows, phi, s.m, j, dots); break;
        case 1: project_tile<1>(s.width, rows, phi, s.m, j, dots); break;
    }
}

template <class T>
void forward(const Shape& s, i64 threads, const T* X, const T* y, const float* coefficients, const float* phi_rows,
             const float* bias, float eps, T* out, T* u, float* next, float* z, float* r) {
    std::vector<float> phi = pad_rows(phi_rows, s);
    parallel(s.tokens, chunks_for(s.tokens), threads, [&](i64, i64 first, i64 last) {
        std::vector<float> rows(FORWARD_BLOCK * s.width, 0.0f), dots(FORWARD_BLOCK * s.m), gate(s.m);
        for (i64 start = first; start < last; start += FORWARD_BLOCK) {
            i64 count = std::min(FORWARD_BLOCK, last - start);
            for (i64 k = 0; k < count; k++) {
                i64 t = start + k;
                write_streams(s, t, X, y, coefficients, out, &rows[k * s.width]);
            }
            for (i64 k = 0; k < count; k += TILE) project(s, &rows[k * s.width], phi.data(), &dots[k * s.m]);
            for (i64 k = 0; k < count; k++) {
                i64 t = start + k;
                const float* row = &rows[k * s.width];
                vec squares = {};
                for (i64 d = 0; d < s.width; d += WIDTH) squares += load(row + d) * load(row + d);
                r[t] = 1.0f / std::sqrt(sum(squares) / s.D + eps);
                for (i64 j = 0; j < s.m; j++) {
                    z[t * s.m + j] = dots[k * s.m + j] * r[t];
                    gate[j] = sigmoid(z[t * s.m + j] + bias[j]);
                }
                float* pre = gate.data();
                float* post = next + t * 2 * s.n;
                walsh(pre, s.n);
                for (i64 i = 0; i < s.n; i++) post[i] = 2 * gate[s.n + i];
                walsh(post, s.n);
                decay_of(&gate[2 * s.n], s.factors, post + s.n);
                sweep(s.C, [&](i64 c, auto part) {
                    vec total = {};
                    for (i64 i = 0; i < s.n; i++) total += load(row + i * s.C + c, part) * pre[i];
                    store(u + t * s.C + c, total, part);
                });
            }
        }
    });
}

// projection[j] += sum over the block's tokens of weight[t][j] * row t
template <int M>
INLINE void outer_tile(i64 width, i64 count, const float* rows, const float* weights, i64 m, i64 j,
                       float* projection) {
    constexpr int STEP = 2;
    i64 d = 0;
    for (; d + STEP * WIDTH <= width; d += STEP * WIDTH) {
        vec acc[M][STEP];
        UNROLL
        for (int q = 0; q < M; q++)
            UNROLL
            for (int v = 0; v < STEP; v++) acc[q][v] = load(projection + (j + q) * width + d + v * WIDTH);
        for (i64 t = 0; t < count; t++) {
            vec x[STEP];
            UNROLL
            for (int v = 0; v < STEP; v++) x[v] = load(rows + t * width + d + v * WIDTH);
            UNROLL
            for (int q = 0; q < M; q++)
                UNROLL
                for (int v = 0; v < STEP; v++) acc[q][v] += x[v] * weights[t * m + j + q];
        }
        UNROLL
        for (int q = 0; q < M; q++)
            UNROLL
            for (int v = 0; v < STEP; v++) store(projection + (j + q) * width + d + v * WIDTH, acc[q][v]);
    }
    for (; d < width; d += WIDTH)
        UNROLL
        for (int q = 0; q < M; q++) {
            vec acc = load(projection + (j + q) * width + d);
            for (i64 t = 0; t < count; t++) acc += load(rows + t * width + d) * weights[t * m + j + q];
            store(projection + (j + q) * width + d, acc);
        }
}

void add_outer(const Shape& s, i64 count, const float* rows, const float* weights, float* projection) {
    i64 j = 0;
    for (; j + ROWS <= s.m; j += ROWS) outer_tile<ROWS>(s.width, count, rows, weights, s.m, j, projection);
    for (; j < s.m; j++) outer_tile<1>(s.width, count, rows, weights, s.m, j, projection);
}

// back[t] = sum_j weight[t][j] phi[j] + shrink[t] row[t], for TILE tokens
void project_back(const Shape& s, const float* rows, const float* weights, const float* shrink, const float* phi,
                  float* back) {
    constexpr int STEP = 4;
    i64 d = 0;
    auto span = [&](auto step) {
        constexpr int N = decltype(step)::value;
        vec acc[TILE][N];
        UNROLL
        for (int t = 0; t < TILE; t++)
            UNROLL
            for (int v = 0; v < N; v++) acc[t][v] = load(rows + t * s.width + d + v * WIDTH) * shrink[t];
        for (i64 j = 0; j < s.m; j++) {
            vec p[N];
            UNROLL
            for (int v = 0; v < N; v++) p[v] = load(phi + j * s.width + d + v * WIDTH);
            UNROLL
            for (int t = 0; t < TILE; t++)
                UNROLL
                for (int v = 0; v < N; v++) acc[t][v] += p[v] * weights[t * s.m + j];
        }
        UNROLL
        for (int t = 0; t < TILE; t++)
            UNROLL
            for (int v = 0; v < N; v++) store(back + t * s.width + d + v * WIDTH, acc[t][v]);
    };
    for (; d + STEP * WIDTH <= s.width; d += STEP * WIDTH) span(std::integral_constant<int, STEP>{});
    for (; d < s.width; d += WIDTH) span(std::integral_constant<int, 1>{});
}

// Token t's last step: G = gX + pre gu + back is the gradient of X'; those of X, y and the coefficients follow from
// it. Without y, X' is X and gX reaches it on its own way.
template <class T>
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
            store(dX + at + c, G * decay, part);
            if (i + 1 < s.n)
                store(dy_row + c, total);
            else
                store(dy + t * s.C + c, total, part);
        });
        dcoefficients[own] = sum(on_post);
        dcoefficients[own + s.n] = sum(on_decay);
    }
}

template <class T>
void backward(const Shape& s, i64 threads, const T* gX, const T* gu, const float* gnext, const T* X, const T* y,
              const float* coefficients, const float* phi_rows, const float* bias, const float* z, const float* r,
              T* dX, T* dy, float* dcoefficients, float* dphi, float* dbias) {
    std::vector<float> phi = pad_rows(phi_rows, s);
    i64 chunks = chunks_for(s.tokens), partial = s.m * (s.width + 1);
    std::vector<float> sums(chunks * partial, 0.0f);  // per chunk: the gradients of phi (padded) and bias
    parallel(s.tokens, chunks, threads, [&](i64 chunk, i64 first, i64 last) {
        float *dphi_sum = &sums[chunk * partial], *dbias_sum = dphi_sum + s.m * s.width;
        std::vector<float> rows(BACKWARD_BLOCK * s.width, 0.0f), back(TILE * s.width), dy_row(padded(s.C));
        std::vector<float> pre(BACKWARD_BLOCK * s.n), weights(BACKWARD_BLOCK * s.m), shrink(BACKWARD_BLOCK);
        std::vector<float> gate(s.m), dgate(s.m);
        for (i64 start = first; start < last; start += BACKWARD_BLOCK) {
            i64 count = std::min(BACKWARD_BLOCK, last - start);
            for (i64 k = 0; k < count; k++) {
                i64 t = start + k;
                float* row = &rows[k * s.width];
                write_streams<T>(s, t, X, y, coefficients, nullptr, row);
                for (i64 i = 0; i < s.n; i++) {
                    vec acc = {};
                    sweep(s.C, [&](i64 c, auto part) { acc += load(gu + t * s.C + c, part) * load(row + i * s.C + c, part); });
                    dgate[i] = sum(acc);
                    dgate[s.n + i] = 2 * gnext[t * 2 * s.n + i];
                }
                walsh(&dgate[0], s.n);
                walsh(&dgate[s.n], s.n);
                for (i64 j = 0; j < s.m; j++) gate[j] = sigmoid(z[t * s.m + j] + bias[j]);
                decay_gradient(&gate[2 * s.n], s.factors, gnext + t * 2 * s.n + s.n, &dgate[2 * s.n]);
                float along = 0;
                for (i64 j = 0; j < s.m; j++) {
                    float dz = dgate[j] * gate[j] * (1 - gate[j]);
                    along += dz * z[t * s.m + j];
                    dbias_sum[j] += dz;
                    weights[k * s.m + j] = r[t] * dz;
                }
                shrink[k] = -along * r[t] * r[t] / s.D;
                memcpy(&pre[k * s.n], gate.data(), s.n * sizeof(float));
                walsh(&pre[k * s.n], s.n);
            }
            add_outer(s, count, rows.data(), weights.data(), dphi_sum);
            for (i64 k = 0; k < count; k += TILE) {
                project_back(s, &rows[k * s.width], &weights[k * s.m], &shrink[k], phi.data(), back.data());
                for (i64 q = k; q < std::min(k + TILE, count); q++)
                    finish(s, start + q, gX, gu, &pre[q * s.n], &back[(q - k) * s.width], X, y, coefficients, dX, dy,
                           dcoefficients, dy_row.data());
            }
        }
    });
    for (i64 j = 0; j < s.m; j++) {
        std::fill(dphi + j * s.D, dphi + (j + 1) * s.D, 0.0f);
        dbias[j] = 0;
    }
    for (i64 chunk = 0; chunk < chunks; chunk++) {
        const float *dphi_sum = &sums[chunk * partial], *dbias_sum = dphi_sum + s.m * s.width;
        for (i64 j = 0; j < s.m; j++) {
            for (i64 d = 0; d < s.D; d++) dphi[j * s.D + d] += dphi_sum[j * s.width + d];
            dbias[j] += dbias_sum[j];
        }
    }
}

}  // namespace

extern "C" {

void stream_boundary_forward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* X, const void* y,
                             const float* coefficients, const float* phi, const float* bias, double eps, void* out,
                             void* u, float* next, float* z, float* r) {
    Shape s(tokens, n, C);
    FOR_DTYPE(dtype, forward<T>(s, threads, (const T*)X, (const T*)y, coefficients, phi, bias, (float)eps, (T*)out,
                                (T*)u, next, z, r))
}

void stream_boundary_backward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* gX, const void* gu,
                              const float* gnext, const void* X, const void* y, const float* coefficients,
                              const float* phi, const float* bias, const float* z, const float* r, void* dX, void* dy,
                              float* dcoefficients, float* dphi, float* dbias) {
    Shape s(tokens, n, C);
    FOR_DTYPE(dtype, backward<T>(s, threads, (const T*)gX, (const T*)gu, gnext, (const T*)X, (const T*)y, coefficients,
                                 phi, bias, z, r, (T*)dX, (T*)dy, dcoefficients, dphi, dbias))
}
}
