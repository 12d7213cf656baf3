// stream_read: formulas and shapes are in kernels/stream_read.py.
//
// Tokens go in blocks whose rows stay in the L1 or L2 cache as floats, so that X and dX each cross the memory bus once.
#include "projection.h"

namespace {

template <class T>
void forward(const Projection& p, i64 first, i64 last, i64 n, i64 C, const T* X, const float* bias, float eps, T* u,
             float* logits, float* z, float* r) {
    floats rows(FORWARD_BLOCK * p.stride), dots(FORWARD_BLOCK * p.m), pre(n);
    for (i64 start = first; start < last; start += FORWARD_BLOCK) {
        i64 count = std::min(FORWARD_BLOCK, last - start);
        for (i64 k = 0; k < count; k++) {
            const T* x = X + (start + k) * p.D;
            vec squares = {};
            sweep(p.D, [&](i64 d, auto part) {
                vec v = load_ahead(x + d, part);
                store(&rows[k * p.stride + d], v, part);
                squares += v * v;
            });
            r[start + k] = 1.0f / std::sqrt(sum(squares) / p.D + eps);
        }
        project(p, count, rows.data(), dots.data());
        for (i64 k = 0; k < count; k++) {
            i64 t = start + k;
            for (i64 j = 0; j < p.m; j++) {
                z[t * p.m + j] = dots[k * p.m + j] * r[t];
                logits[t * p.m + j] = z[t * p.m + j] + bias[j];
            }
            sweep(n, [&](i64 i, auto part) { store(&pre[i], sigmoid(load(logits + t * p.m + i, part)), part); });
            sweep(C, [&](i64 c, auto part) {
                vec total = {};
                for (i64 i = 0; i < n; i++) total += load(&rows[k * p.stride + i * C + c], part) * pre[i];
                store(u + t * C + c, total, part);
            });
        }
    }
}

// Gradients of phi, packed, and bias are added to the sums.
template <bool PAST, class T>
void backward(const Projection& p, i64 first, i64 last, i64 n, i64 C, const T* gu, const float* glogits, const T* X,
              const float* logits, const float* z, const float* r, T* dX, float* dphi_sum, float* dbias_sum) {
    floats rows(BACKWARD_BLOCK * p.stride), pre(BACKWARD_BLOCK * n);
    floats weights(BACKWARD_BLOCK * p.m), shrink(BACKWARD_BLOCK);
    for (i64 start = first; start < last; start += BACKWARD_BLOCK) {
        i64 count = std::min(BACKWARD_BLOCK, last - start);
        for (i64 k = 0; k < count; k++) {
            i64 t = start + k;
            float *row = &rows[k * p.stride], *weight = &weights[k * p.m], *gate = &pre[k * n];
            sweep(n, [&](i64 i, auto part) { store(gate + i, sigmoid(load(logits + t * p.m + i, part)), part); });
            std::copy_n(glogits + t * p.m, p.m, weight);
            for (i64 i = 0; i < n; i++) {
                vec along_u = {};
                sweep(C, [&](i64 c, auto part) {
                    vec v = load_ahead(X + t * p.D + i * C + c, part);
                    store(row + i * C + c, v, part);
                    along_u += v * load(gu + t * C + c, part);
                });
                weight[i] += sum(along_u) * gate[i] * (1 - gate[i]);
            }
            float along = 0;
            for (i64 j = 0; j < p.m; j++) {
                along += weight[j] * z[t * p.m + j];
                dbias_sum[j] += weight[j];
                weight[j] *= r[t];
            }
            shrink[k] = -along * r[t] * r[t] / p.D;
        }
        through_projection(p, count, rows.data(), weights.data(), shrink.data(), dphi_sum);
        for (i64 k = 0; k < count; k++)
            for (i64 i = 0; i < n; i++) {
                const T* g = gu + (start + k) * C;
                const float* back = &rows[k * p.stride + i * C];
                float gate = pre[k * n + i];
                T* to = dX + (start + k) * p.D + i * C;
                sweep(C, [&](i64 c, auto part) {
                    store_maybe_past<PAST>(to + c, load(g + c, part) * gate + load(back + c, part), part);
                });
            }
    }
}

}  // namespace

extern "C" {

void stream_read_forward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, i64 m, const void* X, const float* phi,
                         const float* bias, double eps, void* u, float* logits, float* z, float* r) {
    Projection p(m, n * C, phi);
    FOR_DTYPE(dtype, {
        parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
            forward(p, first, last, n, C, (const T*)X, bias, (float)eps, (T*)u, logits, z, r);
        });
    })
}

void stream_read_backward(i64 dtype, i64 threads, i64 tokens, i64 n, i64 C, i64 m, const void* gu,
                          const float* glogits, const void* X, const float* phi, const float* logits, const float* z,
                          const float* r, void* dX, float* dphi, float* dbias) {
    Projection p(m, n * C, phi);
    i64 chunks = chunks_for(tokens), size = p.packed.size();
    floats dphi_sums(chunks * size), dbias_sums(chunks * m);
    FOR_DTYPE(dtype, {
        auto run = streams_past_cache((T*)dX, C, n * tokens) ? backward<true, T> : backward<false, T>;
        parallel(tokens, chunks, threads, [&](i64 chunk, i64 first, i64 last) {
            run(p, first, last, n, C, (const T*)gu, glogits, (const T*)X, logits, z, r, (T*)dX,
                &dphi_sums[chunk * size], &dbias_sums[chunk * m]);
        });
    })
    p.add_chunks(chunks, dphi_sums, dbias_sums, dphi, dbias);
}
}
