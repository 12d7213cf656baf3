// swiglu: formulas and shapes are in kernels/swiglu.py.
#include "common.h"

namespace {

template <bool PAST, class T>
void forward(i64 threads, i64 tokens, i64 H, const T* x, T* out) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        for (i64 t = first; t < last; t++) {
            const T *gate = x + t * 2 * H, *up = gate + H;
            sweep(H, [&](i64 i, auto part) {
                vec a = load_ahead(gate + i, part);
                store_maybe_past<PAST>(out + t * H + i, a * sigmoid(a) * load_ahead(up + i, part), part);
            });
        }
    });
}

template <bool PAST, class T>
void backward(i64 threads, i64 tokens, i64 H, const T* g, const T* x, T* dx) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        for (i64 t = first; t < last; t++) {
            const T *gate = x + t * 2 * H, *up = gate + H;
            T *dgate = dx + t * 2 * H, *dup = dgate + H;
            sweep(H, [&](i64 i, auto part) {
                vec a = load_ahead(gate + i, part), s = sigmoid(a), grad = load_ahead(g + t * H + i, part), silu = a * s;
                store_maybe_past<PAST>(dup + i, grad * silu, part);
                store_maybe_past<PAST>(dgate + i, grad * load_ahead(up + i, part) * (s + silu * (1.0f - s)), part);
            });
        }
    });
}

}  // namespace

extern "C" {

void swiglu_forward(i64 dtype, i64 threads, i64 tokens, i64 H, const void* x, void* out) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)out, H, tokens) ? forward<true, T> : forward<false, T>;
        run(threads, tokens, H, (const T*)x, (T*)out);
    })
}

void swiglu_backward(i64 dtype, i64 threads, i64 tokens, i64 H, const void* g, const void* x, void* dx) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)dx, H, 2 * tokens) ? backward<true, T> : backward<false, T>;
        run(threads, tokens, H, (const T*)g, (const T*)x, (T*)dx);
    })
}
}
