// stream_chain: formula and shapes are in kernels/stream_chain.py.
#include "common.h"

namespace {

// One layer of one row at a time, the row in the L1 cache: vector by vector for all layers, stores to many places in turn
// would leave the write buffers half full.
template <bool PAST, class T>
void forward(i64 first, i64 last, i64 n, i64 C, i64 layers, const T* X, const T* const* ys,
             const float* const* coefficients, T* const* outs) {
    floats buffer(padded(C));
    float* row = buffer.data();
    for (i64 t = first; t < last; t++)
        for (i64 i = 0; i < n; i++) {
            i64 own = t * 2 * n + i, at = (t * n + i) * C;
            sweep(C, [&](i64 c, auto part) { store(row + c, load_ahead(X + at + c, part)); });
            for (i64 l = 0; l < layers; l++) {
                const T* y = ys[l] + t * C;
                T* out = outs[l] + at;
                float post = coefficients[l][own], decay = coefficients[l][own + n];
                sweep(C, [=](i64 c, auto part) {
                    vec x = written(load(row + c), load_ahead(y + c, part), decay, post);
                    store_maybe_past<PAST>(out + c, x, part);
                    store(row + c, rounded(x, (T*)nullptr));
                });
            }
        }
}

}  // namespace

extern "C" {

void stream_chain_forward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, i64 layers, const void* X,
                          const void* const* ys, const float* const* coefficients, void* const* outs) {
    FOR_DTYPE(dtype, {
        bool past = true;
        for (i64 l = 0; l < layers; l++) past = past && streams_past_cache((T*)outs[l], C, n * tokens);
        auto run = past ? forward<true, T> : forward<false, T>;
        parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
            run(first, last, n, C, layers, (const T*)X, (const T* const*)ys, coefficients, (T* const*)outs);
        });
    })
}
}
