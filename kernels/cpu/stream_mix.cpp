// stream_mix: formulas and shapes are in kernels/stream_mix.py.
#include "common.h"

namespace {

template <bool PAST, class T>
void forward(i64 threads, i64 tokens, i64 n, i64 C, const T* X, const T* y, const float* H, const float* post, T* out) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        floats row(n * padded(C));
        i64 width = padded(C);
        for (i64 t = first; t < last; t++) {
            for (i64 j = 0; j < n; j++)
                sweep(C, [&](i64 c, auto part) {
                    store(&row[j * width + c], load_ahead(X + (t * n + j) * C + c, part));
                });
            for (i64 i = 0; i < n; i++) {
                const float* h = H + (t * n + i) * n;
                float p = post[t * n + i];
                sweep(C, [&](i64 c, auto part) {
                    vec total = load_ahead(y + t * C + c, part) * p;
                    for (i64 j = 0; j < n; j++) total += load(&row[j * width + c]) * h[j];
                    store_maybe_past<PAST>(out + (t * n + i) * C + c, total, part);
                });
            }
        }
    });
}

template <bool PAST, class T>
void backward(i64 threads, i64 tokens, i64 n, i64 C, const T* g, const T* X, const T* y, const float* H,
              const float* post, T* dX, T* dy, float* dH, float* dpost) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        i64 width = padded(C);
        floats rows(n * width), grads(n * width), branch(width);
        for (i64 t = first; t < last; t++) {
            for (i64 j = 0; j < n; j++)
                sweep(C, [&](i64 c, auto part) {
                    store(&rows[j * width + c], load_ahead(X + (t * n + j) * C + c, part));
                    store(&grads[j * width + c], load_ahead(g + (t * n + j) * C + c, part));
                });
            sweep(C, [&](i64 c, auto part) {
                store(&branch[c], load_ahead(y + t * C + c, part));
                vec total = {};
                for (i64 i = 0; i < n; i++) total += load(&grads[i * width + c]) * post[t * n + i];
                store(dy + t * C + c, total, part);
            });
            for (i64 j = 0; j < n; j++)
                sweep(C, [&](i64 c, auto part) {
                    vec total = {};
                    for (i64 i = 0; i < n; i++) total += load(&grads[i * width + c]) * H[(t * n + i) * n + j];
                    store_maybe_past<PAST>(dX + (t * n + j) * C + c, total, part);
                });
            for (i64 i = 0; i < n; i++) {
                const float* grad = &grads[i * width];
                vec on_post = {};
                for (i64 c = 0; c < width; c += WIDTH) on_post += load(grad + c) * load(&branch[c]);
                dpost[t * n + i] = sum(on_post);
                for (i64 j = 0; j < n; j++) {
                    vec on_h = {};
                    for (i64 c = 0; c < width; c += WIDTH) on_h += load(grad + c) * load(&rows[j * width + c]);
                    dH[(t * n + i) * n + j] = sum(on_h);
                }
            }
        }
    });
}

}  // namespace

extern "C" {

void stream_mix_forward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* X, const void* y, const float* H,
                        const float* post, void* out) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)out, C, n * tokens) ? forward<true, T> : forward<false, T>;
        run(threads, tokens, n, C, (const T*)X, (const T*)y, H, post, (T*)out);
    })
}

void stream_mix_backward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, const void* g, const void* X, const void* y,
                         const float* H, const float* post, void* dX, void* dy, float* dH, float* dpost) {
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)dX, C, n * tokens) ? backward<true, T> : backward<false, T>;
        run(threads, tokens, n, C, (const T*)g, (const T*)X, (const T*)y, H, post, (T*)dX, (T*)dy, dH, dpost);
    })
}
}
