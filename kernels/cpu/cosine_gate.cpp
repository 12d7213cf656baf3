// cosine_gate: formulas and shapes are in kernels/cosine_gate.py.
#include "common.h"

namespace {

template <class T>
void forward(i64 threads, i64 tokens, i64 C, const T* x, const T* branch, const float* gate, T* out, float* dots) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        for (i64 t = first; t < last; t++) {
            vec xx = {}, xf = {}, ff = {};
            float g = gate[t];
            sweep(C, [&](i64 c, auto part) {
                vec v = load(x + t * C + c, part), f = load(branch + t * C + c, part);
                xx += v * v;
                xf += v * f;
                ff += f * f;
                store(out + t * C + c, f * g, part);
            });
            dots[3 * t] = sum(xx);
            dots[3 * t + 1] = sum(xf);
            dots[3 * t + 2] = sum(ff);
        }
    });
}

template <class T>
void backward(i64 threads, i64 tokens, i64 C, const T* gout, const float* gdots, const T* x, const T* branch,
              const float* gate, T* dx, T* dbranch, float* dgate) {
    parallel(tokens, chunks_for(tokens), threads, [&](i64, i64 first, i64 last) {
        for (i64 t = first; t < last; t++) {
            float xx = 2 * gdots[3 * t], xf = gdots[3 * t + 1], ff = 2 * gdots[3 * t + 2], g = gate[t];
            vec on_gate = {};
            sweep(C, [&](i64 c, auto part) {
                vec v = load(x + t * C + c, part), f = load(branch + t * C + c, part),
                    grad = load(gout + t * C + c, part);
                on_gate += grad * f;
                store(dx + t * C + c, v * xx + f * xf, part);
                store(dbranch + t * C + c, grad * g + v * xf + f * ff, part);
            });
            dgate[t] = sum(on_gate);
        }
    });
}

}  // namespace

extern "C" {

void cosine_gate_forward(i64 dtype, i64 threads, i64 tokens, i64 C, const void* x, const void* branch,
                         const float* gate, void* out, float* dots) {
    FOR_DTYPE(dtype, forward<T>(threads, tokens, C, (const T*)x, (const T*)branch, gate, (T*)out, dots))
}

void cosine_gate_backward(i64 dtype, i64 threads, i64 tokens, i64 C, const void* gout, const float* gdots,
                          const void* x, const void* branch, const float* gate, void* dx, void* dbranch, float* dgate) {
    FOR_DTYPE(dtype, backward<T>(threads, tokens, C, (const T*)gout, gdots, (const T*)x, (const T*)branch, gate,
                                 (T*)dx, (T*)dbranch, dgate))
}
}
