// stream_chain: formula and shapes are in kernels/stream_chain.py.
#include "common.h"

namespace {

template <bool PAST, class T>
void forward(i64 threads, i64 tokens, i64 n, i64 C, i64 layers, const T* X, const T* const* ys,
             const float* const* coefficients, T* const* outs) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        floats post(layers), decay(layers);
        for (i64 t = first; t < last; t++)
            for (i64 i = 0; i < n; i++) {
                i64 own = t * 2 * n + i, at = (t * n + i) * C;
                for (i64 l = 0; l < layers; l++) {
                    post[l] = coefficients[l][own];
                    decay[l] = coefficients[l][own + n];
                }
                sweep(C, [&](i64 c, auto part) {
                    vec x = load_ahead(X + at + c, part);
                    for (i64 l = 0; l < layers; l++) {
                        x = written(x, load_ahead(ys[l] + t * C + c, part), decay[l], post[l]);
                        store_maybe_past<PAST>(outs[l] + at + c, x, part);
                        x = rounded(x, (T*)nullptr);
                    }
                });
            }
    });
}

}  // namespace

extern "C" {

void stream_chain_forward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, i64 layers, const void* X,
                          const void* const* ys, const float* const* coefficients, void* const* outs) {
    FOR_DTYPE(dtype, {
        bool past = true;
        for (i64 l = 0; l < layers; l++) past = past && streams_past_cache((T*)outs[l], C, n * tokens);
        auto run = past ? forward<true, T> : forward<false, T>;
        run(threads, tokens, n, C, layers, (const T*)X, (const T* const*)ys, coefficients, (T* const*)outs);
    })
}
}
