// stream_boundary: formulas, shapes and sources are in kernels/stream_boundary.py.
//
// Tokens go in blocks small enough for the L2 cache, so that X, y, gX, gu, X', dX and dy each cross the memory bus
// once. Inside a block everything is float; the streams are a run-time loop, because in the Walsh basis they never mix.
#include "projection.h"

namespace {

struct Shape {
    i64 tokens, n, C, factors, m, D;  // m = 2 n + factors logits, D = n C
    float scale;                      // of the orthonormal Walsh transform

    Shape(i64 tokens, i64 n, i64 C) : tokens(tokens), n(n), C(C), factors(0) {
        while ((i64)1 << factors < n) factors++;
        m = 2 * n + factors;
        D = n * C;
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

// gate = sigmoid(z + bias) for `count` tokens
INLINE void gates(const Shape& s, i64 count, const float* z, const float* bias, float* gate) {
    for (i64 k = 0; k < count; k++)
        for (i64 j = 0; j < s.m; j++) gate[k * s.m + j] = z[k * s.m + j] + bias[j];
    sweep(count * s.m, [&](i64 i, auto part) { store(gate + i, sigmoid(load(gate + i, part)), part); });
}

// Tokens [first, last). A function of its own with arguments by value: inside the closure of a parallel region every
// store would make the compiler read them again.
template <bool PAST, class T>
void forward(const Shape s, const Projection& p, i64 first, i64 last, const T* X, const T* y, const float* coefficients,
             const float* bias, float eps, T* out, T* u, float* next, float* z, float* r) {
    floats rows(FORWARD_BLOCK * p.stride), gate(FORWARD_BLOCK * s.m);
    for (i64 start = first; start < last; start += FORWARD_BLOCK) {
        i64 count = std::min(FORWARD_BLOCK, last - start);
        for (i64 k = 0; k < count; k++) {
            i64 t = start + k;
            vec squares = {};
            write_streams(s, t, std::min(t + FORWARD_BLOCK, last - 1), X, y, coefficients, &rows[k * p.stride],
                          [&](i64 i, i64 c, vec v, auto part) {
                              squares += v * v;
                              if (!y) return;
                              store_maybe_past<PAST>(out + t * s.D + i * s.C + c, v, part);
                          });
            r[t] = 1.0f / std::sqrt(sum(squares) / s.D + eps);
        }
        project(p, count, rows.data(), gate.data());
        for (i64 k = 0; k < count; k++)
            for (i64 j = 0; j < s.m; j++) z[(start + k) * s.m + j] = gate[k * s.m + j] * r[start + k];
        gates(s, count, z + start * s.m, bias, gate.data());
        for (i64 k = 0; k < count; k++) {
            i64 t = start + k;
            const float* row = &rows[k * p.stride];
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

// Tokens [first, last); gradients of phi and bias are added to the sums, that of phi packed.
template <bool PAST, class T>
void backward(const Shape s, const Projection& p, i64 first, i64 last, const T* gX, const T* gu, const float* gnext,
              const T* X, const T* y, const float* coefficients, const float* bias, const float* z, const float* r,
              T* dX, T* dy, float* dcoefficients, float* dphi_sum, float* dbias_sum) {
    floats rows(BACKWARD_BLOCK * p.stride), dy_row(padded(s.C)), gdecay(s.n), decay(s.n);
    floats pre(BACKWARD_BLOCK * s.n), weights(BACKWARD_BLOCK * s.m), shrink(BACKWARD_BLOCK);
    floats gate(BACKWARD_BLOCK * s.m), dgate(s.m);
    for (i64 start = first; start < last; start += BACKWARD_BLOCK) {
        i64 count = std::min(BACKWARD_BLOCK, last - start);
        gates(s, count, z + start * s.m, bias, gate.data());
        for (i64 k = 0; k < count; k++) {
            i64 t = start + k;
            float *row = &rows[k * p.stride], *factors = &gate[k * s.m + 2 * s.n];
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
            decay_of(s, factors, decay.data());
            decay_gradient(s, factors, decay.data(), gdecay.data(), &dgate[2 * s.n]);
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
        through_projection(p, count, rows.data(), weights.data(), shrink.data(), dphi_sum);
        for (i64 k = 0; k < count; k++)
            finish<PAST>(s, start + k, gX, gu, &pre[k * s.n], &rows[k * p.stride], X, y, coefficients, dX, dy,
                         dcoefficients, dy_row.data());
    }
}

}  // namespace

extern "C" {

void stream_boundary_forward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* X, const void* y,
                             const float* coefficients, const float* phi, const float* bias, double eps, void* out,
                             void* u, float* next, float* z, float* r) {
    Shape s(tokens, n, C);
    Projection p(s.m, s.D, phi);
    FOR_DTYPE(dtype, {
        auto run = out && streams_past_cache((T*)out, C, n * tokens) ? forward<true, T> : forward<false, T>;
        parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
            run(s, p, first, last, (const T*)X, (const T*)y, coefficients, bias, (float)eps, (T*)out, (T*)u, next, z, r);
        });
    })
}

void stream_boundary_backward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* gX, const void* gu,
                              const float* gnext, const void* X, const void* y, const float* coefficients,
                              const float* phi, const float* bias, const float* z, const float* r, void* dX, void* dy,
                              float* dcoefficients, float* dphi, float* dbias) {
    Shape s(tokens, n, C);
    Projection p(s.m, s.D, phi);
    i64 chunks = chunks_for(tokens), size = p.packed.size();
    floats dphi_sums(chunks * size), dbias_sums(chunks * s.m);
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)dX, C, n * tokens) ? backward<true, T> : backward<false, T>;
        parallel(tokens, chunks, threads, [&](i64 chunk, i64 first, i64 last) {
            run(s, p, first, last, (const T*)gX, (const T*)gu, gnext, (const T*)X, (const T*)y, coefficients, bias, z,
                r, (T*)dX, (T*)dy, dcoefficients, &dphi_sums[chunk * size], &dbias_sums[chunk * s.m]);
        });
    })
    p.add_chunks(chunks, dphi_sums, dbias_sums, dphi, dbias);
}
}
