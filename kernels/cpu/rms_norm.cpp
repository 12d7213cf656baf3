// rms_norm: formulas and shapes are in kernels/rms_norm.py.
#include "common.h"

namespace {

template <class T>
INLINE float inverse_rms(i64 C, const T* x, float eps) {
    vec squares = {};
    sweep(C, [&](i64 c, auto part) {
        vec v = load_ahead(x + c, part);
        squares += v * v;
    });
    return 1.0f / std::sqrt(sum(squares) / C + eps);
}

template <bool PAST, class T>
void forward(i64 threads, i64 tokens, i64 C, const T* x, const float* weight, float eps, T* out) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        for (i64 t = first; t < last; t++) {
            const T* row = x + t * C;
            float r = inverse_rms(C, row, eps);
            sweep(C, [&](i64 c, auto part) {
                store_maybe_past<PAST>(out + t * C + c, load(row + c, part) * r * load(weight + c, part), part);
            });
        }
    });
}

template <bool PAST, class T>
void backward(i64 threads, i64 tokens, i64 C, const T* g, const T* x, const float* weight, float eps, T* dx,
              float* dweight) {
    i64 chunks = chunks_for(tokens), width = padded(C);
    floats sums(chunks * width);
    parallel(tokens, chunks, threads, [&](i64 chunk, i64 first, i64 last) {
        float* own = &sums[chunk * width];
        constexpr i64 ROWS = 4;  // rows that share one read and write of the weight's sums
        for (i64 start = first; start < last; start += ROWS) {
            i64 rows = std::min(ROWS, last - start);
            float r[ROWS] = {}, shrink[ROWS] = {};
            for (i64 k = 0; k < rows; k++) {
                const T *row = x + (start + k) * C, *grad = g + (start + k) * C;
                vec squares = {}, along = {};
                sweep(C, [&](i64 c, auto part) {
                    vec v = load_ahead(row + c, part);
                    squares += v * v;
                    along += v * load_ahead(grad + c, part) * load(weight + c, part);
                });
                r[k] = 1.0f / std::sqrt(sum(squares) / C + eps);
                shrink[k] = -sum(along) * r[k] * r[k] * r[k] / C;
            }
            sweep(C, [&](i64 c, auto part) {
                vec w = load(weight + c, part), total = load(own + c);
                for (i64 k = 0; k < rows; k++) {
                    i64 at = (start + k) * C + c;
                    vec v = load(x + at, part), gr = load(g + at, part) * r[k];
                    store_maybe_past<PAST>(dx + at, gr * w + v * shrink[k], part);
                    total += gr * v;
                }
                store(own + c, total);
            });
        }
    });
    std::fill(dweight, dweight + C, 0.0f);
    for (i64 chunk = 0; chunk < chunks; chunk++)
        for (i64 c = 0; c < C; c++) dweight[c] += sums[chunk * width + c];
}

}  // namespace

extern "C" {

void rms_norm_forward(i64 dtype, i64 threads, i64 tokens, i64 C, const void* x, const float* weight, double eps,
                      void* out) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)out, C, tokens) ? forward<true, T> : forward<false, T>;
        run(threads, tokens, C, (const T*)x, weight, (float)eps, (T*)out);
    })
}

void rms_norm_backward(i64 dtype, i64 threads, i64 tokens, i64 C, const void* g, const void* x, const float* weight,
                       double eps, void* dx, float* dweight) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)dx, C, tokens) ? backward<true, T> : backward<false, T>;
        run(threads, tokens, C, (const T*)g, (const T*)x, weight, (float)eps, (T*)dx, dweight);
    })
}
}
